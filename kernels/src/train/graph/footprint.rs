//! How much a block's graph keeps for its backward.
//!
//! Estimates, somewhat on the large side: of a small Llama's block a device held 1,295 elements a row, and this says 1,480.

use polder_protocol::layout::BlockRange;

use super::Attending;
use crate::device::Device;
use crate::model::Config;
use crate::model::describe::{Activation, LatentQuery, Mixer, Mlp, Norm, Sublayer};

/// Times that a graph keeps the width of a norm: the row, its scaled form and its product.
const NORM: usize = 3;
/// Times that a graph keeps a perceptron's inner width: gate, up, what is between them.
const MLP: usize = 4;
/// The same, where the activation is written out in tensors.
const MLP_WRITTEN_OUT: usize = 9;
/// Times that a graph keeps a head's width: projected, rotated, scaled or laid out.
const HEAD: usize = 3;
/// Times that a graph keeps a Mamba mixer's channels: the scan goes over pieces and keeps each.
const MAMBA: usize = 12;

/// What the largest block of `range` keeps of each row of a sequence of `seq`, in elements.
pub(in crate::train) fn kept_elements(config: &Config, range: BlockRange, seq: usize, device: &Device) -> u64 {
    let attending = Attending::new(device);
    let scores = |heads: usize, width: usize, value: usize| match &attending {
        Some(kernels) if kernels.covers(width, value) => heads,
        _ => 2 * heads * seq,
    };
    let blocks = config.description.iter();
    let blocks = blocks.take(range.end as usize).skip(range.first as usize);
    let elements = blocks.map(|block| block.0.iter().map(|sublayer| kept(sublayer, &scores)).sum::<usize>());
    elements.max().unwrap_or(0) as u64
}

fn kept(sublayer: &Sublayer, scores: &impl Fn(usize, usize, usize) -> usize) -> usize {
    let norms = NORM * (sublayer.norm.width + sublayer.after.as_ref().map_or(0, |after| after.width));
    let mixer = match &sublayer.mixer {
        Mixer::Attention(shape) => {
            let norms = [&shape.q_norm, &shape.k_norm].map(|own: &Option<Norm>| usize::from(own.is_some()) * NORM);
            let [q, k] = norms.map(|norm| HEAD + norm);
            let heads = (shape.heads * q + shape.kv_heads * (k + HEAD)) * shape.head_dim;
            heads + scores(shape.heads, shape.head_dim, shape.head_dim)
        }
        Mixer::Latent(shape) => {
            let query = match &shape.query {
                LatentQuery::Direct(_) => 0,
                LatentQuery::LowRank(_, norm, _) => NORM * norm.width,
            };
            let heads = HEAD * shape.heads * (2 * (shape.nope + shape.rope) + shape.value);
            let scores = scores(shape.heads, shape.nope + shape.rope, shape.value);
            query + NORM * (shape.rank + shape.rope) + heads + scores
        }
        Mixer::Mlp(mlp) => of_mlp(mlp),
        Mixer::Experts(shape) => {
            let expert = shape.experts.iter().map(of_mlp).max().unwrap_or(0);
            let chosen = shape.router.rule.top * (expert + 3 * sublayer.norm.width);
            chosen + 4 * shape.experts.len() + shape.shared.as_ref().map_or(0, of_mlp)
        }
        Mixer::Mamba(shape) => MAMBA * (shape.inner() + shape.channels()),
    };
    norms + mixer
}

fn of_mlp(mlp: &Mlp) -> usize {
    let times = match mlp.activation {
        Activation::Silu | Activation::SquaredRelu => MLP,
        Activation::GeluTanh | Activation::Xielu(_) => MLP_WRITTEN_OUT,
    };
    times * mlp.up.rows
}
