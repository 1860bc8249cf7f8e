//! The device as training uses it: what is loaded in the worker, and orders whose answers have the right kind.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use polder_protocol::hash::{BlobId, RunId};
use polder_protocol::layout::BlockRange;
use polder_protocol::run::RunSpec;
use polder_protocol::work::{Answer, Frozen, Task};
use tracing::warn;

use super::jobs::JobError;
use super::world::{Compute, TRAINING_STAGE};

/// Who holds the desk may order. What the worker is believed to have loaded is forgotten when the worker is another.
pub(super) struct Desk {
    compute: Arc<dyn Compute>,
    stage: Option<(u64, RunId, BlockRange)>,
}

impl Desk {
    pub(super) fn new(compute: Arc<dyn Compute>) -> Self {
        Self { compute, stage: None }
    }

    /// Loads the stage, or gives the one that is loaded the parameters in `part_files`. A stage that is loaded takes up what
    /// its optimiser remembers in the file `remembered`, over a model that is `frozen`.
    pub(super) async fn load(
        &mut self,
        run: RunId,
        spec: &RunSpec,
        range: BlockRange,
        part_files: Vec<String>,
        (remembered, frozen): (Option<PathBuf>, Option<Frozen>),
    ) -> Result<(), JobError> {
        if self.stage == Some((self.compute.life(), run, range)) {
            let task = Task::TrainSet {
                stage: TRAINING_STAGE,
                part_files,
            };
            return self.order(task, Bytes::new(), done).await;
        }
        let inner = spec.inner;
        let task = |optimiser_file| Task::TrainLoad {
            stage: TRAINING_STAGE,
            config_json: spec.config_json.clone(),
            range,
            part_files: part_files.clone(),
            inner,
            steps_total: spec.rounds.saturating_mul(u64::from(inner.steps)),
            optimiser_file,
            frozen: frozen.clone(),
        };
        self.stage = None;
        let loaded = |answer, _| match answer {
            Answer::Loaded { .. } => Ok(()),
            other => Err(other),
        };
        let again = match remembered.as_deref().map(utf8).transpose()? {
            Some(file) => {
                let result = self.order(task(Some(file.clone())), Bytes::new(), loaded).await;
                result.err().map(|error| (file, error))
            }
            None => {
                self.order(task(None), Bytes::new(), loaded).await?;
                None
            }
        };
        if let Some((file, JobError::Failed(reason) | JobError::Invalid(reason))) = again {
            // A damaged file costs what the optimiser remembered, and not the run.
            self.order(task(None), Bytes::new(), loaded).await?;
            warn!(file, reason, "the optimiser's state cannot be used; it begins afresh");
        }
        self.stage = Some((self.compute.life(), run, range));
        Ok(())
    }

    /// Says that the stage may be in the middle of something: the next round loads it anew.
    pub(super) fn forget_stage(&mut self) {
        self.stage = None;
    }

    /// Orders, and takes from the answer what `read` finds in it.
    pub(super) async fn order<T>(
        &self,
        task: Task,
        payload: Bytes,
        read: impl FnOnce(Answer, Bytes) -> Result<T, Answer>,
    ) -> Result<T, JobError> {
        order(self.compute.as_ref(), task, payload, read).await
    }
}

/// The texts and the tokenizer in the worker. Training and scoring both need them, at different times.
pub(super) struct Texts {
    compute: Arc<dyn Compute>,
    loaded: tokio::sync::Mutex<Option<(u64, BlobId, Vec<PathBuf>)>>,
}

impl Texts {
    pub(super) fn new(compute: Arc<dyn Compute>) -> Self {
        let loaded = tokio::sync::Mutex::default();
        Self { compute, loaded }
    }

    /// Makes these texts the ones that batches come from.
    pub(super) async fn load(&self, tokenizer: (BlobId, &Path), files: Vec<PathBuf>) -> Result<(), JobError> {
        let (tokenizer, tokenizer_path) = tokenizer;
        let wanted = (self.compute.life(), tokenizer, files);
        let mut loaded = self.loaded.lock().await;
        if loaded.as_ref() == Some(&wanted) {
            return Ok(());
        }
        *loaded = None;
        let task = Task::TrainData {
            tokenizer_file: utf8(tokenizer_path)?,
            text_files: wanted.2.iter().map(|path| utf8(path)).collect::<Result<_, _>>()?,
        };
        order(self.compute.as_ref(), task, Bytes::new(), |answer, _| match answer {
            Answer::Data { .. } => Ok(()),
            other => Err(other),
        })
        .await?;
        *loaded = Some(wanted);
        Ok(())
    }
}

/// Orders, and takes from the answer what `read` finds in it.
pub(super) async fn order<T>(
    compute: &dyn Compute,
    task: Task,
    payload: Bytes,
    read: impl FnOnce(Answer, Bytes) -> Result<T, Answer>,
) -> Result<T, JobError> {
    let (answer, payload) = compute.order(task, payload).await.map_err(JobError::Failed)?;
    read(answer, payload).map_err(|answer| match answer {
        Answer::Failed { reason } => JobError::Failed(reason),
        other => {
            let mut text = format!("the worker gave an answer to another question: {other:?}");
            text.truncate(text.floor_char_boundary(200));
            JobError::Failed(text)
        }
    })
}

/// For orders that are answered with [`Answer::Done`].
pub(super) fn done(answer: Answer, _: Bytes) -> Result<(), Answer> {
    match answer {
        Answer::Done => Ok(()),
        other => Err(other),
    }
}

/// A path as the worker is told it.
pub(super) fn utf8(path: &Path) -> Result<String, JobError> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| JobError::Failed(format!("{} is no UTF-8 path", path.display())))
}
