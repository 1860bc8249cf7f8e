//! Nemotron-H (Nemotron 3, SOOFI S, Luciole 8B): Mamba-2, experts, perceptrons and a little attention, one per block.

use super::super::config::{Base, Names};
use super::super::describe::{Activation, Mamba, Mixer, NormKind, Sublayer};
use super::super::keys::{BLOCKS_MAX, EXPERTS_MAX, HEAD_DIM_MAX, HEADS_MAX, Keys, WIDTH_MAX};
use super::super::part::{Feed, Grouped, Part};
use super::super::routing::{Rule, Score};
use super::super::{Config, ConfigError};
use super::mixture::{Mixture, Names as ExpertNames};

const NAMES: Names = Names {
    embedding: "backbone.embeddings",
    blocks: "backbone.layers",
    norm: "backbone.norm_f",
};
/// The largest convolution that a model has is of four taps.
const TAPS_MAX: u64 = 64;

/// What a block does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Mamba,
    Experts,
    Attention,
    Mlp,
}

pub(super) fn read(keys: Keys<'_>) -> Result<Config, ConfigError> {
    keys.only_class("NemotronHForCausalLM")?;
    keys.must_be("attention_bias", false)?;
    // The published code says that the head is the embedding, and transformers keeps one of its own.
    keys.must_be("tie_word_embeddings", false)?;
    keys.must_be_absent(&["sliding_window"])?;
    keys.one_of("mamba_hidden_act", &["silu"])?;
    let kinds = kinds(keys)?;
    let base = Base::with_blocks(keys, "nemotron_h", kinds.len(), 4_096, false)?;
    let norm = NormKind::rms(keys.epsilon("layer_norm_epsilon", 1e-5)?);
    let shapes = Shapes::read(keys, base, norm, &kinds)?;
    base.build(NAMES, norm, Vec::new(), |block, part| {
        Ok(vec![Sublayer {
            norm: part.norm("norm", norm, base.hidden),
            mixer: shapes.mixer(part, kinds[block])?,
            after: None,
        }])
    })
}

/// A list of words, or a text with a letter for each block.
fn kinds(keys: Keys<'_>) -> Result<Vec<Kind>, ConfigError> {
    let of_words = |key, words: Vec<&str>| {
        let one = |word: &&str| match *word {
            "linear_attention" | "mamba" => Ok(Kind::Mamba),
            "moe" => Ok(Kind::Experts),
            "full_attention" | "attention" => Ok(Kind::Attention),
            "mlp" => Ok(Kind::Mlp),
            _ => Err(keys.wrong(key, "a list of linear_attention, full_attention, moe and mlp")),
        };
        words.iter().map(one).collect::<Result<Vec<_>, _>>()
    };
    let kinds = if let Some(words) = keys.words("layers_block_type")? {
        of_words("layers_block_type", words)?
    } else if let Some(words) = keys.words("layer_types")? {
        of_words("layer_types", words)?
    } else {
        let key = "hybrid_override_pattern";
        let pattern = keys.value(key).ok_or(ConfigError::Missing { key })?;
        let letter = |letter| match letter {
            'M' => Ok(Kind::Mamba),
            'E' => Ok(Kind::Experts),
            '*' => Ok(Kind::Attention),
            '-' => Ok(Kind::Mlp),
            _ => Err(keys.wrong(key, "a text of the letters M, E, * and -")),
        };
        let letters = pattern.as_str().unwrap_or("?");
        letters.chars().map(letter).collect::<Result<Vec<_>, _>>()?
    };
    if kinds.is_empty() || kinds.len() as u64 > BLOCKS_MAX {
        return Err(keys.wrong("num_hidden_layers", "a number of blocks within reason"));
    }
    Ok(kinds)
}

/// What blocks of each kind are made of, as far as the model has such blocks.
struct Shapes {
    attention: Option<Grouped>,
    mamba: Option<MambaShape>,
    mixture: Option<Mixture>,
    feed: Option<Feed>,
}

#[derive(Debug, Clone, Copy)]
struct MambaShape {
    hidden: usize,
    heads: usize,
    head_dim: usize,
    groups: usize,
    state: usize,
    taps: usize,
    norm: NormKind,
    bias: bool,
    conv_bias: bool,
}

impl Shapes {
    fn read(keys: Keys<'_>, base: Base, norm: NormKind, kinds: &[Kind]) -> Result<Self, ConfigError> {
        let has = |kind| kinds.contains(&kind);
        let activation = keys.activation("mlp_hidden_act", Activation::SquaredRelu)?;
        let feed = Feed {
            hidden: base.hidden,
            wide: 1,
            gated: false,
            bias: keys.flag_or("mlp_bias", false)?,
            activation,
        };
        let mut shapes = Self {
            attention: None,
            mamba: None,
            mixture: None,
            feed: None,
        };
        if has(Kind::Attention) {
            let heads = base.heads(keys, Some(8))?;
            shapes.attention = Some(Grouped {
                hidden: base.hidden,
                heads: heads.heads,
                kv_heads: heads.kv_heads,
                // Older configurations name it so.
                head_dim: match keys.optional_size("head_dim", HEAD_DIM_MAX)? {
                    Some(width) => width,
                    None => keys.size_or("attention_head_dim", HEAD_DIM_MAX, 128)?,
                },
                qkv_bias: false,
                o_bias: false,
                qk_norm: None,
                rotary: None,
                window: None,
                scale: None,
                query_scale: None,
            });
        }
        if has(Kind::Mamba) {
            shapes.mamba = Some(MambaShape::read(keys, base.hidden, norm)?);
        }
        if has(Kind::Experts) {
            let mixture = mixture(keys, &base, feed)?;
            mixture.check(keys, &base)?;
            shapes.mixture = Some(mixture);
        }
        if has(Kind::Mlp) {
            shapes.feed = Some(Feed {
                wide: keys.size("intermediate_size", WIDTH_MAX)?,
                ..feed
            });
        }
        Ok(shapes)
    }

    fn mixer(&self, part: &mut Part, kind: Kind) -> Result<Mixer, ConfigError> {
        let missing = ConfigError::Missing {
            key: "layers_block_type",
        };
        let mixer = match kind {
            Kind::Attention => self
                .attention
                .map(|shape| Mixer::Attention(part.attention("mixer", shape))),
            Kind::Mamba => self.mamba.map(|shape| Mixer::Mamba(shape.mamba(part))),
            Kind::Experts => self
                .mixture
                .map(|mixture| Mixer::Experts(mixture.experts(part, "mixer"))),
            Kind::Mlp => self.feed.map(|feed| Mixer::Mlp(part.mlp("mixer", feed))),
        };
        mixer.ok_or(missing)
    }
}

fn mixture(keys: Keys<'_>, base: &Base, feed: Feed) -> Result<Mixture, ConfigError> {
    let shared = keys.count_or("n_shared_experts", EXPERTS_MAX, 1)?;
    let latent = keys.optional_size("moe_latent_size", WIDTH_MAX)?;
    let mut mixture = Mixture {
        experts: keys.size("n_routed_experts", EXPERTS_MAX)?,
        correction: true,
        wide: keys.size("moe_intermediate_size", WIDTH_MAX)?,
        gated: false,
        activation: feed.activation,
        shared: match shared {
            0 => None,
            _ => Some(keys.size("moe_shared_expert_intermediate_size", WIDTH_MAX)?),
        },
        shared_bias: feed.bias,
        latent,
        ..Mixture::new(base.hidden, ExpertNames::EXPERTS)
    };
    mixture.rule = Rule {
        score: Score::Sigmoid,
        top: keys.size_or("num_experts_per_tok", EXPERTS_MAX, 2)?,
        groups: keys.size_or("n_group", EXPERTS_MAX, 1)?,
        groups_top: keys.size_or("topk_group", EXPERTS_MAX, 1)?,
        normalised: keys.flag_or("norm_topk_prob", true)?,
        scale: keys.number("routed_scaling_factor")?.unwrap_or(1.0) as f32,
        ..mixture.rule
    };
    Ok(mixture)
}

impl MambaShape {
    fn read(keys: Keys<'_>, hidden: usize, norm: NormKind) -> Result<Self, ConfigError> {
        let heads = keys.size("mamba_num_heads", HEADS_MAX)?;
        let groups_key = if keys.has("n_groups") {
            "n_groups"
        } else {
            "mamba_n_groups"
        };
        let groups = keys.size_or(groups_key, HEADS_MAX, 8)?;
        if !heads.is_multiple_of(groups) {
            return Err(keys.wrong(groups_key, "a divisor of mamba_num_heads"));
        }
        let taps_key = if keys.has("conv_kernel") {
            "conv_kernel"
        } else {
            "mamba_d_conv"
        };
        let bias_key = if keys.has("use_conv_bias") {
            "use_conv_bias"
        } else {
            "mamba_conv_bias"
        };
        Ok(Self {
            hidden,
            heads,
            head_dim: keys.size("mamba_head_dim", HEAD_DIM_MAX)?,
            groups,
            state: keys.size("ssm_state_size", HEAD_DIM_MAX)?,
            taps: keys.size_or(taps_key, TAPS_MAX, 4)?,
            norm,
            bias: keys.flag_or("use_bias", false)?,
            conv_bias: keys.flag_or(bias_key, true)?,
        })
    }

    fn mamba(self, part: &mut Part) -> Mamba {
        let inner = self.heads * self.head_dim;
        let channels = inner + 2 * self.groups * self.state;
        Mamba {
            heads: self.heads,
            head_dim: self.head_dim,
            groups: self.groups,
            state: self.state,
            taps: self.taps,
            in_proj: part.linear("mixer.in_proj", [inner + channels + self.heads, self.hidden], self.bias),
            conv: part.tensor("mixer.conv1d.weight", &[channels, 1, self.taps]),
            conv_bias: self.conv_bias.then(|| part.tensor("mixer.conv1d.bias", &[channels])),
            dt_bias: part.tensor("mixer.dt_bias", &[self.heads]),
            a_log: part.tensor("mixer.A_log", &[self.heads]),
            d: part.tensor("mixer.D", &[self.heads]),
            norm: part.norm("mixer.norm", self.norm, inner),
            out_proj: part.linear("mixer.out_proj", [self.hidden, inner], self.bias),
        }
    }
}
