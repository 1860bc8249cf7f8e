//! Memory that tensors and our kernels share.

use burn::backend::Cube;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Shape, Tensor};

use super::{CubeError, Cubes, Floats};

/// What a tensor is to its backend.
pub(crate) type Primitive = FloatTensor<Cube>;

impl Cubes {
    /// A tensor's memory: what a kernel writes there, the tensor has. Nothing else may write there for as long as the tensor
    /// or this is kept.
    ///
    /// # Errors
    ///
    /// [`CubeError`] for a tensor of another device, in a graph, of another type, or whose rows do not follow each other.
    pub(crate) fn of_tensor<const D: usize>(&self, tensor: &Tensor<D>) -> Result<Floats, CubeError> {
        match tensor.clone().try_into_primitive::<Cube>() {
            Ok(primitive) => self.of_primitive(&primitive),
            Err(_) => Err(failed("a tensor is on another device")),
        }
    }

    /// As [`Cubes::of_tensor`].
    pub(crate) fn of_primitive(&self, primitive: &Primitive) -> Result<Floats, CubeError> {
        if primitive.dtype != DType::F32 {
            return Err(failed("a tensor is not of f32"));
        }
        let (shape, strides) = (primitive.meta.shape(), primitive.meta.strides());
        let mut expected = 1;
        for (size, stride) in shape.iter().zip(strides.iter()).rev() {
            if *size != 1 && *stride != expected {
                return Err(failed("a tensor's rows do not follow each other"));
            }
            expected *= size;
        }
        Ok(Floats::new(primitive.handle.clone(), expected))
    }

    /// Memory as a tensor of one dimension, beside another one on the same device.
    pub(crate) fn to_primitive(&self, values: &Floats, beside: &Primitive) -> Primitive {
        Primitive::new_contiguous(
            beside.client.clone(),
            beside.device.clone(),
            Shape::from([values.len()]),
            values.handle().clone(),
            DType::F32,
        )
    }
}

fn failed(reason: &str) -> CubeError {
    CubeError::Device {
        reason: reason.to_owned(),
    }
}
