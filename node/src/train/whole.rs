//! One round of a replica that is this node alone.

use std::time::{Duration, Instant};

use bytes::Bytes;
use polder_protocol::layout::BlockRange;
use polder_protocol::round::Outcome;
use polder_protocol::work::{Answer, Task};
use tracing::warn;

use super::desk::{done, utf8};
use super::jobs::{JobError, Jobs, Training, millionths};
use super::moments::Moments;
use super::world::TRAINING_STAGE;
use super::{adapted, gradient};

/// How long one order may keep the device, so that a person sees progress and an owner who returns waits little.
const SLICE: Duration = Duration::from_secs(1);

/// Trains the round and keeps its update.
pub(super) async fn train(jobs: &Jobs, training: &Training, range: BlockRange) -> Result<Outcome, JobError> {
    let spec = &training.spec;
    let texts = jobs.texts(spec)?;
    let tokenizer = jobs.tokenizer(training.run, spec).await?;
    let mut starts = Vec::with_capacity(training.base.len());
    for (_, blob) in &training.base {
        starts.push(utf8(&jobs.file(*blob)?)?);
    }
    let mut desk = jobs.desk.lock().await;
    jobs.board.preparing(training.run);
    jobs.texts_loaded.load((spec.tokenizer, &tokenizer), texts).await?;
    let moments = training.moments(jobs, range);
    let remembered = moments.before(training.round.0);
    let frozen = adapted::frozen(jobs, training.run, spec, range).await?;
    desk.load(training.run, spec, range, starts, (remembered, frozen))
        .await?;
    let (mut losses, mut tokens) = (Vec::new(), 0u64);
    let mut slice = 1;
    while let Some(left) = left(spec.inner.steps, losses.len()) {
        let began = Instant::now();
        let task = Task::TrainSteps {
            stage: TRAINING_STAGE,
            step_first: training.step_first().saturating_add(losses.len() as u64),
            steps: left.min(slice),
            labels: vec![spec.seed, training.round.0, training.replica.0],
        };
        let (mut stepped, trained) = desk
            .order(task, Bytes::new(), |answer, _| match answer {
                Answer::Stepped { losses, tokens } => Ok((losses, tokens)),
                other => Err(other),
            })
            .await?;
        if stepped.is_empty() {
            return Err(JobError::Failed("the worker took no step".to_owned()));
        }
        // Twice as many, half as many: the first order of a worker is no measure of those after it.
        slice = if began.elapsed() < SLICE / 2 {
            slice.saturating_mul(2)
        } else {
            (slice / 2).max(1)
        };
        losses.append(&mut stepped);
        tokens = tokens.saturating_add(trained);
        let loss = losses.last().copied().unwrap_or(f32::NAN);
        jobs.board
            .trained(training.run, losses.len() as u32, spec.inner.steps, loss, tokens);
    }
    let ends = gradient::end_files(jobs, training);
    write(&desk, &ends, &moments).await?;
    let loss = losses.iter().map(|loss| f64::from(*loss)).sum::<f64>() / losses.len() as f64;
    let kept = gradient::keep(jobs, training, ends, tokens).await;
    let kept = remember(kept, &moments, training);
    if kept.is_err() {
        // What did not come out finite must not be built upon.
        desk.forget_stage();
    }
    Ok(Outcome::Trained {
        parts: kept?,
        tokens,
        loss_ppm: millionths(loss),
    })
}

/// Puts the optimiser's state in place behind an update that is whole. Without it the update is good all the same.
pub(super) fn remember<T>(kept: Result<T, JobError>, moments: &Moments, training: &Training) -> Result<T, JobError> {
    if kept.is_ok()
        && let Err(error) = moments.commit(training.round.0)
    {
        warn!(run = %training.run, %error, "cannot keep the optimiser's state; a restart would begin it afresh");
    }
    kept
}

/// Has the worker write its parameters and what its optimiser remembers.
pub(super) async fn write(
    desk: &super::desk::Desk,
    ends: &[std::path::PathBuf],
    moments: &Moments,
) -> Result<(), JobError> {
    let made = moments.prepare();
    made.map_err(|error| JobError::Failed(format!("cannot make a folder for the optimiser's state: {error}")))?;
    if let Some(folder) = ends.first().and_then(|path| path.parent()) {
        let made = std::fs::create_dir_all(folder);
        made.map_err(|error| JobError::Failed(format!("cannot make {}: {error}", folder.display())))?;
    }
    let task = Task::TrainWrite {
        stage: TRAINING_STAGE,
        part_files: ends.iter().map(|path| utf8(path)).collect::<Result<_, _>>()?,
        optimiser_file: Some(utf8(&moments.next())?),
    };
    desk.order(task, Bytes::new(), done).await
}

fn left(steps: u32, done: usize) -> Option<u32> {
    let left = steps.saturating_sub(u32::try_from(done).unwrap_or(u32::MAX));
    (left > 0).then_some(left)
}
