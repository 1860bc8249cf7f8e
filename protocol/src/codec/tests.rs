use alloc::string::ToString;
use alloc::vec;
use alloc::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::hash::{Digest, RunId, digest};
use crate::layout::{Part, TensorLayout};
use crate::rng::Random;

#[test]
fn wire_sizes_are_exactly_as_computed() {
    let body = |shape: &[u32], form| frame_bytes(&layout(&[shape]), form).map(|len| len - HEADER_BYTES);
    let million = &[1024, 1024];
    assert_eq!(body(million, Form::Raw), Some(4 << 20));
    assert_eq!(body(million, Form::Int8), Some((1 << 20) + 4 * 4096));
    assert_eq!(body(million, Form::E3m0), Some((1 << 19) + 4));
    // 112 bytes per 4,096 parameters, and one codebook.
    assert_eq!(body(million, Form::TopkQ2 { k: 64 }), Some(256 * 112 + 16));
    // Odd lengths round up.
    assert_eq!(body(&[3], Form::E3m0), Some(4 + 2));
    assert_eq!(body(&[257], Form::Int8), Some(257 + 8));
    assert_eq!(body(&[4097], Form::TopkQ2 { k: 3 }), Some(2 * (5 + 1) + 16));
}

#[test]
fn frames_have_golden_bytes() {
    let layout = layout(&[&[2, 3], &[3]]);
    let values = [0.0, 1.0, -2.0, 0.5, 4.0, -0.01, 3.0, -3.0, 0.25];
    let golden = [
        (Form::Raw, "190a4dc2"),
        (Form::Int8, "ba0dbdf0"),
        (Form::E3m0, "c165a797"),
        (Form::TopkQ2 { k: 2 }, "eee26479"),
    ];
    let found = golden.map(|(form, _)| {
        let bytes = encode(&header(form), &layout, &values).unwrap();
        (form, digest(&bytes).short())
    });
    assert_eq!(found, golden.map(|(form, hash)| (form, hash.to_string())));
    let bytes = encode(&header(Form::E3m0), &layout, &values).unwrap();
    // Scale 4: 0, 1/4, -1/2, 1/8, 1, ~0. Scale 3: 1, -1, 1/12 which is nearest to 1/16.
    assert_eq!(
        bytes[HEADER_BYTES..],
        [0, 0, 128, 64, 0x50, 0x4e, 0x07, 0, 0, 64, 64, 0xf7, 0x03]
    );
}

#[test]
fn a_tensor_shorter_than_k_is_sent_whole() {
    let layout = layout(&[&[5]]);
    let bytes = encode(&header(Form::TopkQ2 { k: 64 }), &layout, &[2.0, -2.0, 2.0, -2.0, 2.0]).unwrap();
    assert_eq!(decode(&bytes, &layout).unwrap().1, [2.0, -2.0, 2.0, -2.0, 2.0]);
}

#[test]
fn values_that_are_not_finite_are_not_written() {
    let layout = layout(&[&[2], &[1]]);
    let error = encode(&header(Form::E3m0), &layout, &[0.0, 1.0, f32::NAN]);
    assert_eq!(error, Err(EncodeError::NotFinite { tensor: 1 }));
}

#[test]
fn lies_are_named() {
    let layout = layout(&[&[4096]]);
    let good = encode(&header(Form::TopkQ2 { k: 4 }), &layout, &[1.0; 4096]).unwrap();
    let with = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        decode(&bytes, &layout).map(|_| ())
    };
    assert_eq!(with(0, 0), Err(DecodeError::Magic));
    assert_eq!(with(4, 9), Err(DecodeError::Version { theirs: 9, ours: 1 }));
    assert_eq!(with(6, 9), Err(DecodeError::Form { tag: 9, parameter: 4 }));
    assert_eq!(with(101, 7), Err(DecodeError::TensorCount { found: 7, expected: 1 }));
    assert_eq!(with(HEADER_BYTES + 3, 0x7f).and(with(HEADER_BYTES + 2, 0)), Ok(()));
    // The first index becomes larger than the second.
    let first_index = HEADER_BYTES + 16;
    assert_eq!(with(first_index, 9), Err(DecodeError::Indices { tensor: 0, chunk: 0 }));
    let expected = good.len();
    assert_eq!(
        decode(&good[..expected - 1], &layout).map(|_| ()),
        Err(DecodeError::Length {
            found: expected - 1,
            expected
        })
    );
    let mut infinite = good.clone();
    infinite[HEADER_BYTES..HEADER_BYTES + 4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    assert_eq!(
        decode(&infinite, &layout).map(|_| ()),
        Err(DecodeError::NotFinite { tensor: 0 })
    );
}

#[test]
fn error_feedback_sends_in_the_end_what_it_left_out() {
    let layout = layout(&[&[4096]]);
    let header = header(Form::TopkQ2 { k: 64 });
    let delta = random(7, 4096);
    let mut feedback = ErrorFeedback::new(1.0, 4096);
    let mut received = vec![0.0; 4096];
    let rounds = 400;
    for round in 0..rounds {
        let frame = feedback.encode(&header, &layout, &delta).unwrap();
        let (_, values) = decode(&frame, &layout).unwrap();
        received.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        if round == 0 {
            let error = feedback.error().to_vec();
            feedback.restore(&layout, &frame).unwrap();
            assert_eq!(feedback.error(), delta);
            feedback = ErrorFeedback::from_saved(1.0, 4096, error).unwrap();
        }
    }
    let wanted: Vec<f32> = delta.iter().map(|value| value * rounds as f32).collect();
    let difference: f32 = wanted.iter().zip(&received).map(|(a, b)| (a - b) * (a - b)).sum();
    let size: f32 = wanted.iter().map(|a| a * a).sum();
    assert!(difference < size * 0.05, "{difference} of {size} is still owed");
}

proptest! {
    #[test]
    fn decoding_gives_back_values_within_each_forms_bound(seed: u64, elements in 1usize..9000, exponent in -30i32..30) {
        let layout = layout(&[&[elements as u32], &[1]]);
        let scale = (0..exponent.abs()).fold(1.0f32, |s, _| if exponent < 0 { s / 2.0 } else { s * 2.0 });
        let mut values: Vec<f32> = random(seed, elements).iter().map(|value| value * scale).collect();
        values.push(scale);
        let max = values[..elements].iter().fold(0.0f32, |max, value| max.max(value.abs()));
        for form in [Form::Raw, Form::Int8, Form::E3m0, Form::TopkQ2 { k: 64 }] {
            let bytes = encode(&header(form), &layout, &values).unwrap();
            prop_assert_eq!(bytes.len(), frame_bytes(&layout, form).unwrap());
            let (read, decoded) = decode(&bytes, &layout).unwrap();
            prop_assert_eq!(read, header(form));
            for (value, decoded) in values[..elements].iter().zip(&decoded) {
                let bound = match form {
                    Form::Raw => 0.0,
                    Form::Int8 => max / 127.0 * 0.501,
                    // Nearest of neighbours a factor 2 apart: a third of the value, or half the smallest step.
                    Form::E3m0 => (value.abs() * 0.3334).max(max / 128.0),
                    Form::TopkQ2 { .. } => max * 1.001,
                };
                prop_assert!((value - decoded).abs() <= bound, "{form:?}: {value} became {decoded}");
            }
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = decode(&bytes, &layout(&[&[300], &[7]]));
    }

    #[test]
    fn a_frame_with_a_flipped_byte_never_panics_and_never_yields_what_is_not_finite(
        tag in 0usize..4, at: prop::sample::Index, byte: u8, seed: u64,
    ) {
        let layout = layout(&[&[300], &[4100]]);
        let form = [Form::Raw, Form::Int8, Form::E3m0, Form::TopkQ2 { k: 5 }][tag];
        let mut bytes = encode(&header(form), &layout, &random(seed, 4400)).unwrap();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok((_, values)) = decode(&bytes, &layout) {
            prop_assert!(values.iter().all(|value| value.is_finite()));
        }
    }
}

fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut random = Random::from_seed(seed);
    (0..count)
        .map(|_| random.unit_f32() + random.unit_f32() - 1.0)
        .collect()
}

fn layout(shapes: &[&[u32]]) -> PartLayout {
    let tensor = |shape: &&[u32]| TensorLayout {
        name: "t".to_string(),
        shape: shape.to_vec(),
    };
    PartLayout {
        tensors: shapes.iter().map(tensor).collect(),
    }
}

fn header(form: Form) -> Header {
    Header {
        run: RunId([1; 32]),
        round: 2,
        replica: 3,
        base: Digest([4; 32]),
        part: Part(5),
        form,
        tokens: 6,
    }
}
