//! Memory that tensors and our kernels share.

use burn::backend::Cube;
use burn::tensor::{DType, Tensor};

use super::{CubeError, Cubes, Floats};

impl Cubes {
    /// A tensor's memory: what a kernel writes there, the tensor has. The tensor must be kept for as long as anybody else
    /// may reuse its memory.
    ///
    /// # Errors
    ///
    /// [`CubeError`] for a tensor of another device, in a graph, of another type, or whose rows do not follow each other.
    pub(crate) fn of_tensor<const D: usize>(&self, tensor: &Tensor<D>) -> Result<Floats, CubeError> {
        let failed = |reason: &str| CubeError::Device {
            reason: reason.to_owned(),
        };
        let primitive = tensor.clone().try_into_primitive::<Cube>();
        let primitive = primitive.map_err(|_| failed("a tensor is on another device"))?;
        if primitive.dtype != DType::F32 {
            return Err(failed("a tensor is not of f32"));
        }
        let dims = tensor.dims();
        let strides = primitive.meta.strides();
        let mut expected = 1;
        for (size, stride) in dims.iter().zip(strides.iter()).rev() {
            if *size != 1 && *stride != expected {
                return Err(failed("a tensor's rows do not follow each other"));
            }
            expected *= size;
        }
        if strides.len() != D {
            return Err(failed("a tensor is laid out in tiles"));
        }
        Ok(Floats::new(primitive.handle.clone(), expected))
    }
}
