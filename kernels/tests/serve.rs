//! Serving stages against PyTorch's numbers, and against each other.

mod golden_case;

use golden_case::{Golden, largest, largest_difference};
use polder_kernels::device::Device;
use polder_kernels::stage::{Input, Output, ServeStage, StageError, Want};
use polder_protocol::layout::BlockRange;
use polder_protocol::work::Weights;

const CASES: [&str; 2] = ["llama_tied_sharded", "llama_rope_llama3"];

#[test]
fn logits_and_hidden_states_are_those_of_pytorch() {
    for golden in CASES.map(Golden::open) {
        for (sequence, tokens) in golden.tokens.iter().enumerate() {
            let mut whole = stage(&golden, BlockRange::whole(golden.config.blocks));
            let logits = logits(&mut whole, Input::Tokens(tokens));
            let error = largest_difference(&logits, golden.case_of("logits", sequence));
            assert!(error < golden.tolerance("logits_abs"), "{error}");
            for end in 1..golden.config.blocks {
                let mut first = stage(&golden, BlockRange { first: 0, end });
                let hidden = hidden(&mut first, Input::Tokens(tokens));
                let right = golden.case_of(&format!("hidden.{end}"), sequence);
                let error = largest_difference(&hidden, right) / largest(right);
                assert!(error < golden.tolerance("hidden_rel"), "{error}");
            }
        }
    }
}

#[test]
fn the_plain_loops_meet_pytorch_too() {
    for golden in CASES.map(Golden::open) {
        let reference = reference(&golden);
        for (sequence, tokens) in golden.tokens.iter().enumerate() {
            let trace = reference.forward(&|name| &golden.weights[name], tokens);
            let error = largest_difference(&trace.logits, golden.case_of("logits", sequence));
            assert!(error < golden.tolerance("logits_abs"), "{error}");
            let targets = &tokens[1..];
            let rows = &trace.logits[..targets.len() * golden.config.vocabulary];
            let losses = polder_reference::cross_entropy(rows, targets);
            let error = largest_difference(&losses, golden.case_of("nll", sequence));
            assert!(error < golden.tolerance("loss_abs"), "{error}");
        }
    }
}

#[test]
fn greedy_tokens_are_those_of_pytorch() {
    for golden in CASES.map(Golden::open) {
        for (sequence, tokens) in golden.tokens.iter().enumerate() {
            let mut whole = stage(&golden, BlockRange::whole(golden.config.blocks));
            let mut all = logits(&mut whole, Input::Tokens(tokens));
            let mut chosen = Vec::new();
            for position in tokens.len() as u32.. {
                let last = &all[all.len() - golden.config.vocabulary..];
                chosen.push(argmax(last));
                if chosen.len() == 12 {
                    break;
                }
                let input = Input::Tokens(&chosen[chosen.len() - 1..]);
                let Output::Logits(next) = whole.forward(1, position, input, Want::LastLogits).unwrap() else {
                    panic!("a whole model gives logits");
                };
                all = next;
            }
            assert_eq!(chosen, golden.greedy(sequence));
        }
    }
}

#[test]
fn stages_cut_anywhere_give_the_bits_of_the_whole() {
    for golden in CASES.map(Golden::open) {
        let tokens = &golden.tokens[0];
        let blocks = golden.config.blocks;
        let whole = logits(&mut stage(&golden, BlockRange::whole(blocks)), Input::Tokens(tokens));
        for cut in 1..blocks {
            let x = hidden(
                &mut stage(&golden, BlockRange { first: 0, end: cut }),
                Input::Tokens(tokens),
            );
            let mut last = stage(
                &golden,
                BlockRange {
                    first: cut,
                    end: blocks,
                },
            );
            assert_eq!(logits(&mut last, Input::Hidden(&x)), whole);
        }
    }
}

#[test]
fn positions_one_by_one_and_a_replay_give_the_bits_of_a_prefill() {
    let golden = Golden::open("llama_rope_llama3");
    let tokens = &golden.tokens[1];
    let mut whole = stage(&golden, BlockRange::whole(3));
    let prefill = logits(&mut whole, Input::Tokens(tokens));
    let vocabulary = golden.config.vocabulary;
    for (position, row) in prefill.chunks_exact(vocabulary).enumerate() {
        // The first round rolls the session back to nothing, each of the others by one position more.
        let one = whole.forward(
            1,
            position as u32,
            Input::Tokens(&tokens[position..=position]),
            Want::LastLogits,
        );
        assert_eq!(one.unwrap(), Output::Logits(row.to_vec()));
    }
    let again = whole.forward(1, 5, Input::Tokens(&tokens[5..]), Want::AllLogits);
    assert_eq!(again.unwrap(), Output::Logits(prefill[5 * vocabulary..].to_vec()));
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let golden = Golden::open("llama_rope_llama3");
    let mut whole = stage(&golden, BlockRange::whole(3));
    let mut run = |position, tokens: &[u32]| {
        whole
            .forward(1, position, Input::Tokens(tokens), Want::LastLogits)
            .err()
    };
    assert_eq!(
        run(1, &[1]),
        Some(StageError::Gap {
            position: 1,
            reached: 0
        })
    );
    assert_eq!(
        run(0, &[512]),
        Some(StageError::Token {
            token: 512,
            vocabulary: 512
        })
    );
    assert_eq!(
        run(0, &[1; 65]),
        Some(StageError::Room {
            position: 0,
            count: 65,
            room: 64
        })
    );
    assert!(matches!(run(0, &[]), Some(StageError::Input { .. })));
    assert_eq!(run(0, &[1; 64]), None);
    assert!(matches!(whole.open_session(2, 513), Err(StageError::Context { .. })));
    whole.set_cache_bytes_max(whole.session_bytes(64) + 1);
    assert!(matches!(whole.open_session(2, 16), Err(StageError::Memory { .. })));
    whole.close_session(1);
    assert_eq!(whole.open_session(2, 16), Ok(()));
}

#[test]
fn a_part_file_that_is_cut_or_lies_is_named() {
    let golden = Golden::open("llama_rope_llama3");
    let load = || {
        let range = BlockRange { first: 1, end: 2 };
        let files = &golden.part_files[2..3];
        ServeStage::load(&golden.config_json, range, files, Weights::F32, &Device::cpu()).map(|_| ())
    };
    assert_eq!(load(), Ok(()));
    let bytes = std::fs::read(&golden.part_files[2]).unwrap();
    std::fs::write(&golden.part_files[2], &bytes[..bytes.len() - 8]).unwrap();
    assert!(load().unwrap_err().to_string().contains("part-2"));
    std::fs::copy(&golden.part_files[1], &golden.part_files[2]).unwrap();
    assert!(
        load()
            .unwrap_err()
            .to_string()
            .contains("model.layers.1.input_layernorm.weight")
    );
}

fn stage(golden: &Golden, range: BlockRange) -> ServeStage {
    let parts = range.parts(golden.config.blocks);
    let mut files = golden.part_files[parts.start as usize..parts.end as usize].to_vec();
    if golden.config.tied && range.first > 0 && range.has_head(golden.config.blocks) {
        files.push(golden.part_files[0].clone());
    }
    let mut stage = ServeStage::load(&golden.config_json, range, &files, Weights::F32, &Device::cpu()).unwrap();
    stage.open_session(1, 64).unwrap();
    stage
}

fn logits(stage: &mut ServeStage, input: Input<'_>) -> Vec<f32> {
    match stage.forward(1, 0, input, Want::AllLogits).unwrap() {
        Output::Logits(logits) => logits,
        Output::Hidden(_) => panic!("no head"),
    }
}

fn hidden(stage: &mut ServeStage, input: Input<'_>) -> Vec<f32> {
    match stage.forward(1, 0, input, Want::Hidden).unwrap() {
        Output::Hidden(hidden) => hidden,
        Output::Logits(_) => panic!("logits were not asked for"),
    }
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
    best.0 as u32
}

fn reference(golden: &Golden) -> polder_reference::Llama {
    use polder_kernels::model::Rope;
    let (config, llama) = (&golden.config, golden.config.llama().unwrap());
    polder_reference::Llama {
        hidden: config.hidden,
        intermediate: llama.intermediate,
        blocks: config.blocks as usize,
        heads: llama.heads,
        kv_heads: llama.kv_heads,
        head_dim: llama.head_dim,
        epsilon: llama.epsilon,
        theta: llama.theta,
        rope: match llama.rope {
            Rope::Default => polder_reference::Rope::Default,
            Rope::Llama3 {
                factor,
                low_frequency,
                high_frequency,
                original,
            } => polder_reference::Rope::Llama3 {
                factor,
                low_frequency,
                high_frequency,
                original,
            },
            other => panic!("{other:?} is in no golden case"),
        },
        tied: config.tied,
    }
}
