//! What a model computes, block by block, as plain data: both engines follow it, and the layout comes from it.
//!
//! A block is a list of sublayers, each `x ← x + after(mixer(norm(x)))`. Every weight is named by its [`Slot`], its place
//! in the part's layout, so the description and the tensors cannot drift apart.

/// The place of a tensor in its part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot(pub(crate) usize);

/// `out = weight · x + bias`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Linear {
    /// The tensor that holds the weight, seen as a matrix of its last dimension by all others.
    pub(crate) weight: Slot,
    /// The weight's first row there: experts may share a tensor.
    pub(crate) first_row: usize,
    /// Outputs.
    pub(crate) rows: usize,
    /// Inputs.
    pub(crate) cols: usize,
    /// `[rows]`
    pub(crate) bias: Option<Slot>,
}

/// A norm over the last axis.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Norm {
    /// What it takes away and divides by.
    pub(crate) kind: NormKind,
    /// `[width]`
    pub(crate) gain: Slot,
    /// `[width]`
    pub(crate) bias: Option<Slot>,
    /// Channels.
    pub(crate) width: usize,
}

/// The rule of a norm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct NormKind {
    /// Whether the mean is taken away first, and a bias added last (`LayerNorm`); otherwise `RMSNorm`.
    pub(crate) centred: bool,
    /// Whether the stored gain is one too small (Gemma, `LayerNorm1P`).
    pub(crate) plus_one: bool,
    /// Added to the mean square.
    pub(crate) epsilon: f32,
}

impl NormKind {
    /// The norm of Llama.
    pub(crate) const fn rms(epsilon: f32) -> Self {
        Self {
            centred: false,
            plus_one: false,
            epsilon,
        }
    }
}

/// One transformer block.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Block(pub(crate) Vec<Sublayer>);

/// `x ← x + after(mixer(norm(x)))`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sublayer {
    pub(crate) norm: Norm,
    pub(crate) mixer: Mixer,
    /// A norm of the sublayer's output (Gemma).
    pub(crate) after: Option<Norm>,
}

/// What a sublayer does.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Mixer {
    Attention(Attention),
    Latent(LatentAttention),
    Mlp(Mlp),
    Experts(Experts),
    Mamba(Mamba),
}

/// Grouped-query attention.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Attention {
    pub(crate) heads: usize,
    /// Divides `heads`.
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) q: Linear,
    pub(crate) k: Linear,
    pub(crate) v: Linear,
    pub(crate) o: Linear,
    /// Of each query head, before the rotation.
    pub(crate) q_norm: Option<Norm>,
    /// Of each key head, before the rotation.
    pub(crate) k_norm: Option<Norm>,
    /// Which of the model's rotations; `None` for no positions.
    pub(crate) rotary: Option<usize>,
    /// Positions that a query sees, itself included; `None` for all before it.
    pub(crate) window: Option<usize>,
    /// What scores are multiplied by.
    pub(crate) scale: f32,
    pub(crate) query_scale: Option<QueryScale>,
}

/// `1 + beta · ln(1 + ⌊position / original⌋)` on queries (Llama 4, Ministral 3).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct QueryScale {
    pub(crate) beta: f32,
    pub(crate) original: f32,
}

impl QueryScale {
    /// The factor at a position.
    pub(crate) fn at(self, position: usize) -> f32 {
        let whole = (position as f64 / f64::from(self.original)).floor();
        (1.0 + f64::from(self.beta) * whole.ln_1p()) as f32
    }
}

/// Attention over a compressed cache (DeepSeek's MLA): a latent of `rank` and one rotated key of `rope` for all heads.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LatentAttention {
    pub(crate) heads: usize,
    /// Width of the latent.
    pub(crate) rank: usize,
    /// Width of a head's query and key without positions.
    pub(crate) nope: usize,
    /// Width of what is rotated.
    pub(crate) rope: usize,
    /// Width of a head's value.
    pub(crate) value: usize,
    pub(crate) query: LatentQuery,
    /// `[rank + rope, hidden]`
    pub(crate) kv_down: Linear,
    /// Of the latent.
    pub(crate) kv_norm: Norm,
    /// `[heads · (nope + value), rank]`
    pub(crate) kv_up: Linear,
    pub(crate) o: Linear,
    pub(crate) rotary: usize,
    pub(crate) scale: f32,
    pub(crate) query_scale: Option<QueryScale>,
    pub(crate) indexer: Option<Indexer>,
}

/// Where queries come from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum LatentQuery {
    Direct(Linear),
    /// Down, norm, up.
    LowRank(Linear, Norm, Linear),
}

/// Chooses the positions that a query attends to (DeepSeek Sparse Attention).
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Indexer {
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
    /// Positions chosen.
    pub(crate) top: usize,
    /// From the queries' latent.
    pub(crate) q: Linear,
    pub(crate) k: Linear,
    pub(crate) k_norm: Norm,
    /// `[heads, hidden]`
    pub(crate) weights: Linear,
    /// Rotates halves, whatever the attention itself does.
    pub(crate) rotary: usize,
}

/// An element-wise function.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Activation {
    /// `x · sigmoid(x)`
    Silu,
    /// Gaussian error, by a hyperbolic tangent.
    GeluTanh,
    /// `max(x, 0)²`
    SquaredRelu,
    /// Apertus's, with parameters of its own.
    Xielu(Xielu),
}

/// Where the parameters of xIELU are: each of one element.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Xielu {
    pub(crate) alpha_p: Slot,
    pub(crate) alpha_n: Slot,
    pub(crate) beta: Slot,
    pub(crate) epsilon: Slot,
}

/// `down(act(gate(x)) · up(x))`, or `down(act(up(x)))` without a gate.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Mlp {
    pub(crate) gate: Option<Linear>,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
    pub(crate) activation: Activation,
}

/// A mixture of experts.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Experts {
    pub(crate) router: Router,
    /// Into the width that experts work in, where it is not the model's.
    pub(crate) latent: Option<(Linear, Linear)>,
    pub(crate) experts: Vec<Mlp>,
    /// Computed for every token.
    pub(crate) shared: Option<Mlp>,
}

/// Chooses experts.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Router {
    /// `[experts, hidden]`
    pub(crate) weight: Linear,
    /// Added to scores for the choice alone.
    pub(crate) correction: Option<Slot>,
    pub(crate) rule: super::routing::Rule,
}

/// A Mamba-2 mixer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Mamba {
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
    /// Groups that share `B` and `C`; divides `heads`.
    pub(crate) groups: usize,
    /// Width of the state.
    pub(crate) state: usize,
    /// Taps of the convolution.
    pub(crate) taps: usize,
    /// `[inner + channels + heads, hidden]`: gate, what is convolved, time steps.
    pub(crate) in_proj: Linear,
    /// `[channels, 1, taps]`
    pub(crate) conv: Slot,
    pub(crate) conv_bias: Option<Slot>,
    /// `[heads]` each.
    pub(crate) dt_bias: Slot,
    pub(crate) a_log: Slot,
    pub(crate) d: Slot,
    /// Per group.
    pub(crate) norm: Norm,
    pub(crate) out_proj: Linear,
}

impl Mamba {
    /// Width of gate and values.
    pub(crate) const fn inner(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Channels that are convolved: values, `B` and `C`.
    pub(crate) const fn channels(&self) -> usize {
        self.inner() + 2 * self.groups * self.state
    }
}

/// The model's end.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Head {
    pub(crate) norm: Norm,
    /// `None` where it is the embedding.
    pub(crate) projection: Option<Linear>,
}
