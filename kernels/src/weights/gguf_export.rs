//! From part files to a GGUF file, for the families that GGUF files are read of.
//!
//! What was written is read again and compared before it gets its name: the configuration must mean the same model, and
//! the tokenizer must cut some difficult texts alike. What GGUF has no word for is refused, never left out.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;

use serde_json::Value;

use super::export::Exported;
use super::gguf_writer::GgufWriter;
use super::part_file::OUTPUT;
use super::{PartFile, TensorSource, WeightsError, gguf_model, gguf_tokenizer_writer, source};
use crate::model::{Config, json, layout};
use crate::quant::{PackedType, narrow};
use crate::text::Tokenizer;

/// Writes `model` as the GGUF file `out`, which must not be there yet. Matrices keep their types, packed ones too;
/// vectors become F32, as ggml asks for.
///
/// # Errors
///
/// [`WeightsError`] names the file and what is wrong with it; [`WeightsError::Feature`] what GGUF cannot say.
pub fn export_gguf(model: &Exported<'_>, name: &str, out: &Path) -> Result<(), WeightsError> {
    if out.exists() {
        return Err(WeightsError::AlreadyThere { path: out.to_owned() });
    }
    let mut partial = out.file_name().unwrap_or_default().to_owned();
    partial.push(format!(".partial-{}.gguf", process::id()));
    let partial = out.with_file_name(partial);
    let written = Export::new(model, out)
        .and_then(|export| export.write(name, &partial).and_then(|()| export.compare(&partial)))
        .and_then(|()| fs::rename(&partial, out).map_err(WeightsError::io("make", out)));
    if written.is_err() {
        let _ = fs::remove_file(&partial); // The first error is the one to tell.
    }
    written
}

struct Export<'a> {
    model: &'a Exported<'a>,
    /// To name in errors.
    out: &'a Path,
    config: Config,
    json: Value,
    architecture: &'static str,
    tokenizer_json: String,
    tokenizer: Tokenizer,
}

impl<'a> Export<'a> {
    fn new(model: &'a Exported<'a>, out: &'a Path) -> Result<Self, WeightsError> {
        let config = Config::from_json(model.config_json).map_err(|source| WeightsError::Config {
            path: out.to_owned(),
            source,
        })?;
        let architecture = match config.family {
            // Mistral's files call themselves llama; a window is found out when the file is compared.
            "llama" | "mistral" => "llama",
            "qwen2" => "qwen2",
            "qwen3" => "qwen3",
            other => {
                return Err(WeightsError::Architecture {
                    path: out.to_owned(),
                    architecture: other.to_owned(),
                });
            }
        };
        let tokenizer_json = source::read_text(model.tokenizer_json)?;
        let tokenizer = Tokenizer::from_bytes(tokenizer_json.as_bytes()).map_err(|error| WeightsError::Tokenizer {
            path: model.tokenizer_json.to_owned(),
            reason: error.to_string(),
        })?;
        Ok(Self {
            model,
            out,
            config,
            json: json::parse(model.config_json).unwrap_or_default(), // It was just read.
            architecture,
            tokenizer_json,
            tokenizer,
        })
    }

    fn write(&self, name: &str, path: &Path) -> Result<(), WeightsError> {
        let files = self.files()?;
        let mut writer = GgufWriter::default();
        writer.text("general.architecture", self.architecture);
        writer.text("general.name", name);
        writer.whole("general.quantization_version", 2);
        let heads = self.whole("num_attention_heads")?;
        self.describe(&mut writer, &files, heads)?;
        gguf_tokenizer_writer::describe(
            &mut writer,
            self.out,
            &self.tokenizer_json,
            self.config.vocabulary,
            self.model,
        )?;
        for file in &files {
            for name in file.names().filter(|name| !(self.config.tied && *name == OUTPUT)) {
                self.tensor(&mut writer, file, name, heads)?;
            }
        }
        writer.write(path)
    }

    fn files(&self) -> Result<Vec<PartFile>, WeightsError> {
        let parts = layout(&self.config).parts;
        if parts.len() != self.model.part_files.len() {
            return Err(WeightsError::MissingFile {
                path: PathBuf::from(format!("part {}", self.model.part_files.len())),
                hint: "there must be one file per part: embedding, blocks, head",
            });
        }
        let files = self.model.part_files.iter().zip(&parts).map(|(path, part)| {
            let file = PartFile::open(path)?;
            file.check(part).map(|()| file)
        });
        files.collect()
    }

    /// Sizes come from the tensors, whatever a family assumes of keys that are absent.
    fn describe(&self, writer: &mut GgufWriter, files: &[PartFile], heads: u32) -> Result<(), WeightsError> {
        let block = files.get(1).ok_or_else(|| self.feature("a model without blocks"))?;
        let rows = |name: &str| -> Result<u32, WeightsError> {
            let tensor = block.tensor(&format!("model.layers.0.{name}.weight"))?;
            Ok(tensor.shape.first().copied().unwrap_or(0) as u32)
        };
        let head_dim = rows("self_attn.q_proj")?.checked_div(heads).unwrap_or(0);
        let kv_heads = rows("self_attn.k_proj")?.checked_div(head_dim).unwrap_or(0);
        let key = |name: &str| format!("{}.{name}", self.architecture);
        writer.whole(&key("block_count"), self.config.blocks);
        writer.whole(&key("context_length"), self.config.context_tokens_max);
        writer.whole(&key("embedding_length"), self.config.hidden as u32);
        writer.whole(&key("feed_forward_length"), rows("mlp.gate_proj")?);
        writer.whole(&key("attention.head_count"), heads);
        writer.whole(&key("attention.head_count_kv"), kv_heads);
        writer.whole(&key("attention.key_length"), head_dim);
        writer.whole(&key("attention.value_length"), head_dim);
        writer.whole(&key("rope.dimension_count"), head_dim);
        writer.whole(&key("vocab_size"), self.config.vocabulary as u32);
        let epsilon = self.json.get("rms_norm_eps").and_then(Value::as_f64).unwrap_or(1e-6);
        writer.number(&key("attention.layer_norm_rms_epsilon"), epsilon as f32);
        let rope = self.rope();
        let of_rope = |name: &str| rope.get(name).and_then(Value::as_f64);
        let theta = of_rope("rope_theta").or_else(|| self.json.get("rope_theta").and_then(Value::as_f64));
        let theta = theta.unwrap_or(10_000.0);
        writer.number(&key("rope.freq_base"), theta as f32);
        let kind = rope
            .get("rope_type")
            .or_else(|| rope.get("type"))
            .and_then(Value::as_str);
        match kind.unwrap_or("default") {
            "default" => {}
            kind @ ("linear" | "yarn") => {
                writer.text(&key("rope.scaling.type"), kind);
                writer.number(&key("rope.scaling.factor"), of_rope("factor").unwrap_or(1.0) as f32);
                if let Some(original) = of_rope("original_max_position_embeddings") {
                    writer.whole(&key("rope.scaling.original_context_length"), original as u32);
                }
            }
            "llama3" => {
                let divisors = gguf_model::llama3_divisors(of_rope("factor").unwrap_or(1.0), head_dim.into(), theta);
                let shape = vec![divisors.len()];
                let bytes: Vec<u8> = divisors.iter().flat_map(|divisor| divisor.to_le_bytes()).collect();
                writer.tensor("rope_freqs.weight".to_owned(), PackedType::F32, shape, bytes.into());
            }
            other => return Err(self.feature(format!("rope scaling `{}`", other.chars().take(32).collect::<String>()))),
        }
        Ok(())
    }

    /// Where the configuration speaks of rotation: newer ones put all of it in one place.
    fn rope(&self) -> Value {
        let mut places = ["rope_parameters", "rope_scaling"].into_iter();
        let found = places.find_map(|key| self.json.get(key).filter(|value| value.is_object()));
        found.cloned().unwrap_or_default()
    }

    fn tensor(&self, writer: &mut GgufWriter, file: &PartFile, name: &str, heads: u32) -> Result<(), WeightsError> {
        let ggml = gguf_model::ggml_name(name).ok_or_else(|| WeightsError::UnknownTensor {
            path: file.path().to_owned(),
            tensor: name.to_owned(),
        })?;
        let TensorSource {
            mut ty,
            shape,
            mut bytes,
        } = file.tensor(name)?;
        if shape.len() == 1 && ty != PackedType::F32 {
            let values = TensorSource {
                ty,
                shape: shape.clone(),
                bytes,
            }
            .to_f32();
            let values = values.map_err(WeightsError::quant(file.path(), name))?;
            ty = PackedType::F32;
            bytes = narrow(ty, &values)
                .map_err(WeightsError::quant(file.path(), name))?
                .into();
        }
        if self.architecture == "llama" {
            let rows = shape.first().copied().unwrap_or(0);
            let of = |which: &str| name.contains(&format!(".self_attn.{which}_proj."));
            let heads = match () {
                () if of("q") => Some(heads as usize),
                () if of("k") => {
                    let queries = file.tensor(&name.replace(".k_proj.", ".q_proj."))?;
                    // As many rows a head as queries have.
                    let head_rows = queries.shape.first().map_or(0, |rows| rows / heads.max(1) as usize);
                    rows.checked_div(head_rows)
                }
                () => None,
            };
            if let Some(heads) = heads {
                let moved = gguf_model::halves_together(&bytes, rows, heads);
                bytes = moved.ok_or_else(|| self.feature("heads of an odd width"))?.into();
            }
        }
        writer.tensor(ggml, ty, shape, bytes);
        Ok(())
    }

    /// Whether the written file means the same model.
    fn compare(&self, path: &Path) -> Result<(), WeightsError> {
        let read = gguf_model::open(path)?;
        let mut config = Config::from_json(&read.config_json).map_err(|source| WeightsError::Config {
            path: path.to_owned(),
            source,
        })?;
        // Neither changes a number.
        config.family = self.config.family;
        config.initializer_range = self.config.initializer_range;
        if config != self.config {
            return Err(self.feature("something of this model's configuration that GGUF has no word for"));
        }
        let tokenizer = Tokenizer::from_bytes(&read.tokenizer_json).map_err(|error| WeightsError::Tokenizer {
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
        for text in PROBES {
            let cut = |tokenizer: &Tokenizer| tokenizer.encode_bare(text).ok();
            if cut(&tokenizer) != cut(&self.tokenizer) {
                return Err(self.feature("a tokenizer that cuts text in a way that GGUF has no name for"));
            }
        }
        Ok(())
    }

    fn whole(&self, key: &str) -> Result<u32, WeightsError> {
        let found = self
            .json
            .get(key)
            .and_then(Value::as_u64)
            .and_then(|value| u32::try_from(value).ok());
        found.ok_or_else(|| self.feature(format!("a configuration without `{key}`")))
    }

    fn feature(&self, feature: impl Into<String>) -> WeightsError {
        WeightsError::Feature {
            path: self.out.to_owned(),
            feature: feature.into(),
        }
    }
}

/// Texts on which tokenizers differ: contractions, digits, scripts, spaces, lines, composed letters, symbols.
const PROBES: [&str; 8] = [
    "The polder's dry; it'll stay so, they've said.",
    "In 1953, 12345678 m³ — 3.14159 and 1,000,000",
    "Ångström, žluťoučký kůň, ελληνικά, Українська, 語, العربية, हिन्दी",
    "  two spaces\n\n\nlines\r\n\ttabs   \n",
    "e\u{301}t\u{e9} and 🙂🙃👩‍👩‍👧",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # comment",
    "CamelCaseWords ALLCAPS DON'T won't I'M",
    "</s><|im_end|>!!!???...///",
];
