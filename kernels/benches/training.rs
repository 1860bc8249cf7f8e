//! A training step of ours beside PyTorch's: `cargo bench -p polder-kernels --bench training -- --pytorch PYTHON`.
//!
//! Every measurement is a process of its own, with the same shapes, batch and number of threads, ours and PyTorch's in
//! turn; medians are printed, and ratios of medians. CPU time still means something on a busy machine, but a thread that
//! spins while it waits for another counts too, so `--threads 1` compares the work itself.
//!
//! Options: `--rounds N` (3), `--steps N` (5), `--threads N` (2), `--only NAME`, `--kept N` (0) blocks that keep what their
//! backward needs in the second row; in the first all do. `--bf16` adds a row for both with products in bf16, where the
//! processor has instructions for it; PyTorch's is under `torch.autocast`. `--own NAME` measures ours alone, in this process, and
//! prints JSON; with `--adapters` it trains adapters of rank 16 for queries and values in place of the model.

use std::process::Command;
use std::time::Instant;

use polder_kernels::device::Device;
use polder_kernels::train::{TrainData, TrainStage, initial_adapters, initial_parameters};
use polder_protocol::adapters::Adapters;
use polder_protocol::layout::BlockRange;
use polder_protocol::run::{Inner, Optimiser, Precision, Schedule};
use serde_json::{Value, json};

// What people run has it too (see `cli`).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A Llama and its micro-batch.
#[derive(Debug, Clone, Copy)]
struct Shape {
    name: &'static str,
    vocabulary: u32,
    hidden: u32,
    wide: u32,
    blocks: u32,
    heads: u32,
    kv_heads: u32,
    tied: bool,
    batch: u32,
    seq: u32,
}

const SHAPES: [Shape; 2] = [
    Shape {
        name: "9.3M",
        vocabulary: 8_192,
        hidden: 256,
        wide: 768,
        blocks: 6,
        heads: 4,
        kv_heads: 4,
        tied: false,
        batch: 8,
        seq: 256,
    },
    Shape {
        name: "SmolLM2-135M",
        vocabulary: 49_152,
        hidden: 576,
        wide: 1_536,
        blocks: 30,
        heads: 9,
        kv_heads: 3,
        tied: true,
        batch: 4,
        seq: 512,
    },
];

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let option = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1).cloned()
    };
    let number = |name: &str, default: u32| option(name).map_or(default, |text| text.parse().expect("a number"));
    let (rounds, steps, threads) = (number("--rounds", 3), number("--steps", 5), number("--threads", 2));
    let kept = number("--kept", 0);
    let bf16 = arguments.iter().any(|argument| argument == "--bf16");
    if let Some(name) = option("--own") {
        let shape = SHAPES.into_iter().find(|shape| shape.name == name).expect("a shape");
        let precision = if bf16 { Precision::Bf16 } else { Precision::F32 };
        let adapters = arguments.iter().any(|argument| argument == "--adapters");
        println!("{}", own(&shape, steps, kept, precision, adapters));
        return;
    }
    let only = option("--only");
    let python = option("--pytorch");
    for shape in SHAPES
        .iter()
        .filter(|shape| only.as_deref().is_none_or(|only| only == shape.name))
    {
        compare(shape, [rounds, steps, threads, kept], python.as_deref(), bf16);
    }
}

/// What is measured.
#[derive(Debug, Clone, Copy)]
enum Contestant {
    Polder { kept: u32, bf16: bool },
    PyTorch { bf16: bool },
}

impl Contestant {
    fn name(self, shape: &Shape) -> String {
        let suffix = |bf16| if bf16 { ", bf16" } else { "" };
        match self {
            Self::Polder { kept, bf16 } if kept == shape.blocks => format!("polder{}", suffix(bf16)),
            Self::Polder { kept, bf16 } => {
                format!(
                    "polder, {} blocks again{}",
                    shape.blocks.saturating_sub(kept),
                    suffix(bf16)
                )
            }
            Self::PyTorch { bf16 } => format!("PyTorch eager, SDPA{}", suffix(bf16)),
        }
    }

    fn command(self, shape: &Shape, steps: u32, threads: u32, python: &str) -> Command {
        match self {
            Self::Polder { kept, bf16 } => {
                let mut command = Command::new(std::env::current_exe().expect("this program"));
                command.args([
                    "--own",
                    shape.name,
                    "--kept",
                    &kept.to_string(),
                    "--steps",
                    &steps.to_string(),
                ]);
                command.args(bf16.then_some("--bf16"));
                command
            }
            Self::PyTorch { bf16 } => pytorch(python, shape, steps, threads, bf16),
        }
    }
}

fn compare(shape: &Shape, [rounds, steps, threads, kept]: [u32; 4], python: Option<&str>, with_bf16: bool) {
    println!(
        "{}, batch {} × {}, {threads} threads",
        shape.name, shape.batch, shape.seq
    );
    let precisions = if with_bf16 { &[false, true][..] } else { &[false] };
    let mut contestants = Vec::new();
    for &bf16 in precisions {
        let all = shape.blocks;
        contestants.extend([all, kept].map(|kept| Contestant::Polder { kept, bf16 }));
        contestants.extend(python.map(|_| Contestant::PyTorch { bf16 }));
    }
    let mut measured: Vec<Vec<Value>> = vec![Vec::new(); contestants.len()];
    for _ in 0..rounds {
        for (contestant, measured) in contestants.iter().zip(&mut measured) {
            let mut command = contestant.command(shape, steps, threads, python.unwrap_or_default());
            command.env("RAYON_NUM_THREADS", threads.to_string());
            command.env("OMP_NUM_THREADS", threads.to_string());
            let output = command.output().expect("a program that starts");
            let text = String::from_utf8_lossy(&output.stdout);
            let line = text.lines().last().unwrap_or_default();
            match serde_json::from_str(line) {
                Ok(value) => measured.push(value),
                Err(_) => panic!("{}", String::from_utf8_lossy(&output.stderr)),
            }
        }
    }
    let tokens = f64::from(shape.batch * shape.seq);
    let figures: Vec<[f64; 3]> = measured
        .iter()
        .map(|measured| {
            let per_second =
                |key: &str| tokens / median(measured.iter().flat_map(|value| numbers(&value[key])).collect());
            let peak = median(
                measured
                    .iter()
                    .filter_map(|value| value["peak_bytes"].as_f64())
                    .collect(),
            );
            [per_second("cpu"), per_second("wall"), peak]
        })
        .collect();
    let peers = contestants
        .iter()
        .zip(&figures)
        .filter(|(contestant, _)| matches!(contestant, Contestant::PyTorch { .. }));
    let peers: Vec<_> = peers.map(|(_, figures)| figures).collect();
    for (index, (contestant, [cpu, wall, peak])) in contestants.iter().zip(&figures).enumerate() {
        let name = contestant.name(shape);
        let mut line = format!(
            "  {name:36} {cpu:6.0} tokens per CPU second, {wall:6.0} tokens/s, peak {:6.0} MiB",
            peak / 1_048_576.0
        );
        // Each beside the peer of its own precision.
        if let Some(peer) = peers.get(index / 3) {
            line += &format!(
                "; {:.2} ×, {:.2} ×, {:.2} ×",
                cpu / peer[0],
                wall / peer[1],
                peak / peer[2]
            );
        }
        println!("{line}");
    }
}

fn pytorch(python: &str, shape: &Shape, steps: u32, threads: u32, bf16: bool) -> Command {
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers/pytorch.py");
    let mut command = Command::new(python);
    command.arg(script);
    let Shape {
        vocabulary,
        hidden,
        wide,
        blocks,
        heads,
        kv_heads,
        tied,
        batch,
        seq,
        ..
    } = *shape;
    let tied = u32::from(tied);
    let numbers = [
        vocabulary, hidden, wide, blocks, heads, kv_heads, tied, batch, seq, steps, threads,
    ];
    command.args(numbers.map(|number| number.to_string()));
    command.arg(u32::from(bf16).to_string());
    command
}

fn own(shape: &Shape, steps: u32, blocks_kept: u32, precision: Precision, adapters: bool) -> Value {
    let Shape {
        vocabulary,
        hidden,
        wide,
        blocks,
        heads,
        kv_heads,
        tied,
        batch,
        seq,
        ..
    } = *shape;
    let config = json!({
        "model_type": "llama", "hidden_act": "silu", "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": wide, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0, "tie_word_embeddings": tied
    });
    let config = config.to_string();
    let inner = Inner {
        steps,
        batch,
        micro_batches: 1,
        seq,
        learning_rate: 1e-3,
        warmup_steps: 10,
        beta_1: 0.9,
        beta_2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        clip_norm: 1.0,
        decay_ppm: 200_000,
        final_ppm: 0,
        schedule: Schedule::WarmupStableDecay,
        optimiser: Optimiser::AdamW,
        goldfish: None,
        precision,
    };
    let (layout, parameters) = initial_parameters(&config, 1).expect("a valid shape");
    let count = layout.elements();
    let range = BlockRange::whole(blocks);
    let device = Device::cpu();
    let stage = match adapters {
        true => {
            let adapters = Adapters {
                rank: 16,
                alpha: 32.0,
                targets: ["q_proj", "v_proj"].map(String::from).to_vec(),
                model: layout,
                base: Vec::new(),
            };
            let (_, own) = initial_adapters(&adapters, 2).expect("adapters that fit");
            TrainStage::adapted(&config, range, parameters, (&adapters, own), (inner, 1_000), &device)
        }
        false => TrainStage::new(&config, range, parameters, inner, 1_000, &device),
    };
    let mut stage = stage.expect("a valid stage");
    stage.set_blocks_kept(blocks_kept);
    let mut data = TrainData::new();
    let tokens = (0..100_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 16) % vocabulary);
    data.add(&tokens.collect::<Vec<u32>>());
    let (mut wall, mut cpu, mut loss) = (Vec::new(), Vec::new(), 0.0);
    for step in 0..=u64::from(steps) {
        let (start, cpu_start) = (Instant::now(), cpu_seconds());
        let stepped = stage.steps(&data, step, 1, &[1]).expect("a step");
        // The first one warms up.
        if step > 0 {
            wall.push(start.elapsed().as_secs_f64());
            cpu.push(cpu_seconds() - cpu_start);
        }
        loss = stepped.losses[0];
    }
    json!({"parameters": count, "wall": wall, "cpu": cpu, "peak_bytes": peak_bytes(), "loss": loss, "products": stage.products()})
}

fn numbers(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_f64)
        .collect()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() % 2 {
        0 if middle > 0 => (values[middle - 1] + values[middle]) / 2.0,
        _ => values.get(middle).copied().unwrap_or(f64::NAN),
    }
}

/// User and system time of this process, where the system tells.
fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = text.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |field: usize| {
        fields
            .get(field)
            .and_then(|text| text.parse::<f64>().ok())
            .unwrap_or(0.0)
    };
    // Fields 14 and 15, counted from the one after the name; a hundred ticks a second on every Linux of today.
    (ticks(11) + ticks(12)) / 100.0
}

/// The peak of resident memory, where the system tells.
fn peak_bytes() -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap_or_default();
    let kilobytes = line.split_whitespace().next().and_then(|text| text.parse::<f64>().ok());
    kilobytes.unwrap_or(0.0) * 1_024.0
}
