//! DeepSeek V2, V3, V3.2 and Mistral 4: attention over a compressed cache, and mixtures with shared experts.

use super::super::config::{Base, Further, LLAMA_NAMES, pair};
use super::super::describe::{
    Activation, Block, Indexer, LatentAttention, LatentQuery, Mixer, NormKind, QueryScale, Sublayer,
};
use super::super::keys::{EXPERTS_MAX, HEAD_DIM_MAX, HEADS_MAX, Keys, WIDTH_MAX};
use super::super::part::{Feed, Part};
use super::super::positions::{RopeKeys, Rotary};
use super::super::routing::{Rule, Score};
use super::super::{Config, ConfigError};
use super::mixture::{Mixture, Names};

/// The norms of latents have this epsilon, whatever the configuration says of the others.
const LATENT_NORM: NormKind = NormKind::rms(1e-6);
/// Where the rotations of attention and indexer stand.
const ATTENTION_ROTARY: usize = 0;
const INDEXER_ROTARY: usize = 1;

pub(super) fn v2(keys: Keys<'_>) -> Result<Config, ConfigError> {
    keys.only_class("DeepseekV2ForCausalLM")?;
    keys.one_of("scoring_func", &["softmax"])?;
    keys.must_be("norm_topk_prob", false)?;
    let limited = match keys.value("topk_method") {
        None => false,
        Some(method) => match method.as_str() {
            Some("greedy") => false,
            Some("group_limited_greedy") => true,
            _ => return Err(keys.unsupported("topk_method", method, "greedy, group_limited_greedy")),
        },
    };
    let mut model = Latent::read(keys, "deepseek_v2", 2_048)?;
    model.mixture.rule.normalised = false;
    model.mixture.rule.group_best = 1;
    if !limited {
        (model.mixture.rule.groups, model.mixture.rule.groups_top) = (1, 1);
    }
    model.dense_blocks(keys, 0)?.build()
}

pub(super) fn v3(keys: Keys<'_>) -> Result<Config, ConfigError> {
    keys.only_class("DeepseekV3ForCausalLM")?;
    let model = Latent::read(keys, "deepseek_v3", 4_096)?.with_corrected_sigmoid(keys)?;
    with_further(keys, model.dense_blocks(keys, 3)?)
}

pub(super) fn v32(keys: Keys<'_>) -> Result<Config, ConfigError> {
    keys.only_class("DeepseekV32ForCausalLM")?;
    let mut model = Latent::read(keys, "deepseek_v32", 163_840)?.with_corrected_sigmoid(keys)?;
    if model.query_rank.is_none() {
        return Err(ConfigError::Missing { key: "q_lora_rank" });
    }
    if let Some(kinds) = keys.words("layer_types")?
        && !kinds.iter().all(|kind| *kind == "indexed_attention")
    {
        return Err(keys.wrong("layer_types", "a list of indexed_attention"));
    }
    model.index = Some(Index {
        heads: keys.size_or("index_n_heads", HEADS_MAX, 64)?,
        head_dim: keys.size_or("index_head_dim", HEAD_DIM_MAX, 128)?,
        top: keys.size_or("index_topk", WIDTH_MAX, 2_048)?,
    });
    if model.index.is_some_and(|index| index.head_dim < model.rope) {
        return Err(keys.wrong("index_head_dim", "at least qk_rope_head_dim"));
    }
    with_further(keys, model.dense_blocks(keys, 3)?)
}

/// The model with the module for further tokens, where the configuration speaks of one.
fn with_further(keys: Keys<'_>, model: Latent) -> Result<Config, ConfigError> {
    let modules = keys.count_or("num_nextn_predict_layers", WIDTH_MAX, 0)?;
    let further = (modules > 0).then(|| model.further());
    let mut config = model.build()?;
    config.further = further;
    Ok(config)
}

pub(super) fn mistral4(keys: Keys<'_>) -> Result<Config, ConfigError> {
    keys.only_class("Mistral4ForCausalLM")?;
    if keys.value("rope_parameters").or(keys.value("rope_scaling")).is_none() {
        return Err(ConfigError::Missing { key: "rope_parameters" });
    }
    let mut model = Latent::read(keys, "mistral4", 1_048_576)?;
    model.mixture.names = Names::Fused;
    model.mixture.rule.normalised = keys.flag_or("norm_topk_prob", true)?;
    model.dense_blocks(keys, 0)?.build()
}

/// A model of this kind.
#[derive(Debug, Clone)]
struct Latent {
    base: Base,
    heads: usize,
    rank: usize,
    query_rank: Option<usize>,
    nope: usize,
    rope: usize,
    value: usize,
    attention_bias: bool,
    scale: f32,
    query_scale: Option<QueryScale>,
    rotary: Rotary,
    norm: NormKind,
    mixture: Mixture,
    feed: Feed,
    index: Option<Index>,
    /// Whether a block has one perceptron in place of experts.
    dense: Vec<bool>,
}

#[derive(Debug, Clone, Copy)]
struct Index {
    heads: usize,
    head_dim: usize,
    top: usize,
}

impl Latent {
    fn read(keys: Keys<'_>, family: &'static str, context: usize) -> Result<Self, ConfigError> {
        let base = Base::read(keys, family, context, false)?;
        if let Some(every) = keys.optional_size("moe_layer_freq", WIDTH_MAX)?
            && every != 1
        {
            return Err(keys.wrong("moe_layer_freq", "1"));
        }
        let heads = keys.size("num_attention_heads", HEADS_MAX)?;
        if keys.size_or("num_key_value_heads", HEADS_MAX, heads)? != heads {
            return Err(keys.wrong("num_key_value_heads", "num_attention_heads"));
        }
        let (nope, rope) = (
            keys.size("qk_nope_head_dim", HEAD_DIM_MAX)?,
            keys.size("qk_rope_head_dim", HEAD_DIM_MAX)?,
        );
        if !rope.is_multiple_of(2) {
            return Err(keys.wrong("qk_rope_head_dim", "even"));
        }
        let positions = RopeKeys::find(keys, base.context, 10_000.0)?;
        let scale = ((nope + rope) as f64).powf(-0.5) * positions.latent_scale()?;
        let activation = keys.activation("hidden_act", Activation::Silu)?;
        let mlp_bias = keys.flag_or("mlp_bias", false)?;
        let wide = keys.size("moe_intermediate_size", WIDTH_MAX)?;
        let shared = keys.count_or("n_shared_experts", EXPERTS_MAX, 1)?;
        let experts = keys.size("n_routed_experts", EXPERTS_MAX)?;
        let groups = keys.size_or("n_group", EXPERTS_MAX, 1)?;
        let mut mixture = Mixture {
            experts,
            wide,
            activation,
            shared: (shared > 0).then_some(shared * wide),
            shared_bias: mlp_bias,
            ..Mixture::new(base.hidden, Names::EXPERTS)
        };
        mixture.rule = Rule {
            top: keys.size("num_experts_per_tok", EXPERTS_MAX)?,
            groups,
            groups_top: keys.size_or("topk_group", EXPERTS_MAX, 1)?,
            scale: keys.number("routed_scaling_factor")?.unwrap_or(1.0) as f32,
            ..mixture.rule
        };
        Ok(Self {
            base,
            heads,
            rank: keys.size("kv_lora_rank", WIDTH_MAX)?,
            query_rank: keys.optional_size("q_lora_rank", WIDTH_MAX)?,
            nope,
            rope,
            value: keys.size("v_head_dim", HEAD_DIM_MAX)?,
            attention_bias: keys.flag_or("attention_bias", false)?,
            scale: scale as f32,
            query_scale: positions.query_scale()?,
            rotary: Rotary {
                interleaved: keys.flag_or("rope_interleave", true)?,
                ..positions.rotary_of(rope)?
            },
            norm: NormKind::rms(keys.epsilon("rms_norm_eps", 1e-6)?),
            mixture,
            feed: Feed {
                hidden: base.hidden,
                wide: keys.size("intermediate_size", WIDTH_MAX)?,
                gated: true,
                bias: mlp_bias,
                activation,
            },
            index: None,
            dense: Vec::new(),
        })
    }

    /// V3's router: a sigmoid, and a correction that chooses.
    fn with_corrected_sigmoid(mut self, keys: Keys<'_>) -> Result<Self, ConfigError> {
        keys.one_of("scoring_func", &["sigmoid"])?;
        keys.one_of("topk_method", &["noaux_tc"])?;
        self.mixture.rule.score = Score::Sigmoid;
        self.mixture.rule.normalised = keys.flag_or("norm_topk_prob", true)?;
        self.mixture.correction = true;
        Ok(self)
    }

    /// The first `first_k_dense_replace` blocks, or those that `mlp_layer_types` names, have one perceptron.
    fn dense_blocks(mut self, keys: Keys<'_>, first: usize) -> Result<Self, ConfigError> {
        let first = keys.count_or("first_k_dense_replace", WIDTH_MAX, first)?;
        self.dense = (0..self.base.blocks).map(|block| block < first).collect();
        if let Some(kinds) = keys.words("mlp_layer_types")? {
            let known = kinds.iter().all(|kind| ["dense", "sparse"].contains(kind));
            if kinds.len() != self.base.blocks || !known {
                return Err(keys.wrong("mlp_layer_types", "a list of dense and sparse, one per block"));
            }
            self.dense = kinds.iter().map(|kind| *kind == "dense").collect();
        }
        self.mixture.check(keys, &self.base)?;
        Ok(self)
    }

    fn build(self) -> Result<Config, ConfigError> {
        let halves = Rotary {
            interleaved: false,
            ..self.rotary
        };
        let rotaries = match self.index {
            Some(_) => vec![self.rotary, halves],
            None => vec![self.rotary],
        };
        self.base.build(LLAMA_NAMES, self.norm, rotaries, |block, part| {
            Ok(self.block(part, self.dense.get(block).copied().unwrap_or(false)))
        })
    }

    fn block(&self, part: &mut Part, dense: bool) -> Vec<Sublayer> {
        let hidden = self.base.hidden;
        pair(
            part.norm("input_layernorm", self.norm, hidden),
            Mixer::Latent(self.attention(part)),
            part.norm("post_attention_layernorm", self.norm, hidden),
            match dense {
                true => Mixer::Mlp(part.mlp("mlp", self.feed)),
                false => Mixer::Experts(self.mixture.experts(part, "mlp")),
            },
        )
    }

    fn attention(&self, part: &mut Part) -> LatentAttention {
        let (hidden, heads, rank, bias) = (self.base.hidden, self.heads, self.rank, self.attention_bias);
        let width = heads * (self.nope + self.rope);
        let query = match self.query_rank {
            None => LatentQuery::Direct(part.linear("self_attn.q_proj", [width, hidden], false)),
            Some(query) => LatentQuery::LowRank(
                part.linear("self_attn.q_a_proj", [query, hidden], bias),
                part.norm("self_attn.q_a_layernorm", LATENT_NORM, query),
                part.linear("self_attn.q_b_proj", [width, query], false),
            ),
        };
        let kv_up = [heads * (self.nope + self.value), rank];
        LatentAttention {
            heads,
            rank,
            nope: self.nope,
            rope: self.rope,
            value: self.value,
            query,
            kv_down: part.linear("self_attn.kv_a_proj_with_mqa", [rank + self.rope, hidden], bias),
            kv_norm: part.norm("self_attn.kv_a_layernorm", LATENT_NORM, rank),
            kv_up: part.linear("self_attn.kv_b_proj", kv_up, false),
            o: part.linear("self_attn.o_proj", [hidden, heads * self.value], bias),
            rotary: ATTENTION_ROTARY,
            scale: self.scale,
            query_scale: self.query_scale,
            indexer: self.index.map(|index| self.indexer(part, index)),
        }
    }

    fn indexer(&self, part: &mut Part, index: Index) -> Indexer {
        let (name, hidden) = ("self_attn.indexer", self.base.hidden);
        let norm = NormKind {
            centred: true,
            ..LATENT_NORM
        };
        let queries = [index.heads * index.head_dim, self.query_rank.unwrap_or(hidden)];
        Indexer {
            heads: index.heads,
            head_dim: index.head_dim,
            top: index.top,
            q: part.linear(&format!("{name}.wq_b"), queries, false),
            k: part.linear(&format!("{name}.wk"), [index.head_dim, hidden], false),
            k_norm: part.norm(&format!("{name}.k_norm"), norm, index.head_dim),
            weights: part.linear(&format!("{name}.weights_proj"), [index.heads, hidden], false),
            rotary: INDEXER_ROTARY,
        }
    }

    /// The module that stands behind the last block.
    fn further(&self) -> Further {
        let (vocabulary, hidden) = (self.base.vocabulary, self.base.hidden);
        let mut part = Part::new(format!("{}.{}.", LLAMA_NAMES.blocks, self.base.blocks));
        let embedding = part.tensor("embed_tokens.weight", &[vocabulary, hidden]);
        let embedding_norm = part.norm("enorm", self.norm, hidden);
        let hidden_norm = part.norm("hnorm", self.norm, hidden);
        let join = part.linear("eh_proj", [hidden, 2 * hidden], false);
        let block = Block(self.block(&mut part, false));
        let norm = part.norm("shared_head.norm", self.norm, hidden);
        let projection = part.linear("shared_head.head", [vocabulary, hidden], false);
        Further {
            layout: part.into_layout(),
            embedding,
            embedding_norm,
            hidden_norm,
            join,
            block,
            norm,
            projection,
        }
    }
}
