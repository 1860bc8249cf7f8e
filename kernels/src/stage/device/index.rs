//! Chooses the positions that a query attends to: the device scores them, and the host takes the largest, as it does for the
//! CPU.

use super::block::Batch;
use super::upload::{Dense, Upload};
use crate::device::cube::{CubeError, Floats, NormOnDevice, Rotated, ScoredHeads};
use crate::model::describe::Indexer;
use crate::stage::StageError;
use crate::stage::cpu::{IndexerWeights, choose};

/// Scores that are made at once.
const SCORES_MAX: usize = 16 << 20;

#[derive(Debug)]
pub(super) struct Index {
    shape: Indexer,
    q: Dense,
    k: Dense,
    k_norm: NormOnDevice,
    weights: Dense,
}

impl Index {
    pub(super) fn upload(upload: &Upload<'_>, weights: &IndexerWeights) -> Result<Self, StageError> {
        Ok(Self {
            q: upload.dense(&weights.q)?,
            k: upload.dense(&weights.k)?,
            k_norm: upload.norm(&weights.k_norm),
            weights: upload.dense(&weights.weights)?,
            shape: weights.shape.clone(),
        })
    }

    /// The positions of each row, ascending, of `x` `[n, hidden]` and the latents `[n, rank]` that queries are made from.
    /// `cache` takes the rows' keys.
    pub(super) fn choose(
        &self,
        batch: &Batch<'_>,
        x: &Floats,
        latent: &Floats,
        cache: &Floats,
    ) -> Result<Vec<Vec<usize>>, CubeError> {
        let cubes = batch.cubes;
        let Indexer {
            heads, head_dim, top, ..
        } = self.shape;
        let keys = cubes.add_and_normalise(&self.k.of(cubes, x)?, None, &self.k_norm)?;
        let turns = batch.turns.get(self.shape.rotary);
        let rotate = |rows: &Floats, heads: usize| match turns {
            Some(turns) => cubes.rotate(
                rows,
                turns,
                Rotated {
                    heads,
                    head_dim,
                    first: 0,
                },
            ),
            None => Ok(()),
        };
        rotate(&keys, 1)?;
        cubes.append(&keys, cache, batch.places, head_dim)?;
        let most = batch.positions.iter().max().map_or(0, |position| position + 1);
        if most <= top {
            return Ok(batch
                .positions
                .iter()
                .map(|position| (0..=*position).collect())
                .collect());
        }
        let q = self.q.of(cubes, latent)?;
        rotate(&q, heads)?;
        let weights = self.weights.of(cubes, x)?;
        let shape = ScoredHeads { heads, head_dim };
        let (n, step) = (batch.positions.len(), (SCORES_MAX / most).max(1));
        let mut chosen = Vec::with_capacity(n);
        for first in (0..n).step_by(step) {
            let rows = first..(first + step).min(n);
            let scores = cubes.score_positions(shape, &q, &weights, cache, batch.places, rows.clone())?;
            let scores = cubes.read(&scores)?;
            let own = batch.positions.iter().skip(rows.start).zip(scores.chunks_exact(most));
            chosen.extend(own.map(|(position, scores)| choose(scores.get(..=*position).unwrap_or(scores), top)));
        }
        Ok(chosen)
    }
}
