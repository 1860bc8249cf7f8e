//! Grouped-query attention over a cache of keys and values in pages.

use super::block::{Batch, scale_queries};
use super::upload::{Dense, Upload};
use crate::device::cube::{AttentionShape, CubeError, Floats, NormOnDevice, Rotated};
use crate::model::describe::QueryScale;
use crate::stage::StageError;
use crate::stage::cpu::GroupedWeights;

#[derive(Debug)]
pub(super) struct Grouped {
    shape: AttentionShape,
    /// Which of the model's rotations.
    rotary: Option<usize>,
    query_scale: Option<QueryScale>,
    q: Dense,
    k: Dense,
    v: Dense,
    o: Dense,
    q_norm: Option<NormOnDevice>,
    k_norm: Option<NormOnDevice>,
    /// Which of the pages' caches.
    cache: usize,
}

impl Grouped {
    pub(super) fn upload(upload: &Upload<'_>, weights: &GroupedWeights, cache: usize) -> Result<Self, StageError> {
        let shape = &weights.shape;
        Ok(Self {
            shape: AttentionShape {
                heads: shape.heads,
                kv_heads: shape.kv_heads,
                head_dim: shape.head_dim,
                window: shape.window,
                scale: shape.scale,
            },
            rotary: shape.rotary,
            query_scale: shape.query_scale,
            q: upload.dense(&weights.q)?,
            k: upload.dense(&weights.k)?,
            v: upload.dense(&weights.v)?,
            o: upload.dense(&weights.o)?,
            q_norm: weights.q_norm.as_ref().map(|norm| upload.norm(norm)),
            k_norm: weights.k_norm.as_ref().map(|norm| upload.norm(norm)),
            cache,
        })
    }

    /// Attends from normed rows `[n, hidden]`.
    pub(super) fn of(&self, batch: &Batch<'_>, x: &Floats) -> Result<Floats, CubeError> {
        let cubes = batch.cubes;
        let AttentionShape {
            heads,
            kv_heads,
            head_dim,
            ..
        } = self.shape;
        let (mut q, mut k) = (self.q.of(cubes, x)?, self.k.of(cubes, x)?);
        let v = self.v.of(cubes, x)?;
        if let Some(norm) = &self.q_norm {
            q = cubes.add_and_normalise(&q, None, norm)?;
        }
        if let Some(norm) = &self.k_norm {
            k = cubes.add_and_normalise(&k, None, norm)?;
        }
        if let Some(turns) = self.rotary.and_then(|rotary| batch.turns.get(rotary)) {
            for (rows, heads) in [(&q, heads), (&k, kv_heads)] {
                let first = 0;
                cubes.rotate(rows, turns, Rotated { heads, head_dim, first })?;
            }
        }
        scale_queries(batch, self.query_scale, &q)?;
        let cache = batch.cache(self.cache)?;
        let width = kv_heads * head_dim;
        cubes.append(&k, &cache.keys, batch.places, width)?;
        cubes.append(&v, &cache.values, batch.places, width)?;
        let mixed = cubes.attend(self.shape, &q, &cache.keys, &cache.values, batch.places)?;
        self.o.of(cubes, &mixed)
    }
}
