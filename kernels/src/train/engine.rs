//! What computes a stage in training: plain loops on the CPU where they know the model, else a graph of tensors.

use polder_protocol::layout::{BlockRange, Layout};

use super::graph::Loads;
use super::{Keep, TrainError, cpu, graph};
use crate::device::Device;
use crate::model::Config;

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
            self.sums.iter_mut().for_each(|part| part.fill(0.0));
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
    Graph(graph::Engine),
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
    pub(super) fn new(config: &Config, layout: &Layout, range: BlockRange, device: &Device) -> Self {
        match device.is_cpu() && cpu::covers(config) {
            true => Self::Cpu(cpu::Engine::new(layout, range)),
            false => Self::Graph(graph::Engine::new(device)),
        }
    }

    /// The output of the blocks, `[rows, hidden]`, and what the backward needs.
    pub(super) fn forward(
        &mut self,
        model: Model<'_>,
        input: &Input<'_>,
        keep: Keep,
    ) -> Result<(Vec<f32>, Kept), TrainError> {
        match self {
            Self::Cpu(engine) => {
                let (output, kept) = engine.forward(model, input, keep)?;
                Ok((output, Kept::Cpu(kept)))
            }
            Self::Graph(engine) => {
                let (output, kept) = engine.forward(model, input)?;
                Ok((output, Kept::Graph(Box::new(kept))))
            }
        }
    }

    /// The mean loss of a stage with the head and the gradient of its input; adds the parameters' gradients.
    pub(super) fn train(
        &mut self,
        model: Model<'_>,
        input: &Input<'_>,
        targets: &[u32],
        keep: Keep,
        gradients: &mut [Vec<f32>],
    ) -> Result<(f32, Vec<f32>), TrainError> {
        match self {
            Self::Cpu(engine) => {
                let (mut x, kept) = engine.forward(model, input, keep)?;
                let loss = engine.mean_loss(model, &mut x, targets, gradients)?;
                Ok((loss, engine.backward(model, kept, x, gradients)))
            }
            Self::Graph(engine) => engine.train(model, input, targets, gradients),
        }
    }

    /// The gradient of a kept micro-batch's input from that of its output; adds the parameters' gradients.
    pub(super) fn backward(
        &mut self,
        model: Model<'_>,
        kept: Kept,
        gradient: &[f32],
        gradients: &mut [Vec<f32>],
    ) -> Result<Vec<f32>, TrainError> {
        match (self, kept) {
            (Self::Cpu(engine), Kept::Cpu(kept)) => Ok(engine.backward(model, kept, gradient.to_vec(), gradients)),
            (Self::Graph(engine), Kept::Graph(kept)) => engine.backward(*kept, gradient, gradients),
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

    /// Parameters have changed.
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
