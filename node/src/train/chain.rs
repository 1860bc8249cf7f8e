//! One round of a replica that is a chain of stages on several nodes.
//!
//! The stage before sends activations with the micro-batch's tokens, which hold the targets; the stage after sends
//! gradients back. A stage has at most as many micro-batches under way as there are stages from it to the end (1F1B), so
//! memory does not grow with the micro-batches of a step. At the end of a step the sums of squares travel to the last
//! stage and the total comes back, so that all clip by the same norm. A neighbour that is lost, silent or out of step
//! ends the round for this replica, and nothing else.

use std::path::PathBuf;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use polder_protocol::log::Stage;
use polder_protocol::round::Outcome;
use polder_protocol::run::RunSpec;
use polder_protocol::work::{Answer, Task};
use serde::{Deserialize, Serialize};

use super::desk::{Desk, done, utf8};
use super::jobs::{JobError, Jobs, Training, millionths};
use super::meeting::Opening;
use super::moments::Moments;
use super::world::{Link, TRAINING_STAGE};
use super::{adapted, gradient, whole};

/// How long a stage waits for the next thing from a neighbour: several micro-batches of the slowest device.
const NEIGHBOUR_PATIENCE: Duration = Duration::from_secs(120);
/// The wait before a stream that could not be opened is tried again.
const OPEN_AGAIN: Duration = Duration::from_secs(1);

/// What crosses between two stages. The payload is in the run's boundary form.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
enum Crossing {
    /// Down the chain: `tokens` ids of 4 bytes (little-endian), then activations.
    Forward { step: u32, micro_batch: u32, tokens: u32 },
    /// Up the chain: the gradient of those activations.
    Backward { step: u32, micro_batch: u32 },
    /// Down the chain: the sum of squares of all stages so far.
    Squares { step: u32, sum: f64 },
    /// Up the chain: the sum over all stages, and the step's mean loss.
    Total { step: u32, sum: f64, loss: f32 },
}

/// Trains this node's stage of the round and keeps its update.
pub(super) async fn train(
    jobs: &Jobs,
    training: &Training,
    stages: &[Stage],
    stage: usize,
) -> Result<Outcome, JobError> {
    let spec = &training.spec;
    let own = stages
        .get(stage)
        .ok_or_else(|| JobError::Invalid("no such stage".to_owned()))?;
    let mut starts = Vec::with_capacity(training.base.len());
    for (_, blob) in &training.base {
        starts.push(utf8(&jobs.file(*blob)?)?);
    }
    let mut desk = jobs.desk.lock().await;
    jobs.board.preparing(training.run);
    if stage == 0 {
        let tokenizer = jobs.tokenizer(training.run, spec).await?;
        jobs.texts_loaded
            .load((spec.tokenizer, &tokenizer), jobs.texts(spec)?)
            .await?;
    }
    let moments = training.moments(jobs, own.range);
    let remembered = moments.before(training.round.0);
    let frozen = adapted::frozen(jobs, training.run, spec, own.range).await?;
    desk.load(training.run, spec, own.range, starts, (remembered, frozen))
        .await?;
    let (before, after) = meet(jobs, training, stages, stage).await?;
    let mut line = Line {
        spec,
        desk: &desk,
        before,
        after,
        from_here: u32::try_from(stages.len().saturating_sub(stage)).unwrap_or(1),
        labels: vec![spec.seed, training.round.0, training.replica.0],
    };
    let trained = line.round(training, jobs).await;
    drop(line);
    let ends = gradient::end_files(jobs, training);
    let kept = match trained {
        Ok((tokens, loss)) => finish(jobs, training, &desk, &moments, ends, tokens)
            .await
            .map(|parts| (parts, tokens, loss)),
        Err(error) => Err(error),
    };
    if kept.is_err() {
        // Gradients of half a step may lie in the worker.
        desk.forget_stage();
    }
    let (parts, tokens, loss) = kept?;
    Ok(Outcome::Trained {
        parts,
        tokens,
        loss_ppm: millionths(loss),
    })
}

async fn finish(
    jobs: &Jobs,
    training: &Training,
    desk: &Desk,
    moments: &Moments,
    ends: Vec<PathBuf>,
    tokens: u64,
) -> Result<Vec<(polder_protocol::layout::Part, polder_protocol::hash::BlobId)>, JobError> {
    whole::write(desk, &ends, moments).await?;
    let kept = gradient::keep(jobs, training, ends, tokens).await;
    whole::remember(kept, moments, training)
}

/// The streams to the stage before and to the stage after, where there are such stages.
async fn meet(
    jobs: &Jobs,
    training: &Training,
    stages: &[Stage],
    stage: usize,
) -> Result<(Option<Box<dyn Link>>, Option<Box<dyn Link>>), JobError> {
    let opening = |stage: usize| Opening {
        run: training.run,
        round: training.round.0,
        replica: training.replica.0,
        stage: u32::try_from(stage).unwrap_or(u32::MAX),
    };
    let after = async {
        let Some(next) = stages.get(stage.saturating_add(1)) else {
            return Ok(None);
        };
        let bytes = postcard::to_allocvec(&opening(stage)).map_err(|error| JobError::Failed(error.to_string()))?;
        let open = async {
            loop {
                match jobs.network.open(next.node, bytes.clone()).await {
                    Ok(link) => return link,
                    Err(reason) => tracing::debug!(peer = %next.node, reason, "stage cannot be reached"),
                }
                tokio::time::sleep(OPEN_AGAIN).await;
            }
        };
        let opened = tokio::time::timeout(jobs.meeting_patience, open).await;
        let opened = opened.map_err(|_| JobError::Failed(format!("stage {} cannot be reached", next.node.short())));
        opened.map(Some)
    };
    let before = async {
        let Some((previous, number)) = stage.checked_sub(1).and_then(|n| Some((stages.get(n)?, n))) else {
            return Ok(None);
        };
        let link = jobs
            .meeting
            .wait(previous.node, opening(number), jobs.meeting_patience)
            .await;
        let link = link.ok_or_else(|| JobError::Failed(format!("stage {} did not come", previous.node.short())));
        link.map(Some)
    };
    let (before, after) = tokio::try_join!(before, after)?;
    Ok((before, after))
}

struct Line<'a> {
    spec: &'a RunSpec,
    desk: &'a Desk,
    before: Option<Box<dyn Link>>,
    after: Option<Box<dyn Link>>,
    /// Stages from this one to the last.
    from_here: u32,
    labels: Vec<u64>,
}

/// One micro-batch on its way down.
struct Arrived {
    tokens: Vec<u32>,
    activations: Bytes,
}

impl Line<'_> {
    /// All inner steps of the round: tokens of the replica and mean loss.
    async fn round(&mut self, training: &Training, jobs: &Jobs) -> Result<(u64, f64), JobError> {
        let inner = self.spec.inner;
        let step_tokens = u64::from(inner.batch) * u64::from(inner.micro_batches) * u64::from(inner.seq);
        let (mut tokens, mut losses) = (0u64, 0.0);
        for step in 0..inner.steps {
            let loss = self.step(step).await?;
            let (sum, loss) = self.total(step, loss).await?;
            let apply = Task::TrainApply {
                stage: TRAINING_STAGE,
                step: training.step_first().saturating_add(u64::from(step)),
                square_sum: sum,
            };
            self.desk.order(apply, Bytes::new(), done).await?;
            tokens = tokens.saturating_add(step_tokens);
            losses += f64::from(loss);
            jobs.board
                .trained(training.run, step.saturating_add(1), inner.steps, loss, tokens);
        }
        Ok((tokens, losses / f64::from(inner.steps.max(1))))
    }

    /// All micro-batches of one step, forward and backward. The mean loss at the last stage, zero elsewhere.
    async fn step(&mut self, step: u32) -> Result<f32, JobError> {
        let count = self.spec.inner.micro_batches;
        let (mut forward, mut backward, mut losses) = (0, 0, 0.0);
        while backward < count {
            let room = forward < count && forward - backward < self.from_here;
            match self.next(step, forward, backward, room).await? {
                Next::Forward(arrived) => {
                    let loss = self.forward(step, forward, arrived).await?;
                    forward += 1;
                    if let Some(loss) = loss {
                        // The last stage runs the backward at once.
                        losses += loss;
                        backward += 1;
                    }
                }
                Next::Backward(gradient) => {
                    self.backward(step, backward, gradient).await?;
                    backward += 1;
                }
            }
        }
        Ok(losses / count.max(1) as f32)
    }

    /// Waits for what comes next: a micro-batch while there is room for one, or a gradient.
    async fn next(&mut self, step: u32, forward: u32, backward: u32, room: bool) -> Result<Next, JobError> {
        if room && self.before.is_none() {
            return self.batch(step, forward).await.map(Next::Forward);
        }
        let waits_below = forward > backward;
        let (before, after) = (&mut self.before, &mut self.after);
        let received = async {
            tokio::select! {
                received = receive(before), if room => received.map(|received| (true, received)),
                received = receive(after), if waits_below => received.map(|received| (false, received)),
                else => Err(JobError::Failed("this stage has nothing to wait for".to_owned())),
            }
        };
        let (from_above, (crossing, payload)) = in_time(received).await?;
        match crossing {
            Crossing::Forward {
                step: s,
                micro_batch,
                tokens,
            } if from_above && (s, micro_batch) == (step, forward) => self.unpack(tokens, payload).map(Next::Forward),
            Crossing::Backward { step: s, micro_batch } if !from_above && (s, micro_batch) == (step, backward) => {
                Ok(Next::Backward(payload))
            }
            other => Err(out_of_step(&other)),
        }
    }

    /// The first stage's micro-batch.
    async fn batch(&self, step: u32, micro_batch: u32) -> Result<Arrived, JobError> {
        let inner = self.spec.inner;
        let mut labels = self.labels.clone();
        labels.extend([u64::from(step), u64::from(micro_batch)]);
        let task = Task::TrainBatch {
            labels,
            batch: inner.batch,
            seq: inner.seq,
        };
        let tokens = self
            .desk
            .order(task, Bytes::new(), |answer, _| match answer {
                Answer::Batch { tokens } => Ok(tokens),
                other => Err(other),
            })
            .await?;
        Ok(Arrived {
            tokens,
            activations: Bytes::new(),
        })
    }

    fn unpack(&self, tokens: u32, mut payload: Bytes) -> Result<Arrived, JobError> {
        let inner = self.spec.inner;
        let expected = u64::from(inner.batch) * (u64::from(inner.seq) + 1);
        let bytes = usize::try_from(tokens).ok().and_then(|tokens| tokens.checked_mul(4));
        let bytes = bytes.filter(|bytes| u64::from(tokens) == expected && *bytes <= payload.len());
        let bytes = bytes.ok_or_else(|| JobError::Failed("a neighbour sent another number of tokens".to_owned()))?;
        let ids = payload.split_to(bytes);
        let (ids, _) = ids.as_chunks::<4>();
        Ok(Arrived {
            tokens: ids.iter().map(|id| u32::from_le_bytes(*id)).collect(),
            activations: payload,
        })
    }

    /// Runs a micro-batch forward and passes it on; at the last stage also backward, with its loss as the answer.
    async fn forward(&mut self, step: u32, micro_batch: u32, arrived: Arrived) -> Result<Option<f32>, JobError> {
        let inner = self.spec.inner;
        let needs_tokens = self.before.is_none() || self.after.is_none();
        let task = Task::TrainForward {
            stage: TRAINING_STAGE,
            micro_batch,
            tokens: if needs_tokens {
                arrived.tokens.clone()
            } else {
                Vec::new()
            },
            batch: inner.batch,
            seq: inner.seq,
            boundary: self.spec.boundary,
        };
        let answered = self
            .desk
            .order(task, arrived.activations, |answer, payload| match answer {
                Answer::Hidden => Ok((None, payload)),
                Answer::Loss { loss } => Ok((Some(loss), payload)),
                other => Err(other),
            })
            .await?;
        match (answered, &mut self.after) {
            ((None, activations), Some(after)) => {
                let tokens = u32::try_from(arrived.tokens.len()).unwrap_or(u32::MAX);
                let mut payload = BytesMut::with_capacity(arrived.tokens.len() * 4 + activations.len());
                arrived.tokens.iter().for_each(|token| payload.put_u32_le(*token));
                payload.extend_from_slice(&activations);
                let crossing = Crossing::Forward {
                    step,
                    micro_batch,
                    tokens,
                };
                send(after, crossing, payload.freeze()).await?;
                Ok(None)
            }
            ((Some(loss), gradient), None) => {
                if let Some(before) = &mut self.before {
                    send(before, Crossing::Backward { step, micro_batch }, gradient).await?;
                }
                Ok(Some(loss))
            }
            _ => Err(JobError::Failed(
                "the worker has another stage than the log says".to_owned(),
            )),
        }
    }

    async fn backward(&mut self, step: u32, micro_batch: u32, gradient: Bytes) -> Result<(), JobError> {
        let task = Task::TrainBackward {
            stage: TRAINING_STAGE,
            micro_batch,
            boundary: self.spec.boundary,
        };
        let gradient = self
            .desk
            .order(task, gradient, |answer, payload| match answer {
                Answer::Hidden => Ok(payload),
                other => Err(other),
            })
            .await?;
        match &mut self.before {
            Some(before) => send(before, Crossing::Backward { step, micro_batch }, gradient).await,
            None => Ok(()),
        }
    }

    /// The sum of squares over all stages and the step's mean loss, the same at every stage.
    async fn total(&mut self, step: u32, loss: f32) -> Result<(f64, f32), JobError> {
        let task = Task::TrainSquareSum {
            stage: TRAINING_STAGE,
            micro_batches: self.spec.inner.micro_batches,
        };
        let own = self
            .desk
            .order(task, Bytes::new(), |answer, _| match answer {
                Answer::SquareSum { sum } => Ok(sum),
                other => Err(other),
            })
            .await?;
        let mut sum = own;
        if let Some(before) = &mut self.before {
            match in_time(receive_from(before)).await?.0 {
                Crossing::Squares { step: s, sum: so_far } if s == step => sum = so_far + own,
                other => return Err(out_of_step(&other)),
            }
        }
        let mut total = (sum, loss);
        if let Some(after) = &mut self.after {
            send(after, Crossing::Squares { step, sum }, Bytes::new()).await?;
            match in_time(receive_from(after)).await?.0 {
                Crossing::Total { step: s, sum, loss } if s == step => total = (sum, loss),
                other => return Err(out_of_step(&other)),
            }
        }
        let (sum, loss) = total;
        if !(sum.is_finite() && sum >= 0.0 && loss.is_finite()) {
            return Err(JobError::Failed(format!(
                "step {step} diverged: gradient square sum {sum}, loss {loss}"
            )));
        }
        if let Some(before) = &mut self.before {
            send(before, Crossing::Total { step, sum, loss }, Bytes::new()).await?;
        }
        Ok(total)
    }
}

enum Next {
    Forward(Arrived),
    Backward(Bytes),
}

async fn in_time<T>(received: impl Future<Output = Result<T, JobError>>) -> Result<T, JobError> {
    let received = tokio::time::timeout(NEIGHBOUR_PATIENCE, received).await;
    received.unwrap_or_else(|_| Err(JobError::Failed("a neighbour in the chain is silent".to_owned())))
}

async fn receive(link: &mut Option<Box<dyn Link>>) -> Result<(Crossing, Bytes), JobError> {
    match link {
        Some(link) => receive_from(link).await,
        None => std::future::pending().await,
    }
}

async fn receive_from(link: &mut Box<dyn Link>) -> Result<(Crossing, Bytes), JobError> {
    let lost = |reason: String| JobError::Failed(format!("a neighbour in the chain is lost: {reason}"));
    let received = link.receive().await.map_err(lost)?;
    let (header, payload) = received.ok_or_else(|| lost("it ended the stream".to_owned()))?;
    let crossing = postcard::from_bytes(&header).map_err(|error| lost(error.to_string()))?;
    Ok((crossing, payload))
}

async fn send(link: &mut Box<dyn Link>, crossing: Crossing, payload: Bytes) -> Result<(), JobError> {
    let header = postcard::to_allocvec(&crossing).map_err(|error| JobError::Failed(error.to_string()))?;
    in_time(async {
        let sent = link.send(header, payload).await;
        sent.map_err(|reason| JobError::Failed(format!("a neighbour in the chain is lost: {reason}")))
    })
    .await
}

fn out_of_step(crossing: &Crossing) -> JobError {
    JobError::Failed(format!("a neighbour in the chain is out of step: {crossing:?}"))
}
