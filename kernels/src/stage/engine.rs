//! The two ways of computing a stage: plain loops on the CPU, tensors on any other device.

use std::collections::BTreeMap;

use polder_protocol::layout::BlockRange;

use super::cpu::Trace;
use super::further::FurtherWeights;
use super::weights::StageWeights;
use super::{Input, Output, StageError, Want, cpu, tensors};
use crate::device::Device;
use crate::model::Config;

/// A stage's weights and its sessions' caches.
#[derive(Debug)]
#[cfg_attr(
    feature = "gpu",
    expect(
        clippy::large_enum_variant,
        reason = "a worker has a few stages and moves none of them"
    )
)]
pub(super) enum Engine {
    Cpu(cpu::Engine, cpu::Sessions),
    Tensors(tensors::Engine, BTreeMap<u64, tensors::Sequence>),
}

impl Engine {
    /// Whether a model is computed in tensors on this device.
    pub(super) fn in_tensors(config: &Config, device: &Device) -> bool {
        !device.is_cpu() && tensors::Shape::of(config).is_ok()
    }

    /// Brings weights where they are computed with.
    pub(super) fn new(
        config: &Config,
        range: BlockRange,
        read: StageWeights,
        device: &Device,
    ) -> Result<Self, StageError> {
        if !device.is_cpu() {
            match tensors::Shape::of(config) {
                Ok(shape) => {
                    let engine = tensors::Engine::upload(shape, range, read, device)?;
                    return Ok(Self::Tensors(engine, BTreeMap::new()));
                }
                Err(lacking) => tracing::warn!(%device, lacking, "the CPU serves what the device cannot yet"),
            }
        }
        let engine = cpu::Engine::new(config.clone(), range, read);
        let sessions = cpu::Sessions::of(&engine);
        Ok(Self::Cpu(engine, sessions))
    }

    /// Bytes that the weights take.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Cpu(engine, _) => engine.bytes(),
            Self::Tensors(engine, _) => engine.bytes(),
        }
    }

    /// Bytes that a session of so many positions takes.
    pub(super) fn sequence_bytes(&self, capacity: u64) -> u64 {
        match self {
            Self::Cpu(engine, _) => engine.sequence_bytes(capacity),
            Self::Tensors(engine, _) => engine.sequence_bytes(capacity),
        }
    }

    /// Sets how many bytes the caches of all sessions may take together.
    pub(super) fn set_cache_bytes_max(&mut self, bytes: u64) {
        if let Self::Cpu(_, sessions) = self {
            sessions.set_bytes_max(bytes);
        }
    }

    /// Bytes that caches take now; `None` where that is not known.
    pub(super) fn cache_bytes(&self) -> Option<u64> {
        match self {
            Self::Cpu(_, sessions) => Some(sessions.bytes()),
            Self::Tensors(..) => None,
        }
    }

    /// Makes room for `capacity` positions of a session that is not open; `bytes` are what they take.
    pub(super) fn open(&mut self, session: u64, capacity: usize, bytes: u64) -> Result<(), StageError> {
        match self {
            Self::Cpu(engine, sessions) => sessions.open(engine, session),
            Self::Tensors(engine, sequences) => {
                sequences.insert(session, engine.sequence(capacity, bytes)?);
            }
        }
        Ok(())
    }

    /// As [`Engine::open`], going on from the first `positions` of another session, which has `reached` so many if it is
    /// open. Tells how many positions were taken over. Only the CPU shares them.
    pub(super) fn open_from(
        &mut self,
        session: u64,
        capacity: usize,
        bytes: u64,
        from: u64,
        reached: usize,
        positions: usize,
    ) -> Result<usize, StageError> {
        match self {
            Self::Cpu(engine, sessions) => Ok(sessions.open_from(engine, session, from, reached, positions)),
            Self::Tensors(..) => self.open(session, capacity, bytes).map(|()| 0),
        }
    }

    /// Frees a session's room.
    pub(super) fn close(&mut self, session: u64) {
        match self {
            Self::Cpu(_, sessions) => sessions.close(session),
            Self::Tensors(_, sequences) => drop(sequences.remove(&session)),
        }
    }

    /// Ends a session of `reached` positions, which the CPU keeps until there is need of the room.
    pub(super) fn end(&mut self, session: u64, reached: usize) {
        match self {
            Self::Cpu(_, sessions) => sessions.end(session, reached),
            Self::Tensors(..) => self.close(session),
        }
    }

    /// Frees what a session holds from `position` on, where it is held in pages.
    pub(super) fn truncate(&mut self, session: u64, position: usize) {
        if let Self::Cpu(_, sessions) = self {
            sessions.truncate(session, position);
        }
    }

    /// The earliest position, besides zero, from which a session can go on.
    pub(super) fn earliest(&self, session: u64) -> usize {
        match self {
            Self::Cpu(_, sessions) => sessions.earliest(session),
            Self::Tensors(..) => 0,
        }
    }

    /// Runs positions `position .. end`, and traces them on the CPU. The caller has checked tokens, lengths and room.
    pub(super) fn forward(
        &mut self,
        session: u64,
        (position, end): (usize, usize),
        input: Input<'_>,
        want: Want,
        trace: Option<&mut Trace>,
    ) -> Result<Output, StageError> {
        let closed = StageError::NoSession { session };
        match self {
            Self::Cpu(engine, sessions) => {
                let sequence = sessions.ready(session, position, end)?;
                Ok(engine.forward(sequence, position, input, want, trace))
            }
            // On the caller's thread: a device's orders follow the thread that gives them.
            Self::Tensors(engine, sequences) => {
                let sequence = sequences.get_mut(&session).ok_or(closed)?;
                engine.forward(sequence, position, input, want)
            }
        }
    }

    /// Runs rows of several sessions, `(session, position, input)` each. On the CPU they are one batch. The caller has
    /// checked tokens, lengths and room, and that no session comes twice.
    pub(super) fn forward_together(
        &mut self,
        steps: &[(u64, usize, Input<'_>)],
        want: Want,
    ) -> Result<Vec<Output>, StageError> {
        let Self::Cpu(engine, sessions) = self else {
            let steps = steps.iter();
            return steps
                .map(|(session, position, input)| self.forward(*session, (*position, 0), *input, want, None))
                .collect();
        };
        let (mut x, mut rows) = (Vec::new(), Vec::with_capacity(steps.len()));
        for (.., input) in steps {
            let before = x.len();
            match input {
                Input::Tokens(tokens) => x.extend(engine.embed(tokens)),
                Input::Hidden(hidden) => x.extend_from_slice(hidden),
            }
            rows.push((x.len() - before) / engine.hidden());
        }
        sessions.together(steps, &rows, |spans| engine.forward_together(spans, x, want))
    }

    /// The final norm of activations, at a stage with the head, on the CPU.
    pub(super) fn final_norm(&self, x: &[f32]) -> Option<Vec<f32>> {
        match self {
            Self::Cpu(engine, _) => engine.final_norm(x),
            Self::Tensors(..) => None,
        }
    }

    /// The embeddings of tokens, `[seq, hidden]`, at a stage with them.
    pub(super) fn embed(&self, tokens: &[u32]) -> Vec<f32> {
        match self {
            Self::Cpu(engine, _) => engine.embed(tokens),
            Self::Tensors(engine, _) => engine.embed(tokens),
        }
    }

    /// Logits of the token after the next, on the CPU.
    pub(super) fn further(&self, weights: &FurtherWeights, normed: &[f32], next: &[u32]) -> Option<Vec<f32>> {
        match self {
            Self::Cpu(engine, _) => engine.further(weights, normed, next),
            Self::Tensors(..) => None,
        }
    }
}
