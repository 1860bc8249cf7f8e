//! What a run may ask of its inner steps: each optimiser learns, repeats itself bit for bit, over a restart and as a chain,
//! and the goldfish loss is the same on both engines.

mod settings;
mod training_step;

use polder_kernels::device::Device;
use polder_kernels::train::{TrainData, TrainError, TrainOutput, TrainStage, initial_parameters};
use polder_protocol::layout::BlockRange;
use polder_protocol::run::{Goldfish, Inner, Optimiser, Schedule};
use settings::inner;
use training_step::{batch, loss};

const OPTIMISERS: [Optimiser; 3] = [
    Optimiser::AdamW,
    Optimiser::AdEmaMix {
        beta_3: 0.99,
        alpha: 4.0,
        warmup_steps: 20,
    },
    Optimiser::Muon {
        learning_rate: 0.02,
        momentum: 0.95,
        iterations: 5,
    },
];
const BLOCKS: u32 = 3;
const WHOLE: BlockRange = BlockRange::whole(BLOCKS);

#[test]
fn every_optimiser_learns_with_either_schedule() {
    for optimiser in OPTIMISERS {
        for schedule in [Schedule::WarmupStableDecay, Schedule::Cosine] {
            let mut stage = stage(
                WHOLE,
                Inner {
                    schedule,
                    ..with(optimiser)
                },
                &Device::cpu(),
            );
            let losses = stage.steps(&data(), 0, 30, &[1]).unwrap().losses;
            assert!(
                losses[29] < 2.0 && losses[0] > 5.0,
                "{optimiser:?} {schedule:?}: {losses:?}"
            );
        }
    }
}

#[test]
fn a_restart_goes_on_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    for (number, optimiser) in OPTIMISERS.into_iter().enumerate() {
        let mut through = stage(WHOLE, with(optimiser), &Device::cpu());
        through.steps(&data(), 0, 8, &[1]).unwrap();
        let parts: Vec<_> = (0..=BLOCKS + 1)
            .map(|part| folder.path().join(part.to_string()))
            .collect();
        let state = folder.path().join(format!("optimiser-{number}"));
        through.write(&parts).unwrap();
        through.write_optimiser(&state).unwrap();
        let load = || TrainStage::load(&config(), WHOLE, &parts, with(optimiser), 30, &Device::cpu()).unwrap();
        let (mut restarted, mut afresh) = (load(), load());
        restarted.read_optimiser(&state).unwrap();
        for stage in [&mut through, &mut restarted, &mut afresh] {
            stage.steps(&data(), 8, 5, &[1]).unwrap();
        }
        assert!(
            through.parameters().unwrap() == restarted.parameters().unwrap(),
            "{optimiser:?}"
        );
        assert!(
            through.parameters().unwrap() != afresh.parameters().unwrap(),
            "{optimiser:?}"
        );
    }
}

#[test]
fn a_state_that_is_damaged_or_another_optimisers_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let mut adamw = stage(WHOLE, with(OPTIMISERS[0]), &Device::cpu());
    adamw.steps(&data(), 0, 1, &[1]).unwrap();
    adamw.write_optimiser(&state).unwrap();
    let refused = |stage: &mut TrainStage| match stage.read_optimiser(&state) {
        Err(TrainError::File { reason, .. }) => reason,
        other => panic!("{other:?}"),
    };
    let mut muon = stage(WHOLE, with(OPTIMISERS[2]), &Device::cpu());
    assert!(refused(&mut muon).contains("bytes"));
    let good = std::fs::read(&state).unwrap();
    for at in [0, 8, 16, 24, good.len() / 2, good.len() - 1] {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        std::fs::write(&state, bytes).unwrap();
        refused(&mut adamw);
    }
    std::fs::write(&state, &good[..good.len() - 1]).unwrap();
    refused(&mut adamw);
    let wrong = with(Optimiser::Muon {
        learning_rate: 0.02,
        momentum: 0.95,
        iterations: 0,
    });
    let (_, parameters) = initial_parameters(&config(), 5).unwrap();
    let wrong = TrainStage::new(&config(), WHOLE, parameters, wrong, 30, &Device::cpu());
    assert!(wrong.unwrap_err().to_string().contains("`iterations`"));
}

#[test]
fn stages_of_a_chain_take_the_steps_of_the_whole() {
    for optimiser in OPTIMISERS {
        // A norm that every step exceeds: all stages clip alike.
        let set = Inner {
            clip_norm: 0.05,
            goldfish: Some(GOLDFISH),
            ..with(optimiser)
        };
        let mut whole = stage(WHOLE, set, &Device::cpu());
        let mut first = stage(BlockRange { first: 0, end: 1 }, set, &Device::cpu());
        let mut last = stage(BlockRange { first: 1, end: BLOCKS }, set, &Device::cpu());
        let tokens = text(2 * 17);
        for step in 0..3 {
            let TrainOutput::Hidden(sent) = first.forward(0, batch(&tokens, &[])).unwrap() else {
                panic!("a head");
            };
            let (_, gradient) = loss(last.forward(0, batch(&tokens, &sent)).unwrap());
            first.backward(0, &gradient).unwrap();
            whole.forward(0, batch(&tokens, &[])).unwrap();
            let sum = whole.square_sum(1).unwrap();
            assert!(sum.sqrt() > 0.05);
            first.square_sum(1).unwrap();
            last.square_sum(1).unwrap();
            for stage in [&mut whole, &mut first, &mut last] {
                stage.apply(step, sum).unwrap();
            }
            let chained = [first.parameters().unwrap(), last.parameters().unwrap()].concat();
            assert!(chained == whole.parameters().unwrap(), "{optimiser:?}");
        }
    }
}

#[test]
fn labels_left_out_add_nothing_on_either_engine() {
    let tokens = text(2 * 17);
    let run = |device: &Device, goldfish: Option<Goldfish>| {
        let mut stage = stage(WHOLE, Inner { goldfish, ..inner() }, device);
        let (loss, _) = loss(stage.forward(0, batch(&tokens, &[])).unwrap());
        (loss, stage.gradients().unwrap().concat())
    };
    let (own, right) = (
        run(&Device::cpu(), Some(GOLDFISH)),
        run(&Device::cpu_in_tensors(), Some(GOLDFISH)),
    );
    assert!((own.0 / right.0 - 1.0).abs() < 2e-6, "{} {}", own.0, right.0);
    let largest = right.1.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    for (own, right) in own.1.iter().zip(&right.1) {
        assert!((own - right).abs() < 2e-5 * largest, "{own} {right}");
    }
    let all = run(&Device::cpu(), None);
    assert!(all.0 != own.0 && all.1 != own.1);
}

const GOLDFISH: Goldfish = Goldfish {
    every: 3,
    window: 2,
    seed: 7,
};

fn with(optimiser: Optimiser) -> Inner {
    Inner {
        steps: 30,
        optimiser,
        ..inner()
    }
}

fn config() -> String {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(folder.join("tests/golden/llama_rope_llama3/config.json")).unwrap()
}

fn stage(range: BlockRange, inner: Inner, device: &Device) -> TrainStage {
    let (_, parameters) = initial_parameters(&config(), 5).unwrap();
    let parts = range.parts(BLOCKS);
    let parameters = parameters[parts.start as usize..parts.end as usize].to_vec();
    TrainStage::new(&config(), range, parameters, inner, 30, device).unwrap()
}

fn text(tokens: u32) -> Vec<u32> {
    (0..tokens).map(|i| i % 7 + 3).collect()
}

fn data() -> TrainData {
    let mut data = TrainData::new();
    data.add(&text(400));
    data
}
