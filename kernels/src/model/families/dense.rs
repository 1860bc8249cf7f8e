//! A model of equal blocks with grouped-query attention and a perceptron: what most families are a small change of.

use super::super::config::{Base, Heads, LLAMA_NAMES, pair};
use super::super::describe::{Activation, Mixer, NormKind, QueryScale};
use super::super::keys::{Keys, WIDTH_MAX};
use super::super::part::{Feed, Grouped, Part};
use super::super::positions::Rotary;
use super::super::{Config, ConfigError};

/// What a family changes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dense {
    pub(super) base: Base,
    pub(super) heads: Heads,
    pub(super) norm: NormKind,
    /// Names of the norms before attention and perceptron.
    pub(super) norms: [&'static str; 2],
    pub(super) qkv_bias: bool,
    pub(super) o_bias: bool,
    pub(super) mlp_bias: bool,
    pub(super) qk_norm: bool,
    pub(super) gated: bool,
    pub(super) activation: Activation,
    pub(super) rotary: Rotary,
    pub(super) query_scale: Option<QueryScale>,
}

/// What a family changes from block to block.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Layer {
    /// Whether its attention knows no positions.
    pub(super) without_positions: bool,
    pub(super) window: Option<usize>,
}

impl Dense {
    /// A Llama with `norm`.
    pub(super) fn new(base: Base, heads: Heads, norm: NormKind, rotary: Rotary) -> Self {
        Self {
            base,
            heads,
            norm,
            norms: ["input_layernorm", "post_attention_layernorm"],
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            gated: true,
            activation: Activation::Silu,
            rotary,
            query_scale: None,
        }
    }

    /// Attention of one block.
    pub(super) fn attention(&self, part: &mut Part, layer: Layer) -> Mixer {
        let grouped = Grouped {
            hidden: self.base.hidden,
            heads: self.heads.heads,
            kv_heads: self.heads.kv_heads,
            head_dim: self.heads.head_dim,
            qkv_bias: self.qkv_bias,
            o_bias: self.o_bias,
            qk_norm: self.qk_norm.then_some(self.norm),
            rotary: (!layer.without_positions).then_some(0),
            window: layer.window,
            scale: None,
            query_scale: self.query_scale,
        };
        Mixer::Attention(part.attention("self_attn", grouped))
    }

    /// The perceptron's shape, `intermediate_size` wide.
    pub(super) fn feed(&self, keys: Keys<'_>) -> Result<Feed, ConfigError> {
        Ok(Feed {
            hidden: self.base.hidden,
            wide: keys.size("intermediate_size", WIDTH_MAX)?,
            gated: self.gated,
            bias: self.mlp_bias,
            activation: self.activation,
        })
    }

    /// The model, `layer` saying what is special about a block.
    pub(super) fn build(self, keys: Keys<'_>, layer: impl Fn(usize) -> Layer) -> Result<Config, ConfigError> {
        let feed = self.feed(keys)?;
        self.build_with(layer, |_, part| Ok(Mixer::Mlp(part.mlp("mlp", feed))))
    }

    /// As [`Dense::build`] with another second sublayer.
    pub(super) fn build_with(
        self,
        layer: impl Fn(usize) -> Layer,
        mut second: impl FnMut(usize, &mut Part) -> Result<Mixer, ConfigError>,
    ) -> Result<Config, ConfigError> {
        let (base, hidden) = (self.base, self.base.hidden);
        base.build(LLAMA_NAMES, self.norm, vec![self.rotary], |index, part| {
            let [first_norm, second_norm] = self.norms;
            Ok(pair(
                part.norm(first_norm, self.norm, hidden),
                self.attention(part, layer(index)),
                part.norm(second_norm, self.norm, hidden),
                second(index, part)?,
            ))
        })
    }
}

/// Which blocks have a window: the list of the newer spelling, else `rule`.
pub(super) fn windows(
    keys: Keys<'_>,
    base: &Base,
    window: Option<usize>,
    rule: impl Fn(usize) -> bool,
) -> Result<Vec<Option<usize>>, ConfigError> {
    let Some(kinds) = keys.words("layer_types")? else {
        return Ok((0..base.blocks).map(|block| window.filter(|_| rule(block))).collect());
    };
    if kinds.len() != base.blocks {
        return Err(keys.wrong("layer_types", "a list of as many kinds as there are blocks"));
    }
    let one = |kind: &&str| match *kind {
        "full_attention" => Ok(None),
        "sliding_attention" => Ok(window),
        _ => Err(keys.wrong("layer_types", "a list of full_attention and sliding_attention")),
    };
    kinds.iter().map(one).collect()
}
