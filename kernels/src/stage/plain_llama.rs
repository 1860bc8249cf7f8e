//! A plain Llama, which is what devices other than the CPU serve: its sizes, and its blocks' weights.

use super::StageError;
use super::cpu::{Dense, GroupedWeights, LoadedMixer, LoadedNorm, LoadedSublayer, Matrix, MlpWeights};
use super::weights::StageWeights;
use crate::model::{Config, Frequencies, Rotary};

/// What the forward pass needs to know.
#[derive(Debug, Clone)]
pub(in crate::stage) struct Shape {
    pub(in crate::stage) vocabulary: usize,
    pub(in crate::stage) hidden: usize,
    pub(in crate::stage) intermediate: usize,
    pub(in crate::stage) heads: usize,
    /// Divides `heads`.
    pub(in crate::stage) kv_heads: usize,
    /// Even.
    pub(in crate::stage) head_dim: usize,
    pub(in crate::stage) epsilon: f32,
    pub(in crate::stage) frequencies: Frequencies,
}

impl Shape {
    /// The sizes of a plain Llama; otherwise what it has beyond one, in words.
    pub(in crate::stage) fn of(config: &Config) -> Result<Self, String> {
        let llama = config.llama()?;
        Ok(Self {
            vocabulary: config.vocabulary,
            hidden: config.hidden,
            intermediate: llama.intermediate,
            heads: llama.heads,
            kv_heads: llama.kv_heads,
            head_dim: llama.head_dim,
            epsilon: llama.epsilon,
            frequencies: Frequencies::of(&Rotary {
                theta: llama.theta,
                rope: llama.rope,
                dimensions: llama.head_dim,
                interleaved: false,
            }),
        })
    }
}

/// A block's two sublayers.
pub(in crate::stage) struct Parts<'a> {
    pub(in crate::stage) attention_norm: &'a LoadedNorm,
    pub(in crate::stage) attention: &'a GroupedWeights,
    pub(in crate::stage) mlp_norm: &'a LoadedNorm,
    pub(in crate::stage) gate: &'a Dense,
    pub(in crate::stage) mlp: &'a MlpWeights,
}

impl<'a> Parts<'a> {
    /// Of all blocks of a stage.
    pub(in crate::stage) fn of_all(weights: &'a StageWeights) -> Result<Vec<Self>, StageError> {
        weights.blocks.iter().map(|block| Self::of(block)).collect()
    }

    fn of(block: &'a [LoadedSublayer]) -> Result<Self, StageError> {
        if let [attention, mlp] = block
            && let (LoadedMixer::Attention(grouped), LoadedMixer::Mlp(perceptron)) = (&attention.mixer, &mlp.mixer)
            && let Some(gate) = &perceptron.gate
        {
            return Ok(Self {
                attention_norm: &attention.norm,
                attention: grouped,
                mlp_norm: &mlp.norm,
                gate,
                mlp: perceptron,
            });
        }
        // The configuration was asked first, so this is no peer's doing.
        Err(StageError::Kind {
            takes: "blocks of a plain Llama",
        })
    }

    /// All that is multiplied with.
    pub(in crate::stage) fn matrices(&self) -> [&'a Matrix; 7] {
        let GroupedWeights { q, k, v, o, .. } = self.attention;
        [q, k, v, o, self.gate, &self.mlp.up, &self.mlp.down].map(|dense| &dense.weight)
    }
}
