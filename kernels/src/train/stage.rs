//! A stage in training: its parameters, its optimiser, and the micro-batches that are under way.

use std::collections::BTreeMap;
use std::path::Path;

use polder_protocol::adapters::Adapters;
use polder_protocol::layout::{BlockRange, Layout};
use polder_protocol::run::Inner;

use super::adapted::Adapted;
use super::balance::{BALANCE_RATE, balance};
use super::checks::{check_sizes, checked_layout, finite, read_parts};
use super::engine::{self, Engine, GradientSums, Input, Kept, Model};
use super::goldfish::Goldfish;
use super::optimiser::{Optimiser, scale, square_sum};
use super::{TrainData, TrainError, files, limits};
use crate::device::Device;
use crate::model::Config;
use crate::model::describe::Slot;

/// Micro-batches of one step whose graphs a stage keeps at most.
pub const MICRO_BATCHES_KEPT_MAX: usize = 64;
/// Tokens of one micro-batch at most: 2²⁰ is beyond any device's memory for activations.
const MICRO_BATCH_TOKENS_MAX: usize = 1 << 20;
/// Windows that are scored together.
const SCORE_WINDOWS: usize = 8;

/// What goes into a training stage.
#[derive(Debug, Clone, Copy)]
pub struct TrainInput<'a> {
    /// `[batch, seq + 1]` token ids, row-major, for a stage with the embedding or the head; empty otherwise.
    pub tokens: &'a [u32],
    /// `[batch, seq, hidden]`, for a stage without the embedding; empty otherwise.
    pub hidden: &'a [f32],
    /// Sequences.
    pub batch: u32,
    /// Tokens of one sequence.
    pub seq: u32,
}

/// What comes out of a training stage's forward.
#[derive(Debug, Clone, PartialEq)]
pub enum TrainOutput {
    /// `[batch, seq, hidden]`; the backward waits for its gradient.
    Hidden(Vec<f32>),
    /// The head's: its backward is done.
    Loss {
        /// Mean loss in nats over the tokens that count.
        loss: f32,
        /// Gradient of the input, `[batch, seq, hidden]`; empty at a stage with the embedding.
        input_gradient: Vec<f32>,
    },
}

/// What inner steps came to.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Stepped {
    /// Mean loss of each step, in nats per token.
    pub losses: Vec<f32>,
    /// Tokens trained on.
    pub tokens: u64,
}

/// Consecutive blocks of a model with the state of their inner optimiser.
///
/// Gradients are sums over micro-batches until [`TrainStage::square_sum`] divides them.
#[derive(Debug)]
pub struct TrainStage {
    config: Config,
    layout: Layout,
    range: BlockRange,
    inner: Inner,
    goldfish: Option<Goldfish>,
    engine: Engine,
    /// The last blocks of the stage that keep what their backward needs.
    blocks_kept: u32,
    /// One tensor at most.
    buffer_bytes_max: u64,
    /// Per part of `range`, as all vectors below: of the model, with its adapters merged into it where it has any.
    parameters: Vec<Vec<f32>>,
    /// Whether the device has taken steps with the parameters since they were brought here.
    moved: bool,
    adapted: Option<Adapted>,
    optimiser: Optimiser,
    gradients: GradientSums,
    kept: BTreeMap<u32, Kept>, // At most `MICRO_BATCHES_KEPT_MAX`.
}

impl TrainStage {
    /// Loads `range` from one file of little-endian f32 parameters per part; what follows the parameters is ignored.
    ///
    /// # Errors
    ///
    /// [`TrainError`] names the configuration key or file at fault.
    pub fn load<P: AsRef<Path>>(
        config_json: &str,
        range: BlockRange,
        part_files: &[P],
        inner: Inner,
        steps_total: u64,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let layout = checked_layout(&Config::from_json(config_json)?, range)?;
        let parameters = read_parts(&layout, range, part_files)?;
        Self::new(config_json, range, parameters, inner, steps_total, device)
    }

    /// As [`TrainStage::load`], from parameters per part.
    ///
    /// # Errors
    ///
    /// [`TrainError`] where configuration, range and parameters do not agree.
    pub fn new(
        config_json: &str,
        range: BlockRange,
        parameters: Vec<Vec<f32>>,
        inner: Inner,
        steps_total: u64,
        device: &Device,
    ) -> Result<Self, TrainError> {
        Self::with(config_json, range, parameters, None, (inner, steps_total), device)
    }

    /// As [`TrainStage::load`], for the adapters of a frozen model: `part_files` hold the adapters' parameters, `model_files`
    /// the model's.
    ///
    /// # Errors
    ///
    /// [`TrainError`] names what does not fit.
    pub fn load_adapted<P: AsRef<Path>>(
        config_json: &str,
        range: BlockRange,
        (adapters, model_files): (&Adapters, &[P]),
        part_files: &[P],
        (inner, steps_total): (Inner, u64),
        device: &Device,
    ) -> Result<Self, TrainError> {
        let layout = checked_layout(&Config::from_json(config_json)?, range)?;
        let model = read_parts(&layout, range, model_files)?;
        let adapters = Adapters {
            model: layout,
            ..adapters.clone()
        };
        let parameters = read_parts(&adapters.layout()?, range, part_files)?;
        Self::adapted(
            config_json,
            range,
            model,
            (&adapters, parameters),
            (inner, steps_total),
            device,
        )
    }

    /// As [`TrainStage::load_adapted`], from parameters per part.
    ///
    /// # Errors
    ///
    /// [`TrainError`] names what does not fit.
    pub fn adapted(
        config_json: &str,
        range: BlockRange,
        model: Vec<Vec<f32>>,
        adapters: (&Adapters, Vec<Vec<f32>>),
        inner: (Inner, u64),
        device: &Device,
    ) -> Result<Self, TrainError> {
        Self::with(config_json, range, model, Some(adapters), inner, device)
    }

    fn with(
        config_json: &str,
        range: BlockRange,
        mut parameters: Vec<Vec<f32>>,
        adapters: Option<(&Adapters, Vec<Vec<f32>>)>,
        (inner, steps_total): (Inner, u64),
        device: &Device,
    ) -> Result<Self, TrainError> {
        inner.check().map_err(TrainError::Setting)?;
        let config = Config::from_json(config_json)?;
        let layout = checked_layout(&config, range)?;
        check_sizes(&layout, range, &parameters)?;
        limits::check_parameters(&layout, range, device.buffer_bytes_max())?;
        let adapted = adapters.map(|(adapters, own)| Adapted::new(adapters, &layout, range, &parameters, own));
        let adapted = adapted.transpose()?;
        if let Some(adapted) = &adapted {
            adapted.merge(&mut parameters);
        }
        let trained = adapted.as_ref().map_or(&layout, Adapted::layout);
        let optimiser = Optimiser::new(inner, steps_total, trained, range);
        let mut engine = Engine::new(&config, &layout, range, inner.precision, device);
        if let Some(adapted) = &adapted {
            engine.ask_only(adapted.places());
        }
        if adapted.is_none()
            && optimiser.is_adamw()
            && let Some(graph) = engine.graph()
        {
            graph.step_on_device(device, parameters.iter().map(|part| part.len() as u64).sum());
        }
        Ok(Self {
            optimiser,
            engine,
            goldfish: inner.goldfish.map(Goldfish::new),
            blocks_kept: engine::blocks_that_fit(&config, range, &parameters, &inner, device),
            moved: false,
            buffer_bytes_max: device.buffer_bytes_max(),
            config,
            layout,
            range,
            inner,
            parameters,
            adapted,
            gradients: GradientSums::default(),
            kept: BTreeMap::new(),
        })
    }

    /// Lets the last `blocks` of the stage keep what their backward needs, from the next micro-batch on. The others keep
    /// their input and compute the rest again: less memory and more time, and not a bit of difference.
    ///
    /// Unless it is told otherwise, a stage keeps as many as half of the memory that is free when it is loaded has room for:
    /// the device's own, as far as its driver tells, or the machine's.
    pub fn set_blocks_kept(&mut self, blocks: u32) {
        self.blocks_kept = blocks;
    }

    /// Width of the activations.
    pub fn hidden(&self) -> usize {
        self.config.hidden
    }

    /// What the products of linear layers are computed in: `f32`, or bf16 and the instructions that have it, where the run
    /// asks for that and the device has them.
    pub fn products(&self) -> &'static str {
        self.engine.products()
    }

    /// Bytes of parameters and optimiser state.
    pub fn bytes(&self) -> u64 {
        let parameters: u64 = self.parameters.iter().map(|part| part.len() as u64 * 4).sum();
        parameters + self.optimiser.bytes() + self.adapted.as_ref().map_or(0, Adapted::bytes)
    }

    /// The present parameters per part: those that are trained. They are brought from the device where that took steps.
    ///
    /// # Errors
    ///
    /// [`TrainError::Device`].
    pub fn parameters(&mut self) -> Result<&[Vec<f32>], TrainError> {
        if self.moved
            && let Some(graph) = self.engine.graph()
        {
            graph.bring_parameters(&mut self.parameters)?;
            self.moved = false;
        }
        Ok(self.adapted.as_ref().map_or(&self.parameters, Adapted::parameters))
    }

    /// Replaces the parameters from files; optimiser state stays. Micro-batches under way are dropped.
    ///
    /// # Errors
    ///
    /// [`TrainError`]; nothing has changed then.
    pub fn set<P: AsRef<Path>>(&mut self, part_files: &[P]) -> Result<(), TrainError> {
        let trained = self.adapted.as_ref().map_or(&self.layout, Adapted::layout);
        let parameters = read_parts(trained, self.range, part_files)?;
        self.set_parameters(parameters)
    }

    /// As [`TrainStage::set`], from parameters per part.
    ///
    /// # Errors
    ///
    /// [`TrainError`] where the sizes differ; nothing has changed then.
    pub fn set_parameters(&mut self, parameters: Vec<Vec<f32>>) -> Result<(), TrainError> {
        match &mut self.adapted {
            Some(adapted) => {
                adapted.set(parameters)?;
                adapted.merge(&mut self.parameters);
            }
            None => {
                check_sizes(&self.layout, self.range, &parameters)?;
                self.parameters = parameters;
            }
        }
        self.moved = false;
        self.engine.changed();
        self.forget();
        Ok(())
    }

    /// Writes the present parameters, one file per part.
    ///
    /// # Errors
    ///
    /// [`TrainError::File`], [`TrainError::PartCount`] or [`TrainError::Device`].
    pub fn write<P: AsRef<Path>>(&mut self, part_files: &[P]) -> Result<(), TrainError> {
        let parameters = self.parameters()?;
        if part_files.len() != parameters.len() {
            return Err(TrainError::PartCount {
                expected: parameters.len(),
                found: part_files.len(),
            });
        }
        for (file, values) in part_files.iter().zip(parameters) {
            files::write(file.as_ref(), values)?;
        }
        Ok(())
    }

    /// Writes the optimiser's state, with which [`TrainStage::read_optimiser`] goes on with the same bits.
    ///
    /// # Errors
    ///
    /// [`TrainError::File`] or [`TrainError::Device`].
    pub fn write_optimiser<P: AsRef<Path>>(&mut self, file: P) -> Result<(), TrainError> {
        let optimiser = &mut self.optimiser;
        if let Some(graph) = self.engine.graph() {
            graph.bring_moments(|part, tensor, means| optimiser.set_means(part, tensor, means))?;
        }
        optimiser.write(file.as_ref())
    }

    /// Goes on from an optimiser's state that was written by the same stage of the same run.
    ///
    /// # Errors
    ///
    /// [`TrainError::File`] for a file that is damaged or another stage's; the stage must then be loaded anew.
    pub fn read_optimiser<P: AsRef<Path>>(&mut self, file: P) -> Result<(), TrainError> {
        self.optimiser.read(file.as_ref())?;
        if let Some(graph) = self.engine.graph() {
            graph.forget_moments();
        }
        Ok(())
    }

    /// Takes `steps` whole inner steps on a stage that holds the whole model. The windows of micro-batch `m` of step `s`
    /// (counted over the run) follow from `labels` with `s` and `m` behind them.
    ///
    /// # Errors
    ///
    /// [`TrainError`]; steps before the one that failed have been taken.
    pub fn steps(
        &mut self,
        data: &TrainData,
        step_first: u64,
        steps: u32,
        labels: &[u64],
    ) -> Result<Stepped, TrainError> {
        self.must_be_whole()?;
        self.forget();
        let Inner {
            batch,
            seq,
            micro_batches,
            ..
        } = self.inner;
        let mut stepped = Stepped::default();
        for step in (step_first..).take(steps as usize) {
            let mut loss_sum = 0.0;
            for micro_batch in 0..micro_batches {
                let labels: Vec<u64> = labels.iter().copied().chain([step, u64::from(micro_batch)]).collect();
                let tokens = data
                    .batch(&labels, batch, seq)
                    .ok_or(TrainError::TooLittleData { seq })?;
                let input = TrainInput {
                    tokens: &tokens,
                    hidden: &[],
                    batch,
                    seq,
                };
                if let TrainOutput::Loss { loss, .. } = self.forward(micro_batch, input)? {
                    loss_sum += f64::from(loss);
                }
            }
            let sum = self.square_sum(micro_batches)?;
            self.apply(step, sum)?;
            stepped.losses.push((loss_sum / f64::from(micro_batches.max(1))) as f32);
            stepped.tokens += u64::from(batch) * u64::from(seq) * u64::from(micro_batches);
        }
        Ok(stepped)
    }

    /// Runs a micro-batch forward. A stage with the head also runs its backward and adds up gradients; any other keeps
    /// what [`TrainStage::backward`] needs.
    ///
    /// # Errors
    ///
    /// [`TrainError`] where the input does not fit; nothing has changed then.
    pub fn forward(&mut self, micro_batch: u32, input: TrainInput<'_>) -> Result<TrainOutput, TrainError> {
        let checked = self.check(input)?;
        let has_head = self.range.has_head(self.config.blocks);
        if !has_head && self.kept.len() >= MICRO_BATCHES_KEPT_MAX && !self.kept.contains_key(&micro_batch) {
            return Err(TrainError::Full);
        }
        let model = Model {
            config: &self.config,
            layout: &self.layout,
            range: self.range,
            parameters: &self.parameters,
        };
        let input = Input {
            tokens: checked.inputs.as_deref(),
            hidden: input.hidden,
            rows: checked.rows,
            seq: input.seq as usize,
        };
        if !has_head {
            let (values, kept) = self.engine.forward(model, &input, self.blocks_kept)?;
            self.kept.insert(micro_batch, kept);
            return Ok(TrainOutput::Hidden(values));
        }
        let (loss, input_gradient) =
            self.engine
                .train(model, &input, &checked.targets, self.blocks_kept, &mut self.gradients)?;
        Ok(TrainOutput::Loss { loss, input_gradient })
    }

    /// Runs the backward of a kept micro-batch from the gradient of its output, and returns that of its input, which is
    /// empty at a stage with the embedding.
    ///
    /// # Errors
    ///
    /// [`TrainError`]; the micro-batch is still kept where the gradient does not fit.
    pub fn backward(&mut self, micro_batch: u32, gradient: &[f32]) -> Result<Vec<f32>, TrainError> {
        let kept = self
            .kept
            .get(&micro_batch)
            .ok_or(TrainError::NoMicroBatch { micro_batch })?;
        if gradient.len() != kept.elements() {
            return Err(TrainError::Shape {
                batch: 0,
                seq: 0,
                found: gradient.len(),
            });
        }
        finite(gradient, "the gradient")?;
        let Some(kept) = self.kept.remove(&micro_batch) else {
            return Err(TrainError::NoMicroBatch { micro_batch });
        };
        let model = Model {
            config: &self.config,
            layout: &self.layout,
            range: self.range,
            parameters: &self.parameters,
        };
        self.engine.backward(model, kept, gradient, &mut self.gradients)
    }

    /// Divides the gradients by the number of micro-batches and returns the sum of their squares. Where the optimiser steps on
    /// the device, that number is all that comes to the host.
    ///
    /// # Errors
    ///
    /// [`TrainError::NoGradients`] where none were made.
    pub fn square_sum(&mut self, micro_batches: u32) -> Result<f64, TrainError> {
        let share = 1.0 / micro_batches.max(1) as f32;
        if let Some(sum) = self.engine.graph().and_then(|graph| graph.square_sum(share)) {
            return sum;
        }
        self.bring_gradients()?;
        let mut gradients = self.gradients.made_mut().ok_or(TrainError::NoGradients)?;
        if let Some(adapted) = &mut self.adapted {
            adapted.project(gradients);
            gradients = adapted.gradients_mut();
        }
        if micro_batches > 1 {
            gradients.iter_mut().for_each(|part| scale(part, share));
        }
        Ok(gradients.iter().map(|part| square_sum(part)).sum())
    }

    /// The gradients per part: a sum over micro-batches, or their mean after [`TrainStage::square_sum`], which also makes
    /// those of adapters.
    ///
    /// # Errors
    ///
    /// [`TrainError::NoGradients`] where none were made.
    pub fn gradients(&mut self) -> Result<&[Vec<f32>], TrainError> {
        self.bring_gradients()?;
        let made = self.gradients.made().ok_or(TrainError::NoGradients)?;
        Ok(self.adapted.as_ref().map_or(made, Adapted::gradients))
    }

    fn bring_gradients(&mut self) -> Result<(), TrainError> {
        let model = Model {
            config: &self.config,
            layout: &self.layout,
            range: self.range,
            parameters: &self.parameters,
        };
        self.engine.bring_gradients(model, &mut self.gradients)
    }

    /// Takes an optimiser's step with the gradients, clipped by the norm over all stages of the replica.
    ///
    /// # Errors
    ///
    /// [`TrainError`]; the gradients are gone, the parameters as before.
    pub fn apply(&mut self, step: u64, square_sum: f64) -> Result<(), TrainError> {
        let result = self.step(step, square_sum);
        self.gradients.forget();
        self.engine.forget_gradients();
        result
    }

    fn step(&mut self, step: u64, square_sum: f64) -> Result<(), TrainError> {
        let on_device = self.engine.steps_on_device();
        if !on_device {
            self.bring_gradients()?;
        }
        let made = match self.engine.graph().filter(|_| on_device) {
            Some(graph) => graph.has_gradients(),
            None => self.gradients.made().is_some(),
        };
        if !made {
            return Err(TrainError::NoGradients);
        }
        if !square_sum.is_finite() || square_sum < 0.0 {
            return Err(TrainError::NotFinite { what: "the gradient" });
        }
        match (&mut self.adapted, self.engine.graph().filter(|_| on_device)) {
            (Some(adapted), _) => {
                let (parameters, gradients) = adapted.both();
                self.optimiser.step(parameters, gradients, step, square_sum);
                adapted.merge(&mut self.parameters);
                // The routers' corrections are frozen too.
                self.engine.take_loads();
                self.engine.changed();
            }
            (None, Some(graph)) => {
                let rules = self.optimiser.adamw(step, square_sum);
                graph.step(&rules, |part, tensor| self.optimiser.means_of(part, tensor))?;
                for ((part, slot), load) in graph.take_loads() {
                    let change = |correction: &mut [f32]| balance(correction, &load, BALANCE_RATE);
                    graph.change_vector(part, Slot(slot), change)?;
                }
                self.moved = true;
            }
            (None, None) => {
                let gradients = self.gradients.made().unwrap_or_default();
                self.optimiser.step(&mut self.parameters, gradients, step, square_sum);
                self.balance_experts();
                self.engine.changed();
            }
        }
        self.kept.clear();
        Ok(())
    }

    /// Moves the corrections of routers against the loads that they met.
    fn balance_experts(&mut self) {
        let first = self.range.parts(self.config.blocks).start as usize;
        for ((part, slot), load) in self.engine.take_loads() {
            let Some(layout) = self.layout.parts.get(first + part) else {
                continue;
            };
            let before = layout
                .tensors
                .iter()
                .take(slot)
                .map(|tensor| tensor.elements().unwrap_or(0))
                .sum();
            let own = self
                .parameters
                .get_mut(part)
                .and_then(|values| values.get_mut(before..));
            balance(own.unwrap_or_default(), &load, BALANCE_RATE);
        }
    }

    /// Bits per byte of a text with a stage that holds the whole model.
    ///
    /// All of `tokens` is scored, in windows of `seq` that do not overlap: the first token after `start`, each other
    /// after the tokens before it in its window and the last one of the window before. `bytes` is the length of the text
    /// in UTF-8.
    ///
    /// # Errors
    ///
    /// [`TrainError`] where tokens or sizes do not fit.
    pub fn score(&mut self, tokens: &[u32], bytes: u64, start: u32, seq: u32) -> Result<f32, TrainError> {
        self.must_be_whole()?;
        let shape = TrainError::Shape {
            batch: 1,
            seq,
            found: tokens.len(),
        };
        if tokens.is_empty() || bytes == 0 || seq == 0 || seq as usize > MICRO_BATCH_TOKENS_MAX {
            return Err(shape);
        }
        self.check_tokens(tokens)?;
        self.check_tokens(&[start])?;
        let stream: Vec<u32> = core::iter::once(start).chain(tokens.iter().copied()).collect();
        let seq = seq as usize;
        self.check_room([SCORE_WINDOWS, seq])?;
        let model = Model {
            config: &self.config,
            layout: &self.layout,
            range: self.range,
            parameters: &self.parameters,
        };
        let whole = tokens.len() / seq * seq;
        let batches = (0..whole)
            .step_by(seq * SCORE_WINDOWS)
            .map(|at| (at, (whole - at).min(seq * SCORE_WINDOWS), seq))
            .chain((whole < tokens.len()).then_some((whole, tokens.len() - whole, tokens.len() - whole)));
        let mut nats = 0.0;
        for (at, rows, seq) in batches {
            let input = Input {
                tokens: Some(&stream[at..at + rows]),
                hidden: &[],
                rows,
                seq,
            };
            let losses = self.engine.losses(model, &input, &stream[at + 1..at + rows + 1])?;
            nats += losses.iter().map(|loss| f64::from(*loss)).sum::<f64>();
        }
        Ok((nats / core::f64::consts::LN_2 / bytes as f64) as f32)
    }

    fn forget(&mut self) {
        self.engine.forget_gradients();
        self.engine.take_loads();
        self.gradients.forget();
        self.kept.clear();
    }

    fn must_be_whole(&self) -> Result<(), TrainError> {
        match self.range == BlockRange::whole(self.config.blocks) {
            true => Ok(()),
            false => Err(TrainError::Kind {
                takes: "a part of the model; this needs the whole",
            }),
        }
    }

    fn check(&self, input: TrainInput<'_>) -> Result<Checked, TrainError> {
        let TrainInput {
            tokens,
            hidden,
            batch,
            seq,
        } = input;
        let (batch_rows, seq_rows) = (batch as usize, seq as usize);
        let shape = |found| TrainError::Shape { batch, seq, found };
        let rows = batch_rows.checked_mul(seq_rows).unwrap_or(0);
        if rows == 0 || rows > MICRO_BATCH_TOKENS_MAX {
            return Err(shape(0));
        }
        self.check_room([batch_rows, seq_rows])?;
        let (first, last) = (self.range.has_embedding(), self.range.has_head(self.config.blocks));
        let (mut inputs, mut targets) = (Vec::new(), Vec::new());
        if first || last {
            if tokens.len() != rows + batch_rows {
                return Err(shape(tokens.len()));
            }
            self.check_tokens(tokens)?;
            for row in tokens.chunks_exact(seq_rows + 1) {
                inputs.extend_from_slice(&row[..seq_rows]);
                targets.extend_from_slice(&row[1..]);
            }
            if let Some(goldfish) = self.goldfish.as_ref().filter(|_| last) {
                goldfish.leave_out(&mut targets, seq_rows);
            }
        }
        if !first {
            if Some(hidden.len()) != rows.checked_mul(self.config.hidden) {
                return Err(shape(hidden.len()));
            }
            finite(hidden, "the input")?;
        }
        Ok(Checked {
            inputs: first.then_some(inputs),
            targets,
            rows,
        })
    }

    fn check_room(&self, micro_batch: [usize; 2]) -> Result<(), TrainError> {
        let limit = self.buffer_bytes_max;
        limits::check_micro_batch(&self.config, self.range, micro_batch, &self.engine, limit)
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<(), TrainError> {
        let vocabulary = self.config.vocabulary;
        match tokens.iter().find(|token| **token as usize >= vocabulary) {
            Some(token) => Err(TrainError::Token {
                token: *token,
                vocabulary,
            }),
            None => Ok(()),
        }
    }
}

/// A valid input.
struct Checked {
    /// `[rows]`, at a stage with the embedding.
    inputs: Option<Vec<u32>>,
    /// `[rows]`, at a stage with the head; some may be left out.
    targets: Vec<u32>,
    rows: usize,
}
