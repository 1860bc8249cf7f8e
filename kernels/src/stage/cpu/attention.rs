//! Causal attention over a cache, with grouped queries.
//!
//! In each page keys are kept turned in blocks of 16 positions, `[kv_heads, PAGE_POSITIONS / 16, head_dim, 16]`, so that
//! scores of 16 positions are made at once from memory in one piece; values are kept `[kv_heads, PAGE_POSITIONS,
//! head_dim]`. Each query's sums run over dimensions and positions in order, whether one position is asked or many, and
//! wherever one page ends and the next begins.

#![expect(
    clippy::needless_range_loop,
    reason = "indices name the rows and columns of a tile in registers"
)]

use std::sync::Arc;

use super::elementwise::softmax;
use super::lanes::{Lanes, Level, on_every_level};
use super::pages::{Page, written};
use crate::stage::pages::{PAGE_POSITIONS, runs};
use crate::team;

/// Queries of one key-value head that are worked on together.
const ROWS: usize = 4;

/// Keys and values of one block for one session: a part of each of its pages.
#[derive(Debug)]
pub(super) struct Cache<'a> {
    pub(super) shape: Shape,
    pub(super) pages: &'a mut [Arc<Page>],
    /// Where the block's part begins in a page.
    pub(super) start: usize,
}

/// The sizes of a cache.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    /// Query heads.
    pub(super) heads: usize,
    /// Key-value heads.
    pub(super) kv_heads: usize,
    /// Width of a head; even.
    pub(super) head_dim: usize,
    /// Positions that a query sees, itself included; `None` for all before it.
    pub(super) window: Option<usize>,
    /// What scores are multiplied by.
    pub(super) scale: f32,
}

impl Cache<'_> {
    /// Writes rotated keys and values `[n, kv_heads, head_dim]` from `position` on.
    pub(super) fn write(&mut self, position: usize, keys: &[f32], values: &[f32]) {
        let Shape { kv_heads, head_dim, .. } = self.shape;
        let row = kv_heads * head_dim;
        for run in runs(position, position + keys.len() / row) {
            let page = &mut written(&mut self.pages[run.page])[self.start..][..2 * PAGE_POSITIONS * row];
            let (page_keys, page_values) = page.split_at_mut(PAGE_POSITIONS * row);
            let own = run.offset * row..(run.offset + run.count) * row;
            let rows = keys[own.clone()].chunks_exact(head_dim);
            for (row, (key, value)) in rows.zip(values[own].chunks_exact(head_dim)).enumerate() {
                let (at, head) = (run.at + row / kv_heads, row % kv_heads);
                for (dimension, key) in key.iter().enumerate() {
                    page_keys[(head * PAGE_POSITIONS + at - at % 16) * head_dim + dimension * 16 + at % 16] = *key;
                }
                page_values[(head * PAGE_POSITIONS + at) * head_dim..][..head_dim].copy_from_slice(value);
            }
        }
    }

    /// Attends from `n` positions `position ..`, whose keys and values are written.
    ///
    /// # Shapes
    ///
    /// - `q`, `out`: `[n, heads, head_dim]`
    pub(super) fn attend(&self, position: usize, q: &[f32], out: &mut [f32]) {
        let Shape {
            heads,
            kv_heads,
            head_dim,
            ..
        } = self.shape;
        let group = heads / kv_heads;
        let n = q.len() / (heads * head_dim);
        // A part is the queries of some positions and all heads; those of one key-value head lie side by side.
        let positions = if n < 16 { 1 } else { 4 };
        let (group_len, row_len) = (group * head_dim, heads * head_dim);
        let one = |part: usize, out: &mut [f32]| {
            for (row, out) in out.chunks_exact_mut(group_len).enumerate() {
                let (i, kv) = (part * positions + row / kv_heads, row % kv_heads);
                let q = &q[i * row_len + kv * group_len..][..group_len];
                self.attend_group(position + i + 1, kv, q, out);
            }
        };
        let work = (position + n) * row_len;
        if n == 1 && work >= 100_000 {
            // A single position over a long past: its key-value heads go to different threads.
            let group_of = |kv: usize, out: &mut [f32]| {
                self.attend_group(position + 1, kv, &q[kv * group_len..][..group_len], out);
            };
            return team::in_parts_always(out, group_len, group_of);
        }
        team::in_parts(out, positions * row_len, one);
    }

    /// All heads of one group at one position that sees `visible` positions.
    fn attend_group(&self, visible: usize, kv: usize, q: &[f32], out: &mut [f32]) {
        let Shape {
            kv_heads,
            head_dim,
            window,
            scale,
            ..
        } = self.shape;
        let level = Level::best();
        let head_len = head_dim * PAGE_POSITIONS;
        let keys = |page: usize| &self.pages[page].floats()[self.start + kv * head_len..][..head_len];
        let values = |page: usize| &self.pages[page].floats()[self.start + (kv_heads + kv) * head_len..][..head_len];
        let first = window.map_or(0, |window| visible.saturating_sub(window));
        // Scores are made for whole vectors of positions; those before the first are left out below.
        let from = first - first % 16;
        let padded = visible.next_multiple_of(16) - from;
        let mut scores = vec![0.0; ROWS * padded];
        let rows = q.chunks(ROWS * head_dim).zip(out.chunks_mut(ROWS * head_dim));
        for (q, out) in rows {
            let many = q.len() / head_dim;
            for run in runs(from, from + padded) {
                let keys = &keys(run.page)[run.at * head_dim..][..run.count * head_dim];
                // SAFETY: `q` is [many, head_dim]; `keys` are turned blocks of [head_dim, 16], because pages begin and
                // runs end at multiples of 16; scores have room for [many, padded].
                unsafe {
                    let scores = scores.as_mut_ptr().add(run.offset);
                    score(
                        level,
                        q.as_ptr(),
                        head_dim,
                        many,
                        keys.as_ptr(),
                        run.count / 16,
                        scores,
                        padded,
                    );
                }
            }
            for scores in scores.chunks_exact_mut(padded).take(many) {
                let scores = &mut scores[first - from..visible - from];
                scores.iter_mut().for_each(|score| *score *= scale);
                softmax(scores);
            }
            out.fill(0.0);
            for run in runs(first, visible) {
                let values = &values(run.page)[run.at * head_dim..][..run.count * head_dim];
                // SAFETY: scores are [many, padded], of which those of this run begin at its offset; values are [count,
                // head_dim], and out is [many, head_dim].
                unsafe {
                    let scores = scores.as_ptr().add(first - from + run.offset);
                    let (values, out) = (values.as_ptr(), out.as_mut_ptr());
                    mix(
                        level, scores, padded, many, run.count, values, head_dim, head_dim, out, head_dim,
                    );
                }
            }
        }
    }
}

on_every_level! {
    /// `scores[r, c] = Σ_t q[r, t] · keys[c / 16, t, c % 16]` for `many` r, `head_dim` t and `blocks` blocks of columns;
    /// rows of scores are `stride` apart.
    #[expect(clippy::too_many_arguments, reason = "a kernel's arguments are plain numbers and pointers")]
    unsafe fn score(
        q: *const f32, head_dim: usize, many: usize, keys: *const f32, blocks: usize, scores: *mut f32, stride: usize,
    ) = score_body
}

#[inline(always)]
unsafe fn score_body<L: Lanes>(
    q: *const f32,
    head_dim: usize,
    many: usize,
    keys: *const f32,
    blocks: usize,
    scores: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller gives matrices of these sizes.
    unsafe {
        let mut row = 0;
        while row < many {
            let (q, scores) = (q.add(row * head_dim), scores.add(row * stride));
            row += match many - row {
                4.. => score_rows::<L, 4>(q, head_dim, keys, blocks, scores, stride),
                3 => score_rows::<L, 3>(q, head_dim, keys, blocks, scores, stride),
                2 => score_rows::<L, 2>(q, head_dim, keys, blocks, scores, stride),
                _ => score_rows::<L, 1>(q, head_dim, keys, blocks, scores, stride),
            };
        }
    }
}

/// `R` queries against all blocks; returns `R`.
#[inline(always)]
unsafe fn score_rows<L: Lanes, const R: usize>(
    q: *const f32,
    head_dim: usize,
    keys: *const f32,
    blocks: usize,
    scores: *mut f32,
    stride: usize,
) -> usize {
    // SAFETY: the caller gives `R` queries, `blocks` blocks, and room for the scores.
    unsafe {
        let mut block = 0;
        while block + 2 <= blocks {
            block_scores::<L, R, 2>(
                q,
                head_dim,
                keys.add(block * head_dim * 16),
                scores.add(block * 16),
                stride,
            );
            block += 2;
        }
        if block < blocks {
            block_scores::<L, R, 1>(
                q,
                head_dim,
                keys.add(block * head_dim * 16),
                scores.add(block * 16),
                stride,
            );
        }
    }
    R
}

#[inline(always)]
unsafe fn block_scores<L: Lanes, const R: usize, const C: usize>(
    q: *const f32,
    head_dim: usize,
    keys: *const f32,
    scores: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller gives `R` queries, `C` blocks, and room for the scores.
    unsafe {
        let mut sums = [[L::splat(0.0); C]; R];
        for term in 0..head_dim {
            let mut values = [L::splat(0.0); C];
            for c in 0..C {
                values[c] = L::load(keys.add((c * head_dim + term) * 16));
            }
            for r in 0..R {
                let weight = L::splat(*q.add(r * head_dim + term));
                for c in 0..C {
                    sums[r][c] = L::multiply_add(weight, values[c], sums[r][c]);
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                L::store(scores.add(r * stride + c * 16), sums[r][c]);
            }
        }
    }
}

on_every_level! {
    /// `out[r, c] ← out[r, c] + Σ_t weights[r, t] · rows[t, c]` for `many` r, `terms` t and `columns` c, with the given strides.
    #[expect(clippy::too_many_arguments, reason = "a kernel's arguments are plain numbers and pointers")]
    unsafe fn mix(
        weights: *const f32, weights_stride: usize, many: usize, terms: usize,
        rows: *const f32, rows_stride: usize, columns: usize, out: *mut f32, out_stride: usize,
    ) = mix_body
}

#[inline(always)]
#[expect(
    clippy::too_many_arguments,
    reason = "a kernel's arguments are plain numbers and pointers"
)]
unsafe fn mix_body<L: Lanes>(
    weights: *const f32,
    weights_stride: usize,
    many: usize,
    terms: usize,
    rows: *const f32,
    rows_stride: usize,
    columns: usize,
    out: *mut f32,
    out_stride: usize,
) {
    // SAFETY: the caller gives matrices of these sizes; `panel` reads and writes whole vectors within `columns` only,
    // and the last columns are done one by one.
    unsafe {
        let mut row = 0;
        while row < many {
            let weights = weights.add(row * weights_stride);
            let out = out.add(row * out_stride);
            let whole = columns - columns % 16;
            let pairs = columns - columns % 32;
            macro_rules! panels {
                ($rows:literal) => {{
                    let mut column = 0;
                    while column < pairs {
                        let (rows, out) = (rows.add(column), out.add(column));
                        panel::<L, $rows, 2>(weights, weights_stride, terms, rows, rows_stride, out, out_stride);
                        column += 32;
                    }
                    while column < whole {
                        let (rows, out) = (rows.add(column), out.add(column));
                        panel::<L, $rows, 1>(weights, weights_stride, terms, rows, rows_stride, out, out_stride);
                        column += 16;
                    }
                    for column in whole..columns {
                        for r in 0..$rows {
                            let mut sum = *out.add(r * out_stride + column);
                            for term in 0..terms {
                                let weight = *weights.add(r * weights_stride + term);
                                sum = weight.mul_add(*rows.add(term * rows_stride + column), sum);
                            }
                            *out.add(r * out_stride + column) = sum;
                        }
                    }
                    row += $rows;
                }};
            }
            match many - row {
                4.. => panels!(4),
                3 => panels!(3),
                2 => panels!(2),
                _ => panels!(1),
            }
        }
    }
}

#[inline(always)]
unsafe fn panel<L: Lanes, const R: usize, const C: usize>(
    weights: *const f32,
    weights_stride: usize,
    terms: usize,
    rows: *const f32,
    rows_stride: usize,
    out: *mut f32,
    out_stride: usize,
) {
    // SAFETY: the caller gives `R` rows of weights, `terms` rows of `16 · C` elements and room for the result.
    unsafe {
        let mut sums = [[L::splat(0.0); C]; R];
        for r in 0..R {
            for c in 0..C {
                sums[r][c] = L::load(out.add(r * out_stride + c * 16));
            }
        }
        for term in 0..terms {
            let mut values = [L::splat(0.0); C];
            for c in 0..C {
                values[c] = L::load(rows.add(term * rows_stride + c * 16));
            }
            for r in 0..R {
                let weight = L::splat(*weights.add(r * weights_stride + term));
                for c in 0..C {
                    sums[r][c] = L::multiply_add(weight, values[c], sums[r][c]);
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                L::store(out.add(r * out_stride + c * 16), sums[r][c]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::pages::Memory;
    use super::*;
    use crate::stage::pages::{Pool, Table};

    #[test]
    fn attention_meets_the_plain_loop_for_odd_shapes() {
        let cases: [(usize, usize, usize, usize, usize); 7] = [
            (1, 1, 2, 1, 1),
            (4, 2, 16, 17, 17),
            (9, 3, 64, 40, 5),
            (5, 1, 22, 33, 3),
            (8, 2, 48, 100, 1),
            (6, 2, 16, 2 * PAGE_POSITIONS, 3),
            (3, 1, 20, 3 * PAGE_POSITIONS + 1, 70),
        ];
        for (heads, kv_heads, head_dim, positions, n) in cases {
            let make = |count: usize, salt: f32| (0..count).map(|i| (i as f32 * salt).sin()).collect::<Vec<f32>>();
            let shape = Shape {
                heads,
                kv_heads,
                head_dim,
                window: None,
                scale: 1.0 / (head_dim as f32).sqrt(),
            };
            let q = make(n * heads * head_dim, 0.37);
            let (k, v) = (
                make(positions * kv_heads * head_dim, 0.61),
                make(positions * kv_heads * head_dim, 0.83),
            );
            let (mut out, mut right) = (vec![0.0; q.len()], vec![0.0; q.len()]);
            let mut table = room(shape, positions);
            let pages = table.pages();
            let mut cache = Cache { shape, pages, start: 0 };
            cache.write(0, &k, &v);
            cache.attend(positions - n, &q, &mut out);
            polder_reference::attention(&mut right, &q, &k, &v, heads, kv_heads, head_dim);
            let error = out.iter().zip(&right).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(error < 1e-5, "{heads} {kv_heads} {head_dim}: {error}");
        }
    }

    #[test]
    fn a_window_sees_its_last_positions_alone() {
        let (positions, head_dim) = (2 * PAGE_POSITIONS + 13, 8);
        let make = |count: usize, salt: f32| (0..count).map(|i| (i as f32 * salt).cos()).collect::<Vec<f32>>();
        let (q, k, v) = (
            make(positions * head_dim, 0.37),
            make(positions * head_dim, 0.61),
            make(positions * head_dim, 0.83),
        );
        for window in [1, 5, 16, 17, 33, 60, 65, 200] {
            let shape = Shape {
                heads: 1,
                kv_heads: 1,
                head_dim,
                window: Some(window),
                scale: 1.0 / (head_dim as f32).sqrt(),
            };
            let mut table = room(shape, positions);
            let pages = table.pages();
            let mut cache = Cache { shape, pages, start: 0 };
            cache.write(0, &k, &v);
            let mut out = vec![0.0; q.len()];
            cache.attend(0, &q, &mut out);
            for position in 0..positions {
                let first = (position + 1).saturating_sub(window);
                let seen = first * head_dim..(position + 1) * head_dim;
                let mut right = vec![0.0; (position + 1 - first) * head_dim];
                // A query at the end of the rows that it sees.
                let mut queries = vec![0.0; right.len()];
                let last = right.len() - head_dim;
                queries[last..].copy_from_slice(&q[position * head_dim..][..head_dim]);
                polder_reference::attention(&mut right, &queries, &k[seen.clone()], &v[seen], 1, 1, head_dim);
                let own = &out[position * head_dim..][..head_dim];
                let error = own
                    .iter()
                    .zip(&right[last..])
                    .map(|(a, b)| (a - b).abs())
                    .fold(0.0, f32::max);
                assert!(error < 1e-5, "{window} {position}: {error}");
            }
        }
    }

    fn room(shape: Shape, positions: usize) -> Table<Page> {
        let mut pool = Pool::new(Memory::new(2 * shape.kv_heads * shape.head_dim));
        let mut table = Table::default();
        table.ready(&mut pool, 0, positions).unwrap();
        table
    }
}
