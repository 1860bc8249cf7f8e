//! A stage as a graph of tensors, on any device.

use burn::tensor::{Gradients, Tensor, TensorData};

use super::{Leaf, Leaves, Loads, Positions, blocks, embed, logits, losses, mean_loss};
use crate::device::Device;
use crate::train::TrainError;
use crate::train::checks::numbers;
use crate::train::engine::{Input, Model};

/// What a stage keeps besides its parameters.
#[derive(Debug)]
pub(in crate::train) struct Engine {
    device: burn::tensor::Device,
    leaves: Option<Leaves>, // `None` once parameters have changed.
    positions: Option<Positions>,
    /// How often each expert was chosen since the last step, where a correction balances them.
    loads: Loads,
}

/// A micro-batch between its forward and its backward.
#[derive(Debug)]
pub(in crate::train) struct Kept {
    input: Option<Tensor<2>>,
    output: Tensor<2>,
    leaves: Leaves,
}

impl Kept {
    pub(in crate::train) fn elements(&self) -> usize {
        self.output.dims().iter().product()
    }
}

impl Engine {
    pub(in crate::train) fn new(device: &Device) -> Self {
        Self {
            device: device.tensors().clone(),
            leaves: None,
            positions: None,
            loads: Loads::new(),
        }
    }

    pub(in crate::train) fn forward(
        &mut self,
        model: Model<'_>,
        input: &Input<'_>,
    ) -> Result<(Vec<f32>, Kept), TrainError> {
        let kept = self.tracked(model, input)?;
        Ok((numbers(kept.output.clone().inner())?, kept))
    }

    pub(in crate::train) fn train(
        &mut self,
        model: Model<'_>,
        input: &Input<'_>,
        targets: &[u32],
        sums: &mut [Vec<f32>],
    ) -> Result<(f32, Vec<f32>), TrainError> {
        let Kept {
            input: leaf,
            output,
            leaves,
        } = self.tracked(model, input)?;
        let logits = logits(model.config, &leaves, output).ok_or(TrainError::Kind { takes: "a head" })?;
        let loss = mean_loss(logits, targets, &self.device.clone().autodiff());
        let value = numbers(loss.clone().inner())?.first().copied().unwrap_or(f32::NAN);
        Ok((value, collect(&leaves, leaf, loss.backward(), sums)?))
    }

    pub(in crate::train) fn backward(
        &mut self,
        kept: Kept,
        gradient: &[f32],
        sums: &mut [Vec<f32>],
    ) -> Result<Vec<f32>, TrainError> {
        let data = TensorData::new(gradient.to_vec(), kept.output.dims());
        let constant = Tensor::<2>::from_data(data, &self.device).autodiff();
        // The gradient of this sum is the product of the output's derivative and the given gradient.
        let gradients = (kept.output * constant).sum().backward();
        collect(&kept.leaves, kept.input, gradients, sums)
    }

    pub(in crate::train) fn losses(
        &mut self,
        model: Model<'_>,
        input: &Input<'_>,
        targets: &[u32],
    ) -> Result<Vec<f32>, TrainError> {
        let device = self.device.clone();
        // Untracked, and gone with the text: scoring is rare, and memory is dear.
        let leaves = Leaves::new(model.layout, model.range, model.parameters, &device);
        let positions = Positions::new(model.config, input.seq, &device);
        let tokens = input.tokens.unwrap_or_default();
        let x = embed(model.config, &leaves, tokens, &device).ok_or(TrainError::Kind { takes: "activations" })?;
        let x = blocks(model.config, model.range, &leaves, &positions, x, &mut Loads::new())?;
        let logits = logits(model.config, &leaves, x).ok_or(TrainError::Kind { takes: "a head" })?;
        numbers(losses(logits, targets, &device))
    }

    pub(in crate::train) fn changed(&mut self) {
        self.leaves = None;
    }

    pub(in crate::train) fn take_loads(&mut self) -> Loads {
        core::mem::take(&mut self.loads)
    }

    /// Runs the blocks with a graph.
    fn tracked(&mut self, model: Model<'_>, input: &Input<'_>) -> Result<Kept, TrainError> {
        let tracked = self.device.clone().autodiff();
        let leaves = match self.leaves.take() {
            Some(leaves) => leaves,
            None => Leaves::new(model.layout, model.range, model.parameters, &tracked),
        };
        self.leaves = Some(leaves.clone());
        let (x, leaf) = match input.tokens {
            Some(tokens) => {
                let x = embed(model.config, &leaves, tokens, &tracked);
                (x.ok_or(TrainError::Kind { takes: "activations" })?, None)
            }
            None => {
                let data = TensorData::new(input.hidden.to_vec(), [input.rows, model.config.hidden]);
                let leaf = Tensor::<2>::from_data(data, &tracked).require_grad();
                (leaf.clone(), Some(leaf))
            }
        };
        let positions = match self.positions.take().filter(|positions| positions.seq() == input.seq) {
            Some(positions) => self.positions.insert(positions).clone(),
            None => self
                .positions
                .insert(Positions::new(model.config, input.seq, &tracked))
                .clone(),
        };
        let output = blocks(model.config, model.range, &leaves, &positions, x, &mut self.loads)?;
        Ok(Kept {
            input: leaf,
            output,
            leaves,
        })
    }
}

/// Adds a backward's gradients to the sums, and returns the input's.
fn collect(
    leaves: &Leaves,
    input: Option<Tensor<2>>,
    mut gradients: Gradients,
    sums: &mut [Vec<f32>],
) -> Result<Vec<f32>, TrainError> {
    for (sums, part) in sums.iter_mut().zip(leaves.parts()) {
        let mut rest = &mut sums[..];
        for leaf in part {
            let (elements, gradient) = match leaf {
                Leaf::Vector(leaf) => (leaf.dims()[0], leaf.grad_remove(&mut gradients).map(numbers)),
                Leaf::Matrix(leaf) => {
                    let [rows, cols] = leaf.dims();
                    (rows * cols, leaf.grad_remove(&mut gradients).map(numbers))
                }
            };
            let (own, others) = rest.split_at_mut(elements);
            for (sum, gradient) in own.iter_mut().zip(gradient.transpose()?.unwrap_or_default()) {
                *sum += gradient;
            }
            rest = others;
        }
    }
    match input.and_then(|input| input.grad_remove(&mut gradients)) {
        Some(gradient) => numbers(gradient),
        None => Ok(Vec::new()),
    }
}
