//! Mistral's `tekken.json`: byte pairs by rank, as a `tokenizer.json`.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::make::byte_letter;
use super::pieces::beginning_with;
use super::{TextError, base64};

/// Special tokens of files that do not list them; those beyond are numbered.
const SPECIAL: [&str; 20] = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
];
const BEGIN: &str = "<s>";
/// The longest token of published files has 128 bytes; each is tried at every split.
const TOKEN_BYTES_MAX: usize = 512;
/// Special tokens need no entry in the file, so it could claim any number; published files have a thousand.
const SPECIAL_TOKENS_MAX: usize = 1 << 16;

/// Converts the bytes of a `tekken.json`. A text begins with `<s>`.
///
/// Ids are those of Mistral: special tokens first, then the bytes and pairs by rank, up to the file's size of vocabulary.
///
/// # Errors
///
/// [`TextError::Tokenizer`] says what is wrong with the file.
pub fn from_tekken(bytes: &[u8]) -> Result<Vec<u8>, TextError> {
    let refused = |reason: &str| TextError::Tokenizer {
        reason: reason.to_owned(),
    };
    let file: Value = serde_json::from_slice(bytes).map_err(|error| refused(&error.to_string()))?;
    let size = |key: &str| {
        let found = file.pointer(&format!("/config/{key}")).and_then(Value::as_u64);
        found
            .and_then(|size| usize::try_from(size).ok())
            .ok_or_else(|| refused(&format!("`config.{key}` is missing")))
    };
    let (vocabulary, special) = (size("default_vocab_size")?, size("default_num_special_tokens")?);
    if special > SPECIAL_TOKENS_MAX {
        return Err(refused(&format!(
            "it has {special} special tokens, at most {SPECIAL_TOKENS_MAX} are known"
        )));
    }
    let pattern = file.pointer("/config/pattern").and_then(Value::as_str);
    let pattern = pattern.ok_or_else(|| refused("`config.pattern` is missing"))?;
    let entries = file.get("vocab").and_then(Value::as_array);
    let entries = entries.ok_or_else(|| refused("`vocab` is missing"))?;
    let ordinary = vocabulary
        .checked_sub(special)
        .filter(|count| (256..=entries.len()).contains(count))
        .ok_or_else(|| refused("`vocab` has fewer tokens than the configuration says"))?;

    let mut ranks = HashMap::<Vec<u8>, usize>::with_capacity(ordinary);
    for (rank, entry) in entries.iter().take(ordinary).enumerate() {
        let token = entry
            .get("token_bytes")
            .and_then(Value::as_str)
            .and_then(base64::decode);
        let token = token.filter(|token| (1..=TOKEN_BYTES_MAX).contains(&token.len()));
        let token = token.ok_or_else(|| refused(&format!("the token of rank {rank} has no bytes")))?;
        if entry.get("rank").and_then(Value::as_u64) != Some(rank as u64) || ranks.insert(token, rank).is_some() {
            return Err(refused(&format!("the token of rank {rank} is not in its place")));
        }
    }
    let letters: Vec<char> = (0..=255).map(byte_letter).collect();
    let text = |bytes: &[u8]| -> String {
        bytes
            .iter()
            .filter_map(|byte| letters.get(usize::from(*byte)))
            .collect()
    };
    let mut merges = Vec::new();
    for (token, rank) in &ranks {
        for at in 1..token.len() {
            let (left, right) = token.split_at(at);
            if let (Some(left_rank), Some(right_rank)) = (ranks.get(left), ranks.get(right)) {
                merges.push((*rank, *left_rank, *right_rank, left, right));
            }
        }
    }
    merges.sort_unstable();
    let merges: Vec<Value> = merges
        .iter()
        .map(|merge| json!([text(merge.3), text(merge.4)]))
        .collect();
    let vocabulary: Map<String, Value> = ranks
        .iter()
        .map(|(token, rank)| (text(token), json!(special + rank)))
        .collect();

    let names = special_names(&file, special);
    let begin = names
        .iter()
        .position(|name| name == BEGIN)
        .and_then(|id| u32::try_from(id).ok());
    let added: Vec<Value> = names
        .iter()
        .enumerate()
        .map(|(id, name)| {
            json!({
                "id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            })
        })
        .collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let split = json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes]},
        "post_processor": begin.map(|id| beginning_with(id, BEGIN)), "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
            "vocab": vocabulary, "merges": merges,
        },
    });
    Ok(json.to_string().into_bytes())
}

/// The names of the first `count` ids.
fn special_names(file: &Value, count: usize) -> Vec<String> {
    let mut names: Vec<String> = (0..count)
        .map(|id| {
            SPECIAL
                .get(id)
                .map_or_else(|| format!("<SPECIAL_{id}>"), |name| (*name).to_owned())
        })
        .collect();
    if let Some(listed) = file.get("special_tokens").and_then(Value::as_array) {
        for (id, name) in names.iter_mut().enumerate() {
            *name = format!("<SPECIAL_{id}>");
        }
        for token in listed {
            let rank = token
                .get("rank")
                .and_then(Value::as_u64)
                .and_then(|rank| usize::try_from(rank).ok());
            if let (Some(name), Some(text)) = (
                rank.and_then(|rank| names.get_mut(rank)),
                token.get("token_str").and_then(Value::as_str),
            ) {
                text.clone_into(name);
            }
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_special_tokens_that_would_take_all_memory_is_refused() {
        let token = |rank: usize| json!({"rank": rank, "token_bytes": base64::encode(&[rank as u8])});
        let vocab: Vec<Value> = (0..256).map(token).collect();
        let file = |special: u64| {
            let config = json!({
                "pattern": ".", "default_vocab_size": special + 256, "default_num_special_tokens": special,
            });
            json!({"config": config, "vocab": vocab}).to_string().into_bytes()
        };
        assert!(from_tekken(&file(1_000)).is_ok());
        assert!(from_tekken(&file(1 << 17)).is_err());
        assert!(from_tekken(&file(u64::MAX - 256)).is_err());
    }
}
