//! Low-rank adapters trained by two real nodes of two institutions, over a model that they made before.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use support::{Node, invite, wait_for};

/// A run of this size takes seconds; the machine may be slow.
const RUN_TIME_MAX: Duration = Duration::from_secs(180);
const ROUNDS: u64 = 4;

#[test]
fn two_nodes_adapt_a_model_that_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let mut nodes = two(root);
    let base = root.join("base");
    train(
        root,
        &nodes,
        "base",
        2,
        "[model]\nhidden = 64\nblocks = 2\nheads = 4\nkv_heads = 2\n",
        "en",
    );
    export(&nodes[0], "base", &base, &[]);
    let before = tensors(&base.join("model.safetensors"));
    let adapters = "[adapters]\nbase = \"base\"\nrank = 4\ntargets = [\"q_proj\", \"down_proj\"]\n";
    train(root, &nodes, "tuned", ROUNDS, adapters, "de");

    for node in &nodes {
        let status = status(node, "tuned");
        let losses: Vec<f64> = status["recent"]
            .as_array()
            .unwrap()
            .iter()
            .map(|report| report["loss"].as_f64().unwrap())
            .collect();
        println!("{}: {losses:?}", node.name);
        assert!(losses[losses.len() - 1] < losses[0] * 0.97, "{losses:?}");
    }
    let merged: Vec<PathBuf> = nodes
        .iter()
        .map(|node| root.join(format!("merged-{}", node.name)))
        .collect();
    let adapter = root.join("adapter");
    for (node, folder) in nodes.iter().zip(&merged) {
        export(node, "tuned", folder, &[]);
    }
    let after = tensors(&merged[0].join("model.safetensors"));
    assert!(
        after == tensors(&merged[1].join("model.safetensors")),
        "two nodes, two models"
    );
    assert_eq!(after.len(), before.len());
    for (name, values) in &before {
        let adapted = name.contains("q_proj") || name.contains("down_proj");
        assert_eq!(after[name] != *values, adapted, "{name}");
    }
    export(&nodes[1], "tuned", &adapter, &["--adapter"]);
    let own = tensors(&adapter.join("adapter_model.safetensors"));
    assert_eq!(own.len(), 2 * 2 * 2);
    // What is published is the base and the adapters that are exported.
    let module = "model.layers.1.mlp.down_proj";
    let part = |which: &str| numbers(&own[&format!("base_model.model.{module}.lora_{which}.weight")]);
    let (a, b) = (part("A"), part("B"));
    let (weight, merged) = (
        &before[&format!("{module}.weight")],
        &after[&format!("{module}.weight")],
    );
    let (weight, merged) = (numbers(weight), numbers(merged));
    let inner = a.len() / 4;
    for (at, (weight, merged)) in weight.iter().zip(&merged).enumerate() {
        let (row, col) = (at / inner, at % inner);
        let moved: f32 = (0..4).map(|k| b[row * 4 + k] * a[k * inner + col]).sum();
        assert!((weight + 2.0 * moved - merged).abs() < 1e-5, "{at}");
    }
    let merged_by_first = root.join("merged-first");
    let config: Value = serde_json::from_slice(&fs::read(adapter.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["lora_alpha"], 8.0);
    peft_agrees([&base, &adapter, &merged_by_first]);
    let none = root.join("none");
    let refused = nodes[0].try_verb(&["run", "export", "base", "--adapter", "--to", none.to_str().unwrap()]);
    assert!(refused.unwrap_err().contains("no adapters"));
    for node in &mut nodes {
        node.leave();
    }
}

/// PEFT reads the adapter, and gets with the base what the merged model computes; where there is a Python that has it:
/// `POLDER_PYTHON`, or `python3`.
fn peft_agrees(folders: [&Path; 3]) {
    let python = std::env::var("POLDER_PYTHON").unwrap_or_else(|_| "python3".into());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/exported_adapter.py");
    let output = match Command::new(&python).arg(script).args(folders).output() {
        Ok(output) if output.status.code() != Some(3) => output,
        other => {
            println!("skipped: {python} has no PEFT: {other:?}");
            return;
        }
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let difference: f64 = String::from_utf8_lossy(&output.stdout).trim().parse().unwrap();
    println!("largest difference from PEFT's logits: {difference:.1e}");
    assert!(difference < 1e-3, "{difference}");
}

fn two(root: &Path) -> Vec<Node> {
    const SETTINGS: &str = "threads = 1\nserve = false\n";
    let mut first = Node::prepare(root, "first", SETTINGS);
    let charter = [
        "charter",
        "new",
        "Delta",
        "--institution",
        "Leiden",
        "--institution",
        "Uppsala",
    ];
    first.verb(&charter);
    first.start(&[]);
    let mut second = Node::prepare(root, "second", SETTINGS);
    second.start(&[&invite(&first, "Uppsala")]);
    let nodes = vec![first, second];
    for node in &nodes {
        for language in ["de", "en"] {
            let texts = Path::new(env!("CARGO_MANIFEST_DIR")).join("data").join("udhr");
            let path = texts.join(format!("{language}.train.txt"));
            node.verb(&["data", "add", language, path.to_str().unwrap(), "--language", language]);
        }
    }
    nodes
}

/// Trains a run on one language to its end, on all nodes.
fn train(root: &Path, nodes: &[Node], name: &str, rounds: u64, what: &str, language: &str) {
    let file = root.join(format!("{name}.toml"));
    let text = format!(
        "name = \"{name}\"\nrounds = {rounds}\nseed = 7\ndata = [\"{language}\"]\n\n{what}\n\
         [inner]\nsteps = 30\nbatch = 4\nseq = 64\nprecision = \"bf16\"\n\
         learning_rate = 1e-2\nwarmup_steps = 10\ndecay = 0.0\n\n\
         [outer]\nmomentum = 0.5\n\n\
         [closing]\nquorum = 2\ngrace = \"6s\"\ndeadline = \"30s\"\n"
    );
    fs::write(&file, text).unwrap();
    nodes[0].verb(&["run", "new", file.to_str().unwrap()]);
    nodes[0].verb(&["run", "start", name]);
    for node in nodes {
        wait_for(&format!("the end of {name} on {}", node.name), RUN_TIME_MAX, || {
            (status(node, name)["phase"] == "finished").then_some(())
        });
    }
}

fn status(node: &Node, name: &str) -> Value {
    node.try_verb(&["run", "status", name]).unwrap_or_default()
}

fn export(node: &Node, run: &str, to: &Path, more: &[&str]) {
    let arguments = ["run", "export", run, "--to", to.to_str().unwrap()];
    node.verb(&[&arguments[..], more].concat());
}

/// The bytes of each tensor of a safetensors file.
fn tensors(file: &Path) -> BTreeMap<String, Vec<u8>> {
    let bytes = fs::read(file).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let values = &bytes[8 + header..];
    let header: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let tensors = header
        .as_object()
        .unwrap()
        .iter()
        .filter(|(name, _)| *name != "__metadata__");
    let own = |(name, tensor): (&String, &Value)| {
        let at = |index: usize| tensor["data_offsets"][index].as_u64().unwrap() as usize;
        (name.clone(), values[at(0)..at(1)].to_vec())
    };
    tensors.map(own).collect()
}

fn numbers(bytes: &[u8]) -> Vec<f32> {
    let (words, _) = bytes.as_chunks::<4>();
    words.iter().map(|word| f32::from_le_bytes(*word)).collect()
}
