//! Orders against a small real model, alone and together.

use std::path::Path;

use polder_kernels::weights;
use polder_protocol::layout::BlockRange;
use polder_protocol::work::{Grammar, Weights};

use super::*;

#[test]
fn a_device_that_failed_cannot_go_on_and_the_cpu_can() {
    for (device, breaks) in [(Device::cpu_in_tensors(), true), (Device::cpu(), false)] {
        let mut compute = Compute::new(device, None);
        // What was asked for was wrong; the device is not.
        assert!(compute.perform(Task::Unload { stage: 1 }, Vec::new()).is_ok());
        let order = Task::CloseSession { stage: 1, session: 1 };
        assert!(compute.perform(order, Vec::new()).is_ok());
        let order = Task::TrainSquareSum {
            stage: 1,
            micro_batches: 1,
        };
        assert!(compute.perform(order, Vec::new()).is_err());
        assert_eq!(compute.broken, None);
        compute.panicked("the driver is gone");
        assert_eq!(compute.broken.is_some(), breaks);
    }
}

#[test]
fn failures_of_the_device_are_told_from_those_of_the_order() {
    let reason = || "lost".to_owned();
    assert!(Failure::from(StageError::Device { reason: reason() }).of_device);
    assert!(Failure::from(TrainError::Device { reason: reason() }).of_device);
    assert!(!Failure::from(StageError::Full).of_device);
    assert!(!Failure::from(TrainError::NoGradients).of_device);
}

/// A stage of a golden Llama, loaded as stage 1.
fn loaded(folder: &Path, range: BlockRange) -> Compute {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels/tests/golden/llama_rope_llama3");
    let source = folder.join("source");
    fs::create_dir(&source).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(golden.join(file), source.join(file)).unwrap();
    }
    fs::write(source.join("tokenizer.json"), polder_kernels::text::bytes()).unwrap();
    let model = weights::import(&source, &folder.join("model"), &mut |_| ()).unwrap();
    let parts = range.parts(3).map(|part| &model.part_files[part as usize]);
    let mut compute = Compute::new(Device::cpu(), None);
    let load = Task::Load {
        stage: 1,
        config_json: model.config_json,
        range,
        part_files: parts.map(|file| file.to_str().unwrap().to_owned()).collect(),
        weights: Weights::Packed,
    };
    compute.perform(load, Vec::new()).unwrap();
    compute
}

fn open(compute: &mut Compute, session: u64, context_tokens_max: u32) {
    let open = Task::OpenSession {
        stage: 1,
        session,
        context_tokens_max,
        earlier: None,
    };
    compute.perform(open, Vec::new()).unwrap();
}

#[test]
fn a_session_goes_on_from_one_that_has_ended() {
    let folder = tempfile::tempdir().unwrap();
    let mut compute = loaded(folder.path(), BlockRange::whole(3));
    let text: Vec<u32> = (1..20).collect();
    let all = |compute: &mut Compute, session, position: u32| {
        let rest = text.get(position as usize..).unwrap().to_vec();
        compute.perform(forward(session, position, rest), Vec::new()).unwrap()
    };
    open(&mut compute, 1, 64);
    let expected = all(&mut compute, 1, 0);
    let end = Task::EndSession { stage: 1, session: 1 };
    compute.perform(end, Vec::new()).unwrap();
    let go_on = |session, positions| Task::OpenSession {
        stage: 1,
        session,
        context_tokens_max: 64,
        earlier: Some((1, positions)),
    };
    let opened = |positions| Answer::Opened { positions, earliest: 0 };
    assert_eq!(compute.perform(go_on(2, 11), Vec::new()).unwrap().0, opened(11));
    assert_eq!(all(&mut compute, 2, 11), expected);
    // It was taken over, so there is nothing left of it.
    assert_eq!(compute.perform(go_on(3, 11), Vec::new()).unwrap().0, opened(0));
    assert_eq!(all(&mut compute, 3, 0), expected);
}

fn forward(session: u64, position: u32, tokens: Vec<u32>) -> Task {
    Task::Forward {
        stage: 1,
        session,
        position,
        tokens,
        sample: Some(Sampling {
            alternatives: 3,
            temperature: 0.8,
            ..Sampling::GREEDY
        }),
        written: Written::default(),
    }
}

#[test]
fn together_each_session_gets_what_it_gets_alone() {
    let folder = tempfile::tempdir().unwrap();
    let whole = BlockRange::whole(3);
    let mut compute = loaded(folder.path(), whole);
    let prompts: [&[u32]; 3] = [&[1, 2, 3, 4, 5, 6], &[9], &[7, 8]];
    let orders = |first: u64| -> Vec<(Task, Vec<u8>)> {
        let orders = (first..).zip(prompts);
        orders
            .map(|(session, prompt)| (forward(session, 0, prompt.to_vec()), Vec::new()))
            .collect()
    };
    (1..=6).for_each(|session| open(&mut compute, session, 16));
    let together = compute.perform_together(orders(1));
    let alone: Vec<_> = orders(4)
        .into_iter()
        .map(|(task, payload)| compute.perform(task, payload))
        .collect();
    assert!(together.iter().all(Result::is_ok));
    assert_eq!(together, alone);
    // They go on from there, one of them with more than its room.
    let next = |first: u64| -> Vec<(Task, Vec<u8>)> {
        let of = |place: u64, position, count| (forward(first + place, position, vec![3; count]), Vec::new());
        vec![of(0, 6, 1), of(1, 1, 20), of(2, 2, 1)]
    };
    let together = compute.perform_together(next(1));
    let alone: Vec<_> = next(4)
        .into_iter()
        .map(|(task, payload)| compute.perform(task, payload))
        .collect();
    assert_eq!(
        together.iter().map(Result::is_ok).collect::<Vec<_>>(),
        [true, false, true]
    );
    assert_eq!((&together[0], &together[2]), (&alone[0], &alone[2]));
}

#[test]
fn activations_go_together_too() {
    let folder = tempfile::tempdir().unwrap();
    let mut compute = loaded(folder.path(), BlockRange { first: 1, end: 2 });
    let width = compute.serving[&1].hidden();
    let rows = |count: usize, start: f32| {
        let values: Vec<f32> = (0..count * width).map(|i| (start + i as f32 * 0.01).sin()).collect();
        boundary::write(&values, Boundary::F32)
    };
    (1..=4).for_each(|session| open(&mut compute, session, 16));
    let orders = |first: u64| {
        vec![
            (forward(first, 0, Vec::new()), rows(3, 0.5)),
            (forward(first + 1, 0, Vec::new()), rows(1, 2.0)),
        ]
    };
    let together = compute.perform_together(orders(1));
    let alone: Vec<_> = orders(3)
        .into_iter()
        .map(|(task, payload)| compute.perform(task, payload))
        .collect();
    assert_eq!(together, alone);
    assert!(matches!(&together[0], Ok((Answer::Hidden, rows)) if rows.len() == 3 * width * 4));
    // Half a number fails alone.
    let mut broken = orders(1);
    broken[1].1.pop();
    let together = compute.perform_together(broken);
    assert!(together[0].is_ok() && together[1].is_err());
}

#[test]
fn a_grammar_binds_its_session_alone() {
    let folder = tempfile::tempdir().unwrap();
    let mut compute = loaded(folder.path(), BlockRange::whole(3));
    let tokenizer = folder.path().join("source/tokenizer.json");
    let constrain = |session, grammar| Task::Constrain {
        stage: 1,
        session,
        tokenizer_file: tokenizer.to_str().unwrap().to_owned(),
        end_tokens: vec![0],
        grammar,
    };
    (1..=2).for_each(|session| open(&mut compute, session, 16));
    let grammar = Grammar::JsonSchema(r#"{"enum": [true]}"#.to_owned());
    compute.perform(constrain(1, grammar.clone()), Vec::new()).unwrap();
    let wrong = compute.perform(constrain(2, Grammar::JsonSchema("{".to_owned())), Vec::new());
    assert!(wrong.is_err());
    assert!(
        compute
            .perform(Task::CloseSession { stage: 1, session: 9 }, Vec::new())
            .is_ok()
    );
    let orders = vec![
        (forward(1, 0, vec![5]), Vec::new()),
        (forward(2, 0, vec![5]), Vec::new()),
    ];
    let answers = compute.perform_together(orders);
    let token = |answer: &Result<(Answer, Vec<u8>), String>| match answer {
        Ok((Answer::Sampled { chosen, .. }, _)) => chosen.token,
        other => panic!("{other:?}"),
    };
    assert_eq!(token(&answers[0]), u32::from(b't'));
    assert_ne!(token(&answers[1]), u32::from(b't'));
}
