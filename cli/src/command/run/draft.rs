//! From a run file to everything that a run starts from: configuration, tokenizer, initial parameters, held-out texts.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use polder_node::train::{NewRun, compressor_bits_per_byte, order_0_bits_per_byte};
use polder_protocol::hash::{BlobId, FederationId, NodeId};
use polder_protocol::run::{Evaluation, HeldOut, RunSpec};
use serde_json::{Map, Value, json};

use super::file::{EvaluationTable, RunFile};

/// Ids of a byte tokenizer: the bytes, and the end of a text.
const BYTE_VOCABULARY: u32 = 257;
/// Names under which tokenizers keep the token that ends a text.
const END_TOKENS: [&str; 6] = [
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<eos>",
    "<|eot_id|>",
];

/// Makes the run; its files lie in `folder`.
pub(crate) fn draft(file: &RunFile, folder: &Path) -> anyhow::Result<NewRun> {
    let tokenizer_file = folder.join("tokenizer.json");
    let tokenizer = match file.model.tokenizer.as_str() {
        "bytes" => byte_tokenizer(),
        path => {
            let text = fs::read_to_string(path).with_context(|| format!("cannot read the tokenizer {path}"))?;
            serde_json::from_str(&text).with_context(|| format!("{path} is no tokenizer.json"))?
        }
    };
    fs::write(&tokenizer_file, tokenizer.to_string())?;
    let config_json = config_json(file, &tokenizer)?;
    let (layout, parts) = polder_worker::initial_parameters(&config_json, file.seed)
        .context("the model's dimensions do not fit together")?;
    let mut initial_files = Vec::with_capacity(parts.len());
    for (index, part) in parts.iter().enumerate() {
        let path = folder.join(format!("{index}.f32"));
        let mut out = BufWriter::new(fs::File::create(&path)?);
        for value in part {
            out.write_all(&value.to_le_bytes())?;
        }
        out.flush()?;
        initial_files.push(path);
    }
    let evaluation = file.evaluation.as_ref().map(evaluation).transpose()?;
    Ok(NewRun {
        spec: RunSpec {
            version: 1,
            name: file.name.clone(),
            // The daemon knows these.
            federation: FederationId::default(),
            steward: NodeId::default(),
            tokenizer: BlobId::default(),
            initial: Vec::new(),
            evaluation: None,
            config_json,
            layout,
            rounds: file.rounds,
            inner: file.inner()?,
            outer: file.outer()?,
            closing: file.closing()?,
            data: file.data.clone(),
            seed: file.seed,
            evaluate_every_rounds: file.evaluation.as_ref().map_or(1, |table| table.every_rounds.max(1)),
            boundary: file.boundary()?,
        },
        initial_files,
        tokenizer_file,
        evaluation,
    })
}

/// The Hugging Face configuration of the run's Llama.
fn config_json(file: &RunFile, tokenizer: &Value) -> anyhow::Result<String> {
    let model = &file.model;
    let seq = file.inner()?.seq;
    let intermediate = model
        .intermediate
        .unwrap_or_else(|| (model.hidden.saturating_mul(8) / 3).next_multiple_of(8));
    let (vocabulary, end) = vocabulary(tokenizer);
    ensure!(vocabulary > 0, "the tokenizer has no tokens");
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "bos_token_id": null,
        "eos_token_id": end,
        "head_dim": model.hidden / model.heads,
        "hidden_act": "silu",
        "hidden_size": model.hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": model.context.unwrap_or(seq),
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.blocks,
        "num_key_value_heads": model.kv_heads.unwrap_or(model.heads),
        "rms_norm_eps": 1e-5,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": "float32",
        "vocab_size": vocabulary,
    });
    Ok(serde_json::to_string_pretty(&config)?)
}

/// One past the largest id, and the id that ends a text where one is known.
fn vocabulary(tokenizer: &Value) -> (u32, Option<u32>) {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let added = tokenizer["added_tokens"].as_array().into_iter().flatten();
    let added: Vec<(&str, u32)> = added
        .filter_map(|token| Some((token["content"].as_str()?, id(&token["id"])?)))
        .collect();
    let listed = tokenizer["model"]["vocab"].as_object().into_iter().flatten();
    let ids = listed
        .filter_map(|(_, value)| id(value))
        .chain(added.iter().map(|(_, id)| *id));
    let end = END_TOKENS
        .iter()
        .find_map(|name| added.iter().find(|(content, _)| content == name));
    (ids.max().map_or(0, |id| id.saturating_add(1)), end.map(|(_, id)| *id))
}

/// A `tokenizer.json` whose tokens are the bytes, with their values as ids.
fn byte_tokenizer() -> Value {
    let vocabulary: Map<String, Value> = (0..=255u8)
        .map(|byte| (stand_in(byte).to_string(), json!(byte)))
        .collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{
            "id": BYTE_VOCABULARY - 1,
            "content": "<|endoftext|>",
            "single_word": false,
            "lstrip": false,
            "rstrip": false,
            "normalized": false,
            "special": true
        }],
        "normalizer": null,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "post_processor": null,
        "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocabulary,
            "merges": []
        }
    })
}

/// The visible character that byte-level tokenizers write for a byte: itself, or one from U+0100 on.
fn stand_in(byte: u8) -> char {
    let visible = |byte: &u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if visible(&byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|other| !visible(other)).count();
    u32::try_from(before)
        .ok()
        .and_then(|before| char::from_u32(0x100 + before))
        .unwrap_or(' ')
}

/// Reads the held-out texts and computes what they are compared with.
fn evaluation(table: &EvaluationTable) -> anyhow::Result<Evaluation> {
    let mut found = Evaluation::default();
    let folder = table.folder.display();
    let entries = fs::read_dir(&table.folder).with_context(|| format!("cannot read the held-out texts in {folder}"))?;
    for entry in entries {
        let path: PathBuf = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let Some(language) = name
            .strip_suffix(".txt")
            .filter(|language| !language.ends_with(".train"))
        else {
            continue;
        };
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let primer = table.folder.join(format!("{language}.train.txt"));
        let primer = if primer.is_file() {
            fs::read(&primer)?
        } else {
            Vec::new()
        };
        let held_out = HeldOut {
            order_0_bits_per_byte: order_0_bits_per_byte(text.as_bytes()),
            compressor_bits_per_byte: compressor_bits_per_byte(text.as_bytes(), &primer)?,
            text,
        };
        found.languages.insert(language.to_owned(), held_out);
    }
    ensure!(!found.languages.is_empty(), "there is no LANG.txt in {folder}");
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_tokenizer_has_a_token_for_every_byte_and_an_end() {
        let tokenizer = byte_tokenizer();
        assert_eq!(vocabulary(&tokenizer), (257, Some(256)));
        let vocabulary = tokenizer["model"]["vocab"].as_object().unwrap();
        assert_eq!(vocabulary.len(), 256);
        // As GPT-2's: a space is Ġ, a line feed is Ċ.
        assert_eq!(
            (&vocabulary["Ġ"], &vocabulary["Ċ"], &vocabulary["é"]),
            (&json!(32), &json!(10), &json!(0xe9))
        );
    }

    #[test]
    fn held_out_texts_come_with_their_baselines() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("nl.txt"), "abab".repeat(50)).unwrap();
        fs::write(folder.path().join("nl.train.txt"), "abab".repeat(50)).unwrap();
        let table = EvaluationTable {
            folder: folder.path().to_owned(),
            every_rounds: 1,
        };
        let found = evaluation(&table).unwrap();
        assert_eq!(found.languages.len(), 1);
        assert_eq!(found.languages["nl"].order_0_bits_per_byte, 1.0);
        fs::remove_file(folder.path().join("nl.txt")).unwrap();
        assert!(evaluation(&table).unwrap_err().to_string().contains("LANG.txt"));
    }
}
