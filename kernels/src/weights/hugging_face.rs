//! A Hugging Face folder: `config.json`, safetensors in one file or in shards, tokenizer files.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::fp8::Scaled;
use super::import::{ModelSource, Tensors};
use super::{PartFile, TensorSource, WeightsError, source};
use crate::model::{Config, json};
use crate::text::{TextError, Tokenizer, from_sentencepiece, from_tekken, named_templates};

/// Opens a folder as a model.
pub(super) fn open(folder: &Path) -> Result<ModelSource, WeightsError> {
    let config_path = folder.join("config.json");
    let config_json = source::read_text(&config_path)?;
    // A family that is not implemented is the first thing to say, whatever else is missing.
    Config::from_json(&config_json).map_err(|source| WeightsError::Config {
        path: config_path.clone(),
        source,
    })?;
    let (tokenizer_path, tokenizer_json) = tokenizer_json(folder)?;
    let tokenizer = Tokenizer::from_bytes(&tokenizer_json).map_err(|error| WeightsError::Tokenizer {
        path: tokenizer_path,
        reason: error.to_string(),
    })?;
    let settings = Settings::read(folder, &config_json)?;
    let begin = settings
        .token_text("bos_token")
        .and_then(|token| tokenizer.token_id(&token));
    let begin = begin.or_else(|| settings.ids("bos_token_id").first().copied());
    let tensors = open_folder(folder, &config_json)?;
    let config_json = without_quantisation(config_json);
    Ok(ModelSource {
        name: folder_name(folder),
        config_path,
        config_json,
        tokenizer_json,
        chat_template: settings.chat_template(folder)?,
        end_tokens: settings.end_tokens(&tokenizer),
        begin_token: begin.filter(|begin| tokenizer.encode("a").is_ok_and(|ids| ids.first() == Some(begin))),
        tensors,
    })
}

type Convert = fn(&[u8]) -> Result<Vec<u8>, TextError>;

/// The folder's tokenizer as a `tokenizer.json`, whichever of three kinds it is, and its file to name in errors.
fn tokenizer_json(folder: &Path) -> Result<(PathBuf, Vec<u8>), WeightsError> {
    let path = folder.join("tokenizer.json");
    if path.exists() {
        let text = source::read_text(&path)?;
        return Ok((path, text.into_bytes()));
    }
    let others: [(&str, Convert); 2] = [("tokenizer.model", from_sentencepiece), ("tekken.json", from_tekken)];
    for (name, convert) in others {
        let other = folder.join(name);
        if other.exists() {
            let json = convert(&source::map(&other)?).map_err(|error| WeightsError::Tokenizer {
                path: other.clone(),
                reason: error.to_string(),
            })?;
            return Ok((other, json));
        }
    }
    Err(WeightsError::MissingFile {
        path,
        hint: "the tokenizer is needed as a tokenizer.json, a tokenizer.model or a tekken.json",
    })
}

/// A configuration that no longer says how weights were packed, since they are widened.
fn without_quantisation(config_json: String) -> String {
    match json::parse(&config_json) {
        Ok(Value::Object(mut config)) if config.contains_key("quantization_config") => {
            config.remove("quantization_config");
            serde_json::to_string_pretty(&config).unwrap_or(config_json)
        }
        _ => config_json,
    }
}

/// The tensors of a folder, whatever else is in it. `config_json` says in which blocks FP8 weights are scaled.
pub(crate) fn open_folder(folder: &Path, config_json: &str) -> Result<Box<dyn Tensors>, WeightsError> {
    Ok(Box::new(Scaled::new(Shards::open(folder)?, config_json)))
}

/// Where a template for questions with tools is, in a folder as published and in one that was fetched file by file.
const TOOL_TEMPLATES: [&str; 2] = ["additional_chat_templates/tool_use.jinja", "tool_use.jinja"];

/// The files that say which tokens begin and end, whichever of them are there.
struct Settings {
    tokenizer: Value,
    generation: Value,
    config: Value,
}

impl Settings {
    fn read(folder: &Path, config_json: &str) -> Result<Self, WeightsError> {
        let read = |name: &str| source::read_json_if_there(&folder.join(name)).map(Option::unwrap_or_default);
        Ok(Self {
            tokenizer: read("tokenizer_config.json")?,
            generation: read("generation_config.json")?,
            config: json::parse(config_json).unwrap_or_default(), // Judged by the model's configuration.
        })
    }

    /// A token of `tokenizer_config.json`: a text, or an object with its `content`.
    fn token_text(&self, key: &str) -> Option<String> {
        let token = self.tokenizer.get(key)?;
        let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
        Some(text.to_owned())
    }

    /// Ids of `generation_config.json`, else of `config.json`: a number or a list.
    fn ids(&self, key: &str) -> Vec<u32> {
        let of = |value: &Value| match value {
            Value::Array(list) => list.iter().filter_map(as_id).collect(),
            one => as_id(one).into_iter().collect::<Vec<_>>(),
        };
        let found = [&self.generation, &self.config]
            .into_iter()
            .filter_map(|file| file.get(key))
            .map(of);
        found.into_iter().find(|ids| !ids.is_empty()).unwrap_or_default()
    }

    fn end_tokens(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        let mut ids = self.ids("eos_token_id");
        ids.extend(
            self.token_text("eos_token")
                .and_then(|token| tokenizer.token_id(&token)),
        );
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// From `chat_template.jinja`, else from `tokenizer_config.json`: a text, or a list of named ones; else from
    /// `chat_template.json`, where models that also see pictures keep it. A template named `tool_use`, of the list or in a
    /// file of its own, is for questions with tools.
    fn chat_template(&self, folder: &Path) -> Result<Option<String>, WeightsError> {
        let read_if_there = |name: &str| {
            let path = folder.join(name);
            path.exists().then(|| source::read_text(&path)).transpose()
        };
        let listed = self.tokenizer.get("chat_template");
        let named = |name: &str| {
            let of_list = listed.and_then(Value::as_array)?;
            let found = of_list
                .iter()
                .find(|entry| entry.get("name").is_some_and(|found| found == name));
            found?.get("template")?.as_str().map(str::to_owned)
        };
        let default = match read_if_there("chat_template.jinja")? {
            Some(template) => Some(template),
            None => listed
                .and_then(Value::as_str)
                .map(str::to_owned)
                .or_else(|| named("default")),
        };
        let default = match default {
            Some(default) => Some(default),
            None => source::read_json_if_there(&folder.join("chat_template.json"))?
                .and_then(|file| Some(file.get("chat_template")?.as_str()?.to_owned())),
        };
        let mut with_tools = None;
        for name in TOOL_TEMPLATES {
            with_tools = with_tools.or(read_if_there(name)?);
        }
        let with_tools = with_tools.or_else(|| named("tool_use"));
        Ok(default.map(|default| match with_tools {
            Some(with_tools) => named_templates::joined(&default, &with_tools),
            None => default,
        }))
    }
}

fn as_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

pub(super) struct Shards {
    folder: PathBuf,
    files: Vec<PartFile>,
    /// Which file has a tensor.
    places: BTreeMap<String, usize>,
}

impl Shards {
    /// The file that has a tensor.
    pub(super) fn file(&self, name: &str) -> Option<&PartFile> {
        self.files.get(*self.places.get(name)?)
    }

    fn open(folder: &Path) -> Result<Self, WeightsError> {
        let single = folder.join("model.safetensors");
        let index_path = folder.join("model.safetensors.index.json");
        let paths = match source::read_json_if_there(&index_path)? {
            Some(index) => shard_paths(folder, &index_path, &index)?,
            None if single.exists() => vec![single],
            None => {
                return Err(WeightsError::MissingFile {
                    path: single,
                    hint: "weights are read as safetensors, in one file or in shards with an index",
                });
            }
        };
        let mut shards = Self {
            folder: folder.to_owned(),
            files: Vec::new(),
            places: BTreeMap::new(),
        };
        for (place, path) in paths.iter().enumerate() {
            let file = PartFile::open(path)?;
            shards.places.extend(file.names().map(|name| (name.to_owned(), place)));
            shards.files.push(file);
        }
        Ok(shards)
    }
}

impl Tensors for Shards {
    fn names(&self) -> Vec<String> {
        self.places.keys().cloned().collect()
    }

    fn tensor(&self, name: &str) -> Result<TensorSource, WeightsError> {
        let file = self.places.get(name).and_then(|place| self.files.get(*place));
        let file = file.ok_or_else(|| WeightsError::MissingTensor {
            path: self.folder.clone(),
            tensor: name.to_owned(),
        })?;
        file.tensor(name)
    }

    fn place(&self) -> &Path {
        &self.folder
    }
}

/// The shards that an index names. A name is of a file in the same folder and nothing else.
fn shard_paths(folder: &Path, index_path: &Path, index: &Value) -> Result<Vec<PathBuf>, WeightsError> {
    let refused = |reason: String| WeightsError::Json {
        path: index_path.to_owned(),
        reason,
    };
    let map = index.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| refused("`weight_map` is missing".to_owned()))?;
    let mut paths = Vec::new();
    for (tensor, shard) in map {
        let name = shard.as_str().unwrap_or_default();
        let mut components = Path::new(name).components();
        if !matches!(
            (components.next(), components.next()),
            (Some(Component::Normal(_)), None)
        ) {
            return Err(refused(format!("the shard of `{tensor}` is not a file's name")));
        }
        paths.push(folder.join(name));
    }
    paths.sort();
    paths.dedup();
    Ok(paths)
}

fn folder_name(folder: &Path) -> String {
    let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if name.is_empty() { "model".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// What is read where these files lie in a folder.
    fn template_of(files: &[(&str, &str)]) -> Option<String> {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let settings = Settings::read(folder.path(), "{}").unwrap();
        settings.chat_template(folder.path()).unwrap()
    }

    #[test]
    fn a_chat_template_is_found_wherever_it_is_published() {
        let own = ("chat_template.jinja", "own");
        let text = ("tokenizer_config.json", r#"{"chat_template": "text"}"#);
        let named = (
            "tokenizer_config.json",
            r#"{"chat_template": [{"name": "default", "template": "named"}]}"#,
        );
        let processors = ("chat_template.json", r#"{"chat_template": "processor's"}"#);
        assert_eq!(template_of(&[own, text, processors]).as_deref(), Some("own"));
        assert_eq!(template_of(&[text, processors]).as_deref(), Some("text"));
        assert_eq!(template_of(&[named, processors]).as_deref(), Some("named"));
        assert_eq!(template_of(&[processors]).as_deref(), Some("processor's"));
        assert_eq!(template_of(&[("chat_template.json", "[1]")]), None);
        assert_eq!(template_of(&[]), None);
    }
}
