//! The two ways of computing a stage: plain loops on the CPU, and our own kernels on a graphics device.

use polder_protocol::layout::BlockRange;
use polder_protocol::work::Weights;

use super::cpu::Trace;
use super::further::FurtherWeights;
use super::sessions::Sessions;
use super::weights::StageWeights;
use super::{Input, Output, StageError, Want, cpu};
#[cfg(feature = "gpu")]
use super::{SESSIONS_MAX, device, pages::Pool};
use crate::device::Device;
use crate::model::Config;

/// A stage's weights and its sessions' caches.
#[derive(Debug)]
pub(super) enum Engine {
    Cpu(Box<cpu::Engine>, Sessions<cpu::Sequence>),
    #[cfg(feature = "gpu")]
    Device(Box<device::Engine>, Box<Sessions<device::Sequence>>),
}

/// Does the same with the engine and the sessions of either kind.
macro_rules! either {
    ($own:expr, ($engine:pat, $sessions:pat) => $work:expr) => {
        match $own {
            Engine::Cpu($engine, $sessions) => $work,
            #[cfg(feature = "gpu")]
            Engine::Device($engine, $sessions) => $work,
        }
    };
}

impl Engine {
    /// Brings weights where they are computed with. `read` gives them in a form; a device takes them as they are stored,
    /// whatever `form` says.
    pub(super) fn new(
        config: &Config,
        range: BlockRange,
        form: Weights,
        device: &Device,
        read: impl Fn(Weights) -> Result<StageWeights, StageError>,
    ) -> Result<Self, StageError> {
        if !device.is_cpu() {
            match Self::on_device(config, range, device, &read)? {
                Ok(engine) => return Ok(engine),
                Err(lacking) => tracing::warn!(%device, lacking, "the CPU serves what the device cannot"),
            }
        }
        let engine = cpu::Engine::new(config.clone(), range, read(form)?);
        let sessions = Sessions::new(engine.pool(), engine.state_bytes());
        Ok(Self::Cpu(Box::new(engine), sessions))
    }

    /// A stage on a device, or what is lacking there.
    #[cfg(feature = "gpu")]
    fn on_device(
        config: &Config,
        range: BlockRange,
        device: &Device,
        read: impl Fn(Weights) -> Result<StageWeights, StageError>,
    ) -> Result<Result<Self, String>, StageError> {
        use device::Refusal;

        let engine = match device::Engine::covers(config, range, device) {
            Ok(()) => device::Engine::upload(config, range, read(Weights::Packed)?, device),
            Err(refusal) => Err(refusal),
        };
        match engine {
            Ok(engine) => {
                let sessions = Sessions::new(Pool::new(engine.pages(device)), engine.state_bytes());
                Ok(Ok(Self::Device(Box::new(engine), Box::new(sessions))))
            }
            Err(Refusal::Lacking(lacking)) => Ok(Err(lacking)),
            Err(Refusal::Failed(error)) => Err(error),
        }
    }

    #[cfg(not(feature = "gpu"))]
    fn on_device(
        _: &Config,
        _: BlockRange,
        _: &Device,
        _: impl Fn(Weights) -> Result<StageWeights, StageError>,
    ) -> Result<Result<Self, String>, StageError> {
        Ok(Err(
            "this build has no kernels of ours: it was made without the feature `gpu`".to_owned(),
        ))
    }

    /// Whether the CPU computes.
    pub(super) const fn is_on_cpu(&self) -> bool {
        matches!(self, Self::Cpu(..))
    }

    /// Bytes that the weights take.
    pub(super) fn bytes(&self) -> u64 {
        either!(self, (engine, _) => engine.bytes())
    }

    /// Bytes that a session of so many positions takes.
    pub(super) fn sequence_bytes(&self, capacity: u64) -> u64 {
        match self {
            Self::Cpu(engine, _) => engine.sequence_bytes(capacity),
            #[cfg(feature = "gpu")]
            Self::Device(engine, sessions) => sessions.store().sequence_bytes(capacity) + engine.state_bytes(),
        }
    }

    /// Bytes that the caches of all sessions can take together, whatever they may.
    pub(super) fn cache_bytes_most(&self) -> u64 {
        match self {
            Self::Cpu(..) => u64::MAX,
            #[cfg(feature = "gpu")]
            Self::Device(engine, sessions) => {
                let states = engine.state_bytes().saturating_mul(SESSIONS_MAX as u64);
                sessions.store().bytes_most().saturating_add(states)
            }
        }
    }

    /// Sets how many bytes the caches of all sessions may take together.
    pub(super) fn set_cache_bytes_max(&mut self, bytes: u64) {
        either!(self, (_, sessions) => sessions.set_bytes_max(bytes));
    }

    /// Bytes that caches take now.
    pub(super) fn cache_bytes(&self) -> u64 {
        either!(self, (_, sessions) => sessions.bytes())
    }

    /// Opens a session that is not open.
    pub(super) fn open(&mut self, session: u64) {
        either!(self, (engine, sessions) => sessions.open(session, engine.sequence()));
    }

    /// As [`Engine::open`], going on from the first `positions` of another session, which has `reached` so many if it is
    /// open. Tells how many positions were taken over.
    pub(super) fn open_from(&mut self, session: u64, from: u64, reached: usize, positions: usize) -> usize {
        either!(self, (engine, sessions) => {
            sessions.open_from(session, from, reached, positions, || engine.sequence())
        })
    }

    /// Frees a session's room.
    pub(super) fn close(&mut self, session: u64) {
        either!(self, (_, sessions) => sessions.close(session));
    }

    /// Ends a session of `reached` positions, which are kept in their pages until there is need of the room.
    pub(super) fn end(&mut self, session: u64, reached: usize) {
        either!(self, (_, sessions) => sessions.end(session, reached));
    }

    /// Frees what a session holds from `position` on.
    pub(super) fn truncate(&mut self, session: u64, position: usize) {
        either!(self, (_, sessions) => sessions.truncate(session, position));
    }

    /// The earliest position, besides zero, from which a session can go on.
    pub(super) fn earliest(&self, session: u64) -> usize {
        either!(self, (_, sessions) => sessions.earliest(session))
    }

    /// Runs positions `position .. end`, and traces them. The caller has checked tokens, lengths and room.
    pub(super) fn forward(
        &mut self,
        session: u64,
        (position, end): (usize, usize),
        input: Input<'_>,
        want: Want,
        trace: Option<&mut Trace>,
    ) -> Result<Output, StageError> {
        match self {
            Self::Cpu(engine, sessions) => {
                let sequence = sessions.ready(session, position, end)?;
                Ok(engine.forward(sequence, position, input, want, trace))
            }
            // On the caller's thread: a device's orders follow the thread that gives them.
            #[cfg(feature = "gpu")]
            Self::Device(..) => {
                let mut outputs = self.run_together(&[(session, position, input)], want, trace)?;
                outputs.pop().ok_or(StageError::NoSession { session })
            }
        }
    }

    /// Runs rows of several sessions, `(session, position, input)` each, as one batch. The caller has checked tokens, lengths
    /// and room, and that no session comes twice.
    pub(super) fn forward_together(
        &mut self,
        steps: &[(u64, usize, Input<'_>)],
        want: Want,
    ) -> Result<Vec<Output>, StageError> {
        self.run_together(steps, want, None)
    }

    /// `trace` takes what happens on a device where there is one session.
    #[cfg_attr(
        not(feature = "gpu"),
        expect(unused_variables, reason = "the CPU's engine traces elsewhere")
    )]
    fn run_together(
        &mut self,
        steps: &[(u64, usize, Input<'_>)],
        want: Want,
        trace: Option<&mut Trace>,
    ) -> Result<Vec<Output>, StageError> {
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
            Self::Device(engine, sessions) => {
                sessions.together(&rows, |pages, spans| engine.forward(pages, spans, &x, want, trace))?
            }
        }
    }

    /// Width of the activations.
    fn hidden(&self) -> usize {
        either!(self, (engine, _) => engine.hidden())
    }

    /// The final norm of activations, at a stage with the head; on the host.
    pub(super) fn final_norm(&self, x: &[f32]) -> Option<Vec<f32>> {
        either!(self, (engine, _) => engine.final_norm(x))
    }

    /// The embeddings of tokens, `[seq, hidden]`, at a stage with them.
    pub(super) fn embed(&self, tokens: &[u32]) -> Vec<f32> {
        either!(self, (engine, _) => engine.embed(tokens))
    }

    /// Logits of the token after the next; the CPU's engine alone has them.
    pub(super) fn further(&self, weights: &FurtherWeights, normed: &[f32], next: &[u32]) -> Option<Vec<f32>> {
        match self {
            Self::Cpu(engine, _) => engine.further(weights, normed, next),
            #[cfg(feature = "gpu")]
            Self::Device(..) => None,
        }
    }
}
