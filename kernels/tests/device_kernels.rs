//! Our own kernels for graphics devices, against the loops of `polder-reference` and against the CPU's twins.
//!
//! They need the feature `gpu` and a device; a software rasteriser such as lavapipe will do. Without one they say so, and
//! fail where `POLDER_GPU_REQUIRED` is set.
#![cfg(feature = "gpu")]

use std::sync::{Mutex, OnceLock, PoisonError};

use polder_kernels::device::cube::{
    Activation, AdamWStep, AttentionShape, Columns, Cost, Cubes, NormOnDevice, PagedRows, Rotated, ScoredHeads, Turns,
};
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
fn heads_are_rotated_as_by_the_reference() {
    with_kernels(|cubes| {
        // Rows, heads, elements before those that turn, those, and elements behind them.
        for (n, heads, first, turning, rest) in [(1, 1, 0, 2, 0), (5, 3, 0, 6, 3), (9, 9, 0, 64, 0), (65, 2, 7, 16, 0)]
        {
            for interleaved in [false, true] {
                let head_dim = first + turning + rest;
                let x = numbers(n * heads * head_dim, 4);
                let frequencies = frequencies(Rope::Default, 1e4, turning);
                let mut right = x.clone();
                let (mut cosines, mut sines) = (Vec::new(), Vec::new());
                for (position, heads) in right.chunks_exact_mut(heads * head_dim).enumerate() {
                    for head in heads.chunks_exact_mut(head_dim) {
                        let head = &mut head[first..first + turning];
                        // The reference turns halves.
                        let place = |i: usize| if interleaved { i % 2 * (turning / 2) + i / 2 } else { i };
                        let mut halves = vec![0.0; turning];
                        (0..turning).for_each(|i| halves[place(i)] = head[i]);
                        rotate(&mut halves, position, &frequencies);
                        (0..turning).for_each(|i| head[i] = halves[place(i)]);
                    }
                    let angles = frequencies.radians.iter().map(|radians| position as f32 * radians);
                    cosines.extend(angles.clone().map(f32::cos));
                    sines.extend(angles.map(f32::sin));
                }
                let on_device = cubes.upload(&x);
                let turns = Turns {
                    cosines: cubes.upload(&cosines),
                    sines: cubes.upload(&sines),
                    pairs: turning / 2,
                    interleaved,
                };
                let rotated = Rotated { heads, head_dim, first };
                cubes.rotate(&on_device, &turns, rotated).unwrap();
                let what = format!("{n} x {heads} x {head_dim} {interleaved}");
                near(&cubes.read(&on_device).unwrap(), &right, 1e-5, &what);
                told("rotate", Cost::rotate(n, heads, turning / 2));
                let more = Rotated {
                    heads: heads + 1,
                    ..rotated
                };
                assert!(cubes.rotate(&on_device, &turns, more).is_err());
                let beyond = Rotated {
                    first: first + rest + 1,
                    ..rotated
                };
                assert!(cubes.rotate(&on_device, &turns, beyond).is_err());
            }
        }
    });
}

#[test]
fn activations_and_gates_are_their_formulas() {
    let xielu = Activation::Xielu {
        alpha_p: 0.8,
        alpha_n: 1.3,
        beta: 0.5,
        epsilon: -1e-6,
    };
    with_kernels(|cubes| {
        for count in [1, 63, 64, 65, 1_536, 70_001] {
            let (x, up) = (numbers(count, 5), numbers(count, 6));
            for activation in [Activation::Silu, Activation::GeluTanh, Activation::SquaredRelu, xielu] {
                let of = |x: &f32| -> f64 {
                    let x = f64::from(*x);
                    match activation {
                        Activation::Silu => x / (1.0 + (-x).exp()),
                        Activation::GeluTanh => {
                            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                            0.5 * x * (1.0 + inner.tanh())
                        }
                        Activation::SquaredRelu => x.max(0.0).powi(2),
                        Activation::Xielu { .. } if x > 0.0 => 0.8 * x * x + 0.5 * x,
                        Activation::Xielu { .. } => 1.3 * (x.min(-1e-6).exp_m1() - x) + 0.5 * x,
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
                if activation == Activation::Silu {
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
        assert!(cubes.activate(Activation::Silu, &one, Some(&two)).is_err());
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
fn heads_are_multiplied_with_their_own_weights_and_columns_go_where_they_belong() {
    with_kernels(|cubes| {
        // Rows, heads, elements that go in of so many, and that come out into so many.
        for (n, heads, (cols, x_width), (rows, out_width)) in [
            (1, 1, (1, 1), (1, 1)),
            (3, 4, (17, 25), (32, 40)),
            (70, 2, (5, 5), (3, 9)),
        ] {
            let (x, weight) = (numbers(n * heads * x_width, 70), numbers(heads * cols * rows, 71));
            let on_device = cubes.upload(&x);
            let out = cubes.zeros(n * heads * out_width).unwrap();
            let shape = [heads, cols, rows];
            let own = cubes.upload(&weight);
            cubes
                .multiply_heads((&on_device, x_width), &own, shape, (&out, out_width))
                .unwrap();
            // What stands behind the product comes from the input's last columns, as many as fit.
            let moved = (x_width - cols).min(out_width - rows);
            let part = |of, width, first| Columns { of, width, first };
            let (from, to) = (part(&on_device, x_width, cols), part(&out, out_width, rows));
            cubes.copy_columns(from, to, n * heads, moved).unwrap();
            let mut right = vec![0.0; n * heads * out_width];
            for (index, (x, out)) in x
                .chunks_exact(x_width)
                .zip(right.chunks_exact_mut(out_width))
                .enumerate()
            {
                for row in 0..rows {
                    let column = |column: usize| x[column] * weight[(index % heads * cols + column) * rows + row];
                    out[row] = (0..cols).map(column).sum();
                }
                out[rows..rows + moved].copy_from_slice(&x[cols..cols + moved]);
            }
            near(&cubes.read(&out).unwrap(), &right, 1e-5, &format!("{n} x {heads}"));
            told("multiply heads", Cost::multiply_heads(n, shape));
            assert!(cubes.copy_columns(from, to, n * heads, x_width + 1).is_err());
            let wrong = [heads, cols, rows + 1];
            assert!(
                cubes
                    .multiply_heads((&on_device, x_width), &own, wrong, (&out, out_width))
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
                window: None,
                scale: 1.0 / (head_dim as f32).sqrt(),
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
            for window in [1, 3, 64, 70] {
                let mut right = vec![0.0; q.len()];
                let row = heads * head_dim;
                for (query, (out, q)) in right.chunks_exact_mut(row).zip(q.chunks_exact(row)).enumerate() {
                    let end = position + query + 1;
                    let seen = end.saturating_sub(window) * width..end * width;
                    // Twice the score, by twice the query.
                    let q: Vec<f32> = q.iter().map(|q| 2.0 * q).collect();
                    attention(out, &q, &k[seen.clone()], &v[seen], heads, kv_heads, head_dim);
                }
                let shape = AttentionShape {
                    window: Some(window),
                    scale: 2.0 * shape.scale,
                    ..shape
                };
                let out = cubes
                    .attend(shape, &on_device, &caches[0], &caches[1], &places)
                    .unwrap();
                near(
                    &cubes.read(&out).unwrap(),
                    &right,
                    1e-5,
                    &format!("{position} {shape:?}"),
                );
                told("attend in a window", Cost::attend(shape, queries, position));
            }
            // Three positions of those that a query sees, its own among them; or all.
            let mut right = vec![0.0; q.len()];
            let row = heads * head_dim;
            let choice = |own: usize| {
                if own < 3 {
                    (0..=own).collect()
                } else {
                    vec![0, own / 2, own]
                }
            };
            let chosen: Vec<Vec<usize>> = (position..all).map(choice).collect();
            for (chosen, (out, q)) in chosen.iter().zip(right.chunks_exact_mut(row).zip(q.chunks_exact(row))) {
                let of = |rows: &[f32]| -> Vec<f32> {
                    let own = chosen.iter().flat_map(|at| &rows[at * width..][..width]);
                    own.copied().collect()
                };
                attention(out, q, &of(&k), &of(&v), heads, kv_heads, head_dim);
            }
            let marked = cubes.choose(&chosen, &places).unwrap();
            let out = cubes
                .attend_to_chosen(shape, &on_device, &caches[0], &caches[1], &places, &marked)
                .unwrap();
            near(
                &cubes.read(&out).unwrap(),
                &right,
                1e-5,
                &format!("{position} {shape:?}, chosen"),
            );
            assert!(cubes.choose(&vec![vec![all]; queries], &places).is_err());
            assert!(cubes.choose(&vec![Vec::new(); queries], &places).is_err());
            assert!(cubes.choose(&[], &places).is_err());

            // Scores by which positions are chosen, of all queries but the first.
            let scored = ScoredHeads { heads, head_dim };
            let (one, weights) = (numbers(all * head_dim, 23), numbers(queries * heads, 24));
            let keys = cubes.upload(&vec![f32::NAN; room / width * head_dim]);
            let every = cubes.place(PAGE, &[span(0, all)]).unwrap();
            cubes.append(&cubes.upload(&one), &keys, &every, head_dim).unwrap();
            let rows = 1..queries;
            let scores = cubes
                .score_positions(
                    scored,
                    &on_device,
                    &cubes.upload(&weights),
                    &keys,
                    &places,
                    rows.clone(),
                )
                .unwrap();
            let mut right = Vec::new();
            for row in rows {
                let heads_of = |at: usize| {
                    let key = &one[at * head_dim..][..head_dim];
                    let product = |head: usize| {
                        let q = &q[(row * heads + head) * head_dim..][..head_dim];
                        let product: f32 = q.iter().zip(key).map(|(q, k)| q * k).sum();
                        weights[row * heads + head] * product.max(0.0) / ((heads * head_dim) as f32).sqrt()
                    };
                    (0..heads).map(product).sum::<f32>()
                };
                right.extend((0..all).map(|at| if at <= position + row { heads_of(at) } else { 0.0 }));
            }
            near(&cubes.read(&scores).unwrap(), &right, 1e-5, "scores of positions");
            told("score positions", Cost::score_positions(scored, queries, position));
            let beyond = 0..queries + 1;
            let weights = cubes.upload(&weights);
            assert!(
                cubes
                    .score_positions(scored, &on_device, &weights, &keys, &places, beyond)
                    .is_err()
            );

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
            window: None,
            scale: 1.0 / 10f32.sqrt(),
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
