//! Stages for serving and for training, on one device.

use std::collections::{BTreeMap, VecDeque};
use std::fs;

use polder_kernels::device::{Choice, Device};
use polder_kernels::sample::sample;
use polder_kernels::stage::{Input, Output, ServeStage, StageError, Step, Want};
use polder_kernels::text::Tokenizer;
use polder_kernels::train::{TrainData, TrainError, TrainInput, TrainOutput, TrainStage};
use polder_protocol::run::Boundary;
use polder_protocol::work::{Answer, Frozen, Order, Sampling, StageId, Task, Written};
use tracing::{error, info, warn};

use crate::batch::together;
use crate::boundary;
use crate::grammars::Grammars;
use crate::host::Engine;

/// Computes. Its stages are forgotten with it.
pub(crate) struct Compute {
    device: Device,
    /// Why the device is not the one that was asked for.
    fell_back: Option<String>,
    /// Why the device cannot go on. A driver that failed once has lost what was loaded, or answers anything.
    broken: Option<String>,
    serving: BTreeMap<StageId, ServeStage>,
    grammars: Grammars,
    training: BTreeMap<StageId, TrainStage>,
    data: TrainData,
    tokenizer: Option<Tokenizer>,
}

type Performed = Result<(Answer, Vec<u8>), Failure>;

impl Compute {
    /// Sets up the device that was chosen, or the CPU in its place. Called on the thread that computes.
    pub(crate) fn open(choice: Choice) -> Self {
        let (device, fell_back) = Device::choose(choice);
        match &fell_back {
            Some(reason) => warn!(%device, reason, "the device that was asked for cannot be used"),
            None => info!(%device, "device"),
        }
        Self::new(device, fell_back)
    }

    /// The stage of [`Compute::holding`].
    pub(crate) const HELD: StageId = 1;

    /// Holds a stage that was loaded elsewhere, on the CPU.
    pub(crate) fn holding(stage: ServeStage) -> Self {
        let mut compute = Self::new(Device::cpu(), None);
        compute.serving.insert(Self::HELD, stage);
        compute
    }

    fn new(device: Device, fell_back: Option<String>) -> Self {
        Self {
            device,
            fell_back,
            broken: None,
            serving: BTreeMap::new(),
            grammars: Grammars::default(),
            training: BTreeMap::new(),
            data: TrainData::new(),
            tokenizer: None,
        }
    }

    /// Remembers that the device cannot go on. The CPU always can.
    fn breaks(&mut self, reason: &str) {
        if !self.device.is_cpu() {
            self.broken = Some(reason.to_owned());
        }
    }
}

impl Engine for Compute {
    fn perform(&mut self, task: Task, payload: Vec<u8>) -> Result<(Answer, Vec<u8>), String> {
        self.carry_out(task, &payload).map_err(|failure| {
            if failure.of_device {
                self.breaks(&failure.reason);
            }
            failure.reason
        })
    }

    fn next(&self, waiting: &VecDeque<(Order, Vec<u8>)>) -> Vec<usize> {
        together(waiting, |stage| self.serving.get(&stage).map(ServeStage::hidden))
    }

    fn perform_together(&mut self, orders: Vec<(Task, Vec<u8>)>) -> Vec<Result<(Answer, Vec<u8>), String>> {
        match self.step(&orders) {
            Some(Ok(outputs)) => {
                let choices = orders.iter().zip(outputs);
                return choices.map(|((task, _), output)| self.choose(task, output)).collect();
            }
            // Asked again, a device that failed may answer anything.
            Some(Err(failure)) => {
                self.breaks(&failure.reason);
                return vec![Err(failure.reason); orders.len()];
            }
            None => {}
        }
        // One of them is at fault, and the others are not to suffer.
        let each = |(task, payload)| self.perform(task, payload);
        orders.into_iter().map(each).collect()
    }

    fn panicked(&mut self, message: &str) {
        self.breaks(message);
    }

    fn answered(&mut self) {
        if let Some(reason) = &self.broken {
            error!(device = %self.device, reason, "the device failed; the worker ends, so that another starts afresh");
            std::process::exit(DEVICE_FAILED);
        }
    }
}

/// The status of a worker that ends because its device failed; `EX_IOERR` of sysexits.
const DEVICE_FAILED: i32 = 74;

/// Why an order came to nothing.
#[derive(Debug)]
struct Failure {
    reason: String,
    /// Whether the device is at fault, rather than what was asked of it.
    of_device: bool,
}

impl From<String> for Failure {
    fn from(reason: String) -> Self {
        let of_device = false;
        Self { reason, of_device }
    }
}

impl From<&str> for Failure {
    fn from(reason: &str) -> Self {
        reason.to_owned().into()
    }
}

impl From<StageError> for Failure {
    fn from(error: StageError) -> Self {
        Self {
            reason: error.to_string(),
            of_device: matches!(error, StageError::Device { .. }),
        }
    }
}

impl From<TrainError> for Failure {
    fn from(error: TrainError) -> Self {
        Self {
            reason: error.to_string(),
            of_device: matches!(error, TrainError::Device { .. }),
        }
    }
}

impl Compute {
    fn carry_out(&mut self, task: Task, payload: &[u8]) -> Performed {
        match task {
            Task::Hello => done(Answer::Device {
                name: self.device.name().to_owned(),
                memory_bytes: self.device.memory_bytes(),
                is_cpu: self.device.is_cpu(),
                fell_back: self.fell_back.clone(),
            }),
            Task::Load {
                stage,
                config_json,
                range,
                part_files,
                weights,
            } => {
                // The old one goes first: both may not fit.
                self.serving.remove(&stage);
                self.grammars.forget_stage(stage);
                let loaded = ServeStage::load(&config_json, range, &part_files, weights, &self.device)?;
                let answer = Answer::Loaded {
                    bytes: loaded.weight_bytes(),
                    hidden: width(loaded.hidden()),
                };
                self.serving.insert(stage, loaded);
                done(answer)
            }
            Task::Unload { stage } => {
                self.grammars.forget_stage(stage);
                self.serving.remove(&stage);
                self.training.remove(&stage);
                done(Answer::Done)
            }
            Task::OpenSession {
                stage,
                session,
                context_tokens_max,
                earlier,
            } => {
                self.grammars.forget((stage, session));
                let stage = self.serving(stage)?;
                let Some((from, positions)) = earlier else {
                    stage.open_session(session, context_tokens_max)?;
                    return done(Answer::Opened {
                        positions: 0,
                        earliest: 0,
                    });
                };
                let positions = stage.open_session_from(session, context_tokens_max, from, positions)?;
                stage.close_session(from);
                let earliest = stage.earliest(session);
                done(Answer::Opened { positions, earliest })
            }
            Task::EndSession { stage, session } => {
                self.grammars.forget((stage, session));
                if let Some(stage) = self.serving.get_mut(&stage) {
                    stage.end_session(session);
                }
                done(Answer::Done)
            }
            Task::Constrain {
                stage,
                session,
                tokenizer_file,
                end_tokens,
                grammar,
            } => {
                self.serving(stage)?;
                self.grammars
                    .bind((stage, session), tokenizer_file, end_tokens, &grammar)?;
                done(Answer::Done)
            }
            Task::CloseSession { stage, session } => {
                self.grammars.forget((stage, session));
                if let Some(stage) = self.serving.get_mut(&stage) {
                    stage.close_session(session);
                }
                done(Answer::Done)
            }
            Task::Forward {
                stage,
                session,
                position,
                tokens,
                sample,
                written,
            } => {
                let choice = sample.map(|sampling| (sampling, written));
                self.forward(stage, session, position, &tokens, choice.as_ref(), payload)
            }
            task => self.train(task, payload),
        }
    }

    fn serving(&mut self, stage: StageId) -> Result<&mut ServeStage, String> {
        self.serving
            .get_mut(&stage)
            .ok_or_else(|| format!("no stage {stage} is loaded for serving"))
    }

    fn training(&mut self, stage: StageId) -> Result<&mut TrainStage, String> {
        self.training
            .get_mut(&stage)
            .ok_or_else(|| format!("no stage {stage} is loaded for training"))
    }

    /// Carries out forwards of one stage as one batch; `None` where an order is wrong, and nothing has changed. An error is
    /// the device's.
    fn step(&mut self, orders: &[(Task, Vec<u8>)]) -> Option<Result<Vec<(Output, u32)>, Failure>> {
        let stage = match orders.first()? {
            (Task::Forward { stage, .. }, _) => self.serving.get_mut(stage)?,
            _ => return None,
        };
        let hidden = orders.iter().map(|(_, payload)| match stage.has_embedding() {
            true => Some(Vec::new()),
            false => boundary::read(payload, Boundary::F32),
        });
        let hidden = hidden.collect::<Option<Vec<_>>>()?;
        let steps = orders.iter().zip(&hidden).map(|((task, _), hidden)| match task {
            Task::Forward {
                session,
                position,
                tokens,
                ..
            } => Some(Step {
                session: *session,
                position: *position,
                input: match stage.has_embedding() {
                    true => Input::Tokens(tokens),
                    false => Input::Hidden(hidden),
                },
            }),
            _ => None,
        });
        let steps = steps.collect::<Option<Vec<Step<'_>>>>()?;
        let width = stage.hidden().max(1);
        let ends = steps.iter().map(|step| match step.input {
            Input::Tokens(tokens) => place_after(step.position, tokens.len()),
            Input::Hidden(hidden) => place_after(step.position, hidden.len() / width),
        });
        let ends: Vec<u32> = ends.collect();
        match stage.forward_together(&steps, Want::LastLogits) {
            Ok(outputs) => Some(Ok(outputs.into_iter().zip(ends).collect())),
            Err(error @ StageError::Device { .. }) => Some(Err(error.into())),
            Err(_) => None,
        }
    }

    /// What a forward of a batch is answered with.
    fn choose(&mut self, task: &Task, (output, place): (Output, u32)) -> Result<(Answer, Vec<u8>), String> {
        match (output, task) {
            (Output::Hidden(rows), _) => Ok((Answer::Hidden, boundary::write(&rows, Boundary::F32))),
            (
                Output::Logits(logits),
                Task::Forward {
                    stage,
                    session,
                    sample: Some(sampling),
                    written,
                    ..
                },
            ) => {
                let answer = self.chosen((*stage, *session), &logits, sampling, written, place)?;
                Ok((answer, Vec::new()))
            }
            (Output::Logits(_), task) => Err(format!("{task:?} asks for no token")),
        }
    }

    /// The token that stands at `place`.
    fn chosen(
        &mut self,
        session: (StageId, u64),
        logits: &[f32],
        sampling: &Sampling,
        written: &Written,
        place: u32,
    ) -> Result<Answer, String> {
        let allowed = self.grammars.allowed(session, written)?;
        let choice = sample(logits, sampling, written, place, allowed.as_ref());
        let choice = choice.ok_or("no token can be chosen")?;
        Ok(Answer::Sampled {
            chosen: choice.chosen,
            alternatives: choice.alternatives,
        })
    }

    fn forward(
        &mut self,
        stage: StageId,
        session: u64,
        position: u32,
        tokens: &[u32],
        choice: Option<&(Sampling, Written)>,
        payload: &[u8],
    ) -> Performed {
        let id = stage;
        let stage = self.serving(stage)?;
        let hidden;
        let (input, rows) = if stage.has_embedding() {
            (Input::Tokens(tokens), tokens.len())
        } else {
            hidden = boundary::read(payload, Boundary::F32).ok_or("half a number came as hidden states")?;
            (Input::Hidden(&hidden), hidden.len() / stage.hidden().max(1))
        };
        let want = if choice.is_some() {
            Want::LastLogits
        } else {
            Want::AllLogits
        };
        match (stage.forward(session, position, input, want)?, choice) {
            (Output::Hidden(rows), _) => Ok((Answer::Hidden, boundary::write(&rows, Boundary::F32))),
            (Output::Logits(logits), None) => Ok((Answer::Logits, boundary::write(&logits, Boundary::F32))),
            (Output::Logits(logits), Some((sampling, written))) => {
                // The token chosen stands behind the rows of this forward.
                let place = place_after(position, rows);
                done(self.chosen((id, session), &logits, sampling, written, place)?)
            }
        }
    }

    fn train(&mut self, task: Task, payload: &[u8]) -> Performed {
        match task {
            Task::TrainLoad {
                stage,
                config_json,
                range,
                part_files,
                inner,
                steps_total,
                optimiser_file,
                frozen,
            } => {
                self.training.remove(&stage);
                let set = (inner, steps_total);
                let mut loaded = match &frozen {
                    Some(Frozen {
                        adapters,
                        part_files: model_files,
                    }) => {
                        let model = (adapters, model_files.as_slice());
                        TrainStage::load_adapted(&config_json, range, model, &part_files, set, &self.device)?
                    }
                    None => TrainStage::load(&config_json, range, &part_files, inner, steps_total, &self.device)?,
                };
                if let Some(file) = optimiser_file {
                    loaded.read_optimiser(file)?;
                }
                info!(stage, precision = loaded.products(), "loaded for training");
                let answer = Answer::Loaded {
                    bytes: loaded.bytes(),
                    hidden: width(loaded.hidden()),
                };
                self.training.insert(stage, loaded);
                done(answer)
            }
            Task::TrainSet { stage, part_files } => {
                self.training(stage)?.set(&part_files)?;
                done(Answer::Done)
            }
            Task::TrainData {
                tokenizer_file,
                text_files,
            } => self.read_data(&tokenizer_file, &text_files),
            Task::TrainSteps {
                stage,
                step_first,
                steps,
                labels,
            } => {
                let training = self.training.get_mut(&stage);
                let training = training.ok_or_else(|| format!("no stage {stage} is loaded for training"))?;
                let stepped = training.steps(&self.data, step_first, steps, &labels)?;
                done(Answer::Stepped {
                    losses: stepped.losses,
                    tokens: stepped.tokens,
                })
            }
            Task::TrainBatch { labels, batch, seq } => {
                let tokens = self.data.batch(&labels, batch, seq);
                let tokens = tokens.ok_or_else(|| format!("the local texts are shorter than {seq} tokens"))?;
                done(Answer::Batch { tokens })
            }
            Task::TrainForward {
                stage,
                micro_batch,
                tokens,
                batch,
                seq,
                boundary,
            } => {
                let hidden = boundary::read(payload, boundary).ok_or("half a number came as hidden states")?;
                let input = TrainInput {
                    tokens: &tokens,
                    hidden: &hidden,
                    batch,
                    seq,
                };
                match self.training(stage)?.forward(micro_batch, input)? {
                    TrainOutput::Hidden(rows) => Ok((Answer::Hidden, boundary::write(&rows, boundary))),
                    TrainOutput::Loss { loss, input_gradient } => {
                        Ok((Answer::Loss { loss }, boundary::write(&input_gradient, boundary)))
                    }
                }
            }
            Task::TrainBackward {
                stage,
                micro_batch,
                boundary,
            } => {
                let gradient = boundary::read(payload, boundary).ok_or("half a number came as a gradient")?;
                let gradient = self.training(stage)?.backward(micro_batch, &gradient)?;
                Ok((Answer::Hidden, boundary::write(&gradient, boundary)))
            }
            Task::TrainSquareSum { stage, micro_batches } => done(Answer::SquareSum {
                sum: self.training(stage)?.square_sum(micro_batches)?,
            }),
            Task::TrainApply {
                stage,
                step,
                square_sum,
            } => {
                self.training(stage)?.apply(step, square_sum)?;
                done(Answer::Done)
            }
            Task::TrainWrite {
                stage,
                part_files,
                optimiser_file,
            } => {
                let stage = self.training(stage)?;
                stage.write(&part_files)?;
                if let Some(file) = optimiser_file {
                    stage.write_optimiser(file)?;
                }
                done(Answer::Done)
            }
            Task::Score { stage, texts, seq } => self.score(stage, &texts, seq),
            task => Err(format!("{task:?} is not about the device").into()),
        }
    }

    fn read_data(&mut self, tokenizer_file: &str, text_files: &[String]) -> Performed {
        let bytes = fs::read(tokenizer_file).map_err(|error| format!("{tokenizer_file}: {error}"))?;
        let tokenizer = Tokenizer::from_bytes(&bytes).map_err(|error| format!("{tokenizer_file}: {error}"))?;
        let mut data = TrainData::new();
        for file in text_files {
            let text = fs::read_to_string(file).map_err(|error| format!("{file}: {error}"))?;
            let tokens = tokenizer.encode(&text).map_err(|error| format!("{file}: {error}"))?;
            data.add(&tokens);
            data.add(end(&tokenizer).as_slice());
        }
        self.data = data;
        self.tokenizer = Some(tokenizer);
        done(Answer::Data {
            tokens: self.data.tokens(),
        })
    }

    fn score(&mut self, stage: StageId, texts: &[String], seq: u32) -> Performed {
        let tokenizer = self
            .tokenizer
            .as_ref()
            .ok_or("scoring needs a tokenizer, which comes with the local texts")?;
        let training = self.training.get_mut(&stage);
        let training = training.ok_or_else(|| format!("no stage {stage} is loaded for training"))?;
        let start = end(tokenizer).unwrap_or(0);
        let mut bits_per_byte = Vec::with_capacity(texts.len());
        for text in texts {
            let tokens = tokenizer.encode_bare(text).map_err(|error| error.to_string())?;
            let bytes = u64::try_from(text.len()).unwrap_or(u64::MAX);
            bits_per_byte.push(training.score(&tokens, bytes, start, seq)?);
        }
        done(Answer::Scored { bits_per_byte })
    }
}

/// The token that stands between texts, where the tokenizer has one that is known.
fn end(tokenizer: &Tokenizer) -> Option<u32> {
    const KNOWN: [&str; 6] = [
        polder_kernels::text::END_TEXT,
        "<|endoftext|>",
        "</s>",
        "<|end_of_text|>",
        "<eos>",
        "<|im_end|>",
    ];
    KNOWN.iter().find_map(|name| tokenizer.token_id(name))
}

/// The place behind `rows` positions from `position` on.
fn place_after(position: u32, rows: usize) -> u32 {
    position.saturating_add(u32::try_from(rows).unwrap_or(u32::MAX))
}

fn done(answer: Answer) -> Performed {
    Ok((answer, Vec::new()))
}

fn width(hidden: usize) -> u32 {
    u32::try_from(hidden).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
