//! Training stages against PyTorch's numbers, and against each other.

mod golden_case;
mod settings;
mod training_step;

use golden_case::{Golden, largest, largest_difference};
use polder_kernels::device::Device;
use polder_kernels::model::{Config, layout};
use polder_kernels::train::{TrainData, TrainError, TrainInput, TrainOutput, TrainStage, initial_parameters};
use polder_protocol::layout::BlockRange;
use polder_protocol::run::{Inner, Precision};
use settings::inner;
use training_step::{batch, loss};

#[test]
fn loss_and_gradients_are_those_of_pytorch() {
    for golden in ["llama_tied_sharded", "llama_rope_llama3"].map(Golden::open) {
        let mut stage = stage(&golden, BlockRange::whole(3), inner());
        let tokens: Vec<u32> = golden.tokens.concat();
        let loss = loss(stage.forward(0, batch(&tokens, &[])).unwrap()).0;
        let right = golden.expected["loss"].as_f64().unwrap() as f32;
        assert!((loss - right).abs() < golden.tolerance("loss_abs"), "{loss} {right}");

        let norm = stage.square_sum(1).unwrap().sqrt();
        let right = golden.expected["grad_total_norm"].as_f64().unwrap();
        assert!(
            (norm / right - 1.0).abs() < f64::from(golden.tolerance("grad_norm_rel")),
            "{norm} {right}"
        );
        let gradients = by_name(&golden.config, stage.gradients().unwrap());
        for (name, right) in golden.expected["grad_norms"].as_object().unwrap() {
            let squares: f64 = gradients[name].iter().map(|g| f64::from(*g).powi(2)).sum();
            let ratio = squares.sqrt() / right.as_f64().unwrap();
            assert!(
                (ratio - 1.0).abs() < f64::from(golden.tolerance("grad_norm_rel")),
                "{name}: {ratio}"
            );
        }
        for name in golden.expected["full_gradients"].as_array().unwrap() {
            let name = name.as_str().unwrap();
            let right = golden.case(&format!("grad.{name}"));
            let error = largest_difference(&gradients[name], right) / largest(right);
            assert!(error < golden.tolerance("grad_elem_rel_to_max"), "{name}: {error}");
        }
    }
}

#[test]
fn a_chain_of_stages_trains_with_the_bits_of_the_whole() {
    let golden = Golden::open("llama_rope_llama3");
    let micro_batches: Vec<Vec<u32>> = vec![
        golden.tokens.concat(),
        golden.tokens.concat().into_iter().rev().collect(),
    ];
    for (cut, precision) in [(1, Precision::F32), (2, Precision::F32), (1, Precision::Bf16)] {
        let inner = Inner { precision, ..inner() };
        let mut whole = stage(&golden, BlockRange::whole(3), inner);
        let mut first = stage(&golden, BlockRange { first: 0, end: cut }, inner);
        let mut last = stage(&golden, BlockRange { first: cut, end: 3 }, inner);
        for step in 0..3 {
            // Both micro-batches go forward through the first stage before either comes back.
            let sent: Vec<Vec<f32>> = (0..2)
                .map(|m| hidden(first.forward(m as u32, batch(&micro_batches[m], &[])).unwrap()))
                .collect();
            for m in 0..2 {
                let alone = loss(whole.forward(m as u32, batch(&micro_batches[m], &[])).unwrap());
                let chained = loss(last.forward(m as u32, batch(&micro_batches[m], &sent[m])).unwrap());
                assert_eq!(chained.0, alone.0);
                assert!(alone.1.is_empty());
                assert!(first.backward(m as u32, &chained.1).unwrap().is_empty());
            }
            let sum = whole.square_sum(2).unwrap();
            let sums = first.square_sum(2).unwrap() + last.square_sum(2).unwrap();
            assert!((sum / sums - 1.0).abs() < 1e-12);
            let chained = [first.gradients().unwrap(), last.gradients().unwrap()].concat();
            assert_eq!(chained, whole.gradients().unwrap());
            for stage in [&mut whole, &mut first, &mut last] {
                stage.apply(step, sum).unwrap();
            }
            let chained = [first.parameters().unwrap(), last.parameters().unwrap()].concat();
            assert_eq!(chained, whole.parameters().unwrap());
        }
    }
}

#[test]
fn steps_learn_a_repeating_text_and_the_score_says_so() {
    let golden = Golden::open("llama_tied_sharded");
    let (_, parameters) = initial_parameters(&golden.config_json, 5).unwrap();
    let range = BlockRange::whole(3);
    let device = Device::cpu();
    let mut stage = TrainStage::new(&golden.config_json, range, parameters, inner(), 40, &device).unwrap();
    let text: Vec<u32> = (0..600).map(|i| i % 7 + 3).collect();
    let mut data = TrainData::new();
    data.add(&text);
    let before = stage.score(&text, 600, 1, 16).unwrap();
    // Of 512 equally likely tokens, one byte each.
    assert!((before - 9.0).abs() < 0.2, "{before}");
    let stepped = stage.steps(&data, 0, 40, &[1, 2, 3]).unwrap();
    assert_eq!(stepped.losses.len(), 40);
    assert_eq!(stepped.tokens, 40 * 2 * 16);
    assert!(stepped.losses[39] < 1.0, "{:?}", stepped.losses);
    assert!(stage.score(&text, 600, 1, 16).unwrap() < 2.0);
}

#[test]
fn products_in_bf16_learn_what_those_in_f32_do_and_repeat_their_bits() {
    let golden = Golden::open("llama_tied_sharded");
    let text: Vec<u32> = (0..600).map(|i| i % 7 + 3).collect();
    let mut data = TrainData::new();
    data.add(&text);
    let losses = |precision| {
        let (_, parameters) = initial_parameters(&golden.config_json, 5).unwrap();
        let (inner, range) = (Inner { precision, ..inner() }, BlockRange::whole(3));
        let mut stage = TrainStage::new(&golden.config_json, range, parameters, inner, 40, &Device::cpu()).unwrap();
        (stage.products(), stage.steps(&data, 0, 40, &[1, 2, 3]).unwrap().losses)
    };
    let (name, plain) = losses(Precision::F32);
    assert_eq!(name, "f32");
    let (name, rounded) = losses(Precision::Bf16);
    if name == "f32" {
        println!("skipped: this processor has no instructions for bf16, and f32 is computed in its place");
        assert_eq!(rounded, plain);
        return;
    }
    assert_ne!(rounded, plain);
    // One step's rounding is small; what forty steps make of it is another way to the same end.
    assert!(
        (rounded[0] / plain[0] - 1.0).abs() < 1e-3,
        "{name}: {} {}",
        rounded[0],
        plain[0]
    );
    assert!(rounded[39] < 1.0, "{name}: {rounded:?}");
    assert_eq!(losses(Precision::Bf16).1, rounded);
}

#[test]
fn parameters_survive_their_files() {
    let golden = Golden::open("llama_rope_llama3");
    let folder = tempfile::tempdir().unwrap();
    let range = BlockRange { first: 1, end: 3 };
    let files: Vec<_> = range
        .parts(3)
        .map(|part| folder.path().join(part.to_string()))
        .collect();
    let mut stage = stage(&golden, range, inner());
    stage.write(&files).unwrap();
    // The outer momentum follows the parameters.
    let mut bytes = std::fs::read(&files[0]).unwrap();
    bytes.extend_from_slice(&[0xff; 16]);
    std::fs::write(&files[0], &bytes).unwrap();
    let mut again = TrainStage::load(&golden.config_json, range, &files, inner(), 10, &Device::cpu()).unwrap();
    assert_eq!(again.parameters().unwrap(), stage.parameters().unwrap());
    std::fs::write(&files[1], &bytes[..100]).unwrap();
    assert!(matches!(stage.set(&files), Err(TrainError::File { .. })));
    assert_eq!(again.parameters().unwrap(), stage.parameters().unwrap());
}

#[test]
fn what_does_not_fit_is_refused() {
    let golden = Golden::open("llama_rope_llama3");
    let tied = Golden::open("llama_tied_sharded");
    let range = BlockRange { first: 0, end: 2 };
    let device = Device::cpu();
    let split = TrainStage::new(
        &tied.config_json,
        range,
        tied.parameters()[..3].to_vec(),
        inner(),
        1,
        &device,
    );
    assert_eq!(split.err(), Some(TrainError::TiedStages));
    let mut first = stage(&golden, range, inner());
    let tokens = golden.tokens.concat();
    assert!(matches!(
        first.forward(0, batch(&tokens[1..], &[])),
        Err(TrainError::Shape { .. })
    ));
    assert!(matches!(
        first.forward(0, batch(&[999; 34], &[])),
        Err(TrainError::Token { token: 999, .. })
    ));
    assert_eq!(
        first.backward(7, &[]).err(),
        Some(TrainError::NoMicroBatch { micro_batch: 7 })
    );
    assert_eq!(first.apply(0, 1.0).err(), Some(TrainError::NoGradients));
    first.forward(0, batch(&tokens, &[])).unwrap();
    let gradient = vec![f32::NAN; 2 * 16 * 64];
    assert!(matches!(
        first.backward(0, &gradient),
        Err(TrainError::NotFinite { .. })
    ));
    assert!(matches!(first.score(&tokens, 1, 1, 8), Err(TrainError::Kind { .. })));
}

#[test]
fn a_step_moves_the_corrections_of_routers_against_their_loads() {
    let golden = Golden::open("deepseek_v3");
    let mut stage = stage(&golden, BlockRange::whole(3), inner());
    let tokens: Vec<u32> = golden.tokens.concat();
    let before = by_name(&golden.config, stage.parameters().unwrap());
    stage.forward(0, batch(&tokens, &[])).unwrap();
    let sum = stage.square_sum(1).unwrap();
    stage.apply(0, sum).unwrap();
    let after = by_name(&golden.config, stage.parameters().unwrap());
    let name = "model.layers.1.mlp.gate.e_score_correction_bias";
    let moved: Vec<f32> = after[name]
        .iter()
        .zip(&before[name])
        .map(|(after, before)| after - before)
        .collect();
    assert!(moved.iter().all(|moved| moved.abs() < 1.1e-3));
    assert!(moved.iter().any(|moved| *moved > 0.9e-3) && moved.iter().any(|moved| *moved < -0.9e-3));
}

/// Dense families: each has something that no other has.
const DENSE: [&str; 10] = [
    "llama_rope_llama3",
    "llama_tied_sharded",
    "mistral_sliding",
    "ministral3_yarn",
    "qwen2_bias",
    "qwen3_qknorm",
    "smollm3_nope",
    "apertus_xielu",
    "gemma3_text",
    "nemotron_dense",
];

#[test]
fn loops_over_slices_meet_the_graph_of_tensors_over_odd_shapes() {
    for dense in DENSE.map(Dense::new) {
        let range = BlockRange::whole(dense.config.blocks);
        for (batch, seq) in [(1, 1), (3, 2), (1, 37), (2, 67), (1, 150)] {
            let run = |device: &Device| {
                let mut stage = dense.stage(range, device);
                let tokens = dense.tokens(batch * (seq + 1));
                let input = TrainInput {
                    tokens: &tokens,
                    hidden: &[],
                    batch,
                    seq,
                };
                let loss = loss(stage.forward(0, input).unwrap()).0;
                let score = stage.score(&tokens, 100, 1, seq).unwrap();
                (loss, score, by_name(&dense.config, stage.gradients().unwrap()))
            };
            let (own, right) = (run(&Device::cpu()), run(&Device::cpu_in_tensors()));
            let name = dense.config.family;
            assert!(
                (own.0 / right.0 - 1.0).abs() < 2e-6,
                "{name} {batch} × {seq}: {} {}",
                own.0,
                right.0
            );
            assert!(
                (own.1 / right.1 - 1.0).abs() < 2e-6,
                "{name} {batch} × {seq}: {} {}",
                own.1,
                right.1
            );
            let all = right.2.values().map(|gradient| largest(gradient)).fold(0.0, f32::max);
            for (tensor, right) in &right.2 {
                let error = largest_difference(&own.2[tensor], right);
                // What is rounding in the one is rounding in the other.
                let limit = 2e-5 * largest(right).max(1e-2 * all);
                assert!(error <= limit, "{name} {batch} × {seq}, {tensor}: {error} {limit}");
            }
        }
    }
}

#[test]
fn computing_again_and_repeating_change_no_bit() {
    for dense in DENSE.map(Dense::new).into_iter().filter(|dense| !dense.config.tied) {
        let blocks = dense.config.blocks;
        let tokens = dense.tokens(2 * 71);
        let run = |blocks_kept: u32| {
            let mut stages = [BlockRange { first: 0, end: 1 }, BlockRange { first: 1, end: blocks }]
                .map(|range| dense.stage(range, &Device::cpu()));
            stages.iter_mut().for_each(|stage| stage.set_blocks_kept(blocks_kept));
            let [first, last] = &mut stages;
            let input = |hidden| TrainInput {
                tokens: &tokens,
                hidden,
                batch: 2,
                seq: 70,
            };
            let sent = hidden(first.forward(0, input(&[])).unwrap());
            let (loss, gradient) = loss(last.forward(0, input(&sent)).unwrap());
            first.backward(0, &gradient).unwrap();
            let sum = first.square_sum(1).unwrap() + last.square_sum(1).unwrap();
            first.apply(0, sum).unwrap();
            last.apply(0, sum).unwrap();
            (loss, [first.parameters().unwrap(), last.parameters().unwrap()].concat())
        };
        let right = run(blocks);
        assert!(run(blocks) == right, "{}", dense.config.family);
        for fewer in 0..blocks {
            assert!(run(fewer) == right, "{}, {fewer}", dense.config.family);
        }
    }
}

/// A dense model with parameters of which none is one or zero by rule.
struct Dense {
    config_json: String,
    config: Config,
    parameters: Vec<Vec<f32>>,
}

impl Dense {
    fn new(name: &str) -> Self {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden")
            .join(name);
        let config_json = std::fs::read_to_string(folder.join("config.json")).unwrap();
        let mut parameters = initial_parameters(&config_json, 3).unwrap().1;
        for (index, value) in parameters.iter_mut().flatten().enumerate() {
            *value += 0.03 * (index as f32 * 0.7).sin();
        }
        Self {
            config: Config::from_json(&config_json).unwrap(),
            config_json,
            parameters,
        }
    }

    fn stage(&self, range: BlockRange, device: &Device) -> TrainStage {
        let parts = range.parts(self.config.blocks);
        let parameters = self.parameters[parts.start as usize..parts.end as usize].to_vec();
        TrainStage::new(&self.config_json, range, parameters, inner(), 10, device).unwrap()
    }

    fn tokens(&self, count: u32) -> Vec<u32> {
        (0..count)
            .map(|i| (i * i + 7 * i) % self.config.vocabulary as u32)
            .collect()
    }
}

fn stage(golden: &Golden, range: BlockRange, inner: Inner) -> TrainStage {
    let parts = range.parts(golden.config.blocks);
    let parameters = golden.parameters()[parts.start as usize..parts.end as usize].to_vec();
    TrainStage::new(&golden.config_json, range, parameters, inner, 10, &Device::cpu()).unwrap()
}

fn hidden(output: TrainOutput) -> Vec<f32> {
    match output {
        TrainOutput::Hidden(hidden) => hidden,
        TrainOutput::Loss { .. } => panic!("a head"),
    }
}

fn by_name(config: &Config, parts: &[Vec<f32>]) -> std::collections::BTreeMap<String, Vec<f32>> {
    let mut named = std::collections::BTreeMap::new();
    for (part, values) in layout(config).parts.iter().zip(parts) {
        let mut start = 0;
        for tensor in &part.tensors {
            let end = start + tensor.elements().unwrap();
            named.insert(tensor.name.clone(), values[start..end].to_vec());
            start = end;
        }
    }
    named
}
