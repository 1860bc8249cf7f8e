//! Whether a device can hold what training makes, asked before it is made.

use polder_protocol::layout::{BlockRange, Layout};

use super::TrainError;
use super::engine::Engine;
use crate::model::Config;
use crate::model::describe::Mixer;

const SCORES: &str = "attention's scores";

/// Refuses a stage with a tensor beyond `limit` bytes.
pub(super) fn check_parameters(layout: &Layout, range: BlockRange, limit: u64) -> Result<(), TrainError> {
    for part in range.parts(layout.blocks()) {
        let tensors = layout.parts.get(part as usize).map_or(&[][..], |part| &part.tensors);
        for tensor in tensors {
            check("a parameter tensor", &[tensor.elements().unwrap_or(usize::MAX)], limit)?;
        }
    }
    Ok(())
}

/// Refuses a micro-batch `[batch, seq]` that makes a tensor beyond `limit` bytes.
pub(super) fn check_micro_batch(
    config: &Config,
    range: BlockRange,
    [batch, seq]: [usize; 2],
    engine: &Engine,
    limit: u64,
) -> Result<(), TrainError> {
    let check_scores = |heads: usize, width: usize, value: usize| match engine.attends_without_scores(width, value) {
        true => check("queries", &[batch, seq, heads, width.max(value)], limit),
        false => check(SCORES, &[batch, heads, seq, seq], limit),
    };
    let blocks = config
        .description
        .iter()
        .take(range.end as usize)
        .skip(range.first as usize);
    for sublayer in blocks.flat_map(|block| &block.0) {
        match &sublayer.mixer {
            Mixer::Attention(shape) => check_scores(shape.heads, shape.head_dim, shape.head_dim)?,
            Mixer::Latent(shape) if shape.indexer.is_some() => check(SCORES, &[batch, shape.heads, seq, seq], limit)?,
            Mixer::Latent(shape) => check_scores(shape.heads, shape.nope + shape.rope, shape.value)?,
            Mixer::Mlp(mlp) => check("a perceptron's output", &[batch, seq, mlp.up.rows], limit)?,
            Mixer::Experts(_) | Mixer::Mamba(_) => {} // Theirs follow the tokens alone.
        }
    }
    check("a micro-batch", &[batch, seq, config.hidden], limit)?;
    match range.has_head(config.blocks) {
        true => check("a micro-batch's logits", &[batch, seq, config.vocabulary], limit),
        false => Ok(()),
    }
}

fn check(what: &'static str, shape: &[usize], limit: u64) -> Result<(), TrainError> {
    let bytes = shape
        .iter()
        .fold(4u64, |bytes, size| bytes.saturating_mul(*size as u64));
    match bytes > limit {
        true => Err(TrainError::DeviceBuffer { what, bytes, limit }),
        false => Ok(()),
    }
}
