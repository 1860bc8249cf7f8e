//! Our own kernels for graphics devices, against the loops of `polder-reference` and against the CPU's twins.
//!
//! They need the feature `gpu` and a device; a software rasteriser such as lavapipe will do. Without one they say so, and
//! fail where `POLDER_GPU_REQUIRED` is set.
#![cfg(feature = "gpu")]

use std::sync::{Mutex, OnceLock, PoisonError};

use polder_kernels::device::cube::{AdamWStep, AttentionShape, Cost, Cubes, PagedRows, SequenceAttention, SquareSums};
use polder_kernels::device::{Choice, Device};
use polder_kernels::quant::{PackedMatrix, PackedType, narrow};
use polder_protocol::codec::{ErrorFeedback, Form, HEADER_BYTES, Header};
use polder_protocol::hash::{Digest, RunId};
use polder_protocol::layout::{Part, PartLayout, TensorLayout};
use polder_reference::{AdamW, Rope, adamw, attention, frequencies, matmul, rms_norm, rotate, swiglu};

#[test]
fn a_sum_is_normalised_as_by_the_reference() {
    with_kernels(|cubes| {
        for (rows, cols) in [(1, 1), (1, 576), (3, 63), (7, 65), (2, 1_000), (70_000, 2)] {
            let (x, added, gain) = (numbers(rows * cols, 1), numbers(rows * cols, 2), numbers(cols, 3));
            for adds in [false, true] {
                let on_device = cubes.upload(&x);
                let other = cubes.upload(&added);
                let normed = cubes
                    .add_and_normalise(&on_device, adds.then_some(&other), &cubes.upload(&gain), 1e-5)
                    .unwrap();
                let sum: Vec<f32> = match adds {
                    true => x.iter().zip(&added).map(|(x, added)| x + added).collect(),
                    false => x.clone(),
                };
                let mut right = vec![0.0; rows * cols];
                rms_norm(&mut right, &sum, &gain, 1e-5);
                assert_eq!(cubes.read(&on_device).unwrap(), sum);
                near(&cubes.read(&normed).unwrap(), &right, 1e-5, &format!("{rows} x {cols}"));
                told("add and normalise", Cost::add_and_normalise(rows, cols, adds));
            }
        }
        let three = cubes.upload(&[1.0; 3]);
        assert!(
            cubes
                .add_and_normalise(&three, None, &cubes.upload(&[1.0; 2]), 1e-5)
                .is_err()
        );
        assert!(
            cubes
                .add_and_normalise(&three, Some(&cubes.upload(&[1.0])), &three, 1e-5)
                .is_err()
        );
    });
}

#[test]
fn heads_are_rotated_as_by_the_reference() {
    with_kernels(|cubes| {
        for (n, heads, head_dim) in [(1, 1, 2), (5, 3, 6), (9, 9, 64), (65, 2, 128)] {
            let x = numbers(n * heads * head_dim, 4);
            let frequencies = frequencies(Rope::Default, 1e4, head_dim);
            let mut right = x.clone();
            let (mut cosines, mut sines) = (Vec::new(), Vec::new());
            for (position, heads) in right.chunks_exact_mut(heads * head_dim).enumerate() {
                for head in heads.chunks_exact_mut(head_dim) {
                    rotate(head, position, &frequencies);
                }
                let angles = frequencies.radians.iter().map(|radians| position as f32 * radians);
                cosines.extend(angles.clone().map(f32::cos));
                sines.extend(angles.map(f32::sin));
            }
            let on_device = cubes.upload(&x);
            let (cosines, sines) = (cubes.upload(&cosines), cubes.upload(&sines));
            cubes.rotate(&on_device, &cosines, &sines, heads, head_dim).unwrap();
            near(
                &cubes.read(&on_device).unwrap(),
                &right,
                1e-5,
                &format!("{n} x {heads} x {head_dim}"),
            );
            told("rotate", Cost::rotate(n, heads, head_dim));
            assert!(cubes.rotate(&on_device, &cosines, &sines, heads + 1, head_dim).is_err());
        }
    });
}

#[test]
fn gates_are_those_of_the_reference() {
    with_kernels(|cubes| {
        for count in [1, 63, 64, 65, 1_536, 70_001] {
            let (gate, up) = (numbers(count, 5), numbers(count, 6));
            let out = cubes.gate(&cubes.upload(&gate), &cubes.upload(&up)).unwrap();
            let mut right = vec![0.0; count];
            swiglu(&mut right, &gate, &up);
            near(&cubes.read(&out).unwrap(), &right, 1e-6, &count.to_string());
            told("gate", Cost::gate(count));
        }
        assert!(cubes.gate(&cubes.upload(&[1.0]), &cubes.upload(&[1.0; 2])).is_err());
    });
}

#[test]
fn optimiser_steps_are_those_of_the_reference() {
    with_kernels(|cubes| {
        for count in [1, 65, 4_097] {
            let set = AdamW {
                learning_rate: 0.01,
                beta_1: 0.9,
                beta_2: 0.95,
                epsilon: 1e-8,
                weight_decay: 0.1,
            };
            let (mut p, mut m, mut v) = (numbers(count, 7), vec![0.0; count], vec![0.0; count]);
            let [on_p, on_m, on_v] = [&p, &m, &v].map(|values| cubes.upload(values));
            for step in 1..=3 {
                let gradient = numbers(count, 8 + step);
                let scaled: Vec<f32> = gradient.iter().map(|g| g * 0.5).collect();
                adamw(&set, step.into(), &mut p, &scaled, &mut m, &mut v);
                let step = AdamWStep {
                    learning_rate: set.learning_rate,
                    beta_1: set.beta_1,
                    beta_2: set.beta_2,
                    epsilon: set.epsilon,
                    weight_decay: set.weight_decay,
                    gradient_scale: 0.5,
                    step,
                };
                cubes
                    .adamw(&on_p, &cubes.upload(&gradient), &on_m, &on_v, step)
                    .unwrap();
            }
            for (on_device, right) in [(&on_p, &p), (&on_m, &m), (&on_v, &v)] {
                near(&cubes.read(on_device).unwrap(), right, 1e-5, &count.to_string());
            }
            told("adamw", Cost::adamw(count));
        }
    });
}

#[test]
fn sums_of_squares_have_the_same_bits_each_time() {
    with_kernels(|cubes| {
        let lengths = [1, 65, 4_096, 4_097, 100_001];
        let vectors = lengths.map(|count| numbers(count, 9));
        let run = || {
            let on_device = [0, 1, 2, 3, 4].map(|i: usize| cubes.upload(&vectors[i]));
            let mut sums = SquareSums::new(cubes, SquareSums::room(lengths.into_iter()));
            for values in &on_device {
                sums.add(values, 0.5).unwrap();
            }
            assert!(sums.add(&on_device[0], 1.0).is_err(), "no room is left");
            for (values, own) in vectors.iter().zip(&on_device) {
                let halves: Vec<f32> = values.iter().map(|value| value * 0.5).collect();
                assert_eq!(cubes.read(own).unwrap(), halves);
            }
            sums.read().unwrap()
        };
        let sums = run();
        assert_eq!(sums, run());
        let sum: f64 = sums.into_iter().map(f64::from).sum();
        let right = vectors.iter().flatten();
        let right: f64 = right.map(|value| (f64::from(*value) * 0.5).powi(2)).sum();
        assert!((sum / right - 1.0).abs() < 1e-6, "{sum} {right}");
        told("sum squares", Cost::square_sums(100_001));
    });
}

#[test]
fn attention_over_sequences_and_its_gradients_are_those_of_plain_sums() {
    with_kernels(|cubes| {
        // Sequences, positions, heads, key-value heads, width, width of values, window.
        for (batch, seq, heads, kv_heads, width, value, window) in [
            (1, 1, 1, 1, 1, 1, None),
            (2, 5, 3, 1, 6, 6, None),
            (1, 33, 4, 2, 64, 64, None),
            (1, 40, 6, 2, 80, 48, Some(7)),
            (2, 17, 2, 2, 65, 130, Some(16)),
            (1, 70, 4, 1, 16, 16, Some(33)),
            (1, 20, 2, 1, 192, 128, None),
            (1, 50, 1, 1, 256, 256, Some(1)),
        ] {
            let shape = SequenceAttention {
                batch,
                seq,
                heads,
                kv_heads,
                width,
                value,
                window,
                scale: 0.3,
            };
            let rows = batch * seq;
            let q = numbers(rows * heads * width, 60);
            let k = numbers(rows * kv_heads * width, 61);
            let v = numbers(rows * kv_heads * value, 62);
            let d_out = numbers(rows * heads * value, 63);
            let right = attend_plainly(&shape, [&q, &k, &v], &d_out);
            let [on_q, on_k, on_v, on_d] = [&q, &k, &v, &d_out].map(|values| cubes.upload(values));
            if !cubes.attends_sequences(width, value) {
                println!("skipped: heads of {width} and {value} do not fit the device's shared memory");
                assert!(cubes.attend_sequences(&shape, &on_q, &on_k, &on_v).is_err());
                continue;
            }
            let run = || {
                let attended = cubes.attend_sequences(&shape, &on_q, &on_k, &on_v).unwrap();
                let gradients = cubes
                    .attend_sequences_backward(&shape, (&on_q, &on_k, &on_v), &attended, &on_d)
                    .unwrap();
                let [d_q, d_k, d_v] = gradients;
                [&attended.out, &d_q, &d_k, &d_v].map(|values| cubes.read(values).unwrap())
            };
            let found = run();
            for (found, (right, what)) in found.iter().zip(right.iter().zip(["out", "d_q", "d_k", "d_v"])) {
                near(found, right, 1e-5, &format!("{what} of {shape:?}"));
            }
            assert!(found == run(), "other bits the second time: {shape:?}");
            told("attend sequences", Cost::attend_sequences(&shape));
            told("attend sequences backward", Cost::attend_sequences_backward(&shape));
            let other = SequenceAttention { seq: seq + 1, ..shape };
            assert!(cubes.attend_sequences(&other, &on_q, &on_k, &on_v).is_err());
        }
        assert!(!cubes.attends_sequences(0, 1) && !cubes.attends_sequences(1 << 20, 1));
    });
}

#[test]
fn attention_is_that_of_the_reference() {
    with_kernels(|cubes| {
        // Positions before the queries, queries, heads, key-value heads, width of a head.
        for (position, queries, heads, kv_heads, head_dim) in [
            (0, 1, 1, 1, 1),
            (0, 5, 3, 1, 6),
            (63, 1, 9, 3, 64),
            (64, 2, 4, 4, 65),
            (130, 3, 6, 2, 80),
            (7, 70, 2, 1, 16),
        ] {
            let (all, width) = (position + queries, kv_heads * head_dim);
            let q = numbers(queries * heads * head_dim, 20);
            let (k, v) = (numbers(all * width, 21), numbers(all * width, 22));
            let mut right = vec![0.0; q.len()];
            attention(&mut right, &q, &k, &v, heads, kv_heads, head_dim);
            let shape = AttentionShape {
                heads,
                kv_heads,
                head_dim,
            };
            // Pages of five positions in an order of their own, among others that must not be read.
            const PAGE: usize = 5;
            let pages: Vec<u32> = (0..all.div_ceil(PAGE) as u32).rev().map(|page| 2 * page + 1).collect();
            let room = 2 * pages.len() * PAGE * width;
            let span = |position, rows| PagedRows {
                pages: &pages,
                position,
                rows,
            };
            let before = cubes.place(PAGE, &[span(0, position)]).unwrap();
            let places = cubes.place(PAGE, &[span(position, queries)]).unwrap();
            let caches = [&k, &v].map(|rows| {
                let cache = cubes.upload(&vec![f32::NAN; room]);
                let (held, new) = rows.split_at(position * width);
                cubes.append(&cubes.upload(held), &cache, &before, width).unwrap();
                cubes.append(&cubes.upload(new), &cache, &places, width).unwrap();
                let short = cubes.part(&cache, 0, room - PAGE * width).unwrap();
                assert!(cubes.append(&cubes.upload(new), &short, &places, width).is_err());
                cache
            });
            let on_device = cubes.upload(&q);
            let out = cubes
                .attend(shape, &on_device, &caches[0], &caches[1], &places)
                .unwrap();
            near(
                &cubes.read(&out).unwrap(),
                &right,
                1e-5,
                &format!("{position} {shape:?}"),
            );
            told("attend", Cost::attend(shape, queries, position));
            let more = cubes.place(PAGE, &[span(0, all)]).unwrap();
            if position > 0 {
                assert!(cubes.attend(shape, &on_device, &caches[0], &caches[1], &more).is_err());
            }
            assert!(cubes.place(PAGE, &[span(all, PAGE)]).is_err());
            let wrong = AttentionShape {
                kv_heads: heads + 1,
                ..shape
            };
            assert!(
                cubes
                    .attend(wrong, &on_device, &caches[0], &caches[1], &places)
                    .is_err()
            );
        }
    });
}

#[test]
fn rows_of_several_sessions_see_their_own_pages_alone() {
    with_kernels(|cubes| {
        const PAGE: usize = 4;
        let shape = AttentionShape {
            heads: 4,
            kv_heads: 2,
            head_dim: 10,
        };
        let width = shape.kv_heads * shape.head_dim;
        // Positions before, and rows of each; the third shares the first page of the second.
        let sessions: [(&[u32], usize, usize); 3] = [(&[6, 0, 3], 7, 3), (&[2, 5], 4, 1), (&[2, 1], 5, 3)];
        let keys: Vec<Vec<f32>> = (0..3).map(|session| numbers(12 * width, 30 + session)).collect();
        let values: Vec<Vec<f32>> = (0..3).map(|session| numbers(12 * width, 40 + session)).collect();
        let shared = |all: &[Vec<f32>]| {
            let mut third = all[2].clone();
            third[..PAGE * width].copy_from_slice(&all[1][..PAGE * width]);
            [all[0].clone(), all[1].clone(), third]
        };
        let (keys, values) = (shared(&keys), shared(&values));
        let cache = |all: &[Vec<f32>; 3]| {
            let cache = cubes.upload(&vec![f32::NAN; 7 * PAGE * width]);
            for ((pages, position, rows), numbers) in sessions.iter().zip(all) {
                let end = position + rows;
                let places = [PagedRows {
                    pages,
                    position: 0,
                    rows: end,
                }];
                let places = cubes.place(PAGE, &places).unwrap();
                let new = cubes.upload(&numbers[..end * width]);
                cubes.append(&new, &cache, &places, width).unwrap();
            }
            cache
        };
        let (on_keys, on_values) = (cache(&keys), cache(&values));
        let places = sessions.map(|(pages, position, rows)| PagedRows { pages, position, rows });
        let places = cubes.place(PAGE, &places).unwrap();
        let q = numbers(7 * shape.heads * shape.head_dim, 50);
        let out = cubes
            .attend(shape, &cubes.upload(&q), &on_keys, &on_values, &places)
            .unwrap();
        let mut right = vec![0.0; q.len()];
        let mut first = 0;
        for ((_, position, rows), (keys, values)) in sessions.iter().zip(keys.iter().zip(&values)) {
            let own = first * shape.heads * shape.head_dim..(first + rows) * shape.heads * shape.head_dim;
            first += rows;
            let seen = (position + rows) * width;
            attention(
                &mut right[own.clone()],
                &q[own],
                &keys[..seen],
                &values[..seen],
                shape.heads,
                shape.kv_heads,
                shape.head_dim,
            );
        }
        near(&cubes.read(&out).unwrap(), &right, 1e-5, "three sessions");
        let moved = Cost::append(7, width);
        assert_eq!(
            (moved.read, moved.written),
            (4 * 7 * width as u64 + 28, 4 * 7 * width as u64)
        );
    });
}

#[test]
fn packed_products_are_those_of_the_widened_weights() {
    with_kernels(|cubes| {
        for ty in PackedType::ALL {
            for (rows, blocks, n) in [(1, 1, 1), (5, 3, 1), (130, 18, 1), (3, 2, 7), (9, 3, 17)] {
                let cols = blocks * ty.block_elements();
                let weight = numbers(rows * cols, 30);
                let Ok(bytes) = narrow(ty, &weight) else {
                    println!("skipped: nothing packs {ty}");
                    continue;
                };
                let matrix = PackedMatrix::new(ty, rows, cols, bytes.into()).unwrap();
                let on_device = match cubes.upload_packed(&matrix) {
                    Ok(on_device) => on_device,
                    Err(error) => {
                        assert!(ty.is_float() || ty == PackedType::Q2K, "{error}");
                        continue;
                    }
                };
                let x = numbers(n * cols, 31);
                let mut right = vec![0.0; n * rows];
                matmul(&mut right, &x, &matrix.widen(), cols);
                let out = cubes.multiply(&cubes.upload(&x), &on_device).unwrap();
                near(
                    &cubes.read(&out).unwrap(),
                    &right,
                    2e-5,
                    &format!("{ty} {rows} x {cols} x {n}"),
                );
                told("multiply", Cost::multiply(&on_device, n));
                if n == 17 {
                    println!(
                        "{ty}: {:.2} bits an element on the device",
                        8.0 * on_device.bytes() as f64 / (rows * cols) as f64
                    );
                }
                assert!(cubes.multiply(&cubes.upload(&x[1..]), &on_device).is_err());
            }
        }
    });
}

#[test]
fn bytes_and_scales_are_within_a_rounding_of_the_exact_ones() {
    with_kernels(|cubes| {
        for count in [1, 3, 255, 256, 257, 4_099] {
            let mut x = numbers(count, 40);
            x[count / 2] *= 1e-6;
            let quantised = cubes.quantise(&cubes.upload(&x)).unwrap();
            let bytes: Vec<i8> = cubes
                .read(&quantised.bytes)
                .unwrap()
                .iter()
                .flat_map(|word| word.to_le_bytes().map(|byte| byte as i8))
                .collect();
            let scales = cubes.read(&quantised.scales).unwrap();
            let back = cubes.read(&cubes.dequantise(&quantised)).unwrap();
            for (block, values) in x.chunks(256).enumerate() {
                let right = values.iter().fold(0.0f32, |max, value| max.max(value.abs())) / 127.0;
                assert!((scales[block] - right).abs() <= right * 3e-7, "{count}");
                for (i, value) in values.iter().enumerate() {
                    let at = block * 256 + i;
                    let exact = value / right;
                    // The codec's byte, or its neighbour where the quotient is within a rounding of a half.
                    let error = (f32::from(bytes[at]) - exact).abs();
                    assert!(error <= 0.5 + 1e-4, "{count}, {at}: {} for {exact}", bytes[at]);
                    assert!((back[at] - f32::from(bytes[at]) * scales[block]).abs() < 1e-6);
                }
            }
            assert!(bytes[count..].iter().all(|byte| *byte == 0), "padding");
            told("quantise", Cost::quantise(count));
            told("dequantise", Cost::dequantise(count));
        }
        let zeros = cubes.quantise(&cubes.upload(&[0.0; 300])).unwrap();
        assert_eq!(cubes.read(&cubes.dequantise(&zeros)).unwrap(), [0.0; 300]);
    });
}

#[test]
fn sparse_frames_and_what_is_owed_are_those_of_the_codec() {
    with_kernels(|cubes| {
        for count in [1, 63, 65, 4_095, 4_096, 4_097, 20_000] {
            let mut values = numbers(count, 50);
            if count > 4_000 {
                // Ties: of the same magnitude the first is kept.
                values[100..300].fill(1.75);
                values[300..400].fill(-1.75);
            }
            let layout = PartLayout {
                tensors: vec![TensorLayout {
                    name: "w".to_owned(),
                    shape: vec![count as u32],
                }],
            };
            let header = Header {
                run: RunId([1; 32]),
                round: 0,
                replica: 0,
                base: Digest([2; 32]),
                part: Part(0),
                form: Form::TopkQ2 { k: 64 },
                tokens: 1,
            };
            let mut feedback = ErrorFeedback::new(0.0, count);
            let frame = feedback.encode(&header, &layout, &values).unwrap();
            let on_device = cubes.upload(&values);
            let body = cubes.encode_sparsely(&on_device).unwrap();
            assert!(body == frame[HEADER_BYTES..], "{count}");
            let owed = cubes.read(&on_device).unwrap();
            assert!(owed == feedback.error(), "{count}");
            told("encode sparsely", Cost::encode_sparsely(count));
        }
    });
}

/// One device is computed on at a time: a driver that compiles for several threads is only slower.
static TURN: Mutex<()> = Mutex::new(());

fn with_kernels(test: impl Fn(&Cubes)) {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let device = DEVICE.get_or_init(|| {
        let (device, reason) = Device::choose(Choice::Wgpu);
        match reason {
            Some(reason) if std::env::var_os("POLDER_GPU_REQUIRED").is_some() => panic!("{reason}"),
            Some(reason) => println!("skipped: {reason}"),
            None => println!("device: {device}"),
        }
        device
    });
    match Cubes::of(device) {
        Ok(cubes) => test(&cubes),
        Err(error) => println!("skipped: {error}"),
    }
}

/// Numbers from -2 to 2, the same in every run.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as f32 / (1u32 << 22) as f32 - 2.0
    };
    (0..count).map(|_| next()).collect()
}

/// Output and gradients of queries, keys and values, in f64.
fn attend_plainly(shape: &SequenceAttention, [q, k, v]: [&[f32]; 3], d_out: &[f32]) -> [Vec<f32>; 4] {
    let SequenceAttention {
        batch,
        seq,
        heads,
        kv_heads,
        width,
        value,
        ..
    } = *shape;
    let scale = f64::from(shape.scale);
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let mut out = vec![0.0f64; d_out.len()];
    let (mut d_q, mut d_k, mut d_v) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    for (sequence, head, query) in
        (0..batch).flat_map(|b| (0..heads).flat_map(move |h| (0..seq).map(move |s| (b, h, s))))
    {
        let kv = head / (heads / kv_heads);
        let row = (sequence * seq + query) * heads + head;
        let own = &q[row * width..][..width];
        let d_own = &d_out[row * value..][..value];
        let first = shape.window.map_or(0, |window| (query + 1).saturating_sub(window));
        let place = |key: usize| (sequence * seq + key) * kv_heads + kv;
        let scores: Vec<f64> = (first..=query)
            .map(|key| dot(own, &k[place(key) * width..][..width]) * scale)
            .collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
        let shares: Vec<f64> = scores.iter().map(|score| (score - largest).exp() / total).collect();
        let slants: Vec<f64> = (first..=query)
            .map(|key| dot(d_own, &v[place(key) * value..][..value]))
            .collect();
        let delta: f64 = shares.iter().zip(&slants).map(|(share, slant)| share * slant).sum();
        for (key, (share, slant)) in (first..).zip(shares.iter().zip(&slants)) {
            let slope = share * (slant - delta) * scale;
            for (i, own) in own.iter().enumerate() {
                d_q[row * width + i] += slope * f64::from(k[place(key) * width + i]);
                d_k[place(key) * width + i] += slope * f64::from(*own);
            }
            for (i, d_own) in d_own.iter().enumerate() {
                out[row * value + i] += share * f64::from(v[place(key) * value + i]);
                d_v[place(key) * value + i] += share * f64::from(*d_own);
            }
        }
    }
    [out, d_q, d_k, d_v].map(|values| values.into_iter().map(|value| value as f32).collect())
}

fn near(found: &[f32], right: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), right.len(), "{what}");
    let scale = right.iter().fold(1.0f32, |scale, value| scale.max(value.abs()));
    for (i, (found, right)) in found.iter().zip(right).enumerate() {
        assert!(
            (found - right).abs() <= tolerance * scale,
            "{what}, element {i}: {found} {right}"
        );
    }
}

fn told(what: &str, cost: Cost) {
    assert!(cost.read > 0 && cost.written > 0 && cost.operations > 0);
    println!(
        "{what}: {} bytes read, {} written, {} operations",
        cost.read, cost.written, cost.operations
    );
}
