//! Low-rank adapters against plain torch, against differences, and against themselves.

mod golden_case;
mod settings;
mod training_step;

use golden_case::{Golden, largest, largest_difference};
use polder_kernels::device::Device;
use polder_kernels::model::layout;
use polder_kernels::train::{TrainData, TrainError, TrainOutput, TrainStage, initial_adapters};
use polder_protocol::adapters::Adapters;
use polder_protocol::layout::BlockRange;
use polder_protocol::run::{Inner, Optimiser};
use serde_json::Value;
use settings::inner;
use training_step::{batch, loss};

const WHOLE: BlockRange = BlockRange::whole(3);

#[test]
fn losses_and_gradients_are_those_of_plain_torch() {
    // `make_lora_case.py` writes it.
    let right: Value = serde_json::from_str(include_str!("golden/lora.json")).unwrap();
    for device in [Device::cpu(), Device::cpu_in_tensors()] {
        let case = Case::new();
        let layout = case.adapters.layout().unwrap();
        let set = Inner {
            learning_rate: 0.01,
            warmup_steps: 0,
            decay_ppm: 0,
            clip_norm: 0.0,
            ..inner()
        };
        let mut stage = case.stage(WHOLE, case.waves(), set, &device);
        for step in 0..4 {
            let loss = loss(stage.forward(0, batch(&case.tokens, &[])).unwrap()).0;
            let expected = right["losses"][step as usize].as_f64().unwrap() as f32;
            assert!((loss - expected).abs() < 2e-4, "step {step}: {loss} {expected}");
            let sum = stage.square_sum(1).unwrap();
            if step == 0 {
                for (part, gradients) in layout.parts.iter().zip(stage.gradients().unwrap()) {
                    let mut rest = &gradients[..];
                    for tensor in &part.tensors {
                        let (own, others) = rest.split_at(tensor.elements().unwrap());
                        rest = others;
                        let expected = right["gradients"][&tensor.name].as_array().unwrap().iter();
                        let expected: Vec<f32> = expected.map(|value| value.as_f64().unwrap() as f32).collect();
                        let error = largest_difference(own, &expected) / largest(&expected);
                        assert!(error < 2e-3, "{}: {error}", tensor.name);
                    }
                }
            }
            stage.apply(step, sum).unwrap();
        }
    }
}

#[test]
fn gradients_are_what_differences_say() {
    let case = Case::new();
    let device = Device::cpu();
    let loss_at = |parameters: Vec<Vec<f32>>| {
        let mut stage = case.stage(WHOLE, parameters, inner(), &device);
        f64::from(loss(stage.forward(0, batch(&case.tokens, &[])).unwrap()).0)
    };
    let mut stage = case.stage(WHOLE, case.waves(), inner(), &device);
    stage.forward(0, batch(&case.tokens, &[])).unwrap();
    let norm = stage.square_sum(1).unwrap().sqrt();
    // Along the gradient itself the loss changes by its norm.
    let mut moved = |by: f32| {
        let gradients = stage.gradients().unwrap();
        let parts = case.waves().into_iter().zip(gradients);
        let moved = parts.map(|(own, gradients)| {
            let scale = by / norm as f32;
            own.iter()
                .zip(gradients)
                .map(|(own, gradient)| own + scale * gradient)
                .collect()
        });
        loss_at(moved.collect())
    };
    let by = 0.02;
    let slope = (moved(by) - moved(-by)) / (2.0 * f64::from(by));
    assert!((slope / norm - 1.0).abs() < 0.01, "{slope} {norm}");
}

#[test]
fn a_model_learns_through_its_adapters_alone_and_repeats_its_bits() {
    let case = Case::new();
    let (_, first) = initial_adapters(&case.adapters, 7).unwrap();
    let mut data = TrainData::new();
    data.add(&(0..400).map(|i| i % 7 + 3).collect::<Vec<u32>>());
    for optimiser in [
        Optimiser::AdamW,
        Optimiser::Muon {
            learning_rate: 0.02,
            momentum: 0.95,
            iterations: 5,
        },
    ] {
        let run = || {
            let set = Inner { optimiser, ..inner() };
            let mut stage = case.stage(WHOLE, first.clone(), set, &Device::cpu());
            let losses = stage.steps(&data, 0, 30, &[1]).unwrap().losses;
            (losses, stage.parameters().unwrap().to_vec())
        };
        let (losses, parameters) = run();
        assert!(losses[29] < losses[0] * 0.7, "{losses:?}");
        assert!(run() == (losses, parameters.clone()));
        assert_eq!(parameters.len(), 5);
        assert!(parameters[0].is_empty() && parameters[4].is_empty() && parameters[1] != first[1]);
    }
}

#[test]
fn before_the_first_step_the_model_is_as_it_was_and_a_merged_one_is_as_after_it() {
    let case = Case::new();
    let (_, first) = initial_adapters(&case.adapters, 7).unwrap();
    let loss_of = |mut stage: TrainStage| loss(stage.forward(0, batch(&case.tokens, &[])).unwrap()).0;
    let plain = |model| TrainStage::new(&case.golden.config_json, WHOLE, model, inner(), 10, &Device::cpu()).unwrap();
    let base = loss_of(plain(case.model.clone()));
    assert_eq!(loss_of(case.stage(WHOLE, first, inner(), &Device::cpu())), base);
    // What is published: merged by the protocol's own loop.
    let mut merged = case.model.clone();
    for ((part, values), own) in case.adapters.model.parts.iter().zip(&mut merged).zip(case.waves()) {
        case.adapters.merge(part, values, &own);
    }
    let adapted = loss_of(case.stage(WHOLE, case.waves(), inner(), &Device::cpu()));
    assert!((loss_of(plain(merged)) - adapted).abs() < 1e-5 && adapted != base);
}

#[test]
fn stages_of_a_chain_train_their_own_adapters_with_the_bits_of_the_whole() {
    let case = Case::new();
    let mut whole = case.stage(WHOLE, case.waves(), inner(), &Device::cpu());
    let part = |range: BlockRange| {
        let parts = range.parts(3);
        let own = case.waves()[parts.start as usize..parts.end as usize].to_vec();
        case.stage(range, own, inner(), &Device::cpu())
    };
    let (mut first, mut last) = (
        part(BlockRange { first: 0, end: 2 }),
        part(BlockRange { first: 2, end: 3 }),
    );
    for step in 0..3 {
        let TrainOutput::Hidden(sent) = first.forward(0, batch(&case.tokens, &[])).unwrap() else {
            panic!("a head");
        };
        let (_, gradient) = loss(last.forward(0, batch(&case.tokens, &sent)).unwrap());
        first.backward(0, &gradient).unwrap();
        whole.forward(0, batch(&case.tokens, &[])).unwrap();
        let sum = whole.square_sum(1).unwrap();
        let sums = first.square_sum(1).unwrap() + last.square_sum(1).unwrap();
        assert!((sum / sums - 1.0).abs() < 1e-12);
        for stage in [&mut whole, &mut first, &mut last] {
            stage.apply(step, sum).unwrap();
        }
        assert!([first.parameters().unwrap(), last.parameters().unwrap()].concat() == whole.parameters().unwrap());
    }
}

#[test]
fn adapters_that_do_not_fit_the_model_are_refused_by_name() {
    let case = Case::new();
    let refused = |adapters: &Adapters, parameters| {
        let inner = (inner(), 10);
        let model = case.model.clone();
        let config = &case.golden.config_json;
        TrainStage::adapted(config, WHOLE, model, (adapters, parameters), inner, &Device::cpu()).unwrap_err()
    };
    let unknown = Adapters {
        targets: vec!["c_attn".into()],
        ..case.adapters.clone()
    };
    assert!(refused(&unknown, case.waves()).to_string().contains("c_attn"));
    let mut short = case.waves();
    short[2].pop();
    assert!(matches!(
        refused(&case.adapters, short),
        TrainError::PartSize { part: 2, .. }
    ));
}

struct Case {
    golden: Golden,
    model: Vec<Vec<f32>>,
    adapters: Adapters,
    tokens: Vec<u32>,
}

impl Case {
    fn new() -> Self {
        let golden = Golden::open("llama_rope_llama3");
        let adapters = Adapters {
            rank: 4,
            alpha: 6.0,
            targets: ["q_proj", "v_proj", "down_proj"].map(str::to_owned).to_vec(),
            model: layout(&golden.config),
            base: vec![],
        };
        Self {
            model: golden.parameters(),
            tokens: golden.tokens.concat(),
            adapters,
            golden,
        }
    }

    /// The numbers that the script begins with.
    fn waves(&self) -> Vec<Vec<f32>> {
        let mut place = 0.0f64;
        let wave =
            |count: usize, phase: f64| (0..count).map(move |at| ((0.37 * at as f64 + phase).sin() * 0.05) as f32);
        let parts = self.adapters.model.parts.iter().map(|part| {
            let mut values = Vec::new();
            for own in self.adapters.places(part) {
                values.extend(wave(own.a.len(), place));
                values.extend(wave(own.b.len(), place + 0.5));
                place += 1.0;
            }
            values
        });
        parts.collect()
    }

    fn stage(&self, range: BlockRange, parameters: Vec<Vec<f32>>, inner: Inner, device: &Device) -> TrainStage {
        let parts = range.parts(3);
        let model = self.model[parts.start as usize..parts.end as usize].to_vec();
        let adapters = (&self.adapters, parameters);
        TrainStage::adapted(&self.golden.config_json, range, model, adapters, (inner, 30), device).unwrap()
    }
}
