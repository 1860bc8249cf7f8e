//! From a run file to everything that a run starts from: configuration, tokenizer, initial parameters, held-out texts.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use polder_node::train::{NewRun, compressor_bits_per_byte, order_0_bits_per_byte};
use polder_protocol::adapters::Adapters;
use polder_protocol::hash::{BlobId, FederationId, NodeId};
use polder_protocol::layout::Layout;
use polder_protocol::run::{Evaluation, HeldOut, RunSpec, SPEC_VERSION};
use serde_json::{Value, json};

use super::file::{AdaptersTable, EvaluationTable, Model, RunFile};

/// Names under which tokenizers keep the token that ends a text.
const END_TOKENS: [&str; 7] = [
    "<|end|>",
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<eos>",
    "<|eot_id|>",
];

/// What a run trains, and on what.
struct Start {
    config_json: String,
    layout: Layout,
    initial_files: Vec<PathBuf>,
    adapters: Option<Adapters>,
    base_files: Vec<PathBuf>,
}

/// Makes the run; its files lie in `folder`.
pub(crate) fn draft(file: &RunFile, folder: &Path) -> anyhow::Result<NewRun> {
    let tokenizer_file = folder.join("tokenizer.json");
    let start = match (&file.model, &file.adapters) {
        (_, Some(table)) => {
            let from = table.base.join("tokenizer.json");
            fs::copy(&from, &tokenizer_file).with_context(|| format!("cannot read {}", from.display()))?;
            over_base(table, file.seed, folder)?
        }
        (Some(model), None) => {
            let bytes = match model.tokenizer.as_str() {
                "bytes" => polder_worker::byte_tokenizer(),
                path => fs::read(path).with_context(|| format!("cannot read the tokenizer {path}"))?,
            };
            let tokenizer =
                serde_json::from_slice(&bytes).with_context(|| format!("{} is no tokenizer.json", model.tokenizer))?;
            let what = || format!("cannot write {}", tokenizer_file.display());
            fs::write(&tokenizer_file, bytes).with_context(what)?;
            let config_json = config_json(file, model, &tokenizer)?;
            let (layout, parts) = polder_worker::initial_parameters(&config_json, file.seed)
                .context("the model's dimensions do not fit together")?;
            Start {
                initial_files: write_parts(folder, "initial", &parts)
                    .with_context(|| format!("cannot write to {}", folder.display()))?,
                config_json,
                layout,
                adapters: None,
                base_files: Vec::new(),
            }
        }
        (None, None) => bail!("[model] is missing"),
    };
    let evaluation = file.evaluation.as_ref().map(evaluation).transpose()?;
    Ok(NewRun {
        spec: RunSpec {
            version: SPEC_VERSION,
            name: file.name.clone(),
            // The daemon knows these.
            federation: FederationId::default(),
            steward: NodeId::default(),
            tokenizer: BlobId::default(),
            initial: Vec::new(),
            evaluation: None,
            config_json: start.config_json,
            layout: start.layout,
            rounds: file.rounds,
            inner: file.inner()?,
            outer: file.outer()?,
            closing: file.closing()?,
            data: file.data.clone(),
            seed: file.seed,
            evaluate_every_rounds: file.evaluation.as_ref().map_or(1, |table| table.every_rounds.max(1)),
            boundary: file.boundary()?,
            adapters: start.adapters,
        },
        initial_files: start.initial_files,
        base_files: start.base_files,
        tokenizer_file,
        evaluation,
    })
}

/// Adapters over the model of a folder.
fn over_base(table: &AdaptersTable, seed: u64, folder: &Path) -> anyhow::Result<Start> {
    let base = table.base.display();
    let (config_json, model, parameters) =
        polder_worker::folder_parameters(&table.base).with_context(|| format!("cannot read the model in {base}"))?;
    let has = polder_protocol::adapters::projections(&model).join(", ");
    let adapters = Adapters {
        rank: table.rank,
        alpha: table.alpha.unwrap_or(2.0 * table.rank as f32),
        targets: table.targets.clone(),
        model,
        base: Vec::new(),
    };
    let (layout, parts) = polder_worker::initial_adapters(&adapters, seed)
        .with_context(|| format!("[adapters] do not fit the model in {base}, whose projections are {has}"))?;
    Ok(Start {
        config_json,
        layout,
        initial_files: write_parts(folder, "initial", &parts)
            .with_context(|| format!("cannot write to {}", folder.display()))?,
        base_files: write_parts(folder, "base", &parameters)?,
        adapters: Some(adapters),
    })
}

/// Writes parameters as one file of little-endian f32 per part.
fn write_parts(folder: &Path, name: &str, parts: &[Vec<f32>]) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::with_capacity(parts.len());
    for (index, part) in parts.iter().enumerate() {
        let path = folder.join(format!("{name}-{index}.f32"));
        let mut out = BufWriter::new(fs::File::create(&path)?);
        for value in part {
            out.write_all(&value.to_le_bytes())?;
        }
        out.flush()?;
        files.push(path);
    }
    Ok(files)
}

/// The Hugging Face configuration of the run's Llama.
fn config_json(file: &RunFile, model: &Model, tokenizer: &Value) -> anyhow::Result<String> {
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
    fn the_vocabulary_ends_after_the_largest_id_and_the_end_of_text_is_found() {
        let tokenizer = serde_json::from_slice(&polder_worker::byte_tokenizer()).unwrap();
        assert_eq!(vocabulary(&tokenizer), (258, Some(257)));
        assert_eq!(vocabulary(&json!({})), (0, None));
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
