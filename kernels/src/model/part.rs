//! Building a part: every tensor is named once, gets its place in the layout, and the description refers to the place.

use polder_protocol::layout::{PartLayout, TensorLayout};

use super::describe::{Activation, Attention, Linear, Mlp, Norm, NormKind, QueryScale, Slot};

/// Tensors of one part, in the order in which they are asked for.
#[derive(Debug)]
pub(super) struct Part {
    /// Put before every name.
    prefix: String,
    tensors: Vec<TensorLayout>,
}

/// The shape of grouped-query attention.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grouped {
    pub(super) hidden: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    /// Biases of q, k and v.
    pub(super) qkv_bias: bool,
    /// A bias of the output projection.
    pub(super) o_bias: bool,
    /// Norms of query and key heads.
    pub(super) qk_norm: Option<NormKind>,
    pub(super) rotary: Option<usize>,
    pub(super) window: Option<usize>,
    /// What scores are multiplied by; `None` for 1 / √head_dim.
    pub(super) scale: Option<f32>,
    pub(super) query_scale: Option<QueryScale>,
}

/// The shape of a multi-layer perceptron.
#[derive(Debug, Clone, Copy)]
pub(super) struct Feed {
    pub(super) hidden: usize,
    pub(super) wide: usize,
    pub(super) gated: bool,
    pub(super) bias: bool,
    pub(super) activation: Activation,
}

impl Part {
    pub(super) fn new(prefix: impl Into<String>) -> Self {
        Self {
            prefix: prefix.into(),
            tensors: Vec::new(),
        }
    }

    pub(super) fn into_layout(self) -> PartLayout {
        PartLayout { tensors: self.tensors }
    }

    /// The next tensor.
    pub(super) fn tensor(&mut self, name: &str, shape: &[usize]) -> Slot {
        self.tensors.push(TensorLayout {
            name: format!("{}{name}", self.prefix),
            // A checked configuration has no size beyond 2³²: widths are within 2²⁰, and products of heads and widths
            // within 2²⁴.
            shape: shape
                .iter()
                .map(|size| u32::try_from(*size).unwrap_or(u32::MAX))
                .collect(),
        });
        Slot(self.tensors.len() - 1)
    }

    /// `{name}.weight`, and `{name}.bias` where there is one.
    pub(super) fn linear(&mut self, name: &str, [rows, cols]: [usize; 2], bias: bool) -> Linear {
        Linear {
            weight: self.tensor(&format!("{name}.weight"), &[rows, cols]),
            first_row: 0,
            rows,
            cols,
            bias: bias.then(|| self.tensor(&format!("{name}.bias"), &[rows])),
        }
    }

    /// `{name}.weight`, and `{name}.bias` where the norm has one.
    pub(super) fn norm(&mut self, name: &str, kind: NormKind, width: usize) -> Norm {
        Norm {
            kind,
            gain: self.tensor(&format!("{name}.weight"), &[width]),
            bias: kind.centred.then(|| self.tensor(&format!("{name}.bias"), &[width])),
            width,
        }
    }

    /// `{name}.q_proj` and so on.
    pub(super) fn attention(&mut self, name: &str, shape: Grouped) -> Attention {
        let (queries, keys) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let hidden = shape.hidden;
        let mut linear = |which: &str, size, bias| self.linear(&format!("{name}.{which}_proj"), size, bias);
        let q = linear("q", [queries, hidden], shape.qkv_bias);
        let k = linear("k", [keys, hidden], shape.qkv_bias);
        let v = linear("v", [keys, hidden], shape.qkv_bias);
        let o = linear("o", [hidden, queries], shape.o_bias);
        let mut norm = |which: &str| {
            let name = format!("{name}.{which}_norm");
            shape.qk_norm.map(|kind| self.norm(&name, kind, shape.head_dim))
        };
        Attention {
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            q,
            k,
            v,
            o,
            q_norm: norm("q"),
            k_norm: norm("k"),
            rotary: shape.rotary,
            window: shape.window,
            scale: shape.scale.unwrap_or(1.0 / (shape.head_dim as f32).sqrt()),
            query_scale: shape.query_scale,
        }
    }

    /// `{name}.gate_proj` and so on.
    pub(super) fn mlp(&mut self, name: &str, feed: Feed) -> Mlp {
        self.mlp_named(name, ["gate_proj", "up_proj", "down_proj"], feed)
    }

    /// As [`Part::mlp`] with names of gate, up and down.
    pub(super) fn mlp_named(&mut self, name: &str, names: [&str; 3], feed: Feed) -> Mlp {
        let Feed { hidden, wide, bias, .. } = feed;
        let mut linear = |which: &str, size| self.linear(&format!("{name}.{which}"), size, bias);
        let [gate, up, down] = names;
        Mlp {
            gate: feed.gated.then(|| linear(gate, [wide, hidden])),
            up: linear(up, [wide, hidden]),
            down: linear(down, [hidden, wide]),
            activation: feed.activation,
        }
    }
}
