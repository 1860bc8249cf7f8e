//! The parameters of a stage as tensors.

use burn::tensor::{Device, Tensor, TensorData};
use polder_protocol::layout::{BlockRange, Layout};

use crate::model::describe::Slot;
use crate::train::TrainError;
use crate::train::checks::{all_numbers, numbers};

/// The parameters of a stage, per part, in layout order.
#[derive(Debug, Clone)]
pub(in crate::train) struct Leaves(pub(super) Vec<Vec<Leaf>>);

/// A parameter: a scalar is a vector of one, and more dimensions than two are folded into the first.
#[derive(Debug, Clone)]
pub(in crate::train) enum Leaf {
    Vector(Tensor<1>),
    Matrix(Tensor<2>),
}

impl Leaves {
    /// Uploads parameters; a device with gradients tracks them.
    pub(in crate::train) fn new(layout: &Layout, range: BlockRange, parameters: &[Vec<f32>], device: &Device) -> Self {
        let first = range.parts(layout.blocks()).start as usize;
        let tracked = device.is_autodiff();
        let parts = parameters.iter().zip(&layout.parts[first..]).map(|(values, part)| {
            let mut rest = &values[..];
            let leaves = part.tensors.iter().map(|tensor| {
                let shape: Vec<usize> = tensor.shape.iter().map(|dim| *dim as usize).collect();
                let (own, others) = rest.split_at(shape.iter().product());
                rest = others;
                match shape.split_last() {
                    Some((cols, outer)) if !outer.is_empty() => {
                        let data = TensorData::new(own.to_vec(), [outer.iter().product(), *cols]);
                        Leaf::Matrix(Tensor::from_data(data, device).set_require_grad(tracked))
                    }
                    _ => {
                        let data = TensorData::new(own.to_vec(), [own.len()]);
                        Leaf::Vector(Tensor::from_data(data, device).set_require_grad(tracked))
                    }
                }
            });
            leaves.collect()
        });
        Self(parts.collect())
    }

    /// The same memory, without gradients.
    pub(in crate::train) fn untracked(&self) -> Self {
        let parts = self.0.iter().map(|part| part.iter().map(Leaf::untracked).collect());
        Self(parts.collect())
    }

    /// Brings all to the host, into memory as long as the parts.
    pub(in crate::train) fn bring(&self, parameters: &mut [Vec<f32>]) -> Result<(), TrainError> {
        for (leaves, parameters) in self.0.iter().zip(parameters) {
            let mut rest = &mut parameters[..];
            for values in all_numbers(leaves.iter().map(Leaf::flat))? {
                let (own, others) = rest.split_at_mut(values.len());
                own.copy_from_slice(&values);
                rest = others;
            }
        }
        Ok(())
    }

    /// Changes a vector by way of the host.
    pub(super) fn change_vector(
        &mut self,
        part: usize,
        slot: Slot,
        device: &Device,
        change: impl FnOnce(&mut [f32]),
    ) -> Result<(), TrainError> {
        if let Some(Leaf::Vector(vector)) = self.0.get_mut(part).and_then(|part| part.get_mut(slot.0)) {
            let mut values = numbers(vector.clone().inner())?;
            change(&mut values);
            let count = values.len();
            let data = TensorData::new(values, [count]);
            *vector = Tensor::from_data(data, &device.clone().autodiff()).require_grad();
        }
        Ok(())
    }

    /// Parts, each with its parameters.
    pub(in crate::train) fn parts(&self) -> &[Vec<Leaf>] {
        &self.0
    }
}

impl Leaf {
    pub(super) fn elements(&self) -> usize {
        match self {
            Self::Vector(vector) => vector.dims()[0],
            Self::Matrix(matrix) => matrix.dims().iter().product(),
        }
    }

    /// All in a row, in the same memory, without gradients.
    pub(super) fn flat(&self) -> Tensor<1> {
        match self {
            Self::Vector(vector) => vector.clone().inner(),
            Self::Matrix(matrix) => matrix.clone().inner().reshape([self.elements()]),
        }
    }

    fn untracked(&self) -> Self {
        match self {
            Self::Vector(vector) => Self::Vector(vector.clone().inner()),
            Self::Matrix(matrix) => Self::Matrix(matrix.clone().inner()),
        }
    }
}

/// One part's parameters. A description names only what is in its layout, and layouts and leaves are made together.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part<'a>(pub(super) &'a [Leaf]);

impl Part<'_> {
    pub(super) fn vector(self, slot: Slot) -> Tensor<1> {
        match self.0.get(slot.0) {
            Some(Leaf::Vector(vector)) => vector.clone(),
            other => unreachable!("{slot:?} is no vector but {other:?}"),
        }
    }

    pub(super) fn matrix(self, slot: Slot) -> Tensor<2> {
        match self.0.get(slot.0) {
            Some(Leaf::Matrix(matrix)) => matrix.clone(),
            other => unreachable!("{slot:?} is no matrix but {other:?}"),
        }
    }
}
