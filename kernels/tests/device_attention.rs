//! Our own kernels for graphics devices that attention is made of, against the loops of `polder-reference`.
//!
//! They need the feature `gpu` and a device; a software rasteriser such as lavapipe will do. Without one they say so, and
//! fail where `POLDER_GPU_REQUIRED` is set.
#![cfg(feature = "gpu")]

mod device_case;

use device_case::{near, numbers, told, with_kernels};
use polder_kernels::device::cube::{
    AttentionShape, Columns, Cost, PagedRows, Rotated, ScoredHeads, SequenceAttention, Turns,
};
use polder_reference::{Rope, attention, frequencies, rotate};

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
