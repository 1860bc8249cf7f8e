//! How fast this machine serves and trains: `cargo bench -p polder-kernels --bench engine`.
//!
//! Weights are random, shapes are real. `RAYON_NUM_THREADS` sets the threads, `POLDER_WORKER_DEVICE` the device. Beside
//! wall time it prints CPU time, which still means something on a busy machine.

use std::time::Instant;

use polder_kernels::device::Device;
use polder_kernels::model::{Config, layout};
use polder_kernels::stage::{Input, ServeStage, Want};
use polder_kernels::train::{TrainData, TrainStage, initial_parameters};
use polder_protocol::layout::BlockRange;
use polder_protocol::run::{Inner, Optimiser, Precision, Schedule};
use polder_protocol::work::Weights;
use safetensors::tensor::{Dtype, TensorView};

fn main() {
    let choice = std::env::var("POLDER_WORKER_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    let (device, reason) = Device::choose(choice.parse().expect("auto, cpu or wgpu"));
    println!("{device} {}", reason.unwrap_or_default());
    // The shape of SmolLM2-135M.
    serve(&shape(49_152, 576, 1_536, 30, 9, 3, true), &device);
    // 9.3 M parameters: the shape of research and of the figures of other frameworks.
    train("9.3 M", &shape(8_192, 256, 768, 6, 4, 4, false), 8, 256, 4, &device);
    // A demonstration's: byte-level.
    train("1.0 M", &shape(260, 128, 384, 4, 4, 2, false), 8, 128, 20, &device);
}

fn serve(config_json: &str, device: &Device) {
    let config = Config::from_json(config_json).expect("a valid shape");
    let (layout, parameters) = initial_parameters(config_json, 1).expect("a valid shape");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut files = Vec::new();
    for (index, (part, values)) in layout.parts.iter().zip(&parameters).enumerate() {
        let mut rest = &values[..];
        let views = part.tensors.iter().map(|tensor| {
            let (own, others) = rest.split_at(tensor.elements().expect("it fits"));
            rest = others;
            let shape = tensor.shape.iter().map(|dim| *dim as usize).collect();
            let view = TensorView::new(Dtype::F32, shape, bytemuck::cast_slice(own)).expect("lengths agree");
            (tensor.name.clone(), view)
        });
        let file = folder.path().join(format!("{index}.safetensors"));
        safetensors::serialize_to_file(views.collect::<Vec<_>>(), None, &file).expect("a writable folder");
        files.push(file);
    }
    let range = BlockRange::whole(config.blocks);
    let mut stage = ServeStage::load(config_json, range, &files, Weights::F32, device).expect("files just written");
    stage.open_session(1, 1_024).expect("room");
    let prompt: Vec<u32> = (0..512).map(|i| i * 97 % 49_152).collect();
    measure("135 M f32: prefill of 512", 512, || {
        let input = Input::Tokens(&prompt);
        stage.forward(1, 0, input, Want::LastLogits).expect("a valid prompt");
    });
    measure("135 M f32: decode", 32, || {
        for position in 512..544 {
            let input = Input::Tokens(&[7]);
            stage.forward(1, position, input, Want::LastLogits).expect("room");
        }
    });
}

fn train(name: &str, config_json: &str, batch: u32, seq: u32, steps: u32, device: &Device) {
    let config = Config::from_json(config_json).expect("a valid shape");
    let (_, parameters) = initial_parameters(config_json, 1).expect("a valid shape");
    let count = layout(&config).elements().unwrap_or(0);
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
        precision: Precision::F32,
    };
    let range = BlockRange::whole(config.blocks);
    let mut stage = TrainStage::new(config_json, range, parameters, inner, 1_000, device).expect("a valid stage");
    let mut data = TrainData::new();
    let tokens: Vec<u32> = (0..100_000u32).map(|i| i.wrapping_mul(2_654_435_761) >> 16).collect();
    data.add(
        &tokens
            .iter()
            .map(|token| token % config.vocabulary as u32)
            .collect::<Vec<u32>>(),
    );
    stage.steps(&data, 0, 2, &[1]).expect("two steps");
    let mut step = 2;
    measure(
        &format!("{name} ({count} parameters), batch {batch} × {seq}: training"),
        batch * seq * steps,
        || {
            stage.steps(&data, step, steps, &[1]).expect("steps");
            step += u64::from(steps);
        },
    );
}

/// Prints the best of three.
fn measure(what: &str, tokens: u32, mut run: impl FnMut()) {
    let (mut wall, mut cpu) = (f64::MAX, f64::MAX);
    for _ in 0..3 {
        let (start, cpu_start) = (Instant::now(), cpu_seconds());
        run();
        wall = wall.min(start.elapsed().as_secs_f64());
        cpu = cpu.min(cpu_seconds() - cpu_start);
    }
    let tokens = f64::from(tokens);
    println!(
        "{what}: {:.0} tok/s; {:.0} tok per CPU second",
        tokens / wall,
        tokens / cpu.max(1e-9)
    );
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

fn shape(vocabulary: u32, hidden: u32, wide: u32, blocks: u32, heads: u32, kv_heads: u32, tied: bool) -> String {
    format!(
        r#"{{"model_type": "llama", "hidden_act": "silu", "vocab_size": {vocabulary}, "hidden_size": {hidden},
        "intermediate_size": {wide}, "num_hidden_layers": {blocks}, "num_attention_heads": {heads},
        "num_key_value_heads": {kv_heads}, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0, "tie_word_embeddings": {tied}}}"#
    )
}
