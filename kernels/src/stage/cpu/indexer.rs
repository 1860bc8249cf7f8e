//! Chooses the positions that a query attends to: `Σ_h w_h · ReLU(q_h · k)`, and of those the largest.

use std::sync::Arc;

use rayon::prelude::*;

use super::dense::{Dense, LoadedNorm};
use super::elementwise::Turns;
use super::lanes::Level;
use super::matrix::Matrix;
use super::pages::{Page, written};
use super::product::strip_product;
use crate::model::describe::Indexer;
use crate::model::routing::largest;
use crate::stage::StageError;
use crate::stage::pages::runs;
use crate::stage::weights::PartReader;

/// The weights of one block's indexer.
#[derive(Debug)]
pub(in crate::stage) struct IndexerWeights {
    pub(in crate::stage) shape: Indexer,
    pub(in crate::stage) q: Dense,
    pub(in crate::stage) k: Dense,
    pub(in crate::stage) k_norm: LoadedNorm,
    pub(in crate::stage) weights: Dense,
}

impl IndexerWeights {
    pub(super) fn read(reader: &PartReader<'_>, shape: &Indexer) -> Result<Self, StageError> {
        Ok(Self {
            q: reader.dense(&shape.q)?,
            k: reader.dense(&shape.k)?,
            k_norm: reader.norm(&shape.k_norm)?,
            weights: reader.dense(&shape.weights)?,
            shape: shape.clone(),
        })
    }

    /// All that is multiplied with.
    pub(super) fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        [&self.q, &self.k, &self.weights].into_iter().map(|dense| &dense.weight)
    }

    pub(super) const fn head_dim(&self) -> usize {
        self.shape.head_dim
    }

    /// Writes the keys of the `n` rows `x` at `position ..` into the pages, `[PAGE_POSITIONS, head_dim]` from `start` on.
    pub(super) fn remember(
        &self,
        x: &[f32],
        n: usize,
        position: usize,
        turns: &[Turns],
        pages: &mut [Arc<Page>],
        start: usize,
    ) {
        let width = self.shape.head_dim;
        let mut keys = self.k_norm.of(&self.k.of(x, n));
        if let Some(turns) = turns.get(self.shape.rotary) {
            for (offset, key) in keys.chunks_exact_mut(width).enumerate() {
                turns.rotate(key, offset);
            }
        }
        for run in runs(position, position + n) {
            let page = &mut written(&mut pages[run.page])[start + run.at * width..][..run.count * width];
            page.copy_from_slice(&keys[run.offset * width..][..run.count * width]);
        }
    }

    /// The positions of each row, ascending; of equal scores the earlier. `latent` is what queries are made from.
    #[expect(clippy::too_many_arguments, reason = "what an indexer works on")]
    pub(super) fn choose(
        &self,
        x: &[f32],
        latent: &[f32],
        n: usize,
        position: usize,
        turns: &[Turns],
        pages: &[Arc<Page>],
        start: usize,
    ) -> Vec<Vec<usize>> {
        let Indexer { heads, head_dim, .. } = self.shape;
        let mut q = self.q.of(latent, n);
        if let Some(turns) = turns.get(self.shape.rotary) {
            for (index, head) in q.chunks_exact_mut(head_dim).enumerate() {
                turns.rotate(head, index / heads);
            }
        }
        let weights = self.weights.of(x, n);
        let rows = q
            .par_chunks_exact(heads * head_dim)
            .zip(weights.par_chunks_exact(heads));
        rows.enumerate()
            .map(|(i, (q, weights))| self.choose_one(position + i + 1, q, weights, pages, start))
            .collect()
    }

    fn choose_one(&self, visible: usize, q: &[f32], weights: &[f32], pages: &[Arc<Page>], start: usize) -> Vec<usize> {
        let Indexer {
            heads, head_dim, top, ..
        } = self.shape;
        if visible <= top {
            return (0..visible).collect();
        }
        assert!(q.len() == heads * head_dim);
        let mut products = vec![0.0; heads * visible];
        for run in runs(0, visible) {
            let keys = &pages[run.page].floats()[start + run.at * head_dim..][..run.count * head_dim];
            // SAFETY: `q` is [heads, head_dim], `keys` [count, head_dim], and `products` [heads, visible], of which those
            // of this run begin at its offset.
            unsafe {
                let (q, keys) = (q.as_ptr(), keys.as_ptr());
                let products = products.as_mut_ptr().add(run.offset);
                strip_product(Level::best(), q, heads, keys, head_dim, 0, run.count, products, visible);
            }
        }
        let (scale, share) = ((head_dim as f32).powf(-0.5), (heads as f32).powf(-0.5));
        let mut scores = vec![0.0f32; visible];
        for (products, weight) in products.chunks_exact(visible).zip(weights) {
            for (score, product) in scores.iter_mut().zip(products) {
                *score += weight * share * (product * scale).max(0.0);
            }
        }
        choose(&scores, top)
    }
}

/// The positions of the `top` largest scores, ascending; of equal scores the earlier.
pub(in crate::stage) fn choose(scores: &[f32], top: usize) -> Vec<usize> {
    let mut chosen = largest(scores.iter().copied().enumerate(), top);
    chosen.sort_unstable();
    chosen
}
