//! Attention over a compressed cache: of each position, a normed latent and one rotated key.
//!
//! Keys are never made: a query is carried into the latent's space instead, and the mixture of latents out of it. What
//! the cache keeps is therefore `rank + rope` numbers per position, whatever the number of heads.

use std::sync::Arc;

use rayon::prelude::*;

use super::attention::mix;
use super::dense::{Dense, LoadedNorm};
use super::elementwise::{Turns, softmax};
use super::indexer::IndexerWeights;
use super::lanes::Level;
use super::matrix::Matrix;
use super::pages::{Page, written};
use super::product::strip_product;
use crate::model::describe::{LatentAttention, LatentQuery};
use crate::stage::StageError;
use crate::stage::pages::{PAGE_POSITIONS, Run, runs};
use crate::stage::weights::PartReader;

/// The weights of one block's attention.
#[derive(Debug)]
pub(in crate::stage) struct LatentWeights {
    pub(in crate::stage) shape: LatentAttention,
    pub(in crate::stage) query: Query,
    pub(in crate::stage) kv_down: Dense,
    pub(in crate::stage) kv_norm: LoadedNorm,
    /// `[heads, nope + value, rank]`, widened: both its halves are multiplied from the other side.
    pub(in crate::stage) kv_up: Vec<f32>,
    pub(in crate::stage) o: Dense,
    pub(in crate::stage) indexer: Option<IndexerWeights>,
}

/// Where queries come from.
#[derive(Debug)]
pub(in crate::stage) enum Query {
    Direct(Dense),
    LowRank(Dense, LoadedNorm, Dense),
}

/// What is kept of the positions of one session: a part of each of its pages. It is `[PAGE_POSITIONS, rank + rope]`,
/// and, where positions are chosen, `[PAGE_POSITIONS, index_head_dim]` behind it.
#[derive(Debug)]
pub(super) struct LatentCache<'a> {
    pub(super) pages: &'a mut [Arc<Page>],
    /// Where the sublayer's part begins in a page.
    pub(super) start: usize,
}

impl LatentWeights {
    pub(in crate::stage) fn read(reader: &PartReader<'_>, shape: &LatentAttention) -> Result<Self, StageError> {
        let query = match &shape.query {
            LatentQuery::Direct(linear) => Query::Direct(reader.dense(linear)?),
            LatentQuery::LowRank(down, norm, up) => {
                Query::LowRank(reader.dense(down)?, reader.norm(norm)?, reader.dense(up)?)
            }
        };
        let indexer = shape.indexer.as_ref();
        Ok(Self {
            query,
            kv_down: reader.dense(&shape.kv_down)?,
            kv_norm: reader.norm(&shape.kv_norm)?,
            kv_up: reader.widened(&shape.kv_up)?,
            o: reader.dense(&shape.o)?,
            indexer: indexer
                .map(|indexer| IndexerWeights::read(reader, indexer))
                .transpose()?,
            shape: shape.clone(),
        })
    }

    /// All that is multiplied with, besides what is widened.
    pub(super) fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let query = match &self.query {
            Query::Direct(dense) => [Some(dense), None],
            Query::LowRank(down, _, up) => [Some(down), Some(up)],
        };
        let denses = query.into_iter().flatten().chain([&self.kv_down, &self.o]);
        let indexer = self.indexer.iter().flat_map(IndexerWeights::matrices);
        denses.map(|dense| &dense.weight).chain(indexer)
    }

    fn row(&self) -> usize {
        self.shape.rank + self.shape.rope
    }

    /// Numbers that are kept of a position.
    pub(super) fn position_floats(&self) -> usize {
        self.row() + self.indexer.as_ref().map_or(0, IndexerWeights::head_dim)
    }

    /// Attends from the `n` normed rows `x` at `position ..`; `seen` takes the positions chosen by each.
    #[expect(clippy::too_many_arguments, reason = "what a mixer works on")]
    pub(super) fn forward(
        &self,
        x: &[f32],
        n: usize,
        position: usize,
        turns: &[Turns],
        cache: &mut LatentCache<'_>,
        out: &mut [f32],
        seen: Option<&mut Vec<Vec<usize>>>,
    ) {
        let LatentAttention {
            heads,
            nope,
            rope,
            value,
            ..
        } = self.shape;
        let (latent, mut q) = match &self.query {
            Query::Direct(dense) => (Vec::new(), dense.of(x, n)),
            Query::LowRank(down, norm, up) => {
                let latent = norm.of(&down.of(x, n));
                let q = up.of(&latent, n);
                (latent, q)
            }
        };
        let rotation = turns.get(self.shape.rotary);
        if let Some(turns) = rotation {
            for (index, head) in q.chunks_exact_mut(nope + rope).enumerate() {
                turns.rotate(&mut head[nope..], index / heads);
            }
        }
        self.remember(x, n, position, rotation, cache);
        let index_start = cache.start + PAGE_POSITIONS * self.row();
        let chosen = self.indexer.as_ref().map(|indexer| {
            indexer.remember(x, n, position, turns, cache.pages, index_start);
            indexer.choose(x, &latent, n, position, turns, cache.pages, index_start)
        });
        let cache = &*cache;
        let mut mixed = vec![0.0; n * heads * value];
        let chosen_of = |i: usize| chosen.as_ref().and_then(|chosen| chosen.get(i)).map(Vec::as_slice);
        let one = |(i, out): (usize, &mut [f32])| {
            self.attend(position + i, &q[i * heads * (nope + rope)..], cache, chosen_of(i), out);
        };
        mixed.par_chunks_exact_mut(heads * value).enumerate().for_each(one);
        self.o.apply(&mixed, n, out);
        if let (Some(seen), Some(chosen)) = (seen, chosen) {
            seen.extend(chosen);
        }
    }

    /// Writes latents and rotated keys.
    fn remember(&self, x: &[f32], n: usize, position: usize, turns: Option<&Turns>, cache: &mut LatentCache<'_>) {
        let (rank, row) = (self.shape.rank, self.row());
        let down = self.kv_down.of(x, n);
        for run in runs(position, position + n) {
            let page = &mut written(&mut cache.pages[run.page])[cache.start + run.at * row..][..run.count * row];
            let own = down[run.offset * row..].chunks_exact(row);
            for ((offset, kept), down) in (run.offset..).zip(page.chunks_exact_mut(row)).zip(own) {
                self.kv_norm.apply(&mut kept[..rank], &down[..rank]);
                kept[rank..].copy_from_slice(&down[rank..]);
                if let Some(turns) = turns {
                    turns.rotate(&mut kept[rank..], offset);
                }
            }
        }
    }

    /// All heads at one position, over all positions before it or those chosen.
    fn attend(&self, position: usize, q: &[f32], cache: &LatentCache<'_>, chosen: Option<&[usize]>, out: &mut [f32]) {
        let LatentAttention {
            heads,
            rank,
            nope,
            rope,
            value,
            ..
        } = self.shape;
        let (row, level) = (self.row(), Level::best());
        let page = |run: &Run| &cache.pages[run.page].floats()[cache.start + run.at * row..][..run.count * row];
        let gathered: Vec<f32>;
        // Pieces of rows, each with how many positions lie before it.
        let (pieces, visible): (Vec<(usize, &[f32])>, usize) = match chosen {
            None => {
                let pieces = runs(0, position + 1).map(|run| (run.offset, page(&run)));
                (pieces.collect(), position + 1)
            }
            Some(chosen) => {
                let one = |at: &usize| runs(*at, at + 1).flat_map(|run| page(&run)).copied();
                gathered = chosen.iter().flat_map(one).collect();
                (vec![(0, &gathered[..])], chosen.len())
            }
        };
        assert!(q.len() >= heads * (nope + rope));
        assert!(self.kv_up.len() == heads * (nope + value) * rank && out.len() == heads * value);
        let mut carried = vec![0.0; heads * row];
        let mut scores = vec![0.0; heads * visible];
        let mut latent = vec![0.0; heads * rank];
        for (head, carried) in carried.chunks_exact_mut(row).enumerate() {
            let q = &q[head * (nope + rope)..][..nope + rope];
            // SAFETY: `q` has `nope` elements before the rotated ones, the head's rows of `kv_up` are at least
            // [nope, rank], and `carried` has room for `rank`.
            unsafe {
                let up = self.kv_up.as_ptr().add(head * (nope + value) * rank);
                mix(
                    level,
                    q.as_ptr(),
                    nope,
                    1,
                    nope,
                    up,
                    rank,
                    rank,
                    carried.as_mut_ptr(),
                    rank,
                );
            }
            carried[rank..].copy_from_slice(&q[nope..]);
        }
        for (offset, rows) in &pieces {
            // SAFETY: `carried` is [heads, row], `rows` [count, row], and scores [heads, visible], of which those of this
            // piece begin at its offset.
            unsafe {
                let (carried, scores) = (carried.as_ptr(), scores.as_mut_ptr().add(*offset));
                let count = rows.len() / row;
                strip_product(level, carried, heads, rows.as_ptr(), row, 0, count, scores, visible);
            }
        }
        let scale = self.shape.scale * self.shape.query_scale.map_or(1.0, |scale| scale.at(position));
        for scores in scores.chunks_exact_mut(visible) {
            scores.iter_mut().for_each(|score| *score *= scale);
            softmax(scores);
        }
        for (offset, rows) in &pieces {
            let count = rows.len() / row;
            // SAFETY: scores are [heads, visible], of which those of this piece begin at its offset; `rows` are [count,
            // row], whose first `rank` columns are the latent, and `latent` is [heads, rank].
            unsafe {
                let (scores, latent) = (scores.as_ptr().add(*offset), latent.as_mut_ptr());
                let rows = rows.as_ptr();
                mix(level, scores, visible, heads, count, rows, row, rank, latent, rank);
            }
        }
        for (head, out) in out.chunks_exact_mut(value).enumerate() {
            // SAFETY: one row of `rank`, [value, rank] rows of `kv_up`, and room for `value`.
            unsafe {
                let up = self.kv_up.as_ptr().add((head * (nope + value) + nope) * rank);
                let latent = latent.as_ptr().add(head * rank);
                strip_product(level, latent, 1, up, rank, 0, value, out.as_mut_ptr(), value);
            }
        }
    }
}
