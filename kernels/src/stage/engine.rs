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
pub(super) enum Engine {
    Cpu(cpu::Engine, BTreeMap<u64, cpu::Sequence>),
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
        Ok(Self::Cpu(engine, BTreeMap::new()))
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

    /// Makes room for `capacity` positions of a session that is not open; `bytes` are what they take.
    pub(super) fn open(&mut self, session: u64, capacity: usize, bytes: u64) -> Result<(), StageError> {
        match self {
            Self::Cpu(engine, sequences) => {
                let sequence = engine.sequence(capacity);
                sequences.insert(session, sequence.ok_or(StageError::Memory { bytes, free: 0 })?);
            }
            Self::Tensors(engine, sequences) => {
                sequences.insert(session, engine.sequence(capacity, bytes)?);
            }
        }
        Ok(())
    }

    /// Frees a session's room.
    pub(super) fn close(&mut self, session: u64) {
        match self {
            Self::Cpu(_, sequences) => drop(sequences.remove(&session)),
            Self::Tensors(_, sequences) => drop(sequences.remove(&session)),
        }
    }

    /// The earliest position, besides zero, from which a session can go on.
    pub(super) fn earliest(&self, session: u64) -> usize {
        match self {
            Self::Cpu(_, sequences) => sequences.get(&session).map_or(0, cpu::Sequence::earliest),
            Self::Tensors(..) => 0,
        }
    }

    /// Runs positions `position ..`, and traces them on the CPU. The caller has checked tokens, lengths and room.
    pub(super) fn forward(
        &mut self,
        session: u64,
        position: usize,
        input: Input<'_>,
        want: Want,
        trace: Option<&mut Trace>,
    ) -> Result<Output, StageError> {
        let closed = StageError::NoSession { session };
        match self {
            Self::Cpu(engine, sequences) => {
                let sequence = sequences.get_mut(&session).ok_or(closed)?;
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
        let Self::Cpu(engine, sequences) = self else {
            let steps = steps.iter();
            return steps
                .map(|(session, position, input)| self.forward(*session, *position, *input, want, None))
                .collect();
        };
        let mut x = Vec::new();
        let mut taken = Vec::with_capacity(steps.len());
        for (session, position, input) in steps {
            let before = x.len();
            match input {
                Input::Tokens(tokens) => x.extend(engine.embed(tokens)),
                Input::Hidden(hidden) => x.extend_from_slice(hidden),
            }
            let rows = (x.len() - before) / engine.hidden();
            let sequence = sequences.remove(session);
            taken.push((*session, *position, rows, sequence));
        }
        let spans = taken.iter_mut().filter_map(|(_, position, rows, sequence)| {
            Some(cpu::Span {
                sequence: sequence.as_mut()?,
                position: *position,
                rows: *rows,
            })
        });
        let mut spans: Vec<_> = spans.collect();
        let outputs = match (spans.len() == steps.len(), steps.first()) {
            (true, _) => Ok(engine.forward_together(&mut spans, x, want)),
            (false, Some((session, ..))) => Err(StageError::NoSession { session: *session }),
            (false, None) => Ok(Vec::new()),
        };
        for (session, _, _, sequence) in taken {
            if let Some(sequence) = sequence {
                sequences.insert(session, sequence);
            }
        }
        outputs
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
