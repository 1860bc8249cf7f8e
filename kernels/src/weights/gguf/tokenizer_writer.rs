//! A `tokenizer.json` as the metadata of a GGUF file.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_json::Value;

use super::tokenizer::{self, NAMED_CUTS};
use super::writer::GgufWriter;
use crate::weights::{Exported, WeightsError};

// ggml's kinds of tokens.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Adds the tokenizer, padded with unused tokens to `vocabulary`, and the chat template.
pub(super) fn describe(
    writer: &mut GgufWriter<'_>,
    out: &Path,
    json: &str,
    vocabulary: usize,
    model: &Exported<'_>,
) -> Result<(), WeightsError> {
    let refused = |feature: &str| WeightsError::Feature {
        path: out.to_owned(),
        feature: feature.to_owned(),
    };
    let json: Value = serde_json::from_str(json).map_err(|error| WeightsError::Tokenizer {
        path: model.tokenizer_json.to_owned(),
        reason: error.to_string(),
    })?;
    let inner = json.get("model").unwrap_or(&Value::Null);
    if inner.get("type").and_then(Value::as_str) != Some("BPE") {
        return Err(refused("a tokenizer that is not byte pair encoding"));
    }
    let is_spm = inner.get("byte_fallback").and_then(Value::as_bool) == Some(true);
    let tokens = tokens(&json, is_spm, vocabulary).ok_or_else(|| refused("tokens with ids beyond the vocabulary"))?;
    let merges = merges(inner).ok_or_else(|| refused("merges that are not pairs"))?;
    if is_spm {
        writer.text("tokenizer.ggml.model", "llama");
        writer.text("tokenizer.ggml.pre", "default");
        writer.numbers("tokenizer.ggml.scores", &scores(&tokens, &merges));
        let prefixed = json
            .get("normalizer")
            .is_some_and(|normalizer| normalizer.to_string().contains("\"Prepend\""));
        writer.flag("tokenizer.ggml.add_space_prefix", prefixed);
    } else {
        let wanted = [json.get("normalizer"), json.get("pre_tokenizer")].map(tokenizer::signature);
        let ignore_merges = inner.get("ignore_merges").and_then(Value::as_bool).unwrap_or(false);
        let name = NAMED_CUTS
            .into_iter()
            .find(|name| tokenizer::cut_signature(name) == Some((wanted.clone(), ignore_merges)))
            .ok_or_else(|| refused("a tokenizer that cuts text in a way that GGUF has no name for"))?;
        writer.text("tokenizer.ggml.model", "gpt2");
        writer.text("tokenizer.ggml.pre", name);
        let pairs: Vec<String> = merges.iter().map(|(left, right)| format!("{left} {right}")).collect();
        writer.texts("tokenizer.ggml.merges", pairs.iter().map(String::as_str));
    }
    writer.texts("tokenizer.ggml.tokens", tokens.iter().map(|(text, _)| text.as_str()));
    let kinds: Vec<i32> = tokens.iter().map(|(_, kind)| *kind).collect();
    writer.whole_numbers("tokenizer.ggml.token_type", &kinds);
    if let Some(id) = model.begin_token {
        writer.whole("tokenizer.ggml.bos_token_id", id);
    }
    writer.flag("tokenizer.ggml.add_bos_token", model.begin_token.is_some());
    // The first two that end a generation: the one of texts, and the one of turns.
    let keys = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"];
    for (key, id) in keys.into_iter().zip(model.end_tokens) {
        writer.whole(key, *id);
    }
    if let Some(template) = model.chat_template {
        writer.text("tokenizer.chat_template", template);
    }
    Ok(())
}

/// Text and kind of every id.
fn tokens(json: &Value, is_spm: bool, vocabulary: usize) -> Option<Vec<(String, i32)>> {
    let mut tokens: Vec<Option<(String, i32)>> = vec![None; vocabulary];
    let unknown = json.pointer("/model/unk_token").and_then(Value::as_str);
    let is_byte = |text: &str| is_spm && text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
    for (text, id) in json.pointer("/model/vocab")?.as_object()? {
        let kind = match () {
            () if is_byte(text) => BYTE,
            () if is_spm && unknown == Some(text) => UNKNOWN,
            () => NORMAL,
        };
        *tokens.get_mut(usize::try_from(id.as_u64()?).ok()?)? = Some((text.clone(), kind));
    }
    for added in json.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
        let text = added.get("content")?.as_str()?;
        let special = added.get("special").and_then(Value::as_bool).unwrap_or(false);
        let kind = match () {
            () if is_spm && unknown == Some(text) => UNKNOWN,
            () if special => CONTROL,
            () => USER_DEFINED,
        };
        let id = usize::try_from(added.get("id")?.as_u64()?).ok()?;
        *tokens.get_mut(id)? = Some((text.to_owned(), kind));
    }
    let named = tokens.into_iter().enumerate();
    Some(
        named
            .map(|(id, token)| token.unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED)))
            .collect(),
    )
}

/// Pairs, as two texts or, in older files, one text with a space between.
fn merges(model: &Value) -> Option<Vec<(String, String)>> {
    let pairs = model.get("merges")?.as_array()?.iter().map(|pair| match pair {
        Value::String(pair) => pair
            .split_once(' ')
            .map(|(left, right)| (left.to_owned(), right.to_owned())),
        pair => Some((pair.get(0)?.as_str()?.to_owned(), pair.get(1)?.as_str()?.to_owned())),
    });
    pairs.collect()
}

/// A piece is as good as the first merge that makes it is early; the rest are worse than all of those.
fn scores(tokens: &[(String, i32)], merges: &[(String, String)]) -> Vec<f32> {
    let mut first = HashMap::<String, usize>::new();
    for (rank, (left, right)) in merges.iter().enumerate() {
        first.entry(format!("{left}{right}")).or_insert(rank);
    }
    // One step apart, so that f32 tells all of them apart.
    let mut ranks = BTreeMap::new();
    for rank in first.values() {
        ranks.insert(*rank, 0usize);
    }
    for (place, rank) in ranks.values_mut().enumerate() {
        *rank = place;
    }
    let score = |(text, kind): &(String, i32)| match (*kind, first.get(text).and_then(|rank| ranks.get(rank))) {
        (NORMAL, Some(place)) => -(*place as f32),
        (NORMAL, None) => -(ranks.len() as f32),
        _ => 0.0,
    };
    tokens.iter().map(score).collect()
}
