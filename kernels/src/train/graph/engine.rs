//! A stage as graphs of tensors, one for each block, on any device.
//!
//! Parameters, the sums of gradients and, where the optimiser steps on the device, its moments stay there. Blocks that do
//! not keep their graph keep their input, and make the graph when its turn comes: since each block has a graph of its own
//! either way, and no operation that rounds otherwise without one, there is not a bit of difference.

use burn::tensor::{Gradients, Tensor, TensorData};

use super::stepper::Stepper;
use super::sums::Sums;
use super::{Attending, Leaves, Loads, Positions, blocks_of, embed, logits, losses, mean_loss, run_block};
use crate::device::Device;
use crate::model::describe::Slot;
use crate::train::TrainError;
use crate::train::adamw::AdamW;
use crate::train::checks::numbers;
use crate::train::engine::{GradientSums, Input, Model};

/// What a stage keeps besides its parameters.
#[derive(Debug)]
pub(in crate::train) struct Engine {
    device: burn::tensor::Device,
    held: Option<Held>, // `None` once parameters have changed on the host.
    positions: Option<Positions>,
    sums: Sums,
    /// The optimiser, where it steps on the device.
    stepper: Option<Stepper>,
    /// Our own attention, where the device runs it.
    attending: Option<Attending>,
    /// How often each expert was chosen since the last step, where a correction balances them.
    loads: Loads,
}

/// The parameters on the device: the same memory, with and without gradients.
#[derive(Debug, Clone)]
struct Held {
    tracked: Leaves,
    plain: Leaves,
}

/// A micro-batch between its forward and its backward.
#[derive(Debug)]
pub(in crate::train) struct Kept {
    tokens: Option<Vec<u32>>,
    /// Of each block, in order.
    blocks: Vec<KeptBlock>,
    /// `[rows, hidden]`
    output: Tensor<2>,
    seq: usize,
}

#[derive(Debug)]
struct KeptBlock {
    input: Tensor<2>,
    /// Of its graph, which begins at the input; `None` where it is made again.
    output: Option<Tensor<2>>,
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
            held: None,
            positions: None,
            sums: Sums::default(),
            stepper: None,
            attending: Attending::new(device),
            loads: Loads::new(),
        }
    }

    /// Lets AdamW step on the device, where the device can do that and has room for the moments of `elements`.
    pub(in crate::train) fn step_on_device(&mut self, device: &Device, elements: u64) {
        self.stepper = Stepper::new(device, elements);
    }

    /// Whether AdamW steps on the device.
    pub(in crate::train) fn steps_on_device(&self) -> bool {
        self.stepper.is_some()
    }

    /// Whether attention with heads of these widths makes no matrix of scores.
    pub(in crate::train) fn attends_without_scores(&self, width: usize, value: usize) -> bool {
        self.attending
            .as_ref()
            .is_some_and(|kernels| kernels.covers(width, value))
    }

    pub(in crate::train) fn forward(
        &mut self,
        model: Model<'_>,
        input: &Input<'_>,
        blocks_kept: u32,
    ) -> Result<(Vec<f32>, Kept), TrainError> {
        let kept = self.run(model, input, blocks_kept)?;
        Ok((numbers(kept.output.clone())?, kept))
    }

    pub(in crate::train) fn train(
        &mut self,
        model: Model<'_>,
        input: &Input<'_>,
        targets: &[u32],
        blocks_kept: u32,
    ) -> Result<(f32, Vec<f32>), TrainError> {
        let kept = self.run(model, input, blocks_kept)?;
        let leaves = self.held(model).tracked;
        let leaf = kept.output.clone().autodiff().require_grad();
        let logits = logits(model.config, &leaves, leaf.clone()).ok_or(TrainError::Kind { takes: "a head" })?;
        let loss = mean_loss(logits, targets, &self.device.clone().autodiff());
        let value = loss.clone().inner();
        let mut gradients = loss.backward();
        self.sums.add(&leaves, leaves.parts().len() - 1, &mut gradients);
        if model.config.tied {
            self.sums.add(&leaves, 0, &mut gradients);
        }
        let gradient = gradient_of(&leaf, &mut gradients)?;
        let gradient = self.back(model, kept, gradient)?;
        // Asked for last, so that the host has sent everything by then.
        let value = numbers(value)?.first().copied().unwrap_or(f32::NAN);
        Ok((value, gradient))
    }

    pub(in crate::train) fn backward(
        &mut self,
        model: Model<'_>,
        kept: Kept,
        gradient: &[f32],
    ) -> Result<Vec<f32>, TrainError> {
        let data = TensorData::new(gradient.to_vec(), kept.output.dims());
        let gradient = Tensor::from_data(data, &self.device);
        self.back(model, kept, gradient)
    }

    pub(in crate::train) fn losses(
        &mut self,
        model: Model<'_>,
        input: &Input<'_>,
        targets: &[u32],
    ) -> Result<Vec<f32>, TrainError> {
        let device = self.device.clone();
        let leaves = match &self.held {
            Some(held) => held.plain.clone(),
            // Gone with the text: scoring is rare, and memory is dear.
            None => Leaves::new(model.layout, model.range, model.parameters, &device),
        };
        let positions = Positions::new(model.config, input.seq, &device, self.attending.as_ref());
        let tokens = input.tokens.unwrap_or_default();
        let x = embed(model.config, &leaves, tokens, &device);
        let mut x = x.ok_or(TrainError::Kind { takes: "activations" })?;
        for (part, block) in blocks_of(model.config, model.range) {
            x = run_block(block, (&leaves, part), &positions, x, &mut Loads::new())?;
        }
        let logits = logits(model.config, &leaves, x).ok_or(TrainError::Kind { takes: "a head" })?;
        numbers(losses(logits, targets, &device))
    }

    /// Parameters have changed on the host.
    pub(in crate::train) fn changed(&mut self) {
        self.held = None;
    }

    pub(in crate::train) fn take_loads(&mut self) -> Loads {
        core::mem::take(&mut self.loads)
    }

    /// Whether gradients wait on the device.
    pub(in crate::train) fn has_gradients(&self) -> bool {
        !self.sums.is_empty()
    }

    pub(in crate::train) fn forget_gradients(&mut self) {
        self.sums = Sums::default();
    }

    /// Brings the sums of gradients to the host. They move there, unless the device needs them for its own step.
    pub(in crate::train) fn bring_gradients(
        &mut self,
        model: Model<'_>,
        gradients: &mut GradientSums,
    ) -> Result<(), TrainError> {
        if self.sums.is_empty() {
            return Ok(());
        }
        if self.stepper.is_some() {
            gradients.forget();
        }
        let leaves = self.held(model).plain;
        self.sums.add_to(&leaves, gradients.of(model.parameters))?;
        if self.stepper.is_none() {
            self.forget_gradients();
        }
        Ok(())
    }

    /// Brings the parameters to the host.
    pub(in crate::train) fn bring_parameters(&self, parameters: &mut [Vec<f32>]) -> Result<(), TrainError> {
        match &self.held {
            Some(held) => held.plain.bring(parameters),
            None => Ok(()),
        }
    }

    /// Scales the sums of gradients on the device and returns the sum of their squares, where the device steps.
    pub(in crate::train) fn square_sum(&mut self, share: f32) -> Option<Result<f64, TrainError>> {
        let (stepper, held) = (self.stepper.as_ref()?, self.held.as_ref());
        let sums = &self.sums;
        let leaves = held.filter(|_| !sums.is_empty());
        Some(match leaves {
            Some(held) => stepper.square_sum(&held.plain, sums, share),
            None => Err(TrainError::NoGradients),
        })
    }

    /// One step of AdamW on the device, by a rule for each parameter. `moments` are the host's, per part and parameter, for
    /// a device that has none yet.
    pub(in crate::train) fn step<'a>(
        &mut self,
        rules: &[Vec<AdamW>],
        moments: impl Fn(usize, usize) -> Option<&'a [Vec<f32>]>,
    ) -> Result<(), TrainError> {
        match (&mut self.stepper, &self.held) {
            (Some(stepper), Some(held)) => stepper.step(&held.plain, &self.sums, rules, moments),
            _ => Err(TrainError::NoGradients),
        }
    }

    /// The moments of a parameter, where they are on the device.
    pub(in crate::train) fn bring_moments(
        &self,
        take: impl FnMut(usize, usize, [Vec<f32>; 2]),
    ) -> Result<(), TrainError> {
        match &self.stepper {
            Some(stepper) => stepper.bring_moments(take),
            None => Ok(()),
        }
    }

    /// The moments are the host's again.
    pub(in crate::train) fn forget_moments(&mut self) {
        if let Some(stepper) = &mut self.stepper {
            stepper.forget_moments();
        }
    }

    /// Changes a vector among the parameters on the device.
    pub(in crate::train) fn change_vector(
        &mut self,
        part: usize,
        slot: Slot,
        change: impl FnOnce(&mut [f32]),
    ) -> Result<(), TrainError> {
        let Some(held) = &mut self.held else { return Ok(()) };
        held.tracked.change_vector(part, slot, &self.device, change)?;
        held.plain = held.tracked.untracked();
        Ok(())
    }

    fn held(&mut self, model: Model<'_>) -> Held {
        let tracked = self.device.clone().autodiff();
        let held = self.held.get_or_insert_with(|| {
            let tracked = Leaves::new(model.layout, model.range, model.parameters, &tracked);
            Held {
                plain: tracked.untracked(),
                tracked,
            }
        });
        held.clone()
    }

    fn positions(&mut self, model: Model<'_>, seq: usize) -> Positions {
        let known = self.positions.take().filter(|positions| positions.seq() == seq);
        let positions =
            known.unwrap_or_else(|| Positions::new(model.config, seq, &self.device, self.attending.as_ref()));
        self.positions.insert(positions).clone()
    }

    /// Runs the blocks; the last `blocks_kept` keep their graphs.
    fn run(&mut self, model: Model<'_>, input: &Input<'_>, blocks_kept: u32) -> Result<Kept, TrainError> {
        let Held { tracked, plain } = self.held(model);
        let positions = self.positions(model, input.seq);
        let in_graphs = positions.tracked();
        let mut x = match input.tokens {
            Some(tokens) => {
                let x = embed(model.config, &plain, tokens, &self.device);
                x.ok_or(TrainError::Kind { takes: "activations" })?
            }
            None => {
                let data = TensorData::new(input.hidden.to_vec(), [input.rows, model.config.hidden]);
                Tensor::from_data(data, &self.device)
            }
        };
        // The backward begins at the end, and what it has done with is gone before anything is computed again.
        let again = (model.range.end - model.range.first).saturating_sub(blocks_kept) as usize;
        let mut kept = Vec::new();
        for (index, (part, block)) in blocks_of(model.config, model.range).enumerate() {
            if index < again {
                kept.push(KeptBlock {
                    input: x.clone(),
                    output: None,
                });
                x = run_block(block, (&plain, part), &positions, x, &mut self.loads)?;
                continue;
            }
            let leaf = x.autodiff().require_grad();
            let out = run_block(block, (&tracked, part), &in_graphs, leaf.clone(), &mut self.loads)?;
            x = out.clone().inner();
            kept.push(KeptBlock {
                input: leaf,
                output: Some(out),
            });
        }
        Ok(Kept {
            tokens: input.tokens.map(<[u32]>::to_vec),
            blocks: kept,
            output: x,
            seq: input.seq,
        })
    }

    /// Runs a micro-batch backward from the gradient of its output, adds up the parameters' gradients, and returns the
    /// input's; nothing at a stage with the embedding.
    fn back(&mut self, model: Model<'_>, kept: Kept, mut gradient: Tensor<2>) -> Result<Vec<f32>, TrainError> {
        let leaves = self.held(model).tracked;
        let positions = self.positions(model, kept.seq).tracked();
        let blocks = blocks_of(model.config, model.range);
        let blocks: Vec<_> = blocks.zip(kept.blocks).collect();
        for ((part, block), kept) in blocks.into_iter().rev() {
            let (leaf, out) = match kept.output {
                Some(output) => (kept.input, output),
                None => {
                    let leaf = kept.input.autodiff().require_grad();
                    // The loads of experts were counted in the forward.
                    let out = run_block(block, (&leaves, part), &positions, leaf.clone(), &mut Loads::new())?;
                    (leaf, out)
                }
            };
            let mut gradients = derive(out, gradient);
            self.sums.add(&leaves, part, &mut gradients);
            gradient = gradient_of(&leaf, &mut gradients)?;
        }
        let Some(tokens) = kept.tokens else {
            return numbers(gradient);
        };
        let x = embed(model.config, &leaves, &tokens, &self.device.clone().autodiff());
        let x = x.ok_or(TrainError::Kind { takes: "activations" })?;
        self.sums.add(&leaves, 0, &mut derive(x, gradient));
        Ok(Vec::new())
    }
}

/// Runs a graph backward from the gradient of its output.
fn derive(out: Tensor<2>, gradient: Tensor<2>) -> Gradients {
    // The gradient of this sum is the product of the output's derivative and the given gradient.
    (out * gradient.autodiff()).sum().backward()
}

fn gradient_of(leaf: &Tensor<2>, gradients: &mut Gradients) -> Result<Tensor<2>, TrainError> {
    leaf.grad_remove(gradients).ok_or(TrainError::NoGradients)
}
