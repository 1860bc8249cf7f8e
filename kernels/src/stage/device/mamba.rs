//! Mamba: the projections are the device's; what lies between, a recurrence over positions that keeps a state of every
//! session, is the host's, with the bits that the CPU has. The host waits for the device once a block.

use super::block::Batch;
use super::engine::Sequence;
use super::upload::{Dense, Upload};
use crate::device::cube::{CubeError, Floats};
use crate::stage::StageError;
use crate::stage::cpu::{MambaWeights, Recurrence};
use crate::stage::sessions::Span;

#[derive(Debug)]
pub(super) struct Mamba {
    in_proj: Dense,
    recurrence: Recurrence,
    out_proj: Dense,
    /// Which of a sequence's states.
    state: usize,
}

impl Mamba {
    pub(super) fn upload(upload: &Upload<'_>, weights: &MambaWeights, state: usize) -> Result<Self, StageError> {
        Ok(Self {
            in_proj: upload.dense(&weights.in_proj)?,
            recurrence: weights.recurrence.clone(),
            out_proj: upload.dense(&weights.out_proj)?,
            state,
        })
    }

    /// What the host computes.
    pub(super) const fn recurrence(&self) -> &Recurrence {
        &self.recurrence
    }

    /// Of normed rows `[n, hidden]`.
    pub(super) fn of(
        &self,
        batch: &Batch<'_>,
        spans: &mut [Span<'_, Sequence>],
        x: &Floats,
    ) -> Result<Floats, CubeError> {
        let cubes = batch.cubes;
        let projected = cubes.read(&self.in_proj.of(cubes, x)?)?;
        let width = projected.len() / batch.positions.len().max(1);
        let mut rest = &projected[..];
        let mut mixed = Vec::new();
        for piece in batch.pieces {
            let (own, others) = rest.split_at_checked(piece.rows * width).unwrap_or((rest, &[]));
            rest = others;
            let span = spans.get_mut(piece.session);
            // A sequence is made by the engine that it is used with.
            if let Some(state) = span.and_then(|span| span.sequence.states.get_mut(self.state)) {
                mixed.extend(self.recurrence.forward(own, piece.rows, piece.position, state));
            }
        }
        self.out_proj.of(cubes, &cubes.upload(&mixed))
    }
}
