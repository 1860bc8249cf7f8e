//! Which files of a repository a model needs.

use anyhow::{Context as _, anyhow, bail};
use serde_json::Value;

use super::place::is_path;
use crate::failure::hinted;

/// What describes a model and its text, beside the weights.
const DESCRIPTIONS: [&str; 11] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
];
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// The files to fetch first: descriptions, and the weights or the index that names them. `files` are all there are.
///
/// # Errors
///
/// That the repository holds no model in a form that is read, and which GGUF files it holds instead.
pub(crate) fn first_files(files: &[String]) -> anyhow::Result<Vec<String>> {
    let there = |name: &str| files.iter().any(|file| file == name);
    if !there("config.json") {
        let gguf = files.iter().filter(|file| file.ends_with(".gguf")).take(8);
        let gguf: Vec<&str> = gguf.map(String::as_str).collect();
        return Err(match gguf.is_empty() {
            true => anyhow!("the repository has no config.json, so it is not a model"),
            false => hinted(
                anyhow!("the repository has no config.json"),
                format!("name one of its GGUF files, as hf:ORG/NAME/FILE: {}", gguf.join(", ")),
            ),
        });
    }
    let mut wanted: Vec<String> = DESCRIPTIONS
        .iter()
        .filter(|name| there(name))
        .map(|name| (*name).to_owned())
        .collect();
    match [INDEX, SINGLE].into_iter().find(|name| there(name)) {
        Some(weights) => wanted.push(weights.to_owned()),
        None => bail!("the repository has no {SINGLE} and no {INDEX}; weights of other kinds are not read"),
    }
    Ok(wanted)
}

/// The shards that an index names, each once.
///
/// # Errors
///
/// That `index` is no index, or names what is no file of the repository.
pub(crate) fn shards(index: &[u8], files: &[String]) -> anyhow::Result<Vec<String>> {
    let index: Value = serde_json::from_slice(index).with_context(|| format!("{INDEX} is not JSON"))?;
    let map = index.get("weight_map").and_then(Value::as_object);
    let map = map.with_context(|| format!("{INDEX} has no `weight_map`"))?;
    let mut shards = Vec::new();
    for shard in map.values() {
        let shard = shard.as_str().unwrap_or_default();
        if shard.contains('/') || !is_path(shard) || !files.iter().any(|file| file == shard) {
            bail!(
                "{INDEX} names `{}`, which is not there",
                shard.chars().take(64).collect::<String>()
            );
        }
        shards.push(shard.to_owned());
    }
    shards.sort();
    shards.dedup();
    Ok(shards)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_model_needs_is_fetched() {
        let files = [
            "README.md",
            "config.json",
            "model.safetensors",
            "pytorch_model.bin",
            "tokenizer.json",
            "onnx/model.onnx",
        ];
        let files = files.map(str::to_owned);
        assert_eq!(
            first_files(&files).unwrap(),
            ["config.json", "tokenizer.json", "model.safetensors"]
        );
        let error = first_files(&["a-q8_0.gguf".to_owned()]).unwrap_err();
        assert!(error.to_string().contains("no config.json"));
        assert!(first_files(&["config.json".to_owned(), "pytorch_model.bin".to_owned()]).is_err());
    }

    #[test]
    fn an_index_names_shards_beside_it_and_nothing_else() {
        let files = ["a.safetensors", "b.safetensors"].map(str::to_owned);
        let index = br#"{"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}"#;
        assert_eq!(shards(index, &files).unwrap(), ["a.safetensors", "b.safetensors"]);
        assert!(shards(br#"{"weight_map": {"x": "../b.safetensors"}}"#, &files).is_err());
        assert!(shards(br#"{"weight_map": {"x": "c.safetensors"}}"#, &files).is_err());
        assert!(shards(b"{}", &files).is_err());
    }
}
