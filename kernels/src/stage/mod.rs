//! Consecutive blocks of a model, loaded for serving: sessions, their caches, and the forward pass.

mod cpu;
#[cfg(feature = "gpu")]
mod device;
mod engine;
mod further;
mod pages;
mod sessions;
mod weights;

use std::collections::BTreeMap;
use std::path::Path;

use polder_protocol::layout::BlockRange;
use polder_protocol::work::Weights;
use thiserror::Error;

use crate::device::Device;
use crate::model::{Config, ConfigError};
use crate::weights::{Tensors, WeightsError, open as open_model};
pub(crate) use cpu::{Routing, Trace, curve, exp, expm1};
use engine::Engine;
use further::FurtherWeights;
use weights::StageWeights;

/// Sessions that one stage keeps at most.
pub const SESSIONS_MAX: usize = 1_024;

/// Why a stage was not loaded, or did not run. Nothing has changed then.
#[derive(Debug, Clone, Error, PartialEq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum StageError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("blocks {first} to {end} are not a range of a model of {blocks} blocks")]
    Range { first: u32, end: u32, blocks: u32 },
    #[error("the stage takes {expected} part files, not {found}")]
    PartCount { expected: usize, found: usize },
    #[error("part file {reason}")]
    Part { reason: String },
    #[error("no session {session} is open")]
    NoSession { session: u64 },
    #[error("{SESSIONS_MAX} sessions are open, which is the limit")]
    Full,
    #[error("{context} tokens of context exceed the model's {max}")]
    Context { context: u32, max: u32 },
    #[error("a cache of {bytes} bytes exceeds the {free} that are left for sessions")]
    Memory { bytes: u64, free: u64 },
    #[error("the session has {reached} positions; none can start at {position}")]
    Gap { position: u32, reached: u32 },
    #[error("the session's recurrent state goes back to position {earliest}, not to {position}; start again at 0")]
    Rewind { position: u32, earliest: u32 },
    #[error("{count} positions from {position} exceed the session's {room}")]
    Room { position: u32, count: usize, room: u32 },
    #[error("token {token} is not below {vocabulary}")]
    Token { token: u32, vocabulary: usize },
    #[error("an input of {values} values is not a positive number of rows of {hidden}")]
    Input { values: usize, hidden: usize },
    #[error("this stage takes {takes}")]
    Kind { takes: &'static str },
    #[error("session {session} comes twice in one batch")]
    Twice { session: u64 },
    #[error("the input holds numbers that are not finite")]
    NotFinite,
    #[error("the device has no room for {bytes} bytes of {what}")]
    DeviceMemory { what: &'static str, bytes: u64 },
    #[error("{what} of {bytes} bytes exceeds the device's largest buffer of {limit}")]
    DeviceBuffer { what: &'static str, bytes: u64, limit: u64 },
    #[error("the device failed: {reason}")]
    Device { reason: String },
}

impl StageError {
    /// The error names the file and the tensor.
    fn part(error: WeightsError) -> Self {
        Self::Part {
            reason: error.to_string(),
        }
    }
}

/// What goes into a stage.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// Token ids: a stage with the embedding.
    Tokens(&'a [u32]),
    /// Activations `[seq, hidden]`: any other stage.
    Hidden(&'a [f32]),
}

/// Positions of one session, for a batch of several.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// Which session.
    pub session: u64,
    /// Of the first row; what the cache holds from there on is forgotten.
    pub position: u32,
    /// What goes in.
    pub input: Input<'a>,
}

/// Rows of one batch: a piece of a prompt (256) and 64 sessions that decode. More gain nothing and outgrow the caches.
pub const BATCH_ROWS_MAX: usize = 320;

/// What is wanted of a stage with the head. Any other stage gives [`Output::Hidden`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// Activations before the final norm.
    Hidden,
    /// Logits of the last position, `[vocabulary]`.
    LastLogits,
    /// Logits of all positions, `[seq, vocabulary]`.
    AllLogits,
}

/// What comes out of a stage.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Activations `[seq, hidden]`.
    Hidden(Vec<f32>),
    /// `[vocabulary]` or `[seq, vocabulary]`.
    Logits(Vec<f32>),
}

/// Consecutive blocks of a model, with a cache of keys and values for each session.
///
/// On the CPU positions give the same bits whether they come singly or together. Any other device may choose another
/// order of summation for another shape: results agree within rounding.
#[derive(Debug)]
pub struct ServeStage {
    config: Config,
    range: BlockRange,
    engine: Engine,
    sessions: BTreeMap<u64, Session>,
    cache_bytes: u64,
    cache_bytes_max: u64,
}

#[derive(Debug)]
struct Session {
    room: u32,
    reached: u32, // At most `room`.
    bytes: u64,
}

impl ServeStage {
    /// Loads `range` from its part files, in the order of parts.
    ///
    /// On the CPU `weights` says in which form matrices are kept and multiplied. A graphics device keeps them as they are
    /// stored, whatever `weights` says. What exceeds the device's limits the CPU computes, and the log says why; so it does
    /// where a device runs no kernels of ours.
    ///
    /// The last stage of a model whose projection is its embedding needs it too, unless it is also the first: the head's
    /// file holds it as `lm_head.weight`, or the embedding's file is given after the rest.
    ///
    /// # Errors
    ///
    /// [`StageError`] names the configuration key, file and tensor that is at fault.
    pub fn load<P: AsRef<Path>>(
        config_json: &str,
        range: BlockRange,
        part_files: &[P],
        weights: Weights,
        device: &Device,
    ) -> Result<Self, StageError> {
        let config = Config::from_json(config_json)?;
        if !range.fits(config.blocks) {
            return Err(StageError::Range {
                first: range.first,
                end: range.end,
                blocks: config.blocks,
            });
        }
        let read = |form| StageWeights::read(&config, range, part_files, form);
        let engine = Engine::new(&config, range, weights, device, read)?;
        Ok(Self::with(config, range, engine, device))
    }

    /// Loads a whole model straight from a GGUF file or a Hugging Face folder, and gives its `tokenizer.json` too.
    ///
    /// # Errors
    ///
    /// [`StageError`] names the file, and the configuration key or tensor that is at fault.
    pub fn open(source: &Path, form: Weights, device: &Device) -> Result<(Self, Vec<u8>), StageError> {
        let source = open_model(source).map_err(StageError::part)?;
        let config = Config::from_json(&source.config_json)?;
        let range = BlockRange::whole(config.blocks);
        let stage = Self::of(config, range, &*source.tensors, form, device)?;
        Ok((stage, source.tokenizer_json))
    }

    /// Loads a whole model from its tensors, widened.
    pub(crate) fn whole(config: Config, tensors: &dyn Tensors, device: &Device) -> Result<Self, StageError> {
        let range = BlockRange::whole(config.blocks);
        Self::part(config, range, tensors, device)
    }

    /// Loads a range of a model, which fits, from its tensors, widened.
    pub(crate) fn part(
        config: Config,
        range: BlockRange,
        tensors: &dyn Tensors,
        device: &Device,
    ) -> Result<Self, StageError> {
        Self::of(config, range, tensors, Weights::F32, device)
    }

    fn of(
        config: Config,
        range: BlockRange,
        tensors: &dyn Tensors,
        form: Weights,
        device: &Device,
    ) -> Result<Self, StageError> {
        let read = |form| StageWeights::from_tensors(&config, range, tensors, form);
        let engine = Engine::new(&config, range, form, device, read)?;
        Ok(Self::with(config, range, engine, device))
    }

    fn with(config: Config, range: BlockRange, engine: Engine, device: &Device) -> Self {
        let mut stage = Self {
            engine,
            config,
            range,
            sessions: BTreeMap::new(),
            cache_bytes: 0,
            cache_bytes_max: 0,
        };
        stage.set_cache_bytes_max(device.cache_bytes_max());
        stage
    }

    /// Whether the CPU computes the stage, because it was asked to or because the device cannot.
    pub fn is_on_cpu(&self) -> bool {
        self.engine.is_on_cpu()
    }

    /// Bytes that the weights take.
    pub fn weight_bytes(&self) -> u64 {
        self.engine.bytes()
    }

    /// Width of the activations.
    pub fn hidden(&self) -> usize {
        self.config.hidden
    }

    /// What the model is.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Which blocks.
    pub fn range(&self) -> BlockRange {
        self.range
    }

    /// Whether [`ServeStage::forward`] takes tokens.
    pub fn has_embedding(&self) -> bool {
        self.range.has_embedding()
    }

    /// Whether [`ServeStage::forward`] can give logits.
    pub fn has_head(&self) -> bool {
        self.range.has_head(self.config.blocks)
    }

    /// Sets how many bytes the caches of all sessions may take together.
    pub fn set_cache_bytes_max(&mut self, bytes: u64) {
        let bytes = bytes.min(self.engine.cache_bytes_most());
        self.cache_bytes_max = bytes;
        self.engine.set_cache_bytes_max(bytes);
    }

    /// Bytes that the caches of all sessions take now: those of the positions that they hold, ended sessions included.
    pub fn cache_bytes(&self) -> u64 {
        self.engine.cache_bytes()
    }

    /// Opens a session that is sure of room for its context. The room is taken as positions come, so a device may still say
    /// that it has none. A session that is open already starts anew.
    ///
    /// # Errors
    ///
    /// [`StageError::Context`], [`StageError::Memory`], [`StageError::Full`].
    pub fn open_session(&mut self, session: u64, context_tokens_max: u32) -> Result<(), StageError> {
        self.close_session(session);
        let bytes = self.admit(context_tokens_max)?;
        self.engine.open(session);
        self.seat(session, context_tokens_max, bytes, 0);
        Ok(())
    }

    /// As [`ServeStage::open_session`], going on from the first `positions` positions of another session of the same owner,
    /// which is open, or was ended with [`ServeStage::end_session`]. Both hold the same pages from then on, and whoever
    /// writes to one takes a copy.
    ///
    /// Tells how many positions the session has: fewer where the other has fewer, and none where it is gone or its recurrent
    /// state cannot go back so far. They are the caller's to check: that session must have had the same input there.
    ///
    /// # Errors
    ///
    /// As [`ServeStage::open_session`].
    pub fn open_session_from(
        &mut self,
        session: u64,
        context_tokens_max: u32,
        from: u64,
        positions: u32,
    ) -> Result<u32, StageError> {
        if from == session {
            return Err(StageError::Twice { session });
        }
        self.close_session(session);
        let bytes = self.admit(context_tokens_max)?;
        let reached = self.sessions.get(&from).map_or(0, |from| from.reached as usize);
        let positions = positions.min(context_tokens_max) as usize;
        let taken = self.engine.open_from(session, from, reached, positions);
        let taken = taken as u32; // At most `positions`.
        self.seat(session, context_tokens_max, bytes, taken);
        Ok(taken)
    }

    /// Opens a session that goes on from where another one is, and shares its pages. See [`ServeStage::open_session_from`].
    ///
    /// # Errors
    ///
    /// As [`ServeStage::open_session`], and [`StageError::NoSession`].
    pub fn fork_session(&mut self, session: u64, from: u64, context_tokens_max: u32) -> Result<u32, StageError> {
        let source = self
            .sessions
            .get(&from)
            .ok_or(StageError::NoSession { session: from })?;
        self.open_session_from(session, context_tokens_max, from, source.reached)
    }

    /// Forgets what a session holds from `position` on, and frees its room.
    ///
    /// # Errors
    ///
    /// [`StageError::NoSession`], [`StageError::Gap`], [`StageError::Rewind`]; nothing has changed then.
    pub fn truncate_session(&mut self, session: u64, position: u32) -> Result<(), StageError> {
        self.start_at(session, position)?;
        self.reach(session, position);
        self.engine.truncate(session, position as usize);
        Ok(())
    }

    /// The earliest position, besides zero, from which a session can go on: a recurrent state cannot be unwound.
    pub fn earliest(&self, session: u64) -> u32 {
        self.engine.earliest(session) as u32 // Within the session's room.
    }

    /// Ends a session. Its pages are kept as long as nobody needs the room, so that another can go on from
    /// them with [`ServeStage::open_session_from`]. [`ServeStage::close_session`] frees them.
    pub fn end_session(&mut self, session: u64) {
        if let Some(ended) = self.sessions.remove(&session) {
            self.cache_bytes -= ended.bytes;
            self.engine.end(session, ended.reached as usize);
        }
    }

    /// Bytes of a new session's context, if there is room for it beside the contexts of all others.
    fn admit(&self, context_tokens_max: u32) -> Result<u64, StageError> {
        let max = self.config.context_tokens_max;
        if context_tokens_max == 0 || context_tokens_max > max {
            return Err(StageError::Context {
                context: context_tokens_max,
                max,
            });
        }
        if self.sessions.len() >= SESSIONS_MAX {
            return Err(StageError::Full);
        }
        let bytes = self.session_bytes(context_tokens_max);
        let free = self.cache_bytes_max.saturating_sub(self.cache_bytes);
        if bytes > free {
            return Err(StageError::Memory { bytes, free });
        }
        Ok(bytes)
    }

    fn seat(&mut self, session: u64, room: u32, bytes: u64, reached: u32) {
        self.cache_bytes += bytes;
        self.sessions.insert(session, Session { room, reached, bytes });
    }

    /// Frees what a session holds, open or ended.
    pub fn close_session(&mut self, session: u64) {
        if let Some(closed) = self.sessions.remove(&session) {
            self.cache_bytes -= closed.bytes;
        }
        self.engine.close(session);
    }

    /// Runs positions `position ..` of a session. What the cache holds from `position` on is forgotten first.
    ///
    /// # Errors
    ///
    /// [`StageError`]; the cache is as before, or ends at `position` where the device failed.
    pub fn forward(&mut self, session: u64, position: u32, input: Input<'_>, want: Want) -> Result<Output, StageError> {
        self.forward_traced(session, position, input, want, None)
    }

    /// As [`ServeStage::forward`], telling what happened inside.
    pub(crate) fn forward_traced(
        &mut self,
        session: u64,
        position: u32,
        input: Input<'_>,
        want: Want,
        trace: Option<&mut Trace>,
    ) -> Result<Output, StageError> {
        let end = self.end_of(session, position, input)?;
        // A device that fails halfway has overwritten what came after.
        self.reach(session, position);
        let range = (position as usize, end as usize);
        let output = self.engine.forward(session, range, input, want, trace)?;
        self.reach(session, end);
        Ok(output)
    }

    /// Runs some positions of several sessions as one batch: each weight is read once for all of them. On the CPU each session gets the bits that it would get alone. Outputs come in the order of `steps`.
    ///
    /// # Errors
    ///
    /// As [`ServeStage::forward`], for whichever step is at fault, and [`StageError::Twice`]; no session has changed then,
    /// or all end at their step's position where the device failed.
    pub fn forward_together(&mut self, steps: &[Step<'_>], want: Want) -> Result<Vec<Output>, StageError> {
        let mut ends = BTreeMap::new();
        let mut rows = 0;
        for step in steps {
            let end = self.end_of(step.session, step.position, step.input)?;
            rows += (end - step.position) as usize;
            if ends.insert(step.session, end).is_some() {
                return Err(StageError::Twice { session: step.session });
            }
        }
        if rows > BATCH_ROWS_MAX || steps.len() < 2 {
            let each = |step: &Step<'_>| self.forward(step.session, step.position, step.input, want);
            return steps.iter().map(each).collect();
        }
        steps.iter().for_each(|step| self.reach(step.session, step.position));
        let inputs = steps
            .iter()
            .map(|step| (step.session, step.position as usize, step.input));
        let outputs = self.engine.forward_together(&inputs.collect::<Vec<_>>(), want)?;
        ends.into_iter().for_each(|(session, end)| self.reach(session, end));
        Ok(outputs)
    }

    fn reach(&mut self, session: u64, position: u32) {
        if let Some(state) = self.sessions.get_mut(&session) {
            state.reached = position;
        }
    }

    /// Where a step ends, if it can be taken.
    fn end_of(&self, session: u64, position: u32, input: Input<'_>) -> Result<u32, StageError> {
        let count = self.check(input)?;
        let state = self.sessions.get(&session).ok_or(StageError::NoSession { session })?;
        let end = u32::try_from(count).ok().and_then(|count| position.checked_add(count));
        let Some(end) = end.filter(|end| *end <= state.room) else {
            return Err(StageError::Room {
                position,
                count,
                room: state.room,
            });
        };
        self.start_at(session, position)?;
        Ok(end)
    }

    /// Whether a session can go on from `position`.
    fn start_at(&self, session: u64, position: u32) -> Result<(), StageError> {
        let state = self.sessions.get(&session).ok_or(StageError::NoSession { session })?;
        if position > state.reached {
            return Err(StageError::Gap {
                position,
                reached: state.reached,
            });
        }
        let earliest = self.earliest(session);
        if position != 0 && position < earliest {
            return Err(StageError::Rewind { position, earliest });
        }
        Ok(())
    }

    /// The final norm of activations, at a stage with the head.
    pub(crate) fn final_norm(&self, x: &[f32]) -> Option<Vec<f32>> {
        self.engine.final_norm(x)
    }

    /// The embeddings of tokens, at a stage with them.
    pub(crate) fn embed(&self, tokens: &[u32]) -> Vec<f32> {
        self.engine.embed(tokens)
    }

    /// Logits of the token after the next, by the model's module for it in `tensors`: from final-normed activations
    /// `[seq, hidden]` of positions `0 ..`, and the token that follows each. `None` where there is no such module.
    pub(crate) fn further(
        &self,
        tensors: &dyn Tensors,
        normed: &[f32],
        next: &[u32],
    ) -> Result<Option<Vec<f32>>, StageError> {
        let Some(further) = &self.config.further else {
            return Ok(None);
        };
        let weights = FurtherWeights::read(further, tensors, Weights::F32)?;
        Ok(self.engine.further(&weights, normed, next))
    }

    /// The number of positions of a valid input.
    fn check(&self, input: Input<'_>) -> Result<usize, StageError> {
        let hidden = self.config.hidden;
        match input {
            Input::Tokens(tokens) => {
                if !self.has_embedding() {
                    return Err(StageError::Kind { takes: "activations" });
                }
                let vocabulary = self.config.vocabulary;
                if let Some(token) = tokens.iter().find(|token| **token as usize >= vocabulary) {
                    return Err(StageError::Token {
                        token: *token,
                        vocabulary,
                    });
                }
                match tokens.len() {
                    0 => Err(StageError::Input { values: 0, hidden: 1 }),
                    count => Ok(count),
                }
            }
            Input::Hidden(values) => {
                if self.has_embedding() {
                    return Err(StageError::Kind { takes: "tokens" });
                }
                if values.is_empty() || values.len() % hidden != 0 {
                    return Err(StageError::Input {
                        values: values.len(),
                        hidden,
                    });
                }
                if !values.iter().all(|value| value.is_finite()) {
                    return Err(StageError::NotFinite);
                }
                Ok(values.len() / hidden)
            }
        }
    }

    /// Bytes of a cache for so many tokens.
    pub fn session_bytes(&self, context_tokens_max: u32) -> u64 {
        self.engine.sequence_bytes(u64::from(context_tokens_max))
    }
}
