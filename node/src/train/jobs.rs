//! The slow work that the machines ask for: fetching, training, aggregating, scoring.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use polder_protocol::aggregate::{self, OuterStep, PartState, Update};
use polder_protocol::codec::{Form, Frame, codec_of_round, frame_bytes};
use polder_protocol::hash::{BlobId, InstitutionId, NodeId, RunId};
use polder_protocol::layout::{BlockRange, Part, PartLayout};
use polder_protocol::log::{Contribution, ReplicaId, Round, Stage, institution_of};
use polder_protocol::round::{Job, Outcome};
use polder_protocol::run::{Evaluation, RunSpec};
use polder_protocol::work::{Answer, Task};

use super::datasets::DataSets;
use super::desk::{Desk, Texts, done, order, utf8};
use super::meeting::Meeting;
use super::moments::Moments;
use super::status::Board;
use super::world::{Blobs, Compute, Network, SCORING_STAGE};
use super::{adapted, chain, whole};

/// Blobs fetched at once by one job: enough to fill a link, few enough to share it.
const FETCHES_AT_ONCE: usize = 8;
/// The largest held-out texts of a run.
const EVALUATION_BYTES_MAX: u64 = 64 << 20;
/// The largest tokenizer.
const TOKENIZER_BYTES_MAX: u64 = 64 << 20;
/// The largest fetched blob whose layout cannot be sized here. None is.
const NO_BYTES: u64 = 0;

/// Why a job came to nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum JobError {
    /// Perhaps the next time.
    Failed(String),
    /// The bytes are not what they should be.
    Invalid(String),
}

/// Does jobs.
pub(super) struct Jobs {
    pub(super) compute: Arc<dyn Compute>,
    pub(super) blobs: Arc<dyn Blobs>,
    pub(super) network: Arc<dyn Network>,
    pub(super) board: Arc<Board>,
    pub(super) data: Arc<Mutex<DataSets>>,
    pub(super) meeting: Meeting,
    /// How long a stage waits for its neighbours to begin the same round.
    pub(super) meeting_patience: Duration,
    /// One round is trained at a time.
    pub(super) desk: tokio::sync::Mutex<Desk>,
    /// What the worker has to read.
    pub(super) texts_loaded: Texts,
    /// The folder of all runs.
    pub(super) runs: PathBuf,
}

impl Jobs {
    /// Does one job. May be dropped halfway: what it had begun is then begun again by the next job of its kind.
    pub(super) async fn run(&self, job: Job) -> Outcome {
        let outcome = match job {
            Job::Train {
                run,
                spec,
                round,
                replica,
                stages,
                stage,
                base,
            } => {
                let training = Training {
                    run,
                    spec,
                    round,
                    replica,
                    base,
                };
                match stages.get(stage) {
                    Some(one) if stages.len() == 1 => whole::train(self, &training, one.range).await,
                    Some(_) => chain::train(self, &training, &stages, stage).await,
                    None => Err(JobError::Invalid("the stage is none of the replica's".to_owned())),
                }
            }
            Job::Fetch {
                run,
                spec,
                round,
                parts,
                sources,
            } => self.fetch_update(run, spec, round, parts, sources).await,
            Job::Apply {
                run,
                spec,
                round,
                base,
                set,
                makers,
                sources,
            } => self.apply(run, spec, round, base, (set, makers), sources).await,
            Job::FetchState {
                run,
                spec,
                parts,
                sources,
                ..
            } => self.fetch_state(run, spec, parts, sources).await,
            Job::Evaluate { run, spec, parts, .. } => self.evaluate(run, &spec, &parts).await,
        };
        outcome.unwrap_or_else(|error| match error {
            JobError::Failed(reason) => Outcome::Failed { reason },
            JobError::Invalid(reason) => Outcome::Invalid { reason },
        })
    }

    /// The folder of one run.
    pub(super) fn folder(&self, run: RunId) -> PathBuf {
        self.runs.join(run.to_string())
    }

    /// The file of a blob that was said to be here.
    pub(super) fn file(&self, blob: BlobId) -> Result<PathBuf, JobError> {
        let path = self.blobs.path(blob);
        path.ok_or_else(|| JobError::Failed(format!("blob {} is not here", blob.short())))
    }

    /// The file of the run's tokenizer.
    pub(super) async fn tokenizer(&self, run: RunId, spec: &RunSpec) -> Result<PathBuf, JobError> {
        self.fetch(run, spec.tokenizer, self.sources(run, spec), TOKENIZER_BYTES_MAX)
            .await
    }

    /// Who has what the run's facts name: the steward, and whoever trains.
    pub(super) fn sources(&self, run: RunId, spec: &RunSpec) -> Vec<NodeId> {
        let known = self.board.newest_state(run).map(|(_, _, sources)| sources);
        known.unwrap_or_else(|| vec![spec.steward])
    }

    /// The text files of this node for a run.
    pub(super) fn texts(&self, spec: &RunSpec) -> Result<Vec<PathBuf>, JobError> {
        let data = self.data.lock().unwrap_or_else(PoisonError::into_inner);
        let files = data
            .files_of(&spec.data)
            .map_err(|error| JobError::Failed(error.to_string()))?;
        if files.is_empty() {
            let wanted = spec.data.join(", ");
            return Err(JobError::Failed(format!("this node has no data named {wanted}")));
        }
        Ok(files)
    }

    /// The languages of those texts.
    pub(super) fn languages(&self, spec: &RunSpec) -> Vec<String> {
        let data = self.data.lock().unwrap_or_else(PoisonError::into_inner);
        data.languages_of(&spec.data)
    }

    async fn fetch(&self, run: RunId, blob: BlobId, sources: Vec<NodeId>, bytes_max: u64) -> Result<PathBuf, JobError> {
        self.blobs
            .fetch(run, blob, sources, bytes_max)
            .await
            .map_err(JobError::Failed)?;
        self.file(blob)
    }

    pub(super) async fn fetch_all(
        &self,
        run: RunId,
        blobs: Vec<(BlobId, u64)>,
        sources: &[NodeId],
    ) -> Result<Vec<PathBuf>, JobError> {
        let mut fetches = Vec::with_capacity(blobs.len());
        for (blob, bytes_max) in blobs {
            fetches.push(self.fetch(run, blob, sources.to_vec(), bytes_max));
        }
        let fetched: Vec<_> = futures::stream::iter(fetches).buffered(FETCHES_AT_ONCE).collect().await;
        fetched.into_iter().collect()
    }

    async fn fetch_update(
        &self,
        run: RunId,
        spec: Arc<RunSpec>,
        round: Round,
        parts: Vec<(Part, BlobId)>,
        sources: Vec<NodeId>,
    ) -> Result<Outcome, JobError> {
        let wanted = parts
            .iter()
            .map(|(part, blob)| (*blob, update_bytes(&spec, *part, round)))
            .collect();
        let files = self.fetch_all(run, wanted, &sources).await?;
        blocking(move || {
            for ((part, _), file) in parts.iter().zip(files) {
                let bytes = read(&file)?;
                check_update(&bytes, &spec, run, round, None, *part)?;
            }
            Ok(Outcome::Fetched)
        })
        .await
    }

    async fn apply(
        &self,
        run: RunId,
        spec: Arc<RunSpec>,
        round: Round,
        base: Vec<(Part, BlobId)>,
        (set, makers): (Vec<Contribution>, BTreeMap<ReplicaId, Vec<Stage>>),
        sources: Vec<NodeId>,
    ) -> Result<Outcome, JobError> {
        let mut parts = Vec::with_capacity(base.len());
        for (part, blob) in base {
            let index = usize::try_from(part.0).unwrap_or(usize::MAX);
            let updates = set.iter().map(|update| {
                let blob = update.parts.get(index).copied();
                let blob = blob.ok_or_else(|| JobError::Invalid("the set lacks a part".to_owned()))?;
                Ok((blob, update_bytes(&spec, part, update.base)))
            });
            let updates = updates.collect::<Result<Vec<_>, JobError>>()?;
            let files = self.fetch_all(run, updates, &sources).await?;
            let state = self.file(blob)?;
            let voices = voices(&set, &makers, part, spec.layout.blocks())?;
            let (spec, set) = (Arc::clone(&spec), set.clone());
            let next = blocking(move || outer_step(run, &spec, round, part, &state, &set, &voices, &files)).await?;
            parts.push((part, self.blobs.put(run, next).await.map_err(JobError::Failed)?));
        }
        Ok(Outcome::Applied { parts })
    }

    pub(super) async fn fetch_state(
        &self,
        run: RunId,
        spec: Arc<RunSpec>,
        parts: Vec<(Part, BlobId)>,
        sources: Vec<NodeId>,
    ) -> Result<Outcome, JobError> {
        let wanted = parts
            .iter()
            .map(|(part, blob)| (*blob, state_bytes_max(&spec, *part)))
            .collect();
        let files = self.fetch_all(run, wanted, &sources).await?;
        blocking(move || {
            for ((part, _), file) in parts.iter().zip(files) {
                let state = PartState::from_bytes(layout_of(&spec, *part)?, &read(&file)?);
                state.map_err(|error| JobError::Invalid(format!("part {}: {error}", part.0)))?;
            }
            Ok(Outcome::Fetched)
        })
        .await
    }

    /// The held-out texts of a run, where it has any.
    pub(super) async fn evaluation(&self, run: RunId, spec: &RunSpec) -> Result<Evaluation, JobError> {
        let Some(blob) = spec.evaluation else {
            return Ok(Evaluation::default());
        };
        let file = self
            .fetch(run, blob, self.sources(run, spec), EVALUATION_BYTES_MAX)
            .await?;
        let bytes = blocking(move || read(&file)).await?;
        postcard::from_bytes(&bytes).map_err(|error| JobError::Invalid(format!("the held-out texts: {error}")))
    }

    async fn evaluate(&self, run: RunId, spec: &RunSpec, parts: &[(Part, BlobId)]) -> Result<Outcome, JobError> {
        let evaluation = self.evaluation(run, spec).await?;
        let mut bits_per_byte_ppm = BTreeMap::new();
        if evaluation.languages.is_empty() {
            return Ok(Outcome::Evaluated { bits_per_byte_ppm });
        }
        let part_files = parts
            .iter()
            .map(|(_, blob)| utf8(&self.file(*blob)?))
            .collect::<Result<_, _>>()?;
        // Scoring uses the run's tokenizer, which the worker takes with its data.
        let tokenizer = self.tokenizer(run, spec).await?;
        let texts = self.texts(spec).unwrap_or_default();
        self.texts_loaded.load((spec.tokenizer, &tokenizer), texts).await?;
        let compute = self.compute.as_ref();
        let range = BlockRange::whole(spec.layout.blocks());
        let load = Task::TrainLoad {
            stage: SCORING_STAGE,
            config_json: spec.config_json.clone(),
            range,
            part_files,
            inner: spec.inner,
            steps_total: 1,
            optimiser_file: None,
            frozen: adapted::frozen(self, run, spec, range).await?,
        };
        order(compute, load, Bytes::new(), |answer, _| match answer {
            Answer::Loaded { .. } => Ok(()),
            other => Err(other),
        })
        .await?;
        for (language, held_out) in evaluation.languages {
            // One language at a time, so that the orders of a round in training come in between.
            let score = Task::Score {
                stage: SCORING_STAGE,
                texts: vec![held_out.text],
                seq: spec.inner.seq,
            };
            let bits = order(compute, score, Bytes::new(), |answer, _| match answer {
                Answer::Scored { bits_per_byte } => Ok(bits_per_byte),
                other => Err(other),
            })
            .await?;
            let bits = bits.first().copied().unwrap_or(f32::NAN);
            bits_per_byte_ppm.insert(language, millionths(f64::from(bits)));
        }
        order(compute, Task::Unload { stage: SCORING_STAGE }, Bytes::new(), done).await?;
        Ok(Outcome::Evaluated { bits_per_byte_ppm })
    }
}

/// One round of one replica, at one of its stages.
pub(super) struct Training {
    pub(super) run: RunId,
    pub(super) spec: Arc<RunSpec>,
    pub(super) round: Round,
    pub(super) replica: ReplicaId,
    pub(super) base: Vec<(Part, BlobId)>,
}

impl Training {
    /// What the optimiser of this node's stage remembers on disk.
    pub(super) fn moments(&self, jobs: &Jobs, range: BlockRange) -> Moments {
        Moments::new(jobs.folder(self.run).join("optimiser"), range)
    }

    /// Inner steps of the run before this round.
    pub(super) fn step_first(&self) -> u64 {
        self.round.0.saturating_mul(u64::from(self.spec.inner.steps))
    }
}

/// A measured number in millionths; zero where it is not a number above zero.
pub(super) fn millionths(value: f64) -> u64 {
    // The cast saturates and makes NaN zero.
    (value * 1e6).round() as u64
}

/// Runs slow pure work beside the runtime.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, JobError> + Send + 'static,
) -> Result<T, JobError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(JobError::Failed(error.to_string())),
    }
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>, JobError> {
    fs::read(path).map_err(|error| JobError::Failed(format!("cannot read {}: {error}", path.display())))
}

pub(super) fn layout_of(spec: &RunSpec, part: Part) -> Result<&PartLayout, JobError> {
    let layout = usize::try_from(part.0)
        .ok()
        .and_then(|part| spec.layout.parts.get(part));
    layout.ok_or_else(|| JobError::Invalid(format!("the model has no part {}", part.0)))
}

fn update_bytes(spec: &RunSpec, part: Part, round: Round) -> u64 {
    let form = Form::from(codec_of_round(&spec.outer, round.0));
    let bytes = layout_of(spec, part).ok().and_then(|layout| frame_bytes(layout, form));
    bytes.and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(NO_BYTES)
}

fn state_bytes_max(spec: &RunSpec, part: Part) -> u64 {
    let elements = layout_of(spec, part).ok().and_then(PartLayout::elements);
    let bytes = elements.and_then(|elements| u64::try_from(elements).ok()?.checked_mul(8));
    bytes.unwrap_or(NO_BYTES)
}

/// Checks that bytes are a pseudo-gradient of this run, round and part, in the round's form, and from this replica
/// where it is known.
fn check_update<'a>(
    bytes: &'a [u8],
    spec: &RunSpec,
    run: RunId,
    round: Round,
    replica: Option<ReplicaId>,
    part: Part,
) -> Result<Frame<'a>, JobError> {
    let invalid = |reason: String| JobError::Invalid(format!("update of part {}: {reason}", part.0));
    let frame = Frame::parse(bytes, layout_of(spec, part)?).map_err(|error| invalid(error.to_string()))?;
    let header = frame.header();
    let same_replica = replica.is_none_or(|replica| header.replica == replica.0);
    if (header.run, header.round, header.part) != (run, round.0, part) || !same_replica {
        return Err(invalid("it says that it belongs elsewhere".to_owned()));
    }
    let form = Form::from(codec_of_round(&spec.outer, round.0));
    if header.form != form {
        return Err(invalid(format!(
            "it is written as {:?}, the round's form is {form:?}",
            header.form
        )));
    }
    Ok(frame)
}

/// The institution behind each contribution to a part.
fn voices(
    set: &[Contribution],
    makers: &BTreeMap<ReplicaId, Vec<Stage>>,
    part: Part,
    blocks: u32,
) -> Result<Vec<InstitutionId>, JobError> {
    let voice = |one: &Contribution| institution_of(makers.get(&one.replica)?, part, blocks);
    let voices: Option<Vec<InstitutionId>> = set.iter().map(voice).collect();
    voices.ok_or_else(|| JobError::Invalid("nobody is known to have made a contribution of the set".to_owned()))
}

/// The next state of one part. Every node computes the same bytes.
#[expect(
    clippy::too_many_arguments,
    reason = "each is another thing, and there is one caller"
)]
fn outer_step(
    run: RunId,
    spec: &RunSpec,
    round: Round,
    part: Part,
    state: &Path,
    set: &[Contribution],
    voices: &[InstitutionId],
    files: &[PathBuf],
) -> Result<Vec<u8>, JobError> {
    let layout = layout_of(spec, part)?;
    let mut state = PartState::from_bytes(layout, &read(state)?)
        .map_err(|error| JobError::Invalid(format!("state of part {}: {error}", part.0)))?;
    let bytes = files.iter().map(|file| read(file)).collect::<Result<Vec<_>, _>>()?;
    let mut updates = Vec::with_capacity(set.len());
    for ((contribution, bytes), institution) in set.iter().zip(&bytes).zip(voices) {
        updates.push(Update {
            frame: check_update(bytes, spec, run, contribution.base, Some(contribution.replica), part)?,
            weight: contribution.weight(round),
            institution: *institution,
        });
    }
    aggregate::apply(layout, &updates, OuterStep::of_round(&spec.outer, round.0), &mut state)
        .map_err(|error| JobError::Invalid(error.to_string()))?;
    Ok(state.to_bytes())
}
