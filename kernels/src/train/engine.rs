//! What computes a stage in training: plain loops on the CPU where they know the model, else a graph of tensors.

use core::ops::Range;

use polder_protocol::layout::{BlockRange, Layout};
use polder_protocol::run::{Inner, Precision};

use super::graph::Loads;
use super::{MICRO_BATCHES_KEPT_MAX, TrainError, cpu, graph};
use crate::device::{Device, memory};
use crate::model::Config;

/// Sums that are looked at together before they are begun anew: 256 KiB.
const PIECE: usize = 1 << 16;

/// A stage's model.
#[derive(Debug, Clone, Copy)]
pub(super) struct Model<'a> {
    pub(super) config: &'a Config,
    pub(super) layout: &'a Layout,
    pub(super) range: BlockRange,
    /// Per part of `range`.
    pub(super) parameters: &'a [Vec<f32>],
}

/// A micro-batch that has been checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Input<'a> {
    /// `[rows]`, at a stage with the embedding.
    pub(super) tokens: Option<&'a [u32]>,
    /// `[rows, hidden]`, at any other.
    pub(super) hidden: &'a [f32],
    pub(super) rows: usize,
    pub(super) seq: usize,
}

/// The sums of gradients over micro-batches, in memory that is kept between steps.
#[derive(Debug, Default)]
pub(super) struct GradientSums {
    /// As the parameters, once they are made.
    sums: Vec<Vec<f32>>,
    made: bool,
}

impl GradientSums {
    /// The sums, made if need be.
    pub(super) fn of(&mut self, parameters: &[Vec<f32>]) -> &mut [Vec<f32>] {
        if self.sums.len() != parameters.len() {
            self.sums = parameters.iter().map(|part| vec![0.0; part.len()]).collect();
        } else if !self.made {
            // Where nothing was added, memory that the system has not given yet stays where it is.
            for piece in self.sums.iter_mut().flat_map(|part| part.chunks_mut(PIECE)) {
                if piece.iter().any(|sum| sum.to_bits() != 0) {
                    piece.fill(0.0);
                }
            }
        }
        self.made = true;
        &mut self.sums
    }

    /// The sums, where they have been made.
    pub(super) fn made(&self) -> Option<&[Vec<f32>]> {
        self.made.then_some(&self.sums)
    }

    pub(super) fn made_mut(&mut self) -> Option<&mut [Vec<f32>]> {
        self.made.then_some(&mut self.sums)
    }

    /// Begins anew.
    pub(super) fn forget(&mut self) {
        self.made = false;
    }
}

/// What computes.
#[derive(Debug)]
pub(super) enum Engine {
    Cpu(cpu::Engine),
    Graph(Box<graph::Engine>),
}

/// A micro-batch between its forward and its backward.
#[derive(Debug)]
pub(super) enum Kept {
    Cpu(cpu::Kept),
    Graph(Box<graph::Kept>),
}

impl Kept {
    /// Elements of its output.
    pub(super) fn elements(&self) -> usize {
        match self {
            Self::Cpu(kept) => kept.elements,
            Self::Graph(kept) => kept.elements(),
        }
    }
}

impl Engine {
    pub(super) fn new(
        config: &Config,
        layout: &Layout,
        range: BlockRange,
        precision: Precision,
        device: &Device,
    ) -> Self {
        match device.is_cpu() && cpu::covers(config) {
            true => Self::Cpu(cpu::Engine::new(layout, range, precision)),
            false => Self::Graph(Box::new(graph::Engine::new(device))),
        }
    }

    /// Lets the engine leave out the gradients of all but these weights, per part of the stage.
    pub(super) fn ask_only(&mut self, weights: Vec<Vec<Range<usize>>>) {
        match self {
            Self::Cpu(engine) => engine.ask_only(weights),
            // A graph makes them all.
            Self::Graph(_) => {}
        }
    }

    /// What the products of linear layers are computed in.
    pub(super) fn products(&self) -> &'static str {
        match self {
            Self::Cpu(engine) => engine.products(),
            Self::Graph(_) => "f32",
        }
    }

    /// The output of the blocks, `[rows, hidden]`, and what the backward needs.
    pub(super) fn forward(
        &mut self,
        model: Model<'_>,
        input: &Input<'_>,
        blocks_kept: u32,
    ) -> Result<(Vec<f32>, Kept), TrainError> {
        match self {
            Self::Cpu(engine) => {
                let (output, kept) = engine.forward(model, input, blocks_kept)?;
                Ok((output, Kept::Cpu(kept)))
            }
            Self::Graph(engine) => {
                let (output, kept) = engine.forward(model, input, blocks_kept)?;
                Ok((output, Kept::Graph(Box::new(kept))))
            }
        }
    }

    /// The mean loss of a stage with the head and the gradient of its input; adds the parameters' gradients, on the host or
    /// where [`Engine::bring_gradients`] brings them from.
    pub(super) fn train(
        &mut self,
        model: Model<'_>,
        input: &Input<'_>,
        targets: &[u32],
        blocks_kept: u32,
        gradients: &mut GradientSums,
    ) -> Result<(f32, Vec<f32>), TrainError> {
        match self {
            Self::Cpu(engine) => {
                let gradients = gradients.of(model.parameters);
                let (mut x, kept) = engine.forward(model, input, blocks_kept)?;
                let loss = engine.mean_loss(model, &mut x, targets, gradients)?;
                Ok((loss, engine.backward(model, kept, x, gradients)))
            }
            Self::Graph(engine) => engine.train(model, input, targets, blocks_kept),
        }
    }

    /// The gradient of a kept micro-batch's input from that of its output; adds the parameters' gradients as
    /// [`Engine::train`] does.
    pub(super) fn backward(
        &mut self,
        model: Model<'_>,
        kept: Kept,
        gradient: &[f32],
        gradients: &mut GradientSums,
    ) -> Result<Vec<f32>, TrainError> {
        match (self, kept) {
            (Self::Cpu(engine), Kept::Cpu(kept)) => {
                let gradients = gradients.of(model.parameters);
                Ok(engine.backward(model, kept, gradient.to_vec(), gradients))
            }
            (Self::Graph(engine), Kept::Graph(kept)) => engine.backward(model, *kept, gradient),
            _ => unreachable!("an engine is asked about what it kept"),
        }
    }

    /// The loss of each row of a whole model, in nats, with nothing kept.
    pub(super) fn losses(
        &mut self,
        model: Model<'_>,
        input: &Input<'_>,
        targets: &[u32],
    ) -> Result<Vec<f32>, TrainError> {
        match self {
            Self::Cpu(engine) => engine.losses(model, input, targets),
            Self::Graph(engine) => engine.losses(model, input, targets),
        }
    }

    /// The engine whose parameters, gradients and moments may stay on its device.
    pub(super) fn graph(&mut self) -> Option<&mut graph::Engine> {
        match self {
            Self::Cpu(_) => None,
            Self::Graph(engine) => Some(engine),
        }
    }

    /// Whether the optimiser steps on the device.
    pub(super) fn steps_on_device(&self) -> bool {
        match self {
            Self::Cpu(_) => false,
            Self::Graph(engine) => engine.steps_on_device(),
        }
    }

    /// Whether attention with heads of these widths is computed without a matrix of scores.
    pub(super) fn attends_without_scores(&self, width: usize, value: usize) -> bool {
        match self {
            Self::Cpu(_) => false,
            Self::Graph(engine) => engine.attends_without_scores(width, value),
        }
    }

    /// Brings gradients that wait on a device to the host.
    pub(super) fn bring_gradients(&mut self, model: Model<'_>, gradients: &mut GradientSums) -> Result<(), TrainError> {
        match self {
            Self::Cpu(_) => Ok(()),
            Self::Graph(engine) => engine.bring_gradients(model, gradients),
        }
    }

    /// Forgets gradients that wait on a device.
    pub(super) fn forget_gradients(&mut self) {
        if let Self::Graph(engine) = self {
            engine.forget_gradients();
        }
    }

    /// Parameters have changed on the host.
    pub(super) fn changed(&mut self) {
        if let Self::Graph(engine) = self {
            engine.changed();
        }
    }

    /// How often experts were chosen since the last call, where corrections balance them.
    pub(super) fn take_loads(&mut self) -> Loads {
        match self {
            Self::Cpu(_) => Loads::new(),
            Self::Graph(engine) => engine.take_loads(),
        }
    }
}

/// How many blocks of a stage may keep what their backward needs, by the memory that is free now.
pub(super) fn blocks_that_fit(
    config: &Config,
    range: BlockRange,
    parameters: &[Vec<f32>],
    inner: &Inner,
    device: &Device,
) -> u32 {
    // Without the head several micro-batches are under way.
    let under_way = match range.has_head(config.blocks) {
        true => 1,
        false => u64::from(inner.micro_batches).clamp(1, MICRO_BATCHES_KEPT_MAX as u64),
    };
    let rows = (u64::from(inner.batch) * u64::from(inner.seq)).saturating_mul(under_way);
    let of_row = match device.is_cpu() && cpu::covers(config) {
        true => cpu::kept_elements(config, range),
        false => graph::kept_elements(config, range, inner.seq as usize, device),
    };
    let kept = of_row.saturating_mul(4).saturating_mul(rows);
    let elements: u64 = parameters.iter().map(|part| part.len() as u64).sum();
    if device.has_memory() {
        // Parameters, too, are still to be brought there.
        let later = elements.saturating_mul(16);
        let fits = |blocks| device.has_room(later.saturating_add(kept.saturating_mul(2 * u64::from(blocks))));
        return most(range.end - range.first, fits);
    }
    let free = memory::free_bytes();
    free.map_or(u32::MAX, |free| share(free, elements.saturating_mul(12), kept))
}

/// The most of up to `max` that fits, where fewer fit if more do.
fn most(max: u32, fits: impl Fn(u32) -> bool) -> u32 {
    let (mut least, mut above) = (0, max.saturating_add(1));
    while above - least > 1 {
        // All of them is the usual case, and asked first.
        let middle = if above > max { max } else { least.midpoint(above) };
        match fits(middle) {
            true => least = middle,
            false => above = middle,
        }
    }
    least
}

/// Half of what is left of `free` bytes after moments and gradients, which are made later, by what a block keeps.
fn share(free: u64, later: u64, kept: u64) -> u32 {
    u32::try_from(free.saturating_sub(later) / 2 / kept.max(1)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_keeps_what_half_of_the_free_memory_holds() {
        assert_eq!(share(1_000, 200, 100), 4);
        assert_eq!(share(100, 200, 100), 0);
        assert_eq!(share(u64::MAX, 0, 0), u32::MAX);
    }

    #[test]
    fn the_most_that_fits_is_found() {
        for max in [0, 1, 2, 7, 80] {
            for limit in 0..=max {
                assert_eq!(most(max, |blocks| blocks <= limit), limit);
            }
        }
        assert_eq!(most(5, |_| false), 0);
    }

    #[test]
    fn gradients_are_forgotten_and_summed_anew() {
        let mut gradients = GradientSums::default();
        assert!(gradients.made().is_none());
        gradients.of(&[vec![1.0; 3]])[0].fill(2.0);
        assert_eq!(gradients.of(&[vec![1.0; 3]])[0], [2.0; 3]);
        gradients.forget();
        assert!(gradients.made().is_none() && gradients.made_mut().is_none());
        assert_eq!(gradients.of(&[vec![1.0; 3]])[0], [0.0; 3]);
    }
}
