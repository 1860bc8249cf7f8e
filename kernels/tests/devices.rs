//! Stages on other devices than the CPU: for serving on what wgpu finds, for training in tensors on the CPU too.
//!
//! With the feature `gpu`, a software rasteriser such as lavapipe will do. Where wgpu finds nothing, these tests say so
//! and compute on the CPU alone; with `POLDER_GPU_REQUIRED` set they fail.

mod golden_case;
mod imported_case;
mod settings;
mod training_step;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use golden_case::{Golden, largest, largest_difference};
use imported_case::Case;
use polder_kernels::device::Device;
use polder_kernels::quant::PackedType;
use polder_kernels::stage::{Input, Output, ServeStage, StageError, Step, Want};
use polder_kernels::train::{TrainData, TrainError, TrainInput, TrainOutput, TrainStage, initial_parameters};
use polder_kernels::verify::{verify, verify_serving};
use polder_kernels::weights::{import, quantise};
use polder_protocol::layout::BlockRange;
use polder_protocol::run::Inner;
use polder_protocol::work::Weights;
use settings::inner;
use training_step::{batch, loss};

/// What is trained on a device here: one tied, one not.
const CASES: [&str; 2] = ["llama_tied_sharded", "llama_rope_llama3"];

/// Every family's activations after each block, experts chosen, logits, greedy tokens and chains of stages.
#[test]
fn every_family_is_served_as_pytorch_computes_it() {
    let _turn = turn();
    let Some(device) = graphics_device() else { return };
    for case in imported_case::CASES {
        let began = std::time::Instant::now();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case);
        let report = verify_serving(&folder, device).unwrap_or_else(|error| panic!("{case}: {error:?}"));
        let worst = report
            .quantities
            .iter()
            .map(|quantity| quantity.largest / quantity.tolerance.max(1e-30));
        println!(
            "{case}: {} quantities, the worst at {:.2} of its tolerance, {:.1} s",
            report.quantities.len(),
            worst.fold(0.0, f64::max),
            began.elapsed().as_secs_f64()
        );
        let outside: Vec<_> = report.quantities.iter().filter(|quantity| !quantity.passed).collect();
        assert!(outside.is_empty(), "{case}: {outside:?}");
        assert_eq!(report.served_on, device.name(), "{case}");
    }
}

/// A device without our kernels.
#[test]
fn what_a_device_cannot_compute_the_cpu_does() {
    let golden = Golden::open("llama_rope_llama3");
    let mut stage = serve(&golden, BlockRange::whole(3), &Device::cpu_in_tensors());
    assert!(stage.is_on_cpu());
    let mut cpu = serve(&golden, BlockRange::whole(3), &Device::cpu());
    let run = |stage: &mut ServeStage| logits(stage, 0, &golden.tokens[0], Want::AllLogits);
    assert!(run(&mut stage) == run(&mut cpu));
}

/// What every family must do besides: positions one by one, going back, forks, and rows of several sessions at once; with the
/// weights as they are stored.
#[test]
fn sessions_of_every_family_go_on_from_anywhere() {
    let _turn = turn();
    let Some(device) = graphics_device() else { return };
    for case in imported_case::CASES.map(Case::import) {
        let (config, files) = (&case.model.config_json, &case.model.part_files);
        let range = BlockRange::whole(case.config.blocks);
        let mut stage = ServeStage::load(config, range, files, Weights::Packed, device).unwrap();
        assert!(!stage.is_on_cpu(), "{}", case.name);
        let (tokens, vocabulary) = (case.tokens(100), case.config.vocabulary);
        let near = |what: &str, ours: &[f32], right: &[f32]| {
            let error = largest_difference(ours, right) / largest(right).max(1.0);
            assert!(error < 2e-4, "{}, {what}: {error}", case.name);
        };
        let row = |all: &[f32], position: usize| all[position * vocabulary..][..vocabulary].to_vec();
        stage.open_session(1, 128).unwrap();
        let whole = logits(&mut stage, 0, &tokens, Want::AllLogits);
        let mut cpu = ServeStage::load(config, range, files, Weights::F32, &Device::cpu()).unwrap();
        cpu.open_session(1, 128).unwrap();
        near(
            "a prompt over two pages",
            &whole,
            &logits(&mut cpu, 0, &tokens, Want::AllLogits),
        );
        for position in [97, 98, 99, 62, 63, 64] {
            let one = logits(
                &mut stage,
                position as u32,
                &tokens[position..=position],
                Want::LastLogits,
            );
            near("one position", &one, &row(&whole, position));
        }
        // What came behind the position that was run last is forgotten.
        logits(&mut stage, 65, &tokens[65..], Want::LastLogits);
        assert_eq!(stage.fork_session(2, 1, 128), Ok(100));
        stage.truncate_session(2, 70).unwrap();
        let step = |session, position: usize, end: usize| Step {
            session,
            position: position as u32,
            input: Input::Tokens(&tokens[position..end]),
        };
        stage.open_session(3, 128).unwrap();
        let steps = [step(3, 0, 30), step(2, 70, 72), step(1, 99, 100)];
        let together = stage.forward_together(&steps, Want::LastLogits).unwrap();
        for (output, position) in together.iter().zip([29, 71, 99]) {
            let Output::Logits(output) = output else {
                panic!("a head")
            };
            near("rows together", output, &row(&whole, position));
        }
        stage.end_session(1);
        assert_eq!(stage.open_session_from(4, 128, 1, 90), Ok(90));
        let Ok(Output::Logits(resumed)) = stage.forward(4, 90, Input::Tokens(&tokens[90..]), Want::LastLogits) else {
            panic!("{}: not resumed", case.name);
        };
        near("resumed", &resumed, &row(&whole, 99));
    }
}

#[test]
fn long_prompts_go_in_chunks() {
    let _turn = turn();
    let Some(device) = graphics_device() else { return };
    let case = Case::import("mistral_sliding");
    let long = case.tokens(300);
    let run = |device: &Device| {
        let config = case
            .model
            .config_json
            .replace("\"max_position_embeddings\": 256", "\"max_position_embeddings\": 512");
        let range = BlockRange::whole(case.config.blocks);
        let mut stage = ServeStage::load(&config, range, &case.model.part_files, Weights::F32, device).unwrap();
        stage.open_session(1, 400).unwrap();
        logits(&mut stage, 0, &long, Want::LastLogits)
    };
    let error = largest_difference(&run(device), &run(&Device::cpu()));
    assert!(error < 1e-4, "{device}: {error}");
}

#[test]
fn losses_and_gradients_are_those_of_the_cpu() {
    on_every_device(|device| {
        for golden in CASES.map(Golden::open) {
            let tokens = golden.tokens.concat();
            let run = |device: &Device| {
                let mut stage = train(&golden, BlockRange::whole(3), device);
                let loss = loss(stage.forward(0, batch(&tokens, &[])).unwrap()).0;
                let norm = stage.square_sum(1).unwrap();
                let gradients = stage.gradients().unwrap().to_vec();
                stage.apply(0, norm).unwrap();
                let score = stage.score(&tokens, tokens.len() as u64, 1, 8).unwrap();
                (loss, gradients, score)
            };
            let (loss, gradients, score) = run(device);
            let (right_loss, right_gradients, right_score) = run(&Device::cpu());
            assert!((loss - right_loss).abs() < 1e-5, "{device}: {loss} {right_loss}");
            assert!((score - right_score).abs() < 1e-4, "{device}: {score} {right_score}");
            for (gradients, right) in gradients.iter().zip(&right_gradients) {
                let error = largest_difference(gradients, right) / largest(right);
                assert!(error < 1e-4, "{device}: {error}");
            }
        }
    });
}

#[test]
fn steps_on_a_device_are_those_of_the_cpu_and_go_on_from_its_state() {
    on_every_device(|device| {
        let golden = Golden::open("llama_rope_llama3");
        let data = repeating();
        let start = |device: &Device| train(&golden, BlockRange::whole(3), device);
        let near = |what: &str, ours: &[Vec<f32>], right: &[Vec<f32>]| {
            for (ours, right) in ours.iter().zip(right) {
                let error = largest_difference(ours, right) / largest(right);
                // AdamW's first steps hardly ask how large a gradient is, so errors of the smallest show.
                assert!(error < 1e-3, "{device}, {what}: {error}");
            }
        };
        let (mut ours, mut right) = (start(device), start(&Device::cpu()));
        let losses = |stage: &mut TrainStage, first, steps| stage.steps(&data, first, steps, &[1]).unwrap().losses;
        let close = |a: Vec<f32>, b: Vec<f32>| {
            assert!(
                a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-3),
                "{device}: {a:?} {b:?}"
            );
        };
        close(losses(&mut ours, 0, 4), losses(&mut right, 0, 4));
        near("4 steps", ours.parameters().unwrap(), right.parameters().unwrap());

        // Either goes on from the other's files.
        let folder = tempfile::tempdir().unwrap();
        let write = |stage: &mut TrainStage, name: &str| {
            let file = |part| folder.path().join(format!("{name}-{part}"));
            let parts: Vec<_> = (0..5).map(|part| file(part.to_string())).collect();
            stage.write(&parts).unwrap();
            stage.write_optimiser(file("state".to_owned())).unwrap();
            (parts, file("state".to_owned()))
        };
        let (our_files, right_files) = (write(&mut ours, "ours"), write(&mut right, "right"));
        let load = |(parts, state): &(Vec<_>, _), device: &Device| {
            let range = BlockRange::whole(3);
            let mut stage = TrainStage::load(&golden.config_json, range, parts, inner(), 10, device).unwrap();
            stage.read_optimiser(state).unwrap();
            stage
        };
        let (mut moved, mut back) = (load(&right_files, device), load(&our_files, &Device::cpu()));
        // In two orders, with a look at the parameters between.
        let mut whole = losses(&mut ours, 4, 2);
        assert_eq!(ours.parameters().unwrap().len(), 5);
        whole.extend(losses(&mut ours, 6, 1));
        close(whole.clone(), losses(&mut moved, 4, 3));
        close(whole, losses(&mut back, 4, 3));
        near("7 steps", moved.parameters().unwrap(), back.parameters().unwrap());

        // New parameters are taken, and the state stays.
        let other = right.parameters().unwrap().to_vec();
        for stage in [&mut ours, &mut back] {
            stage.set_parameters(other.clone()).unwrap();
        }
        close(losses(&mut ours, 7, 2), losses(&mut back, 7, 2));
        near("9 steps", ours.parameters().unwrap(), back.parameters().unwrap());
    });
}

#[test]
fn repeats_and_graphs_made_again_have_the_same_bits() {
    on_every_device(|device| {
        for name in ["llama_tied_sharded", "gemma3_text", "deepseek_v3"] {
            let config = std::fs::read_to_string(golden_folder(name).join("config.json")).unwrap();
            let (layout, parameters) = initial_parameters(&config, 5).unwrap();
            let data = repeating();
            let run = |blocks_kept| {
                let inner = Inner {
                    micro_batches: 2,
                    ..inner()
                };
                let range = BlockRange::whole(layout.blocks());
                let stage = TrainStage::new(&config, range, parameters.clone(), inner, 10, device);
                let mut stage = stage.unwrap();
                stage.set_blocks_kept(blocks_kept);
                let losses = stage.steps(&data, 0, 2, &[1]).unwrap().losses;
                (losses, stage.parameters().unwrap().to_vec())
            };
            let all = run(u32::MAX);
            assert!(all.0.iter().all(|loss| loss.is_finite()));
            println!("{device}, {name}: {:08x?}", [all.0[0].to_bits(), all.0[1].to_bits()]);
            for blocks_kept in [u32::MAX, 1, 0] {
                assert!(run(blocks_kept) == all, "{device}, {name}: {blocks_kept} blocks kept");
            }
        }
    });
}

/// What stays on the device between a forward and its backward, and that it is gone afterwards.
#[cfg(feature = "gpu")]
#[test]
fn blocks_that_keep_their_input_alone_hold_less_of_the_device() {
    use polder_kernels::device::cube::Cubes;

    let _turn = turn();
    let Some(device) = graphics_device() else { return };
    let cubes = Cubes::of(device).unwrap();
    let golden = Golden::open("llama_rope_llama3");
    let held = |seq: u32, blocks_kept| {
        let mut stage = train(&golden, BlockRange { first: 0, end: 2 }, device);
        stage.set_blocks_kept(blocks_kept);
        let tokens: Vec<u32> = (0..=seq).map(|i| i % 500).collect();
        let input = TrainInput {
            tokens: &tokens,
            hidden: &[],
            batch: 1,
            seq,
        };
        let run = |stage: &mut TrainStage| match stage.forward(0, input).unwrap() {
            TrainOutput::Hidden(sent) => sent,
            TrainOutput::Loss { .. } => panic!("no head"),
        };
        // Parameters, rotations and sums of gradients are there after the first.
        let sent = run(&mut stage);
        stage.backward(0, &sent).unwrap();
        let before = cubes.bytes_in_use();
        let sent = run(&mut stage);
        let kept = cubes.bytes_in_use() - before;
        stage.backward(0, &sent).unwrap();
        let after = cubes.bytes_in_use();
        assert!(after <= before + before / 20, "{after} {before}");
        kept
    };
    for seq in [64, 256] {
        let [all, one, none] = [u32::MAX, 1, 0].map(|blocks_kept| held(seq, blocks_kept));
        println!("{seq} positions: {all} bytes with both graphs, {one} with one, {none} with none");
        assert!(none < one && one < all && none < all / 4);
        // Nothing grows with the square of the length.
        assert!(seq == 64 || all < 5 * held(64, u32::MAX));
    }
}

#[test]
fn losses_and_gradients_of_other_families_are_those_of_pytorch() {
    on_every_device(|device| {
        let few = "mistral_sliding mistral4_mla mixtral_moe deepseek_v32_dsa nemotron_h_moe";
        // All of them take a software rasteriser minutes.
        let names = std::env::var("POLDER_GPU_FAMILIES").unwrap_or_else(|_| few.to_owned());
        for name in names.split_whitespace() {
            let report = verify(&golden_folder(name), device).unwrap();
            assert!(report.passed(), "{device}, {name}: {:?}", report.quantities);
        }
    });
}

#[test]
fn a_chain_of_two_trains_as_the_whole_does_on_the_cpu() {
    on_every_device(|device| {
        let golden = Golden::open("llama_rope_llama3");
        let tokens = golden.tokens.concat();
        let mut whole = train(&golden, BlockRange::whole(3), &Device::cpu());
        let mut first = train(&golden, BlockRange { first: 0, end: 1 }, device);
        let mut last = train(&golden, BlockRange { first: 1, end: 3 }, device);
        for step in 0..2 {
            let alone = loss(whole.forward(0, batch(&tokens, &[])).unwrap()).0;
            let TrainOutput::Hidden(sent) = first.forward(0, batch(&tokens, &[])).unwrap() else {
                panic!("no head");
            };
            let (chained, gradient) = loss(last.forward(0, batch(&tokens, &sent)).unwrap());
            assert!((chained - alone).abs() < 1e-4, "{device}: {chained} {alone}");
            assert!(first.backward(0, &gradient).unwrap().is_empty());
            let sum = whole.square_sum(1).unwrap();
            let sums = first.square_sum(1).unwrap() + last.square_sum(1).unwrap();
            assert!((sums / sum - 1.0).abs() < 1e-3, "{device}: {sums} {sum}");
            let chained = [first.gradients().unwrap(), last.gradients().unwrap()].concat();
            for (gradients, right) in chained.iter().zip(whole.gradients().unwrap()) {
                let error = largest_difference(gradients, right) / largest(right);
                assert!(error < 1e-3, "{device}, step {step}: {error}");
            }
            whole.apply(step, sum).unwrap();
            for stage in [&mut first, &mut last] {
                stage.apply(step, sums).unwrap();
            }
        }
    });
}

#[test]
fn what_does_not_fit_a_device_is_refused() {
    on_every_device(|device| {
        let golden = Golden::open("llama_rope_llama3");
        let config = golden.config_json.replace(
            "\"max_position_embeddings\": 512",
            "\"max_position_embeddings\": 60000000",
        );
        assert_ne!(config, golden.config_json);
        let range = BlockRange { first: 1, end: 2 };
        let files = &golden.part_files[2..3];
        let mut stage = ServeStage::load(&config, range, files, Weights::F32, device).unwrap();
        // Not on the CPU, which would set about it.
        if !stage.is_on_cpu() {
            stage.set_cache_bytes_max(u64::MAX);
            let refused = stage.open_session(1, 60_000_000);
            assert!(matches!(refused, Err(StageError::Memory { .. })), "{refused:?}");
        }
        assert_eq!(stage.open_session(2, 64), Ok(()), "{device}");

        let mut stage = train(&golden, BlockRange { first: 1, end: 2 }, device);
        let input = TrainInput {
            tokens: &[],
            hidden: &[],
            batch: 1,
            seq: 1 << 20,
        };
        let refused = stage.forward(0, input);
        assert!(matches!(refused, Err(TrainError::DeviceBuffer { .. })), "{refused:?}");
    });
}

/// On a graphics device, where our own kernels multiply packed weights; the CPU computes the same for comparison.
#[test]
fn sessions_in_pages_share_their_past_and_run_together() {
    let _turn = turn();
    let golden = Golden::open("llama_rope_llama3");
    let folder = tempfile::tempdir().unwrap();
    let packed = quantise(
        &golden.config_json,
        &golden.part_files,
        PackedType::Q8_0,
        &folder.path().join("packed"),
        &mut |_| {},
    );
    let packed = packed.unwrap();
    let load = |weights, device: &Device| {
        let range = BlockRange::whole(3);
        ServeStage::load(&golden.config_json, range, &packed.part_files, weights, device).unwrap()
    };
    let long: Vec<u32> = (0..300).map(|i| i * 7 % 512).collect();
    let vocabulary = golden.config.vocabulary;
    let cpu = Device::cpu();
    let Some(device) = graphics_device() else { return };
    // Widened: the CPU rounds activations to eight bits where weights are packed, and the device does not.
    let (mut ours, mut right) = (load(Weights::Packed, device), load(Weights::F32, &cpu));
    let page = ours.session_bytes(65) - ours.session_bytes(64);
    let run = |stage: &mut ServeStage, session: u64, position: u32, tokens: &[u32]| -> Vec<f32> {
        match stage.forward(session, position, Input::Tokens(tokens), Want::AllLogits) {
            Ok(Output::Logits(logits)) => logits,
            other => panic!("{other:?}"),
        }
    };
    let near = |what: &str, ours: &[f32], right: &[f32]| {
        let error = largest_difference(ours, right) / largest(right);
        assert!(error < 1e-4, "{what}: {error}");
    };

    // A prompt in pieces, over the ends of pages, costs the pages that it fills.
    for stage in [&mut ours, &mut right] {
        stage.open_session(1, 400).unwrap();
        assert_eq!(stage.cache_bytes(), 0);
    }
    let mut whole = run(&mut ours, 1, 0, &long[..100]);
    assert_eq!(ours.cache_bytes(), 2 * page);
    whole.extend(run(&mut ours, 1, 100, &long[100..]));
    assert_eq!(ours.cache_bytes(), 5 * page);
    near("a long prompt", &whole, &run(&mut right, 1, 0, &long));

    // A fork shares its past, and takes a page of its own to write.
    assert_eq!(ours.fork_session(2, 1, 400), Ok(300));
    assert_eq!(ours.cache_bytes(), 5 * page);
    ours.truncate_session(2, 130).unwrap();
    let other = [9, 8, 7];
    let forked = run(&mut ours, 2, 130, &other);
    assert_eq!(ours.cache_bytes(), 6 * page);
    ours.open_session(3, 400).unwrap();
    run(&mut ours, 3, 0, &long[..130]);
    let alone = run(&mut ours, 3, 130, &other);
    assert!(largest_difference(&forked, &alone) < 1e-4);
    // The first has not been disturbed.
    let again = run(&mut ours, 1, 290, &long[290..]);
    assert!(largest_difference(&again, &whole[290 * vocabulary..]) < 1e-4);

    // Rows of three sessions at once, among them a piece of a prompt, are those of each alone.
    ours.truncate_session(3, 64).unwrap();
    let step = |session, position: u32, tokens| Step {
        session,
        position,
        input: Input::Tokens(tokens),
    };
    let steps = [
        step(2, 133, &long[..1]),
        step(3, 64, &long[64..170]),
        step(1, 300, &long[5..6]),
    ];
    let together = ours.forward_together(&steps, Want::LastLogits).unwrap();
    for (step, together) in steps.iter().zip(&together) {
        let (Output::Logits(together), Input::Tokens(tokens)) = (together, step.input) else {
            unreachable!()
        };
        let alone = run(&mut ours, step.session, step.position, tokens);
        let error = largest_difference(together, &alone[alone.len() - vocabulary..]);
        assert!(error < 1e-4, "session {}: {error}", step.session);
    }

    // A session that has ended is gone on from, until its room is needed.
    ours.close_session(2);
    ours.close_session(3);
    ours.end_session(1);
    assert_eq!(ours.open_session_from(4, 400, 1, 200), Ok(200));
    let resumed = run(&mut ours, 4, 200, &long[200..210]);
    assert!(largest_difference(&resumed, &whole[200 * vocabulary..210 * vocabulary]) < 1e-4);
    ours.set_cache_bytes_max(7 * page);
    let refused = ours.open_session(5, 65);
    assert!(matches!(refused, Err(StageError::Memory { .. })), "{refused:?}");
    ours.close_session(4);
    ours.open_session(5, 400).unwrap();
    run(&mut ours, 5, 0, &long);
    assert_eq!(
        ours.open_session_from(6, 0, 1, 200),
        Err(StageError::Context { context: 0, max: 512 })
    );
    near(
        "after all that",
        &run(&mut ours, 5, 250, &long[250..]),
        &run(&mut right, 1, 250, &long[250..]),
    );
}

/// `POLDER_SMOLLM2_GGUF` names the file; `POLDER_GPU_SEQUENCES` says how many of the ten continuations to make, one by
/// default: a software rasteriser is slow.
#[test]
fn smollm2_goes_on_as_with_transformers() {
    let _turn = turn();
    let (Some(device), Some(file)) = (graphics_device(), std::env::var_os("POLDER_SMOLLM2_GGUF")) else {
        println!("skipped: needs a graphics device, and POLDER_SMOLLM2_GGUF");
        return;
    };
    let count = std::env::var("POLDER_GPU_SEQUENCES").map_or(1, |count| count.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let imported = import(Path::new(&file), &folder.path().join("model"), &mut |_| {}).unwrap();
    let range = BlockRange::whole(30);
    let mut stage = ServeStage::load(&imported.config_json, range, &imported.part_files, Weights::F32, device).unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/smollm2/f32.json");
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
    for entry in golden["entries"].as_array().unwrap().iter().take(count) {
        let ids = |key: &str| -> Vec<u32> {
            let ids = entry[key].as_array().unwrap();
            ids.iter().map(|id| id.as_u64().unwrap() as u32).collect()
        };
        let began = std::time::Instant::now();
        stage.open_session(1, 512).unwrap();
        let prompt = ids("prompt_ids");
        let mut next = logits(&mut stage, 0, &prompt, Want::LastLogits);
        for top in entry["top10_first"].as_array().unwrap() {
            let error = next[top[0].as_u64().unwrap() as usize] - top[1].as_f64().unwrap() as f32;
            assert!(error.abs() < 0.02, "{}: {error}", entry["prompt"]);
        }
        let right = ids("greedy_ids");
        for (position, right) in (prompt.len() as u32..).zip(&right) {
            assert_eq!(argmax(&next), *right, "{} at {position}", entry["prompt"]);
            next = logits(&mut stage, position, &[*right], Want::LastLogits);
        }
        println!(
            "{}: {} tokens in {:.1} s",
            entry["lang"],
            right.len(),
            began.elapsed().as_secs_f64()
        );
    }
}

/// One device is computed on at a time: a driver that compiles for several threads is only slower.
static TURN: Mutex<()> = Mutex::new(());

fn on_every_device(test: impl Fn(&Device)) {
    let _turn = turn();
    test(&Device::cpu_in_tensors());
    if let Some(device) = graphics_device() {
        let began = std::time::Instant::now();
        test(device);
        println!("{device}: {:.1} s", began.elapsed().as_secs_f64());
    }
}

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(feature = "gpu")]
fn graphics_device() -> Option<&'static Device> {
    use polder_kernels::device::Choice;
    use std::sync::OnceLock;

    static DEVICE: OnceLock<Device> = OnceLock::new();
    let device = DEVICE.get_or_init(|| {
        let (device, reason) = Device::choose(Choice::Wgpu);
        match reason {
            Some(reason) if std::env::var_os("POLDER_GPU_REQUIRED").is_some() => panic!("{reason}"),
            Some(reason) => println!("skipped on a graphics device: {reason}"),
            None => println!("device: {device}"),
        }
        device
    });
    (!device.is_cpu()).then_some(device)
}

#[cfg(not(feature = "gpu"))]
fn graphics_device() -> Option<&'static Device> {
    None
}

fn serve(golden: &Golden, range: BlockRange, device: &Device) -> ServeStage {
    let parts = range.parts(golden.config.blocks);
    let mut files = golden.part_files[parts.start as usize..parts.end as usize].to_vec();
    if golden.config.tied && range.first > 0 && range.has_head(golden.config.blocks) {
        files.push(golden.part_files[0].clone());
    }
    let mut stage = ServeStage::load(&golden.config_json, range, &files, Weights::F32, device).unwrap();
    stage.open_session(1, 64).unwrap();
    stage
}

fn logits(stage: &mut ServeStage, position: u32, tokens: &[u32], want: Want) -> Vec<f32> {
    match stage.forward(1, position, Input::Tokens(tokens), want).unwrap() {
        Output::Logits(logits) => logits,
        Output::Hidden(_) => panic!("no head"),
    }
}

fn train(golden: &Golden, range: BlockRange, device: &Device) -> TrainStage {
    let parts = range.parts(golden.config.blocks);
    let parameters = golden.parameters()[parts.start as usize..parts.end as usize].to_vec();
    TrainStage::new(&golden.config_json, range, parameters, inner(), 10, device).unwrap()
}

fn golden_folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn repeating() -> TrainData {
    let mut data = TrainData::new();
    data.add(&(0..200).map(|i| i % 7 + 3).collect::<Vec<u32>>());
    data
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
    best.0 as u32
}
