//! What every family must do besides computing the right numbers: one position at a time, packed, imported, exported.

mod imported_case;
mod settings;

use std::path::Path;

use imported_case::{CASES, Case, logits};
use polder_kernels::device::Device;
use polder_kernels::model::{Config, layout};
use polder_kernels::stage::{Input, StageError, Step, Want};
use polder_kernels::train::{TrainData, TrainStage, initial_parameters};
use polder_kernels::weights::{Vectors, export, import};
use polder_protocol::layout::BlockRange;
use polder_protocol::run::Inner;
use polder_protocol::work::Weights;
use serde_json::{Value, json};
use settings::inner;

#[test]
fn positions_one_by_one_give_the_bits_of_a_prefill() {
    for case in CASES.map(Case::import) {
        let tokens = case.tokens(40);
        let mut stage = case.stage(Weights::F32);
        let prefill = logits(stage.forward(1, 0, Input::Tokens(&tokens), Want::AllLogits));
        for (position, row) in (0u32..).zip(prefill.chunks_exact(case.config.vocabulary)) {
            let one = &tokens[position as usize..=position as usize];
            let own = logits(stage.forward(1, position, Input::Tokens(one), Want::LastLogits));
            assert!(own == row, "{} at {position}", case.name);
        }
        // What a verifier does with rejected tokens.
        let again = logits(stage.forward(1, 25, Input::Tokens(&tokens[25..]), Want::AllLogits));
        assert!(again == prefill[25 * case.config.vocabulary..], "{}", case.name);
    }
}

#[test]
fn sessions_in_one_batch_get_the_bits_that_each_gets_alone() {
    for case in CASES.map(Case::import) {
        for weights in [Weights::F32, Weights::Packed] {
            let tokens = case.tokens(30);
            let mut stage = case.stage(weights);
            // Sessions of different lengths; each goes on by another number of positions.
            let lengths = [(1u64, 9usize, 1usize), (2, 3, 1), (3, 17, 4), (4, 12, 2)];
            let mut alone = Vec::new();
            for (session, length, more) in lengths {
                stage.open_session(session, 64).unwrap();
                stage
                    .forward(session, 0, Input::Tokens(&tokens[..length]), Want::Hidden)
                    .unwrap();
                let input = Input::Tokens(&tokens[length..length + more]);
                alone.push(stage.forward(session, length as u32, input, Want::LastLogits).unwrap());
                // Back to where it was.
                stage.open_session(session, 64).unwrap();
                stage
                    .forward(session, 0, Input::Tokens(&tokens[..length]), Want::Hidden)
                    .unwrap();
            }
            let steps = lengths.map(|(session, length, more)| Step {
                session,
                position: length as u32,
                input: Input::Tokens(&tokens[length..length + more]),
            });
            let together = stage.forward_together(&steps, Want::LastLogits).unwrap();
            assert!(together == alone, "{}", case.name);
            let twice = stage.forward_together(&[steps[0], steps[0]], Want::LastLogits);
            assert_eq!(twice, Err(StageError::Twice { session: 1 }));
        }
    }
}

#[test]
fn weights_as_stored_are_near_widened_ones() {
    for case in CASES.map(Case::import) {
        let tokens = case.tokens(17);
        let run = |weights| {
            let mut stage = case.stage(weights);
            logits(stage.forward(1, 0, Input::Tokens(&tokens), Want::AllLogits))
        };
        let (packed, widened) = (run(Weights::Packed), run(Weights::F32));
        let error = packed
            .iter()
            .zip(&widened)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(error < 1e-3, "{}: {error}", case.name);
    }
}

#[test]
fn an_exported_model_is_imported_as_the_same() {
    for case in CASES.map(Case::import) {
        let out = case.folder.path().join("exported");
        export(&case.model.exported(Vectors::AsStored), &out).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let again = import(&out, &case.folder.path().join("again"), &mut |_| {}).unwrap();
        for (own, right) in again.part_files.iter().zip(&case.model.part_files) {
            assert!(
                std::fs::read(own).unwrap() == std::fs::read(right).unwrap(),
                "{}",
                case.name
            );
        }
    }
}

#[test]
fn a_recurrent_session_goes_back_as_far_as_it_promises_and_no_further() {
    let case = Case::import("nemotron_h_moe");
    let tokens = case.tokens(200);
    let vocabulary = case.config.vocabulary;
    let mut stage = case.stage(Weights::F32);
    let prefill = logits(stage.forward(1, 0, Input::Tokens(&tokens), Want::AllLogits));
    for from in [199, 160, 150, 136] {
        let again = stage.forward(1, from, Input::Tokens(&tokens[from as usize..]), Want::AllLogits);
        assert!(logits(again) == prefill[from as usize * vocabulary..], "{from}");
    }
    let too_far = stage.forward(1, 60, Input::Tokens(&tokens[60..61]), Want::LastLogits);
    assert!(
        matches!(too_far, Err(StageError::Rewind { position: 60, .. })),
        "{too_far:?}"
    );
    let anew = stage.forward(1, 0, Input::Tokens(&tokens), Want::AllLogits);
    assert!(logits(anew) == prefill);
}

#[test]
fn a_cache_of_latents_does_not_grow_with_the_heads() {
    let case = Case::import("deepseek_v3");
    // Three blocks of a latent of 32 and one rotated key of 8, four bytes each.
    assert_eq!(case.stage(Weights::F32).session_bytes(64), 64 * 3 * (32 + 8) * 4);
}

#[test]
fn every_family_learns_a_repeating_text_from_its_first_parameters() {
    for name in CASES {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let config = std::fs::read_to_string(golden.join("config.json")).unwrap();
        let (layout, parameters) = initial_parameters(&config, 5).unwrap();
        assert!(parameters.iter().flatten().all(|value| value.is_finite()), "{name}");
        let inner = Inner { steps: 30, ..inner() };
        let range = BlockRange::whole(layout.blocks());
        let mut stage = TrainStage::new(&config, range, parameters, inner, 30, &Device::cpu()).unwrap();
        let text: Vec<u32> = (0..400).map(|i| i % 7 + 3).collect();
        let mut data = TrainData::new();
        data.add(&text);
        let before = stage.score(&text, 400, 1, 16).unwrap();
        let stepped = stage.steps(&data, 0, 30, &[1, 2, 3]).unwrap();
        let last = stepped.losses[29];
        // Of hundreds of tokens, seven are ever seen.
        assert!(last < 2.0 && stepped.losses[0] > 5.0, "{name}: {:?}", stepped.losses);
        let after = stage.score(&text, 400, 1, 16).unwrap();
        assert!(after < before / 2.0, "{name}: {before} {after}");
    }
}

#[test]
fn no_value_in_a_configuration_makes_its_reading_panic() {
    let values = [
        json!(null),
        json!(0),
        json!(1),
        json!(2),
        json!(3),
        json!(7),
        json!(1 << 20),
        json!(1u64 << 40),
        json!(-1),
        json!(0.3),
        json!(1e300),
        json!("x"),
        json!(true),
        json!([]),
        json!([1, 0]),
        json!(["full_attention"]),
        json!({}),
        json!({"rope_type": "yarn"}),
        json!({"rope_type": "yarn", "factor": 1e-9, "original_max_position_embeddings": 1e-9}),
    ];
    let (mut read, mut refused) = (0, 0);
    for name in CASES {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let text = std::fs::read_to_string(golden.join("config.json")).unwrap();
        let config: Value = serde_json::from_str(&text).unwrap();
        let keys: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
        for (key, value) in keys.iter().flat_map(|key| values.iter().map(move |value| (key, value))) {
            let mut changed = config.clone();
            changed[key] = value.clone();
            match Config::from_json(&changed.to_string()) {
                Ok(config) => {
                    read += 1;
                    assert_eq!(layout(&config).blocks(), config.blocks);
                }
                Err(error) => {
                    refused += 1;
                    assert!(!error.to_string().is_empty());
                }
            }
        }
    }
    assert!(read > 1_000 && refused > 1_000, "{read} {refused}");
}
