//! A Llama, Mistral or Qwen in a GGUF file, as its Hugging Face folder would have it: names, row order, configuration.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use serde_json::{Map, Value, json};

use super::gguf_tokenizer::{self, GgufTokenizer};
use super::import::{ModelSource, Tensors};
use super::{Gguf, GgufError, TensorSource, WeightsError, source};
use crate::quant::PackedBytes;

/// Opens a GGUF file as a model.
pub(super) fn open(path: &Path) -> Result<ModelSource, WeightsError> {
    let file = GgufFile::open(path)?;
    let config = file.config()?;
    let GgufTokenizer {
        json,
        chat_template,
        end_tokens,
        begin_token,
    } = gguf_tokenizer::build(&file)?;
    let architecture = file.architecture()?;
    let heads = file.required_whole(&architecture.key("attention.head_count"))?;
    let kv_heads = file
        .whole(&architecture.key("attention.head_count_kv"))?
        .unwrap_or(heads);
    let names = file.names()?;
    Ok(ModelSource {
        name: model_name(path),
        config_path: path.to_owned(),
        config_json: serde_json::to_string_pretty(&config).unwrap_or_default(),
        tokenizer_json: json,
        chat_template,
        end_tokens,
        begin_token,
        tensors: Box::new(GgufTensors {
            file,
            names,
            moved: architecture.rows_moved.then_some((heads, kv_heads)),
        }),
    })
}

/// An architecture of GGUF files, and the family that it is.
#[derive(Debug, Clone, Copy)]
struct Architecture {
    /// In `general.architecture`, and before the keys of the metadata.
    name: &'static str,
    family: &'static str,
    class: &'static str,
    /// Whether rows of queries and keys stand in an order of their own.
    rows_moved: bool,
}

/// Those that are read. Mistral's files call themselves llama.
const ARCHITECTURES: [Architecture; 3] = [
    Architecture {
        name: "llama",
        family: "llama",
        class: "LlamaForCausalLM",
        rows_moved: true,
    },
    Architecture {
        name: "qwen2",
        family: "qwen2",
        class: "Qwen2ForCausalLM",
        rows_moved: false,
    },
    Architecture {
        name: "qwen3",
        family: "qwen3",
        class: "Qwen3ForCausalLM",
        rows_moved: false,
    },
];

impl Architecture {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.name)
    }
}

/// A mapped GGUF file.
pub(super) struct GgufFile {
    pub(super) path: PathBuf,
    pub(super) map: Arc<Mmap>,
    pub(super) header: Gguf,
}

impl GgufFile {
    pub(super) fn open(path: &Path) -> Result<Self, WeightsError> {
        let map = source::map(path)?;
        let header = Gguf::parse(&map).map_err(at(path))?;
        Ok(Self {
            path: path.to_owned(),
            map,
            header,
        })
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>, WeightsError> {
        self.header.text(&self.map, key).map_err(at(&self.path))
    }

    pub(super) fn texts(&self, key: &str) -> Result<Option<Vec<&str>>, WeightsError> {
        self.header.texts(&self.map, key).map_err(at(&self.path))
    }

    pub(super) fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, WeightsError> {
        self.header.numbers(&self.map, key).map_err(at(&self.path))
    }

    pub(super) fn whole(&self, key: &str) -> Result<Option<u64>, WeightsError> {
        self.header.whole(key).map_err(at(&self.path))
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, WeightsError> {
        self.header.number(key).map_err(at(&self.path))
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, WeightsError> {
        self.header.flag(key).map_err(at(&self.path))
    }

    pub(super) fn missing(&self, key: &str) -> WeightsError {
        at(&self.path)(GgufError::Missing { key: key.to_owned() })
    }

    pub(super) fn feature(&self, feature: impl Into<String>) -> WeightsError {
        WeightsError::Feature {
            path: self.path.clone(),
            feature: feature.into(),
        }
    }

    fn required_whole(&self, key: &str) -> Result<u64, WeightsError> {
        self.whole(key)?.ok_or_else(|| self.missing(key))
    }

    fn architecture(&self) -> Result<Architecture, WeightsError> {
        let name = self.text("general.architecture")?;
        let name = name.ok_or_else(|| self.missing("general.architecture"))?;
        let known = ARCHITECTURES.iter().find(|known| known.name == name);
        known.copied().ok_or_else(|| WeightsError::Architecture {
            path: self.path.clone(),
            architecture: name.chars().take(64).collect(),
        })
    }

    /// The `config.json` that the metadata describes.
    pub(super) fn config(&self) -> Result<Value, WeightsError> {
        let architecture = self.architecture()?;
        let key = |name: &str| architecture.key(name);
        for feature in [
            "expert_count",
            "attention.sliding_window",
            "attention.temperature_scale",
        ] {
            if self.number(&key(feature))?.unwrap_or(0.0) > 0.0 {
                return Err(self.feature(format!("`{}`", key(feature))));
            }
        }
        let hidden = self.required_whole(&key("embedding_length"))?;
        let heads = self.required_whole(&key("attention.head_count"))?;
        let context = self.required_whole(&key("context_length"))?;
        let from_heads = hidden.checked_div(heads);
        let head_dim = self.whole(&key("attention.key_length"))?.or(from_heads);
        let head_dim = head_dim.ok_or_else(|| self.missing(&key("attention.key_length")))?;
        let values = self.whole(&key("attention.value_length"))?.unwrap_or(head_dim);
        let rotated = self.whole(&key("rope.dimension_count"))?.unwrap_or(head_dim);
        if values != head_dim || rotated != head_dim {
            return Err(self.feature(format!(
                "heads of {head_dim} with values of {values} and {rotated} rotated dimensions"
            )));
        }
        let tensors = self.header.tensors();
        let embedding = tensors.get("token_embd.weight");
        let embedding = embedding.ok_or_else(|| WeightsError::MissingTensor {
            path: self.path.clone(),
            tensor: "token_embd.weight".to_owned(),
        })?;
        let theta = self.number(&key("rope.freq_base"))?.unwrap_or(10_000.0);
        let mut config = json!({
            "architectures": [architecture.class],
            "model_type": architecture.family,
            "hidden_size": hidden,
            "intermediate_size": self.required_whole(&key("feed_forward_length"))?,
            "num_hidden_layers": self.required_whole(&key("block_count"))?,
            "num_attention_heads": heads,
            "num_key_value_heads": self.whole(&key("attention.head_count_kv"))?.unwrap_or(heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "attention_bias": architecture.family != "qwen2" && tensors.contains_key("blk.0.attn_q.bias"),
            "mlp_bias": tensors.contains_key("blk.0.ffn_gate.bias"),
            "rms_norm_eps": self.number(&key("attention.layer_norm_rms_epsilon"))?.unwrap_or(1e-5),
            "rope_theta": theta,
            "max_position_embeddings": context,
            "sliding_window": null,
            "vocab_size": embedding.shape.first(),
            "tie_word_embeddings": !tensors.contains_key("output.weight"),
        });
        for (key, name) in [
            ("bos_token_id", "tokenizer.ggml.bos_token_id"),
            ("eos_token_id", "tokenizer.ggml.eos_token_id"),
        ] {
            if let Some(token) = self.whole(name)? {
                config[key] = json!(token);
            }
        }
        if let Some(scaling) = self.rope_scaling(architecture, head_dim, theta, context)? {
            config["rope_scaling"] = scaling;
        }
        Ok(config)
    }

    fn rope_scaling(
        &self,
        architecture: Architecture,
        head_dim: u64,
        theta: f64,
        context: u64,
    ) -> Result<Option<Value>, WeightsError> {
        let key = |name: &str| architecture.key(name);
        if let Some(factors) = self.header.tensors().get("rope_freqs.weight") {
            let bytes = PackedBytes::mapped(Arc::clone(&self.map), factors.range.clone());
            let tensor = bytes.map(|bytes| TensorSource {
                ty: factors.ty,
                shape: factors.shape.clone(),
                bytes,
            });
            let values = tensor.and_then(|tensor| tensor.to_f32().ok()).unwrap_or_default();
            return llama3_scaling(&values, head_dim, theta)
                .map(Some)
                .ok_or_else(|| self.feature("`rope_freqs.weight` that are not Llama 3.1's"));
        }
        let Some(kind) = self.text(&key("rope.scaling.type"))? else {
            return Ok(None);
        };
        let factor = self.number(&key("rope.scaling.factor"))?.unwrap_or(1.0);
        match kind {
            "none" => Ok(None),
            "linear" => Ok(Some(json!({"rope_type": "linear", "factor": factor}))),
            "yarn" => {
                let original = self
                    .whole(&key("rope.scaling.original_context_length"))?
                    .unwrap_or(context);
                Ok(Some(json!({
                    "rope_type": "yarn",
                    "factor": factor,
                    "original_max_position_embeddings": original,
                })))
            }
            other => Err(self.feature(format!("rope scaling `{}`", other.chars().take(32).collect::<String>()))),
        }
    }

    /// ggml names by Hugging Face name.
    fn names(&self) -> Result<BTreeMap<String, String>, WeightsError> {
        let mut names = BTreeMap::new();
        for name in self.header.tensors().keys() {
            if name == "rope_freqs.weight" {
                continue; // Already in the configuration.
            }
            let known = hugging_face_name(name).ok_or_else(|| WeightsError::UnknownTensor {
                path: self.path.clone(),
                tensor: name.clone(),
            })?;
            names.insert(known, name.clone());
        }
        Ok(names)
    }
}

/// For `map_err`: which file.
fn at(path: &Path) -> impl FnOnce(GgufError) -> WeightsError {
    let path = path.to_owned();
    move |source| WeightsError::Gguf { path, source }
}

struct GgufTensors {
    file: GgufFile,
    names: BTreeMap<String, String>,
    /// Heads of queries and of keys, where their rows stand in GGUF's own order.
    moved: Option<(u64, u64)>,
}

impl Tensors for GgufTensors {
    fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    fn tensor(&self, name: &str) -> Result<TensorSource, WeightsError> {
        let missing = || WeightsError::MissingTensor {
            path: self.file.path.clone(),
            tensor: name.to_owned(),
        };
        let ggml = self.names.get(name).ok_or_else(missing)?;
        let entry = self.file.header.tensors().get(ggml).ok_or_else(missing)?;
        let bytes = PackedBytes::mapped(Arc::clone(&self.file.map), entry.range.clone()).ok_or_else(missing)?;
        let of = |which: &str| {
            [".weight", ".bias"]
                .iter()
                .any(|end| name.ends_with(&format!("{which}_proj{end}")))
        };
        let heads = match self.moved {
            Some((heads, _)) if of("q") => Some(heads),
            Some((_, kv_heads)) if of("k") => Some(kv_heads),
            _ => None,
        };
        let bytes = match heads {
            None => bytes,
            Some(heads) => {
                let rows = entry.shape.first().copied().unwrap_or(0);
                halves_apart(&bytes, rows, heads)
                    .ok_or_else(|| WeightsError::Shape {
                        path: self.file.path.clone(),
                        tensor: ggml.clone(),
                        expected: vec![usize::try_from(heads).unwrap_or(usize::MAX), 2],
                        found: entry.shape.clone(),
                    })?
                    .into()
            }
        };
        Ok(TensorSource {
            ty: entry.ty,
            shape: entry.shape.clone(),
            bytes,
        })
    }

    fn place(&self) -> &Path {
        &self.file.path
    }
}

/// Undoes the order of rows that GGUF gives to query and key projections of the llama architecture: there the two
/// halves of a head, which rotate together, are interleaved. Whole packed rows move.
///
/// `None` where the rows are not `heads` heads of an even width.
fn halves_apart(bytes: &[u8], rows: usize, heads: u64) -> Option<Vec<u8>> {
    let heads = usize::try_from(heads).ok()?;
    let half = rows.checked_div(heads)? / 2;
    if half == 0 || half * 2 * heads != rows {
        return None;
    }
    let row_bytes = bytes.len() / rows;
    let mut moved = Vec::with_capacity(bytes.len());
    for head in 0..heads {
        for row in (0..2).flat_map(|side| (0..half).map(move |i| 2 * i + side)) {
            moved.extend_from_slice(bytes.get((head * 2 * half + row) * row_bytes..)?.get(..row_bytes)?);
        }
    }
    Some(moved)
}

/// The inverse of [`halves_apart`].
pub(super) fn halves_together(bytes: &[u8], rows: usize, heads: usize) -> Option<Vec<u8>> {
    let half = rows.checked_div(heads)? / 2;
    if half == 0 || half * 2 * heads != rows {
        return None;
    }
    let row_bytes = bytes.len() / rows;
    let mut moved = Vec::with_capacity(bytes.len());
    for head in 0..heads {
        for row in (0..half).flat_map(|i| [i, half + i]) {
            moved.extend_from_slice(bytes.get((head * 2 * half + row) * row_bytes..)?.get(..row_bytes)?);
        }
    }
    Some(moved)
}

/// GGUF's name of a tensor, where it has one.
pub(super) fn ggml_name(hugging_face: &str) -> Option<String> {
    if let Some((_, ggml)) = ENDS.iter().find(|(name, _)| *name == hugging_face) {
        return Some((*ggml).to_owned());
    }
    let (block, name) = hugging_face.strip_prefix("model.layers.")?.split_once('.')?;
    let (name, kind) = name.rsplit_once('.')?;
    let (_, ggml) = IN_BLOCK.iter().find(|(known, _)| *known == name)?;
    Some(format!("blk.{block}.{ggml}.{kind}"))
}

/// Names outside blocks: Hugging Face's, and ggml's.
const ENDS: [(&str, &str); 3] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];

/// Names within a block.
const IN_BLOCK: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

fn hugging_face_name(ggml: &str) -> Option<String> {
    if let Some((name, _)) = ENDS.iter().find(|(_, known)| *known == ggml) {
        return Some((*name).to_owned());
    }
    let (block, name) = ggml.strip_prefix("blk.")?.split_once('.')?;
    let block: u32 = block.parse().ok()?;
    let (name, kind) = name.rsplit_once('.')?;
    if !["weight", "bias"].contains(&kind) {
        return None;
    }
    let (name, _) = IN_BLOCK.iter().find(|(_, known)| *known == name)?;
    Some(format!("model.layers.{block}.{name}.{kind}"))
}

/// The constants that all models with Llama 3.1's rotary scaling share.
const LOW: f64 = 1.0;
const HIGH: f64 = 4.0;
const ORIGINAL: f64 = 8192.0;

/// Llama 3.1's rotary scaling as GGUF has it: one divisor per frequency.
pub(super) fn llama3_divisors(factor: f64, head_dim: u64, theta: f64) -> Vec<f32> {
    let divisor = |i: u64| {
        let wavelength = std::f64::consts::TAU * theta.powf(2.0 * i as f64 / head_dim as f64);
        if wavelength < ORIGINAL / HIGH {
            1.0
        } else if wavelength > ORIGINAL / LOW {
            factor
        } else {
            let share = (ORIGINAL / wavelength - LOW) / (HIGH - LOW);
            1.0 / ((1.0 - share) / factor + share)
        }
    };
    (0..head_dim / 2).map(|i| divisor(i) as f32).collect()
}

/// The scaling that divisors come from. They follow from the largest; where these do not, it is another scaling.
fn llama3_scaling(divisors: &[f32], head_dim: u64, theta: f64) -> Option<Value> {
    let factor = divisors.iter().copied().fold(1f32, f32::max);
    if divisors.len() as u64 != head_dim / 2 || !factor.is_finite() {
        return None;
    }
    for (divisor, expected) in divisors.iter().zip(llama3_divisors(f64::from(factor), head_dim, theta)) {
        if (divisor - expected).abs() > 1e-3 * expected {
            return None;
        }
    }
    let mut scaling = Map::new();
    scaling.insert("rope_type".to_owned(), json!("llama3"));
    scaling.insert("factor".to_owned(), json!(factor));
    scaling.insert("low_freq_factor".to_owned(), json!(LOW));
    scaling.insert("high_freq_factor".to_owned(), json!(HIGH));
    scaling.insert("original_max_position_embeddings".to_owned(), json!(8192));
    Some(Value::Object(scaling))
}

/// The file's name without `.gguf`.
fn model_name(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default();
    stem.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_head_go_back_to_halves() {
        // Two heads of four rows, one byte each; in GGUF, rows 0 and 2 of a head are neighbours.
        let gguf = [0, 2, 1, 3, 10, 12, 11, 13];
        assert_eq!(halves_apart(&gguf, 8, 2).unwrap(), [0, 1, 2, 3, 10, 11, 12, 13]);
        assert_eq!(halves_together(&[0, 1, 2, 3, 10, 11, 12, 13], 8, 2).unwrap(), gguf);
        assert_eq!(halves_apart(&gguf, 8, 3), None);
        assert_eq!(halves_apart(&gguf, 8, 8), None);
        assert_eq!(halves_apart(&gguf, 8, 0), None);
    }

    #[test]
    fn llama_3_divisors_are_recognised() {
        let divisors: Vec<f32> = (0..32)
            .map(|i| {
                let wavelength = std::f64::consts::TAU * 500_000f64.powf(2.0 * f64::from(i) / 64.0);
                let share = ((8192.0 / wavelength - 1.0) / 3.0).clamp(0.0, 1.0);
                (1.0 / ((1.0 - share) / 32.0 + share)) as f32
            })
            .collect();
        let scaling = llama3_scaling(&divisors, 64, 500_000.0).unwrap();
        assert_eq!(scaling["factor"], 32.0);
        assert_eq!(llama3_scaling(&[1.0, 2.0, 1.0], 6, 10_000.0), None);
    }
}
