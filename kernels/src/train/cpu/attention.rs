//! Causal attention that keeps no scores: a logarithm per row is enough to make them again, block by block.
//!
//! The formulas are those of FlashAttention-2 (arXiv 2307.08691); a block of queries meets all its keys at once, so
//! memory grows with the length and not with its square, and no sum is ever rescaled.

use core::ops::Range;

use rayon::prelude::*;

use super::norm::{Loaded, Sums};
use super::pool::Pool;
use super::product::{Mode, Threads, View, ViewMut, product};
use super::rotation::Rotations;
use super::slots::Weights;
use super::softmax::{dot, shares, shares_backward};
use crate::model::describe::Attention;

/// Queries of a block: their scores stay in the cache for any usual length.
const BLOCK: usize = 64;
/// Rows that one task takes where heads are put side by side, whatever the number of threads.
const ROWS: usize = 32;

/// What the backward needs.
#[derive(Debug)]
pub(super) struct Kept {
    /// `[rows, heads + 2 · kv_heads, head_dim]`: queries, keys and values as they were projected.
    pub(super) qkv: Vec<f32>,
    /// `[rows, heads, head_dim]`
    pub(super) mixed: Vec<f32>,
    /// `[batch, heads, seq]`: the logarithm of the sum of each query's exponentials.
    log_sums: Vec<f32>,
}

impl Kept {
    pub(super) fn give(self, pool: &mut Pool) {
        for buffer in [self.qkv, self.mixed, self.log_sums] {
            pool.give(buffer);
        }
    }
}

/// Attention with everything that it reads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attend<'a> {
    pub(super) shape: &'a Attention,
    pub(super) weights: Weights<'a>,
    pub(super) rotations: &'a Rotations,
}

/// Queries or keys, normed and rotated: `[batch, heads, seq, head_dim]`.
struct Prepared {
    q: Vec<f32>,
    k: Vec<f32>,
}

impl<'a> Attend<'a> {
    /// Elements of one row of projections.
    pub(super) const fn width(self) -> usize {
        (self.shape.heads + 2 * self.shape.kv_heads) * self.shape.head_dim
    }

    /// Of projections `qkv`.
    pub(super) fn forward(self, qkv: Vec<f32>, pool: &mut Pool) -> Kept {
        let Attention { heads, head_dim, .. } = *self.shape;
        let seq = self.rotations.seq();
        let rows = qkv.len() / self.width();
        let Prepared { q, k } = self.prepare(&qkv, pool);
        let mut log_sums = pool.take(rows * heads);
        let mut by_head = pool.take(rows * heads * head_dim);
        by_head
            .par_chunks_mut(seq * head_dim)
            .zip(log_sums.par_chunks_mut(seq))
            .enumerate()
            .for_each_init(Vec::new, |scores, (head, (out, log_sums))| {
                let head = self.head(head, &q, &k, &qkv);
                for rows in blocks(seq) {
                    let keys = self.keys(&rows);
                    scores.resize(rows.len() * keys.len(), 0.0);
                    head.scores(scores, &rows, &keys);
                    for (row, scores) in rows.clone().zip(scores.chunks_exact_mut(keys.len())) {
                        let seen = self.seen(row, &keys);
                        scores[..seen.start].fill(0.0);
                        scores[seen.end..].fill(0.0);
                        log_sums[row] = shares(&mut scores[seen], self.shape.scale);
                    }
                    let out = &mut out[rows.start * head_dim..rows.end * head_dim];
                    let out = ViewMut::new(out, rows.len(), head_dim);
                    let scores = View::new(scores, rows.len(), keys.len());
                    product(out, Mode::Write, scores, head.v(&keys), Threads::Own);
                }
            });
        let mut mixed = pool.take(rows * heads * head_dim);
        mixed
            .par_chunks_mut(ROWS * heads * head_dim)
            .enumerate()
            .for_each(|(chunk, mixed)| {
                for (row, mixed) in (chunk * ROWS..).zip(mixed.chunks_exact_mut(heads * head_dim)) {
                    for (head, mixed) in mixed.chunks_exact_mut(head_dim).enumerate() {
                        let at = ((row / seq * heads + head) * seq + row % seq) * head_dim;
                        mixed.copy_from_slice(&by_head[at..at + head_dim]);
                    }
                }
            });
        for buffer in [q, k, by_head] {
            pool.give(buffer);
        }
        Kept { qkv, mixed, log_sums }
    }

    /// The gradient of the projections from that of what was mixed, `[rows, heads, head_dim]`; adds those of the norms
    /// of queries and keys.
    pub(super) fn backward(self, kept: Kept, gradient: &[f32], gradients: &mut [f32], pool: &mut Pool) -> Vec<f32> {
        let Attention { heads, head_dim, .. } = *self.shape;
        let Kept {
            mut qkv,
            mixed,
            log_sums,
        } = kept;
        let seq = self.rotations.seq();
        let Prepared { q, k } = self.prepare(&qkv, pool);
        let len = mixed.len();
        let [mut q_gradient, mut k_gradient, mut v_gradient] = [(); 3].map(|()| pool.take(len));
        q_gradient
            .par_chunks_mut(seq * head_dim)
            .zip(k_gradient.par_chunks_mut(seq * head_dim))
            .zip(v_gradient.par_chunks_mut(seq * head_dim))
            .enumerate()
            .for_each_init(
                || (Vec::new(), Vec::new()),
                |(scores, score_gradients), (index, ((q_gradient, k_gradient), v_gradient))| {
                    let head = self.head(index, &q, &k, &qkv);
                    // This head's columns of what was mixed.
                    let first = (index / heads * seq * heads + index % heads) * head_dim;
                    let row_of = |row: usize| first + row * heads * head_dim;
                    k_gradient.fill(0.0);
                    v_gradient.fill(0.0);
                    for rows in blocks(seq) {
                        let keys = self.keys(&rows);
                        let count = rows.len() * keys.len();
                        scores.resize(count, 0.0);
                        score_gradients.resize(count, 0.0);
                        head.scores(scores, &rows, &keys);
                        let out = &gradient[row_of(rows.start)..];
                        let out = View::strided(out, rows.len(), head_dim, heads * head_dim);
                        let into = ViewMut::new(score_gradients, rows.len(), keys.len());
                        product(into, Mode::Write, out, head.v(&keys).transposed(), Threads::Own);
                        let both = scores
                            .chunks_exact_mut(keys.len())
                            .zip(score_gradients.chunks_exact_mut(keys.len()));
                        for (row, (scores, gradients)) in rows.clone().zip(both) {
                            let at = row_of(row)..row_of(row) + head_dim;
                            let along = dot(&gradient[at.clone()], &mixed[at]);
                            let seen = self.seen(row, &keys);
                            for unseen in [0..seen.start, seen.end..keys.len()] {
                                scores[unseen.clone()].fill(0.0);
                                gradients[unseen].fill(0.0);
                            }
                            let log_sum = log_sums[index * seq + row];
                            let (scores, gradients) = (&mut scores[seen.clone()], &mut gradients[seen]);
                            shares_backward(scores, gradients, log_sum, along, self.shape.scale);
                        }
                        let shares = View::new(scores, rows.len(), keys.len());
                        let score_gradients = View::new(score_gradients, rows.len(), keys.len());
                        let of = |range: &Range<usize>| range.start * head_dim..range.end * head_dim;
                        let into = ViewMut::new(&mut v_gradient[of(&keys)], keys.len(), head_dim);
                        product(into, Mode::Add, shares.transposed(), out, Threads::Own);
                        let into = ViewMut::new(&mut k_gradient[of(&keys)], keys.len(), head_dim);
                        product(
                            into,
                            Mode::Add,
                            score_gradients.transposed(),
                            head.q(&rows),
                            Threads::Own,
                        );
                        let into = ViewMut::new(&mut q_gradient[of(&rows)], rows.len(), head_dim);
                        product(into, Mode::Write, score_gradients, head.k(&keys), Threads::Own);
                    }
                },
            );
        self.unprepare(&mut qkv, [&q_gradient, &k_gradient, &v_gradient], gradients);
        for buffer in [q, k, q_gradient, k_gradient, v_gradient, mixed, log_sums] {
            pool.give(buffer);
        }
        qkv
    }

    /// Queries and keys, normed and rotated.
    fn prepare(self, qkv: &[f32], pool: &mut Pool) -> Prepared {
        let shape = self.shape;
        let head_dim = shape.head_dim;
        let seq = self.rotations.seq();
        let rows = qkv.len() / self.width();
        let mut prepared = |heads: usize, first: usize, norm: Option<Loaded<'a>>, scale| {
            let mut out = pool.take(rows * heads * head_dim);
            out.par_chunks_mut(seq * head_dim).enumerate().for_each(|(index, out)| {
                for (position, out) in out.chunks_exact_mut(head_dim).enumerate() {
                    let row = index / heads * seq + position;
                    let from = row * self.width() + (first + index % heads) * head_dim;
                    let from = &qkv[from..from + head_dim];
                    match norm {
                        Some(norm) => norm.row(out, from),
                        None => out.copy_from_slice(from),
                    }
                    self.rotations.turn(out, position, shape.rotary, scale);
                }
            });
            out
        };
        let [q_norm, k_norm] = self.norms();
        Prepared {
            q: prepared(shape.heads, 0, q_norm, shape.query_scale),
            k: prepared(shape.kv_heads, shape.heads, k_norm, None),
        }
    }

    /// Writes the gradients of queries, keys and values, each `[batch, heads, seq, head_dim]`, over the projections.
    fn unprepare(self, qkv: &mut [f32], [q, k, v]: [&[f32]; 3], gradients: &mut [f32]) {
        let shape = self.shape;
        let Attention {
            heads,
            kv_heads,
            head_dim,
            ..
        } = *shape;
        let group = heads / kv_heads;
        let seq = self.rotations.seq();
        let [q_norm, k_norm] = self.norms();
        let sums = qkv.par_chunks_mut(ROWS * self.width()).enumerate().map(|(chunk, qkv)| {
            let mut sums = [q_norm, k_norm].map(|norm| norm.map(Loaded::sums));
            let (mut own, mut before) = (vec![0.0; head_dim], vec![0.0; head_dim]);
            for (row, qkv) in (chunk * ROWS..).zip(qkv.chunks_exact_mut(self.width())) {
                let (sequence, position) = (row / seq, row % seq);
                let of = |head: usize| {
                    let at = ((sequence * heads + head) * seq + position) * head_dim;
                    at..at + head_dim
                };
                for (head, qkv) in qkv.chunks_exact_mut(head_dim).enumerate() {
                    if head < heads {
                        own.copy_from_slice(&q[of(head)]);
                        self.rotations
                            .turn_back(&mut own, position, shape.rotary, shape.query_scale);
                        before_norm(qkv, &own, q_norm, sums[0].as_mut(), &mut before);
                        continue;
                    }
                    let (all, kv_head) = match head - heads {
                        kv_head if kv_head < kv_heads => (k, kv_head),
                        kv_head => (v, kv_head - kv_heads),
                    };
                    // All queries of the group have looked at this head.
                    own.copy_from_slice(&all[of(kv_head * group)]);
                    for head in kv_head * group + 1..(kv_head + 1) * group {
                        for (own, more) in own.iter_mut().zip(&all[of(head)]) {
                            *own += more;
                        }
                    }
                    if head < heads + kv_heads {
                        self.rotations.turn_back(&mut own, position, shape.rotary, None);
                        before_norm(qkv, &own, k_norm, sums[1].as_mut(), &mut before);
                    } else {
                        qkv.copy_from_slice(&own);
                    }
                }
            }
            sums
        });
        let (q_sums, k_sums): (Vec<_>, Vec<_>) = sums.collect::<Vec<_>>().into_iter().map(|[q, k]| (q, k)).unzip();
        let norms = [(&shape.q_norm, q_norm, q_sums), (&shape.k_norm, k_norm, k_sums)];
        for (norm, loaded, sums) in norms {
            if let (Some(norm), Some(loaded)) = (norm, loaded) {
                let sums = loaded.all(sums.into_iter().flatten().collect());
                sums.add_to(gradients, norm, self.weights);
            }
        }
    }

    fn norms(self) -> [Option<Loaded<'a>>; 2] {
        let load = |norm| Loaded::new(norm, self.weights);
        [
            self.shape.q_norm.as_ref().map(load),
            self.shape.k_norm.as_ref().map(load),
        ]
    }

    /// The head of number `index` among `[batch, heads]`.
    fn head<'b>(self, index: usize, q: &'b [f32], k: &'b [f32], qkv: &'b [f32]) -> Head<'b> {
        let Attention {
            heads,
            kv_heads,
            head_dim,
            ..
        } = *self.shape;
        let len = self.rotations.seq() * head_dim;
        let (sequence, kv_head) = (index / heads, index % heads / (heads / kv_heads));
        let first_value = sequence * self.rotations.seq() * self.width() + (heads + kv_heads + kv_head) * head_dim;
        let at = (sequence * kv_heads + kv_head) * len;
        Head {
            head_dim,
            width: self.width(),
            q: &q[index * len..(index + 1) * len],
            k: &k[at..at + len],
            v: &qkv[first_value..],
        }
    }

    /// The keys that some query of `rows` sees.
    fn keys(self, rows: &Range<usize>) -> Range<usize> {
        let first = self
            .shape
            .window
            .map_or(0, |window| (rows.start + 1).saturating_sub(window));
        first..rows.end
    }

    /// Those that the query at `row` sees, counted from the first of `keys`.
    fn seen(self, row: usize, keys: &Range<usize>) -> Range<usize> {
        let first = self.shape.window.map_or(0, |window| (row + 1).saturating_sub(window));
        first.max(keys.start) - keys.start..row + 1 - keys.start
    }
}

/// One head of queries, with the keys and values that it looks at.
struct Head<'a> {
    head_dim: usize,
    width: usize,
    /// `[seq, head_dim]`
    q: &'a [f32],
    k: &'a [f32],
    /// Rows of `head_dim`, each `width` after the one before.
    v: &'a [f32],
}

impl<'a> Head<'a> {
    fn scores(&self, scores: &mut [f32], rows: &Range<usize>, keys: &Range<usize>) {
        let scores = ViewMut::new(scores, rows.len(), keys.len());
        product(
            scores,
            Mode::Write,
            self.q(rows),
            self.k(keys).transposed(),
            Threads::Own,
        );
    }

    fn q(&self, rows: &Range<usize>) -> View<'a> {
        View::new(&self.q[rows.start * self.head_dim..], rows.len(), self.head_dim)
    }

    fn k(&self, keys: &Range<usize>) -> View<'a> {
        View::new(&self.k[keys.start * self.head_dim..], keys.len(), self.head_dim)
    }

    fn v(&self, keys: &Range<usize>) -> View<'a> {
        View::strided(
            &self.v[keys.start * self.width..],
            keys.len(),
            self.head_dim,
            self.width,
        )
    }
}

fn blocks(seq: usize) -> impl Iterator<Item = Range<usize>> {
    (0..seq)
        .step_by(BLOCK)
        .map(move |first| first..(first + BLOCK).min(seq))
}

/// The gradient of a head before its norm, where it has one; `x` is what the norm took, and then the gradient.
/// `scratch` is as long.
fn before_norm(
    x: &mut [f32],
    gradient: &[f32],
    norm: Option<Loaded<'_>>,
    sums: Option<&mut Sums>,
    scratch: &mut [f32],
) {
    match (norm, sums) {
        (Some(norm), Some(sums)) => {
            scratch.fill(0.0);
            norm.row_backward(scratch, gradient, x, sums);
            x.copy_from_slice(scratch);
        }
        _ => x.copy_from_slice(gradient),
    }
}
