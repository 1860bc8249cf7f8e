//! Attention over a compressed cache: of each position, a normed latent and one rotated key.
//!
//! As on the CPU keys are never made: a query is carried into the latent's space, where one cached row is the key of all
//! heads, and its latent their value.

use super::block::{Batch, scale_queries};
use super::index::Index;
use super::pages::Cache;
use super::upload::{Dense, Upload};
use crate::device::cube::{AttentionShape, Columns, CubeError, Floats, NormOnDevice, Rotated};
use crate::model::describe::LatentAttention;
use crate::stage::StageError;
use crate::stage::cpu::{LatentWeights, Query as LoadedQuery};

#[derive(Debug)]
pub(super) struct Latent {
    shape: LatentAttention,
    query: Query,
    kv_down: Dense,
    kv_norm: NormOnDevice,
    /// Carries queries into the latent's space, `[heads, nope, rank]`.
    into: Floats,
    /// Makes values of mixed latents, `[heads, rank, value]`.
    out_of: Floats,
    o: Dense,
    index: Option<Index>,
    /// Which of the pages' caches.
    cache: usize,
}

/// Where queries come from: the rows, or a normed latent of them.
#[derive(Debug)]
struct Query {
    low_rank: Option<(Dense, NormOnDevice)>,
    up: Dense,
}

impl Latent {
    pub(super) fn upload(upload: &Upload<'_>, weights: &LatentWeights, cache: usize) -> Result<Self, StageError> {
        let LatentAttention { rank, nope, value, .. } = weights.shape;
        let (mut into, mut out_of) = (Vec::new(), Vec::new());
        for head in weights.kv_up.chunks_exact(((nope + value) * rank).max(1)) {
            let (keys, values) = head.split_at(nope * rank);
            into.extend_from_slice(keys);
            let column = |column: usize| values.iter().skip(column).step_by(rank.max(1)).copied();
            out_of.extend((0..rank).flat_map(column));
        }
        Ok(Self {
            query: match &weights.query {
                LoadedQuery::Direct(up) => Query {
                    low_rank: None,
                    up: upload.dense(up)?,
                },
                LoadedQuery::LowRank(down, norm, up) => Query {
                    low_rank: Some((upload.dense(down)?, upload.norm(norm))),
                    up: upload.dense(up)?,
                },
            },
            kv_down: upload.dense(&weights.kv_down)?,
            kv_norm: upload.norm(&weights.kv_norm),
            into: upload.floats(&into),
            out_of: upload.floats(&out_of),
            o: upload.dense(&weights.o)?,
            index: weights
                .indexer
                .as_ref()
                .map(|index| Index::upload(upload, index))
                .transpose()?,
            cache,
            shape: weights.shape.clone(),
        })
    }

    /// Whether positions are chosen.
    pub(super) const fn chooses(&self) -> bool {
        self.index.is_some()
    }

    /// Attends from normed rows `[n, hidden]`; `seen` takes the positions chosen by each.
    pub(super) fn of(
        &self,
        batch: &Batch<'_>,
        x: &Floats,
        seen: Option<&mut Vec<Vec<usize>>>,
    ) -> Result<Floats, CubeError> {
        let (cubes, n) = (batch.cubes, batch.places.rows());
        let LatentAttention {
            heads,
            rank,
            nope,
            rope,
            value,
            scale,
            ..
        } = self.shape;
        let (query, row) = (nope + rope, rank + rope);
        let asking = match &self.query.low_rank {
            None => x.clone(),
            Some((down, norm)) => cubes.add_and_normalise(&down.of(cubes, x)?, None, norm)?,
        };
        let q = self.query.up.of(cubes, &asking)?;
        let down = self.kv_down.of(cubes, x)?;
        if let Some(turns) = batch.turns.get(self.shape.rotary) {
            let all = |heads, head_dim, first| Rotated { heads, head_dim, first };
            cubes.rotate(&q, turns, all(heads, query, nope))?;
            cubes.rotate(&down, turns, all(1, row, rank))?;
        }
        let part = |of, width, first| Columns { of, width, first };
        let latent = cubes.room(n * rank);
        cubes.copy_columns(part(&down, row, 0), part(&latent, rank, 0), n, rank)?;
        let latent = cubes.add_and_normalise(&latent, None, &self.kv_norm)?;
        cubes.copy_columns(part(&latent, rank, 0), part(&down, row, 0), n, rank)?;
        let Cache { keys, values: index } = batch.cache(self.cache)?;
        cubes.append(&down, keys, batch.places, row)?;
        let chosen = match &self.index {
            Some(own) => Some(own.choose(batch, x, &asking, index)?),
            None => None,
        };

        let carried = cubes.room(n * heads * row);
        cubes.multiply_heads((&q, query), &self.into, [heads, nope, rank], (&carried, row))?;
        cubes.copy_columns(part(&q, query, nope), part(&carried, row, rank), n * heads, rope)?;
        scale_queries(batch, self.shape.query_scale, &carried)?;
        let shape = AttentionShape {
            heads,
            kv_heads: 1,
            head_dim: row,
            window: None,
            scale,
        };
        // The rotated key is mixed too, and left out of what follows.
        let mixed = match &chosen {
            Some(chosen) => {
                let marked = cubes.choose(chosen, batch.places)?;
                cubes.attend_to_chosen(shape, &carried, keys, keys, batch.places, &marked)?
            }
            None => cubes.attend(shape, &carried, keys, keys, batch.places)?,
        };
        if let (Some(seen), Some(chosen)) = (seen, chosen) {
            seen.extend(chosen);
        }
        let values = cubes.room(n * heads * value);
        cubes.multiply_heads((&mixed, row), &self.out_of, [heads, rank, value], (&values, value))?;
        self.o.of(cubes, &values)
    }
}
