//! The sizes of a model that the tensor engine knows: a plain Llama.

use crate::model::{Config, Frequencies, Rotary};

/// What the forward pass needs to know.
#[derive(Debug, Clone)]
pub(in crate::stage) struct Shape {
    pub(super) vocabulary: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) heads: usize,
    /// Divides `heads`.
    pub(super) kv_heads: usize,
    /// Even.
    pub(super) head_dim: usize,
    pub(super) epsilon: f32,
    pub(super) frequencies: Frequencies,
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
