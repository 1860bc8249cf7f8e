use alloc::string::ToString;
use alloc::vec;
use alloc::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::codec::{Form, Header, encode};
use crate::hash::{Digest, RunId, digest};
use crate::layout::{Part, TensorLayout};
use crate::rng::Random;

const NESTEROV: OuterStep = OuterStep {
    learning_rate: 0.7,
    momentum: 0.9,
};

/// `nesterov_outer` of the golden training rules: three rounds of three workers with equal weights, in f64.
#[test]
fn the_outer_step_meets_the_golden_values() {
    let theta_0 = [
        -0.146_795_1,
        0.786_141_3,
        0.946_821_6,
        -1.114_344,
        1.690_79,
        -0.894_827_9,
    ];
    let workers = [
        [
            [
                -0.182_357_6,
                0.909_379_9,
                0.960_638_8,
                -1.282_563_8,
                1.722_558,
                -0.881_547_2,
            ],
            [
                -0.133_062_7,
                0.810_195_9,
                1.086_366_7,
                -0.979_641_8,
                1.934_611,
                -0.874_552_1,
            ],
            [
                0.098_259_03,
                0.988_701_5,
                1.124_737_1,
                -1.206_137_1,
                1.645_008_2,
                -0.967_275_2,
            ],
        ],
        [
            [
                0.080_155_37,
                0.841_836_3,
                1.275_185_4,
                -1.230_183_2,
                1.954_152_6,
                -0.719_049_7,
            ],
            [
                -0.090_082_59,
                0.932_924_3,
                0.995_315_5,
                -1.294_833_8,
                1.773_844,
                -0.883_800_8,
            ],
            [
                -0.034_779_02,
                0.974_268_5,
                1.085_956,
                -1.262_140_1,
                1.603_259_5,
                -0.811_505_5,
            ],
        ],
        [
            [
                -0.031_330_42,
                1.064_871_2,
                1.200_447_8,
                -1.255_338_6,
                1.848_340_1,
                -0.864_359_9,
            ],
            [
                -0.129_528_17,
                0.901_779_7,
                1.286_063_1,
                -1.303_166_3,
                1.870_230_4,
                -0.563_246_56,
            ],
            [
                -0.049_662_79,
                0.765_986_3,
                1.372_894,
                -1.371_945,
                1.919_323_5,
                -0.902_741_24,
            ],
        ],
    ];
    let expected = [
        [
            -0.047_832_444,
            0.941_243,
            1.093_688_1,
            -1.169_898_4,
            1.792_671_1,
            -0.912_069_5,
        ],
        [
            0.038_154_28,
            0.974_248_4,
            1.189_723_7,
            -1.316_590_3,
            1.815_375_5,
            -0.776_731_9,
        ],
        [
            -0.049_280_133,
            0.935_359,
            1.388_993_6,
            -1.381_780_3,
            1.930_645_4,
            -0.722_584_5,
        ],
    ];
    let mut theta = theta_0;
    let mut m = [0.0; 6];
    for (workers, expected) in workers.iter().zip(expected) {
        // Without the clip: the golden rule is the outer step alone.
        let g: [f32; 6] = core::array::from_fn(|i| {
            workers
                .iter()
                .fold(0.0, |sum, worker| sum + (theta[i] - worker[i]) / 3.0)
        });
        assert!(outer_step(&mut theta, &mut m, &g, NESTEROV));
        for (theta, expected) in theta.iter().zip(expected) {
            assert!((theta - expected).abs() < 3e-6, "{theta} is not {expected}");
        }
    }
}

#[test]
fn a_voice_ten_times_too_loud_is_clipped_to_the_median() {
    let layout = layout(&[4]);
    let frames = [1.0, 1.0, 10.0].map(|size| [size; 4]);
    let bytes = encode_all(&layout, &frames, Form::Raw);
    let updates = updates(&layout, &bytes, &[5, 5, 5], &[1, 2, 3]);
    let mut state = PartState::initial(vec![0.0; 4]);
    let step = OuterStep {
        learning_rate: 1.0,
        momentum: 0.0,
    };
    let summary = apply(&layout, &updates, step, &mut state).unwrap();
    assert_eq!(summary.clipped, 1);
    assert!(state.parameters.iter().all(|value| (value + 1.0).abs() < 1e-6));
    assert!(
        state.momentum.iter().all(|value| *value == 0.0),
        "a rule without momentum keeps none"
    );
}

#[test]
fn an_institution_that_starts_many_nodes_has_one_voice() {
    let layout = layout(&[2]);
    let bytes = encode_all(&layout, &[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], Form::Raw);
    let shares = |institutions: &[u8; 4]| {
        let updates = updates(&layout, &bytes, &[1; 4], institutions);
        let voices = voices(&updates).unwrap();
        let share = |voice: &Voice<'_>| voice.iter().map(|(share, _)| share).sum();
        voices.iter().map(share).collect::<Vec<f64>>()
    };
    assert_eq!(shares(&[1, 2, 3, 4]), [0.25; 4]);
    // Three of four nodes, and yet no more than what counts double beside another.
    let two = shares(&[1, 1, 1, 2]);
    assert!(
        (two[0] - 2.0 / 3.0).abs() < 1e-12 && (two[1] - 1.0 / 3.0).abs() < 1e-12,
        "{two:?}"
    );
    assert_eq!(shares(&[1; 4]), [1.0]);
}

#[test]
fn shares_follow_weights_up_to_twice_that_of_an_equal() {
    assert_eq!(shares(&[3.0]), [1.0]);
    assert_eq!(shares(&[1.0, 1.0]), [0.5, 0.5]);
    assert_eq!(shares(&[3.0, 2.0]), [0.6, 0.4]);
    // The giants hold their caps, of 2/5 each; the rest is for the others, by their weights.
    let four = shares(&[1e9, 1.0, 1e8, 3.0]);
    for (share, right) in four.iter().zip([0.4, 0.05, 0.4, 0.15]) {
        assert!((share - right).abs() < 1e-12, "{four:?}");
    }
}

#[test]
fn quiet_nodes_of_one_institution_do_not_silence_the_others() {
    let layout = layout(&[4]);
    // A crowd that says next to nothing, and two institutions that trained.
    let frames = [1e-6, 1e-6, 1e-6, 1.0, 1.0].map(|size| [size; 4]);
    let bytes = encode_all(&layout, &frames, Form::Raw);
    let step = OuterStep {
        learning_rate: 1.0,
        momentum: 0.0,
    };
    let moved = |institutions: &[u8; 5]| {
        let updates = updates(&layout, &bytes, &[1; 5], institutions);
        let mut state = PartState::initial(vec![0.0; 4]);
        apply(&layout, &updates, step, &mut state).unwrap();
        -state.parameters[0]
    };
    assert!(moved(&[1, 1, 1, 2, 3]) > 0.5);
    assert!(
        moved(&[1, 2, 3, 4, 5]) < 1e-5,
        "as five institutions they are the majority"
    );
}

#[test]
fn a_step_that_would_be_infinite_is_not_taken() {
    let layout = layout(&[2]);
    let bytes = encode_all(&layout, &[[f32::MAX, f32::MAX]], Form::Raw);
    let updates = updates(&layout, &bytes, &[1], &[1]);
    let mut state = PartState::initial(vec![-f32::MAX, 1.0]);
    let summary = apply(&layout, &updates, NESTEROV, &mut state).unwrap();
    assert_eq!(summary.skipped, 1);
    assert_eq!(state, PartState::initial(vec![-f32::MAX, 1.0]));
}

#[test]
fn a_set_with_a_replica_twice_or_with_nothing_is_refused() {
    let layout = layout(&[1]);
    let bytes = encode_all(&layout, &[[1.0]], Form::Raw);
    let once = updates(&layout, &bytes, &[1], &[1]);
    let twice = [once[0].clone(), once[0].clone()];
    let mut state = PartState::initial(vec![0.0]);
    let mut refused = |updates: &[Update<'_>]| apply(&layout, updates, NESTEROV, &mut state).unwrap_err();
    assert_eq!(refused(&twice), AggregateError::Twice { replica: 0, round: 0 });
    assert_eq!(refused(&[]), AggregateError::Empty);
}

#[test]
fn a_state_survives_its_bytes_and_leaves_out_momentum_that_it_has_not() {
    let layout = layout(&[2]);
    let plain = PartState::initial(vec![1.0, -2.0]);
    let moving = PartState {
        parameters: vec![1.0, -2.0],
        momentum: vec![0.0, 0.5],
    };
    assert_eq!(plain.to_bytes().len(), 8);
    assert_eq!(moving.to_bytes().len(), 16);
    for state in [plain, moving] {
        assert_eq!(PartState::from_bytes(&layout, &state.to_bytes()), Ok(state));
    }
    assert_eq!(
        PartState::from_bytes(&layout, &[0; 12]),
        Err(StateError::Length {
            found_bytes: 12,
            elements: 2
        })
    );
    assert_eq!(
        PartState::from_bytes(&layout, &f32::NAN.to_le_bytes().repeat(2)),
        Err(StateError::NotFinite { element: 0 })
    );
}

#[test]
fn the_bits_of_an_aggregate_never_change() {
    let layout = layout(&[300, 7, 4097]);
    let values: Vec<Vec<f32>> = (0..5).map(|seed| random(seed, 4404)).collect();
    let hashes = [Form::Raw, Form::Int8, Form::E3m0, Form::TopkQ2 { k: 64 }].map(|form| {
        let bytes = encode_all(&layout, &values, form);
        let updates = updates(&layout, &bytes, &[3, 1, 4, 1, 5], &[1, 2, 3, 1, 4]);
        let mut state = PartState::initial(random(9, 4404));
        apply(&layout, &updates, NESTEROV, &mut state).unwrap();
        digest(&state.to_bytes()).short()
    });
    assert_eq!(hashes, ["a249b73e", "4d895102", "7cc8c365", "1c31019f"]);
}

proptest! {
    #[test]
    fn the_order_of_arrival_changes_no_bit(seed: u64, swaps in prop::collection::vec((0usize..6, 0usize..6), 0..8)) {
        let layout = layout(&[50, 3]);
        let values: Vec<Vec<f32>> = (0..6).map(|replica| random(seed ^ replica, 53)).collect();
        let bytes = encode_all(&layout, &values, Form::E3m0);
        let mut updates = updates(&layout, &bytes, &[7, 1, 9, 2, 2, 30], &[1, 2, 3, 2, 4, 2]);
        let mut in_order = PartState::initial(random(seed, 53));
        let mut shuffled = in_order.clone();
        apply(&layout, &updates, NESTEROV, &mut in_order).unwrap();
        for (a, b) in swaps {
            updates.swap(a, b);
        }
        apply(&layout, &updates, NESTEROV, &mut shuffled).unwrap();
        prop_assert_eq!(in_order.to_bytes(), shuffled.to_bytes());
    }

    /// The same rule written over whole vectors, all in memory at once.
    #[test]
    fn another_implementation_of_the_loop_gets_equal_bits(seed: u64, weights in prop::collection::vec(1u64..100, 3)) {
        let layout = layout(&[40]);
        let values: Vec<Vec<f32>> = (0..3).map(|replica| random(seed ^ replica, 40)).collect();
        let bytes = encode_all(&layout, &values, Form::Int8);
        let updates = updates(&layout, &bytes, &weights, &[1, 2, 3]);
        let mut state = PartState::initial(random(seed, 40));
        let plain = state.clone();
        apply(&layout, &updates, NESTEROV, &mut state).unwrap();

        let decoded: Vec<Vec<f32>> = bytes.iter().map(|bytes| crate::codec::decode(bytes, &layout).unwrap().1).collect();
        let norms: Vec<f64> = decoded.iter().map(|x| libm::sqrt(x.iter().map(|v| f64::from(*v) * f64::from(*v)).sum())).collect();
        let mut sorted = norms.clone();
        sorted.sort_by(f64::total_cmp);
        let shares = shares(&weights.iter().map(|w| *w as f64).collect::<Vec<_>>());
        for (i, theta) in plain.parameters.iter().enumerate() {
            let mut g = 0.0f32;
            for r in 0..3 {
                let clip = if norms[r] > sorted[1] { sorted[1] / norms[r] } else { 1.0 };
                g += (shares[r] * clip) as f32 * decoded[r][i];
            }
            let theta = theta - 0.7 * (g + 0.9 * g);
            prop_assert_eq!(theta.to_bits(), state.parameters[i].to_bits());
            prop_assert_eq!(g.to_bits(), state.momentum[i].to_bits());
        }
    }
}

fn layout(lengths: &[u32]) -> PartLayout {
    let tensor = |length: &u32| TensorLayout {
        name: "t".to_string(),
        shape: vec![*length],
    };
    PartLayout {
        tensors: lengths.iter().map(tensor).collect(),
    }
}

fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut random = Random::from_seed(seed);
    (0..count).map(|_| random.unit_f32() - 0.5).collect()
}

fn encode_all<V: AsRef<[f32]>>(layout: &PartLayout, values: &[V], form: Form) -> Vec<Vec<u8>> {
    let header = |replica| Header {
        run: RunId([1; 32]),
        round: 0,
        replica,
        base: Digest([0; 32]),
        part: Part(0),
        form,
        tokens: 1,
    };
    let numbered = (0..).zip(values);
    numbered
        .map(|(replica, values)| encode(&header(replica), layout, values.as_ref()).unwrap())
        .collect()
}

fn updates<'a>(layout: &PartLayout, bytes: &'a [Vec<u8>], weights: &[u64], institutions: &[u8]) -> Vec<Update<'a>> {
    let of = |((bytes, weight), institution): ((&'a Vec<u8>, &u64), &u8)| Update {
        frame: Frame::parse(bytes, layout).unwrap(),
        weight: *weight,
        institution: InstitutionId([*institution; 32]),
    };
    bytes.iter().zip(weights).zip(institutions).map(of).collect()
}
