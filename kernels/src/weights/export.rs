//! From part files to a Hugging Face folder.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process;

use serde_json::{Value, json};

use super::part_file::OUTPUT;
use super::{PartFile, PartWriter, TensorSource, WeightsError};
use crate::model::{Config, layout};
use crate::quant::{PackedType, narrow};
use crate::text::Tokenizer;

/// A model to write as a Hugging Face folder.
#[derive(Debug, Clone)]
pub struct Exported<'a> {
    /// The `config.json`, as text.
    pub config_json: &'a str,
    /// The `tokenizer.json`, where it is now.
    pub tokenizer_json: &'a Path,
    /// The Jinja template of a conversation.
    pub chat_template: Option<&'a str>,
    /// Token ids that end a generation.
    pub end_tokens: &'a [u32],
    /// The token that begins a text.
    pub begin_token: Option<u32>,
    /// One file per part.
    pub part_files: &'a [PathBuf],
    /// In which type norms and biases are written to a Hugging Face folder.
    pub vectors: Vectors,
}

/// The type of tensors with one dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vectors {
    /// As they are.
    AsStored,
    /// That of the matrices, where all have one type of 16 bits and nothing is lost. GGUF files keep vectors in F32,
    /// whatever type they had.
    AsMatrices,
}

/// Writes `model` into the new folder `out`, one shard per part, as transformers loads it. Packed tensors are widened
/// to F32; others keep their type. A failed export leaves nothing behind.
///
/// # Errors
///
/// [`WeightsError`] names the file and what is wrong with it.
pub fn export(model: &Exported<'_>, out: &Path) -> Result<(), WeightsError> {
    if out.exists() {
        return Err(WeightsError::AlreadyThere { path: out.to_owned() });
    }
    let mut name = out.file_name().unwrap_or_default().to_owned();
    name.push(format!(".partial-{}", process::id()));
    let partial = out.with_file_name(name);
    fs::create_dir_all(&partial).map_err(WeightsError::io("make", &partial))?;
    let written =
        write(model, &partial).and_then(|()| fs::rename(&partial, out).map_err(WeightsError::io("make", out)));
    if written.is_err() {
        let _ = fs::remove_dir_all(&partial); // The first error is the one to tell.
    }
    written
}

fn write(model: &Exported<'_>, folder: &Path) -> Result<(), WeightsError> {
    let config_path = folder.join("config.json");
    let config = Config::from_json(model.config_json).map_err(|source| WeightsError::Config {
        path: config_path.clone(),
        source,
    })?;
    let parts = layout(&config).parts;
    if parts.len() != model.part_files.len() {
        return Err(WeightsError::MissingFile {
            path: folder.join(format!("part {}", model.part_files.len())),
            hint: "there must be one file per part: embedding, blocks, head",
        });
    }
    let vectors = match model.vectors {
        Vectors::AsStored => None,
        Vectors::AsMatrices => common_type(model.part_files)?,
    };
    let shards = parts.len();
    let mut places = BTreeMap::new();
    let mut total_bytes = 0;
    for (index, (path, part)) in model.part_files.iter().zip(&parts).enumerate() {
        let shard = format!("model-{:05}-of-{shards:05}.safetensors", index + 1);
        let file = PartFile::open(path)?;
        file.check(part)?;
        let mut writer = PartWriter::new();
        writer.note("format", "pt"); // transformers refuses files that do not say so.
        let names: Vec<_> = file.names().filter(|name| !(config.tied && *name == OUTPUT)).collect();
        for name in names {
            let mut tensor = file.tensor(name)?;
            if let (Some(ty), [] | [_], PackedType::F32) = (vectors, tensor.shape.as_slice(), tensor.ty) {
                tensor = without_loss(&tensor, ty).unwrap_or(tensor);
            }
            if tensor.is_packed() {
                let values = tensor.to_f32().map_err(WeightsError::quant(path, name))?;
                total_bytes += 4 * values.len();
                writer.plain(name, &tensor.shape, &values);
            } else {
                total_bytes += tensor.bytes.len();
                writer.tensor(name, tensor.ty, &tensor.shape, tensor.bytes.to_vec());
            }
            places.insert(name.to_owned(), shard.clone());
        }
        writer.write(&folder.join(shard))?;
    }
    write_text(&config_path, model.config_json)?;
    let index = json!({"metadata": {"total_size": total_bytes}, "weight_map": places});
    write_json(&folder.join("model.safetensors.index.json"), &index)?;
    write_tokenizer(model, folder)
}

/// The type of 16 bits that all matrices have.
fn common_type(part_files: &[PathBuf]) -> Result<Option<PackedType>, WeightsError> {
    let mut found = None;
    for path in part_files {
        let file = PartFile::open(path)?;
        for name in file.names() {
            let tensor = file.tensor(name)?;
            match (tensor.shape.len(), tensor.ty, found) {
                (0 | 1, ..) => {}
                (_, ty @ (PackedType::F16 | PackedType::BF16), None) => found = Some(ty),
                (_, ty, Some(common)) if ty == common => {}
                _ => return Ok(None),
            }
        }
    }
    Ok(found)
}

/// A tensor in a narrower type, where it holds exactly the same values.
fn without_loss(tensor: &TensorSource, ty: PackedType) -> Option<TensorSource> {
    let narrowed = TensorSource {
        ty,
        shape: tensor.shape.clone(),
        bytes: narrow(ty, &tensor.to_f32().ok()?).ok()?.into(),
    };
    let back = narrow(PackedType::F32, &narrowed.to_f32().ok()?).ok()?;
    (*back == *tensor.bytes).then_some(narrowed)
}

fn write_tokenizer(model: &Exported<'_>, folder: &Path) -> Result<(), WeightsError> {
    let bytes = fs::read(model.tokenizer_json).map_err(WeightsError::io("read", model.tokenizer_json))?;
    let tokenizer = Tokenizer::from_bytes(&bytes).map_err(|error| WeightsError::Tokenizer {
        path: model.tokenizer_json.to_owned(),
        reason: error.to_string(),
    })?;
    let path = folder.join("tokenizer.json");
    fs::write(&path, &bytes).map_err(WeightsError::io("write", &path))?;
    let token = |id: Option<u32>| {
        id.and_then(|id| tokenizer.token_text(id))
            .map_or(Value::Null, Value::String)
    };
    let mut settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token(model.begin_token),
        "eos_token": token(model.end_tokens.first().copied()),
        "clean_up_tokenization_spaces": false,
    });
    if let Some(template) = model.chat_template {
        settings["chat_template"] = json!(template);
    }
    write_json(&folder.join("tokenizer_config.json"), &settings)?;
    let generation = json!({"bos_token_id": model.begin_token, "eos_token_id": model.end_tokens});
    write_json(&folder.join("generation_config.json"), &generation)
}

fn write_json(path: &Path, value: &Value) -> Result<(), WeightsError> {
    write_text(path, &serde_json::to_string_pretty(value).unwrap_or_default())
}

fn write_text(path: &Path, text: &str) -> Result<(), WeightsError> {
    fs::write(path, text).map_err(WeightsError::io("write", path))
}
