//! A Hugging Face `config.json`, read into a shape that cannot be wrong.
//!
//! Whatever would change the numbers and is not implemented is refused by name; nothing is ignored in silence.

use polder_protocol::layout::{Layout, PartLayout};
use serde_json::Value;
use thiserror::Error;

use super::describe::{Activation, Block, Head, Linear, Mixer, Norm, NormKind, Slot, Sublayer};
use super::families;
use super::json;
use super::keys::{BLOCKS_MAX, CONTEXT_MAX, HEAD_DIM_MAX, HEADS_MAX, Keys, VOCABULARY_MAX, WIDTH_MAX};
use super::part::Part;
use super::positions::{Rope, Rotary};

/// Why a `config.json` is not a model that runs here.
#[derive(Debug, Clone, Error, PartialEq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum ConfigError {
    #[error("the model's configuration is not a JSON object: {reason}")]
    NotJson { reason: String },
    #[error("the model's configuration lacks `{key}`")]
    Missing { key: &'static str },
    #[error("`{key}` of the model's configuration is {value}, and must be {must}")]
    Wrong {
        key: &'static str,
        value: String,
        must: &'static str,
    },
    #[error("{key} `{value}` is not implemented; implemented: {implemented}")]
    Unsupported {
        key: &'static str,
        value: String,
        implemented: &'static str,
    },
}

/// A model, checked: every size is positive and within its limit, heads divide evenly, and every weight that a block
/// names is in the layout.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The `model_type`, such as `llama`.
    pub family: &'static str,
    /// Token ids are below this.
    pub vocabulary: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Blocks.
    pub blocks: u32,
    /// Whether the output projection is the embedding.
    pub tied: bool,
    /// The longest context that the model was made for, in tokens.
    pub context_tokens_max: u32,
    /// Standard deviation of initial weights.
    pub initializer_range: f32,
    /// What embeddings are multiplied by.
    pub(crate) embedding_scale: f32,
    /// The rotations that attention refers to.
    pub(crate) rotaries: Vec<Rotary>,
    /// One per block.
    pub(crate) description: Vec<Block>,
    pub(crate) head: Head,
    /// The module that predicts one token further, where the configuration has one.
    pub(crate) further: Option<Further>,
    layout: Layout,
}

/// A module for multi-token prediction: `block(join([embedding norm; hidden norm]))`, a norm, a projection.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Further {
    pub(crate) layout: PartLayout,
    pub(crate) embedding: Slot,
    pub(crate) embedding_norm: Norm,
    pub(crate) hidden_norm: Norm,
    /// `[hidden, 2 · hidden]`
    pub(crate) join: Linear,
    pub(crate) block: Block,
    pub(crate) norm: Norm,
    pub(crate) projection: Linear,
}

/// The sizes of a model that is a plain Llama and nothing else.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama {
    /// Width of the gated layer.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Epsilon of the norms.
    pub epsilon: f32,
    /// Base of the rotary frequencies.
    pub theta: f64,
    /// Scaling of the rotary frequencies.
    pub rope: Rope,
}

impl Config {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] names the key that is missing, wrong or not implemented.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let value = json::parse(text).map_err(|error| ConfigError::NotJson {
            reason: error.to_string(),
        })?;
        let Value::Object(object) = value else {
            return Err(ConfigError::NotJson {
                reason: "another kind of value".to_owned(),
            });
        };
        families::read(Keys(&object))
    }

    /// The model's sizes where it is a plain Llama; otherwise what is not.
    ///
    /// # Errors
    ///
    /// The feature that a plain Llama does not have, in words.
    pub fn llama(&self) -> Result<Llama, String> {
        if self.family != "llama" {
            return Err(format!("a model of the family `{}`", self.family));
        }
        let (Some(Block(sublayers)), Some(rotary)) = (self.description.first(), self.rotaries.first()) else {
            return Err("a model without blocks or positions".to_owned());
        };
        let [
            Sublayer {
                norm,
                mixer: Mixer::Attention(attention),
                ..
            },
            Sublayer {
                mixer: Mixer::Mlp(mlp), ..
            },
        ] = sublayers.as_slice()
        else {
            return Err("a block of other sublayers".to_owned());
        };
        if attention.q.bias.is_some() || mlp.up.bias.is_some() {
            return Err("biases".to_owned());
        }
        if mlp.activation != Activation::Silu {
            return Err("another activation than silu".to_owned());
        }
        if rotary.dimensions != attention.head_dim {
            return Err("heads of which a part is rotated".to_owned());
        }
        Ok(Llama {
            intermediate: mlp.up.rows,
            heads: attention.heads,
            kv_heads: attention.kv_heads,
            head_dim: attention.head_dim,
            epsilon: norm.kind.epsilon,
            theta: rotary.theta,
            rope: rotary.rope,
        })
    }

    /// Whether a checkpoint's tensor is no part of the model: what is computed anyhow, a copy of the embedding, and the
    /// module that predicts one token further, which nothing here drafts with yet.
    pub(crate) fn ignores(&self, name: &str) -> bool {
        let further = self.further.iter().flat_map(|further| &further.layout.tensors);
        name.ends_with(".rotary_emb.inv_freq")
            || self.tied && name == "lm_head.weight"
            || further
                .map(|tensor| tensor.name.as_str())
                .any(|further| further == name)
    }

    /// The parts and their tensors.
    pub(super) const fn layout(&self) -> &Layout {
        &self.layout
    }
}

/// What every family's configuration says in the same words.
#[derive(Debug, Clone, Copy)]
pub(super) struct Base {
    pub(super) family: &'static str,
    pub(super) vocabulary: usize,
    pub(super) hidden: usize,
    pub(super) blocks: usize,
    pub(super) context: usize,
    pub(super) tied: bool,
    initializer_range: f32,
}

/// Heads of grouped-query attention.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
}

/// Names outside blocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Names {
    pub(super) embedding: &'static str,
    /// Put before a block's number.
    pub(super) blocks: &'static str,
    pub(super) norm: &'static str,
}

/// The names of Llama, which most families have taken.
pub(super) const LLAMA_NAMES: Names = Names {
    embedding: "model.embed_tokens",
    blocks: "model.layers",
    norm: "model.norm",
};

impl Base {
    /// `context` and `tied` are the family's defaults.
    pub(super) fn read(keys: Keys<'_>, family: &'static str, context: usize, tied: bool) -> Result<Self, ConfigError> {
        let blocks = keys.size("num_hidden_layers", BLOCKS_MAX)?;
        Self::with_blocks(keys, family, blocks, context, tied)
    }

    /// Where the number of blocks stands elsewhere.
    pub(super) fn with_blocks(
        keys: Keys<'_>,
        family: &'static str,
        blocks: usize,
        context: usize,
        tied: bool,
    ) -> Result<Self, ConfigError> {
        let initializer_range = keys.number("initializer_range")?.unwrap_or(0.02);
        if !(0.0..=10.0).contains(&initializer_range) {
            return Err(keys.wrong("initializer_range", "a number from 0 to 10"));
        }
        Ok(Self {
            family,
            vocabulary: keys.size("vocab_size", VOCABULARY_MAX)?,
            hidden: keys.size("hidden_size", WIDTH_MAX)?,
            blocks,
            context: keys.size_or("max_position_embeddings", CONTEXT_MAX, context)?,
            tied: keys.flag_or("tie_word_embeddings", tied)?,
            initializer_range: initializer_range as f32,
        })
    }

    /// Heads; those of keys and values default to `kv_heads`, or to as many as of queries.
    pub(super) fn heads(&self, keys: Keys<'_>, kv_heads: Option<usize>) -> Result<Heads, ConfigError> {
        let heads = keys.size("num_attention_heads", HEADS_MAX)?;
        let kv_heads = match keys.has("num_key_value_heads") {
            // Null means as many as of queries, whatever the family's default.
            true => keys.size_or("num_key_value_heads", HEADS_MAX, heads)?,
            false => kv_heads.unwrap_or(heads),
        };
        if !heads.is_multiple_of(kv_heads) {
            return Err(keys.wrong("num_key_value_heads", "a divisor of num_attention_heads"));
        }
        let head_dim = match keys.optional_size("head_dim", HEAD_DIM_MAX)? {
            Some(head_dim) => head_dim,
            None if self.hidden.is_multiple_of(heads) => self.hidden / heads,
            None => return Err(keys.wrong("hidden_size", "a multiple of num_attention_heads, or head_dim given")),
        };
        if !head_dim.is_multiple_of(2) {
            return Err(keys.wrong("head_dim", "even"));
        }
        Ok(Heads {
            heads,
            kv_heads,
            head_dim,
        })
    }

    /// Builds a model from its blocks; `block` names the tensors of one.
    pub(super) fn build(
        self,
        names: Names,
        norm: NormKind,
        rotaries: Vec<Rotary>,
        mut block: impl FnMut(usize, &mut Part) -> Result<Vec<Sublayer>, ConfigError>,
    ) -> Result<Config, ConfigError> {
        let mut embedding = Part::new("");
        embedding.tensor(&format!("{}.weight", names.embedding), &[self.vocabulary, self.hidden]);
        let mut parts = vec![embedding.into_layout()];
        let mut description = Vec::with_capacity(self.blocks);
        for index in 0..self.blocks {
            let mut part = Part::new(format!("{}.{index}.", names.blocks));
            description.push(Block(block(index, &mut part)?));
            parts.push(part.into_layout());
        }
        let mut end = Part::new("");
        let head = Head {
            norm: end.norm(names.norm, norm, self.hidden),
            projection: (!self.tied).then(|| end.linear("lm_head", [self.vocabulary, self.hidden], false)),
        };
        parts.push(end.into_layout());
        Ok(Config {
            family: self.family,
            vocabulary: self.vocabulary,
            hidden: self.hidden,
            // Within `BLOCKS_MAX` and `CONTEXT_MAX`.
            blocks: self.blocks as u32,
            tied: self.tied,
            context_tokens_max: self.context as u32,
            initializer_range: self.initializer_range,
            embedding_scale: 1.0,
            rotaries,
            description,
            head,
            further: None,
            layout: Layout { parts },
        })
    }
}

/// A block as most families have it: attention, then a perceptron, each behind a norm.
pub(super) fn pair(attention_norm: Norm, attention: Mixer, mlp_norm: Norm, mlp: Mixer) -> Vec<Sublayer> {
    [(attention_norm, attention), (mlp_norm, mlp)]
        .into_iter()
        .map(|(norm, mixer)| Sublayer {
            norm,
            mixer,
            after: None,
        })
        .collect()
}
