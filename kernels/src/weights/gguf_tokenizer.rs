//! The tokenizer inside a GGUF file, as a `tokenizer.json`.

use std::collections::{HashMap, HashSet};

use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Map, Value, json};

use super::WeightsError;
use super::gguf_model::GgufFile;

/// What a GGUF file says of text.
pub(super) struct GgufTokenizer {
    /// A `tokenizer.json`.
    pub(super) json: Vec<u8>,
    pub(super) chat_template: Option<String>,
    pub(super) end_tokens: Vec<u32>,
    /// The token that begins a text, where the tokenizer adds one.
    pub(super) begin_token: Option<u32>,
}

// ggml's kinds of tokens.
const UNKNOWN: f64 = 2.0;
const CONTROL: f64 = 3.0;
const USER_DEFINED: f64 = 4.0;

/// Special tokens that end a turn or a text in some family, whichever of them the file names as its end.
const END_TEXTS: [&str; 8] = [
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
];

/// How a byte-level tokenizer cuts text before merging, from the name that llama.cpp gives it.
enum Cut {
    /// GPT-2's expression.
    Gpt2,
    /// Digits one by one, then GPT-2's expression.
    Digits,
    /// Another expression; the flag says whether a whole word that is a token is taken without merging.
    Expression(&'static str, bool),
    /// As [`Cut::Expression`], after Unicode composition.
    Composed(&'static str),
}

const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

fn cut_named(name: &str) -> Option<Cut> {
    Some(match name {
        "default" | "gpt-2" | "gpt2" => Cut::Gpt2,
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "minerva-7b" => Cut::Digits,
        "llama3" | "llama-v3" | "llama-bpe" | "falcon3" => Cut::Expression(LLAMA_3, true),
        "tekken" => Cut::Expression(TEKKEN, true),
        "qwen2" | "deepseek-r1-qwen" => Cut::Composed(QWEN_2),
        _ => return None,
    })
}

/// Builds the tokenizer.
pub(super) fn build(file: &GgufFile) -> Result<GgufTokenizer, WeightsError> {
    let tokens = file
        .texts("tokenizer.ggml.tokens")?
        .ok_or_else(|| file.missing("tokenizer.ggml.tokens"))?;
    let kinds = file.numbers("tokenizer.ggml.token_type")?.unwrap_or_default();
    let kind_of = |id: usize| kinds.get(id).copied().unwrap_or(1.0);
    let vocabulary = vocabulary(file, &tokens)?;
    let model = file.text("tokenizer.ggml.model")?;
    let is_spm = match model.ok_or_else(|| file.missing("tokenizer.ggml.model"))? {
        "gpt2" => false,
        "llama" => true,
        other => {
            let other: String = other.chars().take(32).collect();
            return Err(file.feature(format!("tokenizer model `{other}` (gpt2 and llama are)")));
        }
    };
    let (mut json, merges) = if is_spm {
        (sentence_pieces(file, &tokens, &vocabulary, &kinds)?, None)
    } else {
        let (json, merges) = byte_level(file)?;
        (json, Some(merges))
    };
    let added: Vec<Value> = tokens
        .iter()
        .enumerate()
        .filter(|(id, _)| [CONTROL, USER_DEFINED].contains(&kind_of(*id)) || is_spm && kind_of(*id) == UNKNOWN)
        .map(|(id, token)| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": kind_of(id) != USER_DEFINED,
            })
        })
        .collect();
    json["added_tokens"] = Value::Array(added);

    let token_id = |key: &str| -> Result<Option<u32>, WeightsError> {
        let id = file.whole(key)?.filter(|id| *id < tokens.len() as u64);
        Ok(id.and_then(|id| u32::try_from(id).ok()))
    };
    let begin = token_id("tokenizer.ggml.bos_token_id")?;
    let adds_begin = match file.flag("tokenizer.ggml.add_bos_token")? {
        Some(flag) => flag,
        // What llama.cpp assumes of files that do not say.
        None => {
            is_spm
                || matches!(
                    file.text("tokenizer.ggml.pre")?,
                    Some("llama-bpe" | "llama3" | "llama-v3" | "tekken")
                )
        }
    };
    let begin_token = begin.filter(|_| adds_begin);
    if let Some((id, token)) = begin_token.and_then(|id| Some((id, tokens.get(id as usize)?))) {
        json["post_processor"] = beginning_with(id, token);
    }
    let mut end_tokens = Vec::new();
    for key in [
        "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.eot_token_id",
        "tokenizer.ggml.eom_token_id",
    ] {
        end_tokens.extend(token_id(key)?);
    }
    for text in END_TEXTS {
        let id = vocabulary.get(text).copied();
        end_tokens.extend(id.filter(|id| kind_of(*id as usize) == CONTROL));
    }
    end_tokens.sort_unstable();
    end_tokens.dedup();
    let json = match (&merges, json) {
        (Some(merges), Value::Object(rest)) => written(rest, &tokens, merges)?,
        (_, json) => json.to_string().into_bytes(),
    };
    Ok(GgufTokenizer {
        json,
        chat_template: file.text("tokenizer.chat_template")?.map(str::to_owned),
        end_tokens,
        begin_token,
    })
}

fn vocabulary<'a>(file: &GgufFile, tokens: &[&'a str]) -> Result<HashMap<&'a str, u32>, WeightsError> {
    let mut vocabulary = HashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        let id = u32::try_from(id).map_err(|_| file.feature("a vocabulary of more than 2^32 tokens"))?;
        if let Some(first) = vocabulary.insert(*token, id) {
            return Err(WeightsError::Tokenizer {
                path: file.path.clone(),
                reason: format!("tokens {first} and {id} are the same text"),
            });
        }
    }
    Ok(vocabulary)
}

/// Two texts that are merged.
type Merge<'a> = (&'a str, &'a str);

/// A `tokenizer.json` whose model lacks vocabulary and merges, and the merges.
fn byte_level(file: &GgufFile) -> Result<(Value, Vec<Merge<'_>>), WeightsError> {
    let pairs = file
        .texts("tokenizer.ggml.merges")?
        .ok_or_else(|| file.missing("tokenizer.ggml.merges"))?;
    let mut merges = Vec::with_capacity(pairs.len());
    for pair in pairs {
        // A merge is two texts with a space between; only the first may begin with one.
        let at = pair.char_indices().skip(1).find(|(_, letter)| *letter == ' ');
        let Some((left, right)) = at.map(|(at, _)| (&pair[..at], &pair[at + 1..])) else {
            return Err(WeightsError::Tokenizer {
                path: file.path.clone(),
                reason: format!("merge `{}` is not a pair", pair.chars().take(40).collect::<String>()),
            });
        };
        merges.push((left, right));
    }
    let name = file.text("tokenizer.ggml.pre")?.unwrap_or("default");
    let cut = cut_named(name).ok_or_else(|| {
        let name: String = name.chars().take(32).collect();
        file.feature(format!("pre-tokenizer `{name}`"))
    })?;
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let split = |expression: &str| json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false});
    let sequence = |steps: Vec<Value>| json!({"type": "Sequence", "pretokenizers": steps});
    let (pre_tokenizer, ignore_merges, normalizer) = match cut {
        Cut::Gpt2 => (bytes(true), false, Value::Null),
        Cut::Digits => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            (sequence(vec![digits, bytes(true)]), false, Value::Null)
        }
        Cut::Expression(expression, ignore) => (sequence(vec![split(expression), bytes(false)]), ignore, Value::Null),
        Cut::Composed(expression) => (
            sequence(vec![split(expression), bytes(false)]),
            false,
            json!({"type": "NFC"}),
        ),
    };
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": ignore_merges,
    });
    let post_processor =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true});
    let json = tokenizer_json(model, normalizer, pre_tokenizer, post_processor, bytes(true));
    Ok((json, merges))
}

/// The text of a byte-level tokenizer. Vocabulary and merges, a hundred thousand texts, are written as they stand in the
/// file, without a value for each.
fn written(mut rest: Map<String, Value>, tokens: &[&str], merges: &[Merge<'_>]) -> Result<Vec<u8>, WeightsError> {
    struct Vocabulary<'a>(&'a [&'a str]);
    impl Serialize for Vocabulary<'_> {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.collect_map(self.0.iter().zip(0u32..))
        }
    }
    struct Model<'a>(&'a Map<String, Value>, Vocabulary<'a>, &'a [Merge<'a>]);
    impl Serialize for Model<'_> {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let mut map = serializer.serialize_map(None)?;
            for (key, value) in self.0 {
                map.serialize_entry(key, value)?;
            }
            map.serialize_entry("vocab", &self.1)?;
            map.serialize_entry("merges", self.2)?;
            map.end()
        }
    }
    struct Whole<'a>(&'a Map<String, Value>, Model<'a>);
    impl Serialize for Whole<'_> {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let mut map = serializer.serialize_map(None)?;
            for (key, value) in self.0 {
                map.serialize_entry(key, value)?;
            }
            map.serialize_entry("model", &self.1)?;
            map.end()
        }
    }
    let model = match rest.remove("model") {
        Some(Value::Object(model)) => model,
        _ => Map::new(),
    };
    let whole = Whole(&rest, Model(&model, Vocabulary(tokens), merges));
    serde_json::to_vec(&whole).map_err(|error| WeightsError::Json {
        path: "tokenizer.json".into(),
        reason: error.to_string(),
    })
}

/// SentencePiece's byte pair encoding: pieces have scores in place of merges. Every way to make a piece of two others is
/// a merge, and merges into better pieces come first.
fn sentence_pieces(
    file: &GgufFile,
    tokens: &[&str],
    vocabulary: &HashMap<&str, u32>,
    kinds: &[f64],
) -> Result<Value, WeightsError> {
    let scores = file
        .numbers("tokenizer.ggml.scores")?
        .filter(|scores| scores.len() == tokens.len())
        .ok_or_else(|| file.missing("tokenizer.ggml.scores"))?;
    // A hostile file could hold very long pieces; real ones have at most a few dozen letters.
    const PIECE_LETTERS_MAX: usize = 256;
    let ordinary: HashSet<&str> = tokens
        .iter()
        .enumerate()
        .filter(|(id, token)| kinds.get(*id).is_none_or(|kind| *kind == 1.0) && token.len() <= PIECE_LETTERS_MAX)
        .map(|(_, token)| *token)
        .collect();
    let mut merges = Vec::new();
    for (token, score) in tokens
        .iter()
        .zip(&scores)
        .filter(|(token, _)| ordinary.contains(*token))
    {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (true, true, Some(left_id), Some(right_id)) = (
                ordinary.contains(left),
                ordinary.contains(right),
                vocabulary.get(left),
                vocabulary.get(right),
            ) {
                merges.push((*score, *left_id, *right_id, left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    let merges: Vec<Value> = merges.into_iter().map(|merge| json!([merge.3, merge.4])).collect();
    let unknown = kinds
        .iter()
        .position(|kind| *kind == UNKNOWN)
        .and_then(|id| tokens.get(id));
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
        "vocab": vocabulary_json(tokens, vocabulary), "merges": merges,
    });
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let prefixed = file.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    let normalizer = if prefixed {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]})
    } else {
        replace
    };
    let decoder = json!({"type": "Sequence", "decoders": decoders});
    Ok(tokenizer_json(model, normalizer, Value::Null, Value::Null, decoder))
}

fn vocabulary_json(tokens: &[&str], vocabulary: &HashMap<&str, u32>) -> Map<String, Value> {
    let entries = tokens
        .iter()
        .filter_map(|token| Some(((*token).to_owned(), json!(vocabulary.get(token)?))));
    entries.collect()
}

fn tokenizer_json(
    model: Value,
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
) -> Value {
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer, "post_processor": post_processor, "decoder": decoder, "model": model,
    })
}

fn beginning_with(id: u32, token: &str) -> Value {
    let begin = |type_id: u32| json!({"SpecialToken": {"id": token, "type_id": type_id}});
    let sequence = |id: &str, type_id: u32| json!({"Sequence": {"id": id, "type_id": type_id}});
    json!({
        "type": "TemplateProcessing",
        "single": [begin(0), sequence("A", 0)],
        "pair": [begin(0), sequence("A", 0), begin(1), sequence("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    })
}
