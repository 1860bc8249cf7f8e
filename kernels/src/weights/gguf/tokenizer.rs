//! The tokenizer inside a GGUF file, as a `tokenizer.json`.

use std::collections::HashMap;

use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Map, Value, json};

use super::GgufFile;
use crate::text::named_templates;
use crate::text::pieces::{self, Pieces, beginning_with};
use crate::weights::WeightsError;

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
const END_TEXTS: [&str; 9] = [
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|assistant_end|>",
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
    /// One expression after the other.
    Expressions(&'static [&'static str]),
}

const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const DEEPSEEK_3: [&str; 3] = [
    r"\p{N}{1,3}",
    "[一-龥\u{3040}-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
];

fn cut_named(name: &str) -> Option<Cut> {
    Some(match name {
        "default" | "gpt-2" | "gpt2" => Cut::Gpt2,
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "minerva-7b" => Cut::Digits,
        "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "pixtral" => Cut::Expression(LLAMA_3, true),
        "smaug-bpe" => Cut::Expression(LLAMA_3, false),
        "tekken" => Cut::Expression(TEKKEN, true),
        "deepseek-v3" => Cut::Expressions(&DEEPSEEK_3),
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
        (sentence_pieces(file, &tokens, &kinds)?, None)
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
                    Some("llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" | "tekken")
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
        chat_template: chat_template(file)?,
        end_tokens,
        begin_token,
    })
}

/// The template; where a second one is for questions with tools, both in one.
fn chat_template(file: &GgufFile) -> Result<Option<String>, WeightsError> {
    let default = file.text("tokenizer.chat_template")?;
    let with_tools = file.text("tokenizer.chat_template.tool_use")?;
    Ok(default.map(|default| match with_tools {
        Some(with_tools) => named_templates::joined(default, with_tools),
        None => default.to_owned(),
    }))
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
    let (normalizer, pre_tokenizer, ignore_merges) = cut_json(&cut);
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": ignore_merges,
    });
    let post_processor =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true});
    let json = tokenizer_json(model, normalizer, pre_tokenizer, post_processor, byte_letters(true));
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

fn byte_letters(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

/// Normalizer, pre-tokenizer, and whether a whole word that is a token is taken without merging.
fn cut_json(cut: &Cut) -> (Value, Value, bool) {
    let split = |expression: &str| json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false});
    let sequence = |steps: &[Value]| json!({"type": "Sequence", "pretokenizers": steps});
    match cut {
        Cut::Gpt2 => (Value::Null, byte_letters(true), false),
        Cut::Digits => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            (Value::Null, sequence(&[digits, byte_letters(true)]), false)
        }
        Cut::Expression(expression, ignore) => (
            Value::Null,
            sequence(&[split(expression), byte_letters(false)]),
            *ignore,
        ),
        Cut::Composed(expression) => {
            let composed = json!({"type": "NFC"});
            (composed, sequence(&[split(expression), byte_letters(false)]), false)
        }
        Cut::Expressions(expressions) => {
            let mut steps: Vec<Value> = expressions.iter().map(|expression| split(expression)).collect();
            steps.push(byte_letters(false));
            (Value::Null, sequence(&steps), false)
        }
    }
}

/// One name for each way of cutting that files are written with.
pub(super) const NAMED_CUTS: [&str; 7] = [
    "gpt-2",
    "smollm",
    "llama-bpe",
    "smaug-bpe",
    "tekken",
    "qwen2",
    "deepseek-v3",
];

/// What decides how a named way cuts: the signatures of normalizer and pre-tokenizer, and whether merges may be ignored.
pub(super) fn cut_signature(name: &str) -> Option<([Vec<String>; 2], bool)> {
    let (normalizer, pre_tokenizer, ignore_merges) = cut_json(&cut_named(name)?);
    Some(([Some(&normalizer), Some(&pre_tokenizer)].map(signature), ignore_merges))
}

/// The steps of a normalizer or pre-tokenizer by what changes a token's id, whatever else its JSON says.
pub(super) fn signature(step: Option<&Value>) -> Vec<String> {
    let Some(step) = step.filter(|step| !step.is_null()) else {
        return Vec::new();
    };
    let of = |key: &str| step.get(key).unwrap_or(&Value::Null).to_string();
    match step.get("type").and_then(Value::as_str) {
        Some("Sequence") => {
            let steps = step.get("pretokenizers").or_else(|| step.get("normalizers"));
            let steps = steps.and_then(Value::as_array).into_iter().flatten();
            steps.flat_map(|step| signature(Some(step))).collect()
        }
        Some("Split") => vec![format!("split {} {} {}", of("pattern"), of("behavior"), of("invert"))],
        Some("Digits") => vec![format!("digits {}", of("individual_digits"))],
        Some("ByteLevel") => vec![format!("bytes {} {}", of("use_regex"), of("add_prefix_space"))],
        _ => vec![step.to_string()],
    }
}

fn sentence_pieces(file: &GgufFile, tokens: &[&str], kinds: &[f64]) -> Result<Value, WeightsError> {
    let scores = file
        .numbers("tokenizer.ggml.scores")?
        .filter(|scores| scores.len() == tokens.len())
        .ok_or_else(|| file.missing("tokenizer.ggml.scores"))?;
    let kind_of = |id: usize| kinds.get(id).copied().unwrap_or(f64::from(pieces::NORMAL));
    let pieces = tokens.iter().zip(scores).enumerate();
    // A cast from float saturates, and no kind is above six.
    let pieces = pieces.map(|(id, (token, score))| (*token, score, kind_of(id) as u8));
    Ok(Pieces {
        pieces: pieces.collect(),
        normalizers: Vec::new(),
        prefixed: file.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true),
        byte_fallback: true,
    }
    .byte_pairs())
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
