//! The ways of computing a stage: plain loops on the CPU, our own kernels on a graphics device, tensors on any.

use std::collections::BTreeMap;

use polder_protocol::layout::BlockRange;

use super::cpu::Trace;
use super::further::FurtherWeights;
use super::plain_llama::Shape;
use super::sessions::Sessions;
use super::weights::StageWeights;
use super::{Input, Output, StageError, Want, cpu, tensors};
#[cfg(feature = "gpu")]
use super::{packed, pages::Pool};
use crate::device::Device;
use crate::model::Config;

/// A stage's weights and its sessions' caches.
#[derive(Debug)]
pub(super) enum Engine {
    Cpu(Box<cpu::Engine>, Sessions<cpu::Sequence>),
    #[cfg(feature = "gpu")]
    Packed(Box<packed::Engine>, Box<Sessions<packed::Sequence>>),
    Tensors(Box<tensors::Engine>, BTreeMap<u64, tensors::Sequence>),
}

impl Engine {
    /// Whether a model is computed in tensors on this device.
    pub(super) fn in_tensors(config: &Config, device: &Device) -> bool {
        !device.is_cpu() && Shape::of(config).is_ok()
    }

    /// Brings weights where they are computed with.
    pub(super) fn new(
        config: &Config,
        range: BlockRange,
        read: StageWeights,
        device: &Device,
    ) -> Result<Self, StageError> {
        if !device.is_cpu() {
            match Shape::of(config) {
                Ok(shape) => {
                    #[cfg(feature = "gpu")]
                    if let Some(engine) = packed::Engine::upload(&shape, &read, device)? {
                        let engine = engine.with_embedding(read.embedding.filter(|_| range.has_embedding()));
                        let sessions = Sessions::new(Pool::new(engine.pages(device)), 0);
                        return Ok(Self::Packed(Box::new(engine), Box::new(sessions)));
                    }
                    let engine = tensors::Engine::upload(shape, range, read, device)?;
                    return Ok(Self::Tensors(Box::new(engine), BTreeMap::new()));
                }
                Err(lacking) => tracing::warn!(%device, lacking, "the CPU serves what the device cannot yet"),
            }
        }
        let engine = cpu::Engine::new(config.clone(), range, read);
        let sessions = Sessions::new(engine.pool(), engine.state_bytes());
        Ok(Self::Cpu(Box::new(engine), sessions))
    }

    /// Bytes that the weights take.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Cpu(engine, _) => engine.bytes(),
            #[cfg(feature = "gpu")]
            Self::Packed(engine, _) => engine.bytes(),
            Self::Tensors(engine, _) => engine.bytes(),
        }
    }

    /// Bytes that a session of so many positions takes.
    pub(super) fn sequence_bytes(&self, capacity: u64) -> u64 {
        match self {
            Self::Cpu(engine, _) => engine.sequence_bytes(capacity),
            #[cfg(feature = "gpu")]
            Self::Packed(_, sessions) => sessions.store().sequence_bytes(capacity),
            Self::Tensors(engine, _) => engine.sequence_bytes(capacity),
        }
    }

    /// Bytes that the caches of all sessions can take together, whatever they may.
    pub(super) fn cache_bytes_most(&self) -> u64 {
        match self {
            #[cfg(feature = "gpu")]
            Self::Packed(_, sessions) => sessions.store().bytes_most(),
            Self::Cpu(..) | Self::Tensors(..) => u64::MAX,
        }
    }

    /// Sets how many bytes the caches of all sessions may take together.
    pub(super) fn set_cache_bytes_max(&mut self, bytes: u64) {
        match self {
            Self::Cpu(_, sessions) => sessions.set_bytes_max(bytes),
            #[cfg(feature = "gpu")]
            Self::Packed(_, sessions) => sessions.set_bytes_max(bytes),
            Self::Tensors(..) => {}
        }
    }

    /// Bytes that caches take now; `None` where that is not known.
    pub(super) fn cache_bytes(&self) -> Option<u64> {
        match self {
            Self::Cpu(_, sessions) => Some(sessions.bytes()),
            #[cfg(feature = "gpu")]
            Self::Packed(_, sessions) => Some(sessions.bytes()),
            Self::Tensors(..) => None,
        }
    }

    /// Makes room for `capacity` positions of a session that is not open; `bytes` are what they take.
    pub(super) fn open(&mut self, session: u64, capacity: usize, bytes: u64) -> Result<(), StageError> {
        match self {
            Self::Cpu(engine, sessions) => sessions.open(session, engine.sequence()),
            #[cfg(feature = "gpu")]
            Self::Packed(_, sessions) => sessions.open(session, packed::Sequence::default()),
            Self::Tensors(engine, sequences) => {
                sequences.insert(session, engine.sequence(capacity, bytes)?);
            }
        }
        Ok(())
    }

    /// As [`Engine::open`], going on from the first `positions` of another session, which has `reached` so many if it is
    /// open. Tells how many positions were taken over: none where they are not held in pages.
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
            Self::Cpu(engine, sessions) => {
                Ok(sessions.open_from(session, from, reached, positions, || engine.sequence()))
            }
            #[cfg(feature = "gpu")]
            Self::Packed(_, sessions) => {
                Ok(sessions.open_from(session, from, reached, positions, packed::Sequence::default))
            }
            Self::Tensors(..) => self.open(session, capacity, bytes).map(|()| 0),
        }
    }

    /// Frees a session's room.
    pub(super) fn close(&mut self, session: u64) {
        match self {
            Self::Cpu(_, sessions) => sessions.close(session),
            #[cfg(feature = "gpu")]
            Self::Packed(_, sessions) => sessions.close(session),
            Self::Tensors(_, sequences) => drop(sequences.remove(&session)),
        }
    }

    /// Ends a session of `reached` positions, which are kept in their pages until there is need of the room.
    pub(super) fn end(&mut self, session: u64, reached: usize) {
        match self {
            Self::Cpu(_, sessions) => sessions.end(session, reached),
            #[cfg(feature = "gpu")]
            Self::Packed(_, sessions) => sessions.end(session, reached),
            Self::Tensors(..) => self.close(session),
        }
    }

    /// Frees what a session holds from `position` on, where it is held in pages.
    pub(super) fn truncate(&mut self, session: u64, position: usize) {
        match self {
            Self::Cpu(_, sessions) => sessions.truncate(session, position),
            #[cfg(feature = "gpu")]
            Self::Packed(_, sessions) => sessions.truncate(session, position),
            Self::Tensors(..) => {}
        }
    }

    /// The earliest position, besides zero, from which a session can go on.
    pub(super) fn earliest(&self, session: u64) -> usize {
        match self {
            Self::Cpu(_, sessions) => sessions.earliest(session),
            #[cfg(feature = "gpu")]
            Self::Packed(_, sessions) => sessions.earliest(session),
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
            #[cfg(feature = "gpu")]
            Self::Packed(..) => {
                let mut outputs = self.forward_together(&[(session, position, input)], want)?;
                outputs.pop().ok_or(closed)
            }
            // On the caller's thread: a device's orders follow the thread that gives them.
            Self::Tensors(engine, sequences) => {
                let sequence = sequences.get_mut(&session).ok_or(closed)?;
                engine.forward(sequence, position, input, want)
            }
        }
    }

    /// Runs rows of several sessions, `(session, position, input)` each, as one batch where sessions are held in pages. The
    /// caller has checked tokens, lengths and room, and that no session comes twice.
    pub(super) fn forward_together(
        &mut self,
        steps: &[(u64, usize, Input<'_>)],
        want: Want,
    ) -> Result<Vec<Output>, StageError> {
        if let Self::Tensors(..) = self {
            let steps = steps.iter();
            return steps
                .map(|(session, position, input)| self.forward(*session, (*position, 0), *input, want, None))
                .collect();
        }
        let (mut x, mut rows) = (Vec::new(), Vec::with_capacity(steps.len()));
        for (session, position, input) in steps {
            let before = x.len();
            match input {
                Input::Tokens(tokens) => x.extend(self.embed(tokens)),
                Input::Hidden(hidden) => x.extend_from_slice(hidden),
            }
            rows.push((*session, *position, (x.len() - before) / self.hidden()));
        }
        match self {
            Self::Cpu(engine, sessions) => sessions.together(&rows, |_, spans| engine.forward_together(spans, x, want)),
            #[cfg(feature = "gpu")]
            Self::Packed(engine, sessions) => {
                sessions.together(&rows, |pages, spans| engine.forward(pages, spans, &x, want))?
            }
            Self::Tensors(..) => Ok(Vec::new()), // Done above.
        }
    }

    /// Width of the activations.
    fn hidden(&self) -> usize {
        match self {
            Self::Cpu(engine, _) => engine.hidden(),
            #[cfg(feature = "gpu")]
            Self::Packed(engine, _) => engine.hidden(),
            Self::Tensors(engine, _) => engine.hidden(),
        }
    }

    /// The final norm of activations, at a stage with the head, on the CPU.
    pub(super) fn final_norm(&self, x: &[f32]) -> Option<Vec<f32>> {
        match self {
            Self::Cpu(engine, _) => engine.final_norm(x),
            _ => None,
        }
    }

    /// The embeddings of tokens, `[seq, hidden]`, at a stage with them.
    pub(super) fn embed(&self, tokens: &[u32]) -> Vec<f32> {
        match self {
            Self::Cpu(engine, _) => engine.embed(tokens),
            #[cfg(feature = "gpu")]
            Self::Packed(engine, _) => engine.embed(tokens),
            Self::Tensors(engine, _) => engine.embed(tokens),
        }
    }

    /// Logits of the token after the next, on the CPU.
    pub(super) fn further(&self, weights: &FurtherWeights, normed: &[f32], next: &[u32]) -> Option<Vec<f32>> {
        match self {
            Self::Cpu(engine, _) => engine.further(weights, normed, next),
            _ => None,
        }
    }
}
