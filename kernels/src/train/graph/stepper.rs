//! AdamW where parameters and gradients are: on the device, by a kernel of our own, in place.

use super::Leaves;
use super::sums::Sums;
use crate::device::Device;
use crate::device::cube::{AdamWStep, CubeError, Cubes, Floats, SquareSums};
use crate::train::TrainError;
use crate::train::adamw::AdamW;

/// The kernels, and what AdamW keeps.
#[derive(Debug)]
pub(super) struct Stepper {
    cubes: Cubes,
    /// Per part and parameter, both means; `None` before the first step, when they are the host's.
    moments: Option<Vec<Vec<[Floats; 2]>>>,
}

impl Stepper {
    /// Where the device runs our kernels, and has room for each of `elements`, a gradient and two moments.
    pub(super) fn new(device: &Device, elements: u64) -> Option<Self> {
        let cubes = match Cubes::of(device) {
            Ok(cubes) => cubes,
            Err(error) => {
                tracing::debug!(%error, "optimiser steps on the host");
                return None;
            }
        };
        let bytes = elements.saturating_mul(16);
        if !device.has_room(bytes) {
            tracing::warn!(bytes, "no room for moments on the device, optimiser steps on the host");
            return None;
        }
        Some(Self { cubes, moments: None })
    }

    /// Multiplies all gradients by `share`, and returns the sum of their squares: partial sums in f32 on the device, and
    /// these in f64 in their order.
    pub(super) fn square_sum(&self, leaves: &Leaves, sums: &Sums, share: f32) -> Result<f64, TrainError> {
        let mut found = Vec::new();
        for (part, own) in leaves.parts().iter().enumerate() {
            for leaf in 0..own.len() {
                if let Some(sum) = sums.of(part, leaf) {
                    found.push(self.cubes.of_tensor(sum).map_err(failed)?);
                }
            }
        }
        let room = SquareSums::room(found.iter().map(Floats::len));
        let mut partial = SquareSums::new(&self.cubes, room);
        for gradient in &found {
            partial.add(gradient, share).map_err(failed)?;
        }
        let partial = partial.read().map_err(failed)?;
        Ok(partial.into_iter().map(f64::from).sum())
    }

    pub(super) fn step<'a>(
        &mut self,
        leaves: &Leaves,
        sums: &Sums,
        rules: &[Vec<AdamW>],
        moments: impl Fn(usize, usize) -> Option<&'a [Vec<f32>]>,
    ) -> Result<(), TrainError> {
        let held = match &mut self.moments {
            Some(held) => held,
            none => {
                let upload = |part: usize, leaf: usize| match moments(part, leaf) {
                    Some([first, second]) => Ok([first, second].map(|mean| self.cubes.upload(mean))),
                    _ => Err(TrainError::NoGradients),
                };
                let parts = leaves.parts().iter().enumerate();
                let parts = parts.map(|(part, own)| (0..own.len()).map(|leaf| upload(part, leaf)).collect());
                none.insert(parts.collect::<Result<_, _>>()?)
            }
        };
        for (part, ((own, held), rules)) in leaves.parts().iter().zip(held).zip(rules).enumerate() {
            for (index, ((leaf, [first, second]), rule)) in own.iter().zip(held).zip(rules).enumerate() {
                // The kernel writes into the memory that the model's tensors have: no copy is made of it.
                let parameters = self.cubes.of_tensor(&leaf.flat()).map_err(failed)?;
                let gradient = match sums.of(part, index) {
                    Some(sum) => self.cubes.of_tensor(sum).map_err(failed)?,
                    None => self.cubes.upload(&vec![0.0; leaf.elements()]),
                };
                let step = AdamWStep {
                    learning_rate: rule.learning_rate,
                    beta_1: rule.beta_1,
                    beta_2: rule.beta_2,
                    epsilon: rule.epsilon,
                    weight_decay: rule.weight_decay,
                    gradient_scale: rule.gradient_scale,
                    step: u32::try_from(rule.count).unwrap_or(u32::MAX),
                };
                self.cubes
                    .adamw(&parameters, &gradient, first, second, step)
                    .map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Brings the moments to the host, where there are any.
    pub(super) fn bring_moments(&self, mut take: impl FnMut(usize, usize, [Vec<f32>; 2])) -> Result<(), TrainError> {
        for (part, own) in self.moments.iter().flatten().enumerate() {
            for (leaf, [first, second]) in own.iter().enumerate() {
                let means = [
                    self.cubes.read(first).map_err(failed)?,
                    self.cubes.read(second).map_err(failed)?,
                ];
                take(part, leaf, means);
            }
        }
        Ok(())
    }

    /// The next step begins with the host's.
    pub(super) fn forget_moments(&mut self) {
        self.moments = None;
    }
}

fn failed(error: CubeError) -> TrainError {
    TrainError::Device {
        reason: error.to_string(),
    }
}
