//! Grouped-query attention over a cache of keys and values.

use std::sync::Arc;

use super::attention::{Cache, Shape};
use super::dense::{Dense, LoadedNorm, together};
use super::elementwise::Turns;
use super::matrix::Matrix;
use super::pages::Page;
use crate::model::describe::Attention;
use crate::stage::StageError;
use crate::stage::weights::PartReader;

/// The weights of one block's attention.
#[derive(Debug)]
pub(in crate::stage) struct GroupedWeights {
    pub(in crate::stage) shape: Attention,
    pub(in crate::stage) q: Dense,
    pub(in crate::stage) k: Dense,
    pub(in crate::stage) v: Dense,
    pub(in crate::stage) o: Dense,
    pub(in crate::stage) q_norm: Option<LoadedNorm>,
    pub(in crate::stage) k_norm: Option<LoadedNorm>,
}

impl GroupedWeights {
    pub(in crate::stage) fn read(reader: &PartReader<'_>, shape: &Attention) -> Result<Self, StageError> {
        let norm = |norm: &Option<_>| norm.as_ref().map(|norm| reader.norm(norm)).transpose();
        Ok(Self {
            q: reader.dense(&shape.q)?,
            k: reader.dense(&shape.k)?,
            v: reader.dense(&shape.v)?,
            o: reader.dense(&shape.o)?,
            q_norm: norm(&shape.q_norm)?,
            k_norm: norm(&shape.k_norm)?,
            shape: shape.clone(),
        })
    }

    /// All that is multiplied with.
    pub(super) fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        [&self.q, &self.k, &self.v, &self.o]
            .into_iter()
            .map(|dense| &dense.weight)
    }

    /// Numbers that are kept of a position.
    pub(super) const fn position_floats(&self) -> usize {
        2 * self.shape.kv_heads * self.shape.head_dim
    }

    /// Attends from normed rows `x`, those of each session in turn.
    pub(super) fn forward(&self, x: &[f32], n: usize, sessions: &mut [Attending<'_>], out: &mut [f32]) {
        let Attention {
            heads,
            kv_heads,
            head_dim,
            ..
        } = self.shape;
        let (mut q, mut mixed) = (vec![0.0; n * heads * head_dim], vec![0.0; n * heads * head_dim]);
        let (mut k, mut v) = (vec![0.0; n * kv_heads * head_dim], vec![0.0; n * kv_heads * head_dim]);
        together(
            x,
            n,
            [(&self.q, &mut q[..]), (&self.k, &mut k[..]), (&self.v, &mut v[..])],
        );
        if let Some(norm) = &self.q_norm {
            q = norm.of(&q);
        }
        if let Some(norm) = &self.k_norm {
            k = norm.of(&k);
        }
        let mut first = 0;
        for session in sessions {
            let own = |width: usize| first * width..(first + session.rows) * width;
            let (q_rows, k_rows) = (own(heads * head_dim), own(kv_heads * head_dim));
            first += session.rows;
            let (q, mixed) = (&mut q[q_rows.clone()], &mut mixed[q_rows]);
            let (k, v) = (&mut k[k_rows.clone()], &v[k_rows]);
            if let Some(turns) = self.shape.rotary.and_then(|rotary| session.turns.get(rotary)) {
                for (rows, heads) in [(&mut *q, heads), (&mut *k, kv_heads)] {
                    for (index, head) in rows.chunks_exact_mut(head_dim).enumerate() {
                        turns.rotate(head, index / heads);
                    }
                }
            }
            if let Some(scale) = self.shape.query_scale {
                for (offset, row) in q.chunks_exact_mut(heads * head_dim).enumerate() {
                    let factor = scale.at(session.position + offset);
                    row.iter_mut().for_each(|q| *q *= factor);
                }
            }
            let mut cache = Cache {
                shape: Shape {
                    heads,
                    kv_heads,
                    head_dim,
                    window: self.shape.window,
                    scale: self.shape.scale,
                },
                pages: &mut *session.pages,
                start: session.start,
            };
            cache.write(session.position, k, v);
            cache.attend(session.position, q, mixed);
        }
        self.o.apply(&mixed, n, out);
    }
}

/// Rows of one session that attend to what the session has kept.
pub(super) struct Attending<'a> {
    /// The session's, ready for these rows.
    pub(super) pages: &'a mut [Arc<Page>],
    /// Where the sublayer's part begins in a page.
    pub(super) start: usize,
    /// Of the first row.
    pub(super) position: usize,
    pub(super) rows: usize,
    /// By rotation, from the first row on.
    pub(super) turns: &'a [Turns],
}
