//! The forward pass of consecutive blocks in tensors, on any device, with a graph where gradients are wanted.

#[cfg_attr(not(feature = "gpu"), path = "no_attending.rs")]
mod attending;
mod attention;
mod engine;
mod experts;
mod footprint;
mod latent;
mod leaves;
mod mamba;
mod mlp;
mod positions;
#[cfg_attr(not(feature = "gpu"), path = "no_stepper.rs")]
mod stepper;
mod sums;

use std::collections::BTreeMap;

use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};
use polder_protocol::layout::BlockRange;

use super::TrainError;
use super::goldfish::LEFT_OUT;
use crate::model::Config;
use crate::model::describe::{Block, Linear, Mixer, Norm, Slot};

pub(super) use attending::Attending;
pub(super) use engine::{Engine, Kept};
pub(super) use footprint::kept_elements;
use leaves::{Leaves, Part};
use positions::Positions;

/// How often each expert was chosen, by the stage's part and the place of the router's correction in it.
pub(super) type Loads = BTreeMap<(usize, usize), Vec<u64>>;

/// The embeddings of a stage that has them: `[rows, hidden]`.
fn embed(config: &Config, leaves: &Leaves, tokens: &[u32], device: &Device) -> Option<Tensor<2>> {
    let embedding = Part(leaves.0.first()?).matrix(Slot(0));
    let x = embedding.select(0, indices(tokens.iter().map(|token| *token as usize), device));
    Some(match config.embedding_scale {
        1.0 => x,
        scale => x.mul_scalar(scale),
    })
}

/// One block, whose parameters are part `index` of the stage: `[batch · seq, hidden]` to the same.
fn run_block(
    block: &Block,
    (leaves, index): (&Leaves, usize),
    positions: &Positions,
    mut x: Tensor<2>,
    loads: &mut Loads,
) -> Result<Tensor<2>, TrainError> {
    let part = Part(leaves.0.get(index).map_or(&[][..], Vec::as_slice));
    for sublayer in &block.0 {
        let normed = norm(part, &sublayer.norm, x.clone());
        let mut out = match &sublayer.mixer {
            Mixer::Attention(shape) => attention::grouped(part, shape, positions, &normed)?,
            Mixer::Latent(shape) => latent::latent(part, shape, positions, &normed)?,
            Mixer::Mlp(mlp) => mlp::mlp(part, mlp, &normed),
            Mixer::Experts(shape) => {
                let (out, load) = experts::experts(part, shape, &normed)?;
                if let Some(slot) = shape.router.correction {
                    add_load(loads, (index, slot.0), &load);
                }
                out
            }
            Mixer::Mamba(shape) => mamba::mamba(part, shape, positions.seq(), &normed),
        };
        if let Some(after) = &sublayer.after {
            out = norm(part, after, out);
        }
        x = x + out;
    }
    Ok(x)
}

/// The blocks of a stage, each with the place of its part in the stage.
fn blocks_of(config: &Config, range: BlockRange) -> impl DoubleEndedIterator<Item = (usize, &Block)> {
    let range = range.first as usize..range.end as usize;
    let first = usize::from(range.start == 0);
    let blocks = config.description.get(range).unwrap_or_default();
    blocks
        .iter()
        .enumerate()
        .map(move |(index, block)| (first + index, block))
}

fn add_load(loads: &mut Loads, place: (usize, usize), load: &[u64]) {
    let sum = loads.entry(place).or_insert_with(|| vec![0; load.len()]);
    for (sum, load) in sum.iter_mut().zip(load) {
        *sum += load;
    }
}

/// The logits of a stage with the head: `[rows, hidden]` to `[rows, vocabulary]`.
fn logits(config: &Config, leaves: &Leaves, x: Tensor<2>) -> Option<Tensor<2>> {
    let part = Part(leaves.0.last()?);
    let normed = norm(part, &config.head.norm, x);
    Some(match &config.head.projection {
        Some(projection) => linear(part, projection, &normed),
        None => normed.matmul(Part(leaves.0.first()?).matrix(Slot(0)).transpose()),
    })
}

/// The mean loss of the rows that count, in nats.
fn mean_loss(logits: Tensor<2>, targets: &[u32], device: &Device) -> Tensor<1> {
    let counted = targets.iter().filter(|target| **target != LEFT_OUT).count();
    if counted == targets.len() {
        return losses(logits, targets, device).mean();
    }
    let counts = targets.iter().map(|target| f32::from(*target != LEFT_OUT));
    let counts = TensorData::new(counts.collect::<Vec<f32>>(), [targets.len()]);
    let counts = Tensor::<1>::from_data(counts, device);
    let known: Vec<u32> = targets
        .iter()
        .map(|target| if *target == LEFT_OUT { 0 } else { *target })
        .collect();
    (losses(logits, &known, device) * counts)
        .sum()
        .div_scalar(counted.max(1) as f32)
}

/// The loss of each row in nats, `[rows]`.
fn losses(logits: Tensor<2>, targets: &[u32], device: &Device) -> Tensor<1> {
    let targets = indices(targets.iter().map(|target| *target as usize), device).unsqueeze_dim::<2>(1);
    log_softmax(logits, 1).gather(1, targets).neg().squeeze_dim(1)
}

/// Whole numbers below 2³¹.
fn indices(values: impl Iterator<Item = usize>, device: &Device) -> Tensor<1, Int> {
    let values: Vec<i32> = values.map(|value| value as i32).collect();
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), &device.clone().without_autodiff())
}

/// `weight · x + bias`, `[rows, cols]` to `[rows, out]`.
fn linear(part: Part<'_>, linear: &Linear, x: &Tensor<2>) -> Tensor<2> {
    let mut weight = part.matrix(linear.weight);
    if weight.dims()[0] != linear.rows {
        weight = weight.narrow(0, linear.first_row, linear.rows);
    }
    let out = x.clone().matmul(weight.transpose());
    match linear.bias {
        Some(bias) => out + part.vector(bias).unsqueeze::<2>(),
        None => out,
    }
}

/// A norm of each row.
fn norm(part: Part<'_>, norm: &Norm, x: Tensor<2>) -> Tensor<2> {
    let mut gain = part.vector(norm.gain);
    if norm.kind.plus_one {
        gain = gain.add_scalar(1.0);
    }
    let x = match norm.kind.centred {
        true => x.clone() - x.mean_dim(1),
        false => x,
    };
    let out = unit_rows(x, norm.kind.epsilon) * gain.unsqueeze::<2>();
    match norm.bias {
        Some(bias) => out + part.vector(bias).unsqueeze::<2>(),
        None => out,
    }
}

/// Scales each row to unit root mean square.
fn unit_rows(x: Tensor<2>, epsilon: f32) -> Tensor<2> {
    let scale = x.clone().square().mean_dim(1).add_scalar(epsilon).sqrt().recip();
    x * scale
}

/// `ln(1 + eˣ)`, without overflow.
fn softplus<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    x.clone().clamp_min(0.0) + x.abs().neg().exp().log1p()
}

/// Shares along the last axis. Written out, because burn's own rounds otherwise in a graph than without one.
fn softmax<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let largest = x.clone().detach().max_dim(D - 1);
    let shares = (x - largest).exp();
    let sum = shares.clone().sum_dim(D - 1);
    shares / sum
}

/// The values on the host.
fn host<const D: usize>(x: &Tensor<D>) -> Result<Vec<f32>, TrainError> {
    super::checks::numbers(x.clone().detach())
}
