//! Where each tensor of a Hugging Face folder is in a GGUF file, and in what form.

use super::architecture::Architecture;
use crate::model::Config;
use crate::model::describe::{Block, LatentAttention, Mamba, Mixer};

/// A tensor's place.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Place {
    /// The tensor of the GGUF file, or its only one.
    pub(super) ggml: String,
    pub(super) form: Form,
}

/// How a tensor is stored.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Form {
    /// The same bytes in the same shape.
    Same,
    /// Rows of heads whose two halves are interleaved.
    Interleaved { heads: usize },
    /// The gain of a norm, one larger.
    Whole,
    /// One of the matrices that are stacked in one tensor.
    Expert { index: usize, experts: usize },
    /// The way up from a latent, in two tensors: that of keys, turned, under the place's name, and that of values.
    Latent(Up),
    /// `-exp` of the tensor, in a column.
    Decay { heads: usize },
    /// The same numbers in another shape, as F32.
    Reshaped { folder: Vec<usize>, ggml: Vec<usize> },
    /// A number of the metadata, one for each block; the place's name is the key.
    Parameter { block: usize, shape: Vec<usize> },
}

/// Sizes of the way up from a latent: `[heads · (nope + value), rank]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Up {
    pub(super) heads: usize,
    pub(super) nope: usize,
    pub(super) value: usize,
    pub(super) rank: usize,
}

/// The sublayers of a model, in order.
pub(super) fn mixers(config: &Config) -> impl Iterator<Item = &Mixer> {
    config.description.iter().flat_map(mixers_of)
}

fn mixers_of(Block(sublayers): &Block) -> impl Iterator<Item = &Mixer> {
    sublayers.iter().map(|sublayer| &sublayer.mixer)
}

/// The places of a model's tensors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Places<'c> {
    pub(super) architecture: Architecture,
    pub(super) config: &'c Config,
}

impl Places<'_> {
    /// The place of a tensor; `None` where GGUF has none for it.
    pub(super) fn of(&self, name: &str) -> Option<Place> {
        if let Some((_, ggml)) = ENDS.iter().find(|(known, _)| *known == name) {
            return Some(place((*ggml).to_owned(), self.gain(name)));
        }
        let (block, name) = BLOCKS
            .iter()
            .find_map(|prefix| name.strip_prefix(prefix))?
            .split_once('.')?;
        let index: usize = block.parse().ok()?;
        let description = self.config.description.get(index)?;
        if let Some((_, key, shape)) = PARAMETERS.iter().find(|(known, ..)| *known == name) {
            let form = Form::Parameter {
                block: index,
                shape: shape.to_vec(),
            };
            return Some(place((*key).to_owned(), form));
        }
        if let Some((_, expert)) = name.split_once(".experts.") {
            let (expert, weight) = expert.split_once('.')?;
            let (_, ggml) = EXPERTS.iter().find(|(known, _)| *known == weight)?;
            let experts = mixers_of(description).find_map(|mixer| match mixer {
                Mixer::Experts(experts) => Some(experts.experts.len()),
                _ => None,
            })?;
            let form = Form::Expert {
                index: expert.parse().ok()?,
                experts,
            };
            return Some(place(format!("blk.{block}.{ggml}.weight"), form));
        }
        if let Some((_, ggml)) = WHOLE_NAMES.iter().find(|(known, _)| *known == name) {
            let form = match *ggml {
                "ssm_a" => Form::Decay {
                    heads: mamba(description)?.heads,
                },
                "ssm_d" => {
                    let heads = mamba(description)?.heads;
                    reshaped(&[heads], &[heads, 1])
                }
                _ => Form::Same,
            };
            return Some(place(format!("blk.{block}.{ggml}"), form));
        }
        let (stem, kind) = name.rsplit_once('.')?;
        if !["weight", "bias"].contains(&kind) {
            return None;
        }
        let own = OF_GEMMA.iter().filter(|_| self.architecture.name == "gemma3");
        let (_, ggml) = own.chain(&IN_BLOCK).find(|(known, _)| *known == stem)?;
        let form = match stem {
            "self_attn.q_proj" if self.architecture.rows_moved => heads(description, Of::Queries)?,
            "self_attn.k_proj" if self.architecture.rows_moved => heads(description, Of::Keys)?,
            "self_attn.kv_b_proj" => Form::Latent(up(latent(description)?)),
            "mixer.conv1d" if kind == "weight" => {
                let mamba = mamba(description)?;
                let (channels, taps) = (mamba.channels(), mamba.taps);
                reshaped(&[channels, 1, taps], &[channels, taps])
            }
            "mixer.norm" => {
                let mamba = mamba(description)?;
                reshaped(&[mamba.inner()], &[mamba.groups, mamba.inner() / mamba.groups.max(1)])
            }
            _ => self.gain(name),
        };
        Some(place(format!("blk.{block}.{ggml}.{kind}"), form))
    }

    fn gain(&self, name: &str) -> Form {
        match self.architecture.gains_whole && name.ends_with("norm.weight") {
            true => Form::Whole,
            false => Form::Same,
        }
    }
}

const fn place(ggml: String, form: Form) -> Place {
    Place { ggml, form }
}

impl Place {
    /// The second tensor of a way up from a latent.
    pub(super) fn of_values(&self) -> String {
        self.ggml.replace(".attn_k_b.", ".attn_v_b.")
    }

    /// The one tensor that older files have in place of those two.
    pub(super) fn of_both(&self) -> String {
        self.ggml.replace(".attn_k_b.", ".attn_kv_b.")
    }
}

#[derive(Clone, Copy)]
enum Of {
    Queries,
    Keys,
}

fn heads(block: &Block, of: Of) -> Option<Form> {
    mixers_of(block).find_map(|mixer| match (mixer, of) {
        (Mixer::Attention(attention), Of::Queries) => Some(Form::Interleaved { heads: attention.heads }),
        (Mixer::Attention(attention), Of::Keys) => Some(Form::Interleaved {
            heads: attention.kv_heads,
        }),
        _ => None,
    })
}

fn latent(block: &Block) -> Option<&LatentAttention> {
    mixers_of(block).find_map(|mixer| match mixer {
        Mixer::Latent(latent) => Some(latent),
        _ => None,
    })
}

const fn up(latent: &LatentAttention) -> Up {
    Up {
        heads: latent.heads,
        nope: latent.nope,
        value: latent.value,
        rank: latent.rank,
    }
}

fn mamba(block: &Block) -> Option<&Mamba> {
    mixers_of(block).find_map(|mixer| match mixer {
        Mixer::Mamba(mamba) => Some(mamba),
        _ => None,
    })
}

fn reshaped(folder: &[usize], ggml: &[usize]) -> Form {
    Form::Reshaped {
        folder: folder.to_vec(),
        ggml: ggml.to_vec(),
    }
}

/// Put before a block's number.
const BLOCKS: [&str; 2] = ["model.layers.", "backbone.layers."];

/// Names outside blocks: the folder's, and ggml's.
const ENDS: [(&str, &str); 7] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("model.norm.bias", "output_norm.bias"),
    ("lm_head.weight", "output.weight"),
    ("backbone.embeddings.weight", "token_embd.weight"),
    ("backbone.norm_f.weight", "output_norm.weight"),
    ("backbone.norm_f.bias", "output_norm.bias"),
];

/// Names within a block, before `.weight` or `.bias`.
const IN_BLOCK: [(&str, &str); 40] = [
    ("input_layernorm", "attn_norm"),
    ("attention_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.q_a_proj", "attn_q_a"),
    ("self_attn.q_a_layernorm", "attn_q_a_norm"),
    ("self_attn.q_b_proj", "attn_q_b"),
    ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
    ("self_attn.kv_a_layernorm", "attn_kv_a_norm"),
    ("self_attn.kv_b_proj", "attn_k_b"),
    ("post_attention_layernorm", "ffn_norm"),
    ("feedforward_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.gate", "ffn_gate_inp"),
    ("block_sparse_moe.gate", "ffn_gate_inp"),
    ("mlp.shared_experts.gate_proj", "ffn_gate_shexp"),
    ("mlp.shared_experts.up_proj", "ffn_up_shexp"),
    ("mlp.shared_experts.down_proj", "ffn_down_shexp"),
    ("norm", "attn_norm"),
    ("mixer.q_proj", "attn_q"),
    ("mixer.k_proj", "attn_k"),
    ("mixer.v_proj", "attn_v"),
    ("mixer.o_proj", "attn_output"),
    ("mixer.up_proj", "ffn_up"),
    ("mixer.down_proj", "ffn_down"),
    ("mixer.gate", "ffn_gate_inp"),
    ("mixer.shared_experts.up_proj", "ffn_up_shexp"),
    ("mixer.shared_experts.down_proj", "ffn_down_shexp"),
    ("mixer.fc1_latent_proj", "ffn_latent_down"),
    ("mixer.fc2_latent_proj", "ffn_latent_up"),
    ("mixer.in_proj", "ssm_in"),
    ("mixer.conv1d", "ssm_conv1d"),
    ("mixer.norm", "ssm_norm"),
    ("mixer.out_proj", "ssm_out"),
];

/// Gemma has norms after sublayers too.
const OF_GEMMA: [(&str, &str); 3] = [
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];

/// Whole names within a block.
const WHOLE_NAMES: [(&str, &str); 5] = [
    ("mlp.gate.e_score_correction_bias", "exp_probs_b.bias"),
    ("mixer.gate.e_score_correction_bias", "exp_probs_b.bias"),
    ("mixer.dt_bias", "ssm_dt.bias"),
    ("mixer.A_log", "ssm_a"),
    ("mixer.D", "ssm_d"),
];

/// Names of an expert's matrices.
const EXPERTS: [(&str, &str); 6] = [
    ("gate_proj.weight", "ffn_gate_exps"),
    ("up_proj.weight", "ffn_up_exps"),
    ("down_proj.weight", "ffn_down_exps"),
    ("w1.weight", "ffn_gate_exps"),
    ("w3.weight", "ffn_up_exps"),
    ("w2.weight", "ffn_down_exps"),
];

/// Tensors of one number that are metadata, and their shapes.
const PARAMETERS: [(&str, &str, &[usize]); 4] = [
    ("mlp.act_fn.alpha_p", "xielu.alpha_p", &[1]),
    ("mlp.act_fn.alpha_n", "xielu.alpha_n", &[1]),
    ("mlp.act_fn.beta", "xielu.beta", &[]),
    ("mlp.act_fn.eps", "xielu.eps", &[]),
];
