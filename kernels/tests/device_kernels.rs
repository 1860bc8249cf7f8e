//! Our own kernels for graphics devices, against the loops of `polder-reference` and against the CPU's twins.
//!
//! They need the feature `gpu` and a device; a software rasteriser such as lavapipe will do. Without one they say so, and
//! fail where `POLDER_GPU_REQUIRED` is set.
#![cfg(feature = "gpu")]

mod device_case;

use device_case::{near, numbers, told, with_kernels};
use polder_kernels::device::cube::{AdamWStep, Cost, Cubes, NormOnDevice, SquareSums};
use polder_kernels::model::Curve;
use polder_kernels::quant::{PackedMatrix, PackedType, narrow};
use polder_protocol::codec::{ErrorFeedback, Form, HEADER_BYTES, Header};
use polder_protocol::hash::{Digest, RunId};
use polder_protocol::layout::{Part, PartLayout, TensorLayout};
use polder_reference::{AdamW, adamw, matmul, rms_norm, swiglu};

#[test]
fn a_sum_is_normalised_as_by_the_reference() {
    with_kernels(|cubes| {
        for (rows, cols) in [(1, 1), (1, 576), (3, 63), (7, 65), (2, 1_000), (70_000, 2)] {
            let (x, added, gain) = (numbers(rows * cols, 1), numbers(rows * cols, 2), numbers(cols, 3));
            for adds in [false, true] {
                let on_device = cubes.upload(&x);
                let other = cubes.upload(&added);
                let norm = rms(cubes, &gain);
                let normed = cubes
                    .add_and_normalise(&on_device, adds.then_some(&other), &norm)
                    .unwrap();
                let sum: Vec<f32> = match adds {
                    true => x.iter().zip(&added).map(|(x, added)| x + added).collect(),
                    false => x.clone(),
                };
                let mut right = vec![0.0; rows * cols];
                rms_norm(&mut right, &sum, &gain, 1e-5);
                assert_eq!(cubes.read(&on_device).unwrap(), sum);
                near(&cubes.read(&normed).unwrap(), &right, 1e-5, &format!("{rows} x {cols}"));
                told("add and normalise", Cost::add_and_normalise(&norm, rows, adds));
            }
            // With the mean taken away.
            let bias = numbers(cols, 9);
            let norm = NormOnDevice {
                bias: Some(cubes.upload(&bias)),
                ..rms(cubes, &gain)
            };
            let normed = cubes.add_and_normalise(&cubes.upload(&x), None, &norm).unwrap();
            let mut right = Vec::new();
            for x in x.chunks_exact(cols) {
                let mean = x.iter().sum::<f32>() / cols as f32;
                let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / cols as f32;
                let scale = 1.0 / (variance + 1e-5).sqrt();
                let channels = x.iter().zip(&gain).zip(&bias);
                right.extend(channels.map(|((x, gain), bias)| (x - mean) * scale * gain + bias));
            }
            // Of two equal numbers rounding alone is left, which the epsilon makes large.
            let tolerance = if cols == 2 { 1e-3 } else { 1e-5 };
            near(
                &cubes.read(&normed).unwrap(),
                &right,
                tolerance,
                &format!("{rows} x {cols}, centred"),
            );
            told("centre and normalise", Cost::add_and_normalise(&norm, rows, false));
        }
        let three = cubes.upload(&[1.0; 3]);
        assert!(cubes.add_and_normalise(&three, None, &rms(cubes, &[1.0; 2])).is_err());
        let one = cubes.upload(&[1.0]);
        assert!(
            cubes
                .add_and_normalise(&three, Some(&one), &rms(cubes, &[1.0; 3]))
                .is_err()
        );
        let short = NormOnDevice {
            bias: Some(one),
            ..rms(cubes, &[1.0; 3])
        };
        assert!(cubes.add_and_normalise(&three, None, &short).is_err());
    });
}

fn rms(cubes: &Cubes, gain: &[f32]) -> NormOnDevice {
    NormOnDevice {
        gain: cubes.upload(gain),
        bias: None,
        epsilon: 1e-5,
    }
}

#[test]
fn activations_and_gates_are_their_formulas() {
    let xielu = Curve::Xielu {
        alpha_p: 0.8,
        alpha_n: 1.3,
        beta: 0.5,
        epsilon: -1e-6,
    };
    with_kernels(|cubes| {
        for count in [1, 63, 64, 65, 1_536, 70_001] {
            let (x, up) = (numbers(count, 5), numbers(count, 6));
            for activation in [Curve::Silu, Curve::GeluTanh, Curve::SquaredRelu, xielu] {
                let of = |x: &f32| -> f64 {
                    let x = f64::from(*x);
                    match activation {
                        Curve::Silu => x / (1.0 + (-x).exp()),
                        Curve::GeluTanh => {
                            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                            0.5 * x * (1.0 + inner.tanh())
                        }
                        Curve::SquaredRelu => x.max(0.0).powi(2),
                        Curve::Xielu { .. } if x > 0.0 => 0.8 * x * x + 0.5 * x,
                        Curve::Xielu { .. } => 1.3 * (x.min(-1e-6).exp_m1() - x) + 0.5 * x,
                    }
                };
                let on_device = cubes.upload(&x);
                let right: Vec<f32> = x.iter().map(|x| of(x) as f32).collect();
                let out = cubes.activate(activation, &on_device, None).unwrap();
                near(
                    &cubes.read(&out).unwrap(),
                    &right,
                    1e-6,
                    &format!("{activation:?} {count}"),
                );
                let out = cubes
                    .activate(activation, &on_device, Some(&cubes.upload(&up)))
                    .unwrap();
                let mut right: Vec<f32> = right.iter().zip(&up).map(|(x, up)| x * up).collect();
                if activation == Curve::Silu {
                    swiglu(&mut right, &x, &up);
                }
                near(
                    &cubes.read(&out).unwrap(),
                    &right,
                    1e-6,
                    &format!("{activation:?} {count}, gate"),
                );
                told("activate", Cost::activate(count, true));
            }
        }
        let (one, two) = (cubes.upload(&[1.0]), cubes.upload(&[1.0; 2]));
        assert!(cubes.activate(Curve::Silu, &one, Some(&two)).is_err());
    });
}

#[test]
fn rows_are_added_scaled_and_chosen() {
    with_kernels(|cubes| {
        for (rows, width) in [(1, 1), (3, 65), (70, 33)] {
            let x = numbers(rows * width, 60);
            let (bias, factors) = (numbers(width, 61), numbers(rows, 62));
            let on_device = cubes.upload(&x);
            cubes.add(&on_device, &cubes.upload(&bias)).unwrap();
            cubes.scale_rows(&on_device, &cubes.upload(&factors)).unwrap();
            let mut right = x.clone();
            for (row, factor) in right.chunks_exact_mut(width).zip(&factors) {
                row.iter_mut()
                    .zip(&bias)
                    .for_each(|(x, bias)| *x = (*x + bias) * factor);
            }
            near(&cubes.read(&on_device).unwrap(), &right, 1e-6, "bias and factors");
            told("add", Cost::add(rows * width, width));
            told("scale rows", Cost::scale_rows(rows, width));

            let chosen: Vec<usize> = (0..rows).filter(|row| row % 3 == 0).rev().collect();
            let picked = cubes.pick(&chosen, rows).unwrap();
            let gathered = cubes.gather(&on_device, &picked).unwrap();
            let held = cubes.read(&on_device).unwrap();
            let own: Vec<f32> = chosen
                .iter()
                .flat_map(|row| &held[row * width..][..width])
                .copied()
                .collect();
            assert_eq!(cubes.read(&gathered).unwrap(), own);
            let shares = cubes.upload(&factors[..chosen.len()]);
            let sums = cubes.zeros(rows * width).unwrap();
            assert!(cubes.read(&sums).unwrap().iter().all(|sum| *sum == 0.0));
            cubes.add_to_rows(&sums, &gathered, &shares, &picked).unwrap();
            cubes.add_to_rows(&sums, &gathered, &shares, &picked).unwrap();
            let mut right = vec![0.0; rows * width];
            for (row, (own, share)) in chosen.iter().zip(own.chunks_exact(width).zip(&factors)) {
                let sums = right[row * width..].iter_mut().zip(own);
                sums.for_each(|(sum, own)| *sum = 2.0 * share * own);
            }
            near(&cubes.read(&sums).unwrap(), &right, 1e-6, "sums of rows");
            let moved = Cost::gather(chosen.len(), width);
            assert_eq!((moved.written, moved.operations), (4 * own.len() as u64, 0));
            told("add to rows", Cost::add_to_rows(chosen.len(), width));
            assert!(cubes.pick(&[rows], rows).is_err());
            assert!(cubes.add(&cubes.upload(&bias[..1]), &cubes.upload(&[0.0; 2])).is_err());
            assert!(
                cubes
                    .add_to_rows(&sums, &on_device, &shares, &cubes.pick(&[], rows).unwrap())
                    .is_err()
            );
        }
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
fn products_are_those_of_the_widened_weights() {
    with_kernels(|cubes| {
        for ty in PackedType::ALL {
            for (rows, blocks, n) in [(1, 1, 1), (5, 3, 1), (130, 18, 1), (3, 2, 7), (9, 3, 17), (66, 71, 9)] {
                if blocks == 71 && !ty.is_float() {
                    continue; // Rows that end inside a word are those of halves.
                }
                let cols = blocks * ty.block_elements();
                let weight = numbers(rows * cols, 30);
                let Ok(bytes) = narrow(ty, &weight) else {
                    println!("skipped: nothing packs {ty}");
                    continue;
                };
                let matrix = PackedMatrix::new(ty, rows, cols, bytes.into()).unwrap();
                let on_device = match cubes.upload_weight(&matrix) {
                    Ok(on_device) => on_device,
                    Err(error) => {
                        assert!(ty == PackedType::Q2K, "{error}");
                        cubes.upload_floats(&matrix.widen(), rows, cols).unwrap()
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
                if ty == PackedType::F32 {
                    let floats = cubes.upload_floats(&matrix.widen(), rows, cols).unwrap();
                    assert_eq!(floats.bytes(), on_device.bytes());
                    let again = cubes.multiply(&cubes.upload(&x), &floats).unwrap();
                    assert_eq!(cubes.read(&again).unwrap(), cubes.read(&out).unwrap());
                    assert!(cubes.upload_floats(&[0.0; 3], 2, 2).is_err());
                }
                if n == 17 {
                    println!(
                        "{ty}: {:.2} bits an element on the device",
                        8.0 * on_device.bytes() as f64 / (rows * cols) as f64
                    );
                }
                assert!(cols == 1 || cubes.multiply(&cubes.upload(&x[1..]), &on_device).is_err());
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
