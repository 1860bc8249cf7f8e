//! Training runs: drives the protocol's machines, trains on this node's device, keeps what must not be lost.
//!
//! ```text
//! driver   one task: steps the machines, carries out their effects in order
//! jobs     slow work that they ask for: fetch, apply, evaluate; whole and chain train a round
//! journal  what is durable of a run; feedback: what top-k left out; moments: what optimisers remember
//! status   what people see of it; routes: over HTTP
//! world    what all this needs of the network, the store and the device; real: these, as the daemon has them
//! ```

mod adapted;
mod baselines;
mod chain;
mod datasets;
mod desk;
mod driver;
mod durable;
mod export;
mod feedback;
mod gradient;
mod jobs;
mod journal;
mod meeting;
mod moments;
mod network;
mod publish;
mod real;
mod routes;
mod status;
#[cfg(test)]
mod tests;
mod whole;
mod world;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use polder_protocol::hash::{FederationId, InstitutionId, NodeId, RunId};
use polder_protocol::log::Seal;
use polder_protocol::node::{Command, Input};
use polder_protocol::run::{Evaluation, RunSpec};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

pub use baselines::{compressor_bits_per_byte, order_0_bits_per_byte};
pub use datasets::{DataSet, DataSetError, DataSets};
pub use export::ExportError;
pub(crate) use journal::{honest_journal, untrusted_journal};
pub use network::{Planes, TOPIC};
pub use real::RunBlobs;

pub use routes::routes;
pub use status::{LanguageStatus, ReplicaStatus, RoundReport, RunStatus};
pub use world::{Blobs, Compute, Link, Network, Received};

use crate::gate::Admitted;
use desk::{Desk, Texts};
use driver::{Ask, Driver, Participant};
use jobs::{JobError, Jobs};
use meeting::{Meeting, Opening};
use status::Board;

/// What waits for the driver. Messages beyond are lost, as messages may be.
const ASKS_MAX: usize = 1_024;

/// A neighbour in a chain may have to fetch the state first, and one that failed tries again within this time.
const MEETING_PATIENCE: Duration = Duration::from_secs(60);

/// How training takes part in a node.
#[derive(Debug, Clone)]
pub struct TrainConfig {
    /// The node's folder: `runs/` and `data.toml` lie in it.
    pub home: PathBuf,
    /// The federation, for the facts of new runs.
    pub federation: FederationId,
    /// The institution that certified this node: its updates are that institution's voice.
    pub institution: InstitutionId,
    /// Train in runs. Without it, runs are followed and nothing is contributed.
    pub train: bool,
    /// The most blocks to hold; 0 is no limit.
    pub blocks_max: u32,
}

/// A run that is to be: its facts, and the local files that it starts from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewRun {
    /// The facts. Federation, steward and blob ids are filled in here.
    pub spec: RunSpec,
    /// The initial parameters: one file of little-endian f32 per part.
    pub initial_files: Vec<PathBuf>,
    /// The frozen model under adapters, likewise; empty without adapters.
    pub base_files: Vec<PathBuf>,
    /// `tokenizer.json`.
    pub tokenizer_file: PathBuf,
    /// Held-out texts with their baselines.
    pub evaluation: Option<Evaluation>,
}

/// Why something asked of training was not done.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum TrainError {
    #[error("there is no run named `{name}`; `polder run status` shows what there is")]
    Unknown { name: String },
    #[error("run `{name}` is not started yet; `polder run start {name}` does")]
    NotStarted { name: String },
    #[error("there is a run named `{name}` already")]
    Taken { name: String },
    #[error("the run file does not fit together: {reason}")]
    Spec { reason: String },
    #[error("cannot read or write {path}: {source}", path = path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{reason}")]
    Blob { reason: String },
    #[error(transparent)]
    Data(#[from] DataSetError),
    #[error(transparent)]
    Export(#[from] ExportError),
    #[error("training has stopped")]
    Stopped,
}

/// Training, for the rest of the node. Clones mean the same.
#[derive(Clone)]
pub struct TrainHandle {
    config: TrainConfig,
    asks: mpsc::Sender<Ask>,
    jobs: Arc<Jobs>,
    me: NodeId,
}

impl std::fmt::Debug for TrainHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TrainHandle")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// Reads all journals and goes on with every run. Call it within a tokio runtime. The task ends after
/// [`TrainHandle::shutdown`].
///
/// # Errors
///
/// [`TrainError`] for journals or a list of data that cannot be read.
pub fn start(
    config: TrainConfig,
    seal: Arc<dyn Seal>,
    compute: Arc<dyn Compute>,
    blobs: Arc<dyn Blobs>,
    network: Arc<dyn Network>,
) -> Result<(TrainHandle, JoinHandle<()>), TrainError> {
    let me = seal.node();
    let runs = config.home.join("runs");
    let jobs = Arc::new(Jobs {
        desk: tokio::sync::Mutex::new(Desk::new(Arc::clone(&compute))),
        texts_loaded: Texts::new(Arc::clone(&compute)),
        compute,
        blobs,
        network,
        board: Arc::new(Board::new(me)),
        data: Arc::new(Mutex::new(DataSets::open(config.home.join("data.toml"))?)),
        meeting: Meeting::default(),
        meeting_patience: MEETING_PATIENCE,
        runs: runs.clone(),
    });
    let (asks, asked) = mpsc::channel(ASKS_MAX);
    let participant = Participant {
        seal,
        institution: config.institution,
        train: config.train,
        blocks_max: config.blocks_max,
    };
    let driver = Driver::open(participant, Arc::clone(&jobs), asked);
    let driver = driver.map_err(|source| TrainError::File { path: runs, source })?;
    let task = tokio::spawn(driver.run());
    Ok((TrainHandle { config, asks, jobs, me }, task))
}

impl TrainHandle {
    /// Keeps what a new run starts from and writes its facts down. Nothing is trained before
    /// [`TrainHandle::start_run`].
    ///
    /// # Errors
    ///
    /// [`TrainError`] for a name in use, files that are not what the layout says, or a full disk.
    pub async fn new_run(&self, new: NewRun) -> Result<RunId, TrainError> {
        let mut spec = new.spec;
        if self.find(&spec.name).is_ok() || self.draft_path(&spec.name).exists() {
            return Err(TrainError::Taken { name: spec.name });
        }
        check_name(&spec.name)?;
        spec.federation = self.config.federation;
        spec.steward = self.me;
        // The run's id is not known before its blobs are.
        let holder = RunId::default();
        spec.initial = self.put_parts(&spec.layout, &new.initial_files).await?;
        if let Some(adapters) = &mut spec.adapters {
            adapters.base = self.put_parts(&adapters.model, &new.base_files).await?;
        }
        spec.tokenizer = self.put(holder, read(&new.tokenizer_file)?).await?;
        spec.evaluation = match &new.evaluation {
            Some(evaluation) => {
                let bytes = postcard::to_allocvec(evaluation);
                let bytes = bytes.map_err(|error| TrainError::Spec {
                    reason: error.to_string(),
                })?;
                Some(self.put(holder, bytes).await?)
            }
            None => None,
        };
        let path = self.draft_path(&spec.name);
        let written = durable::write(&path, &spec.to_bytes());
        written.map_err(|source| TrainError::File { path, source })?;
        let run = spec.id();
        let base = spec.adapters.iter().flat_map(|adapters| &adapters.base);
        let own = spec.initial.iter().chain([&spec.tokenizer]).chain(&spec.evaluation);
        let own = own.chain(base);
        for blob in own {
            self.jobs.blobs.keep(run, *blob);
        }
        Ok(run)
    }

    /// Begins a run that [`TrainHandle::new_run`] wrote down, or resumes one that is paused. This node is its steward.
    ///
    /// # Errors
    ///
    /// [`TrainError::Unknown`] for a name that is neither.
    pub async fn start_run(&self, name: &str) -> Result<RunId, TrainError> {
        if let Ok(run) = self.find(name) {
            self.command(Command::Resume { run }).await?;
            return Ok(run);
        }
        let path = self.draft_path(name);
        if !path.is_file() {
            return Err(TrainError::Unknown { name: name.to_owned() });
        }
        let spec = RunSpec::from_bytes(&read(&path)?);
        let spec = spec.map_err(|error| TrainError::Spec {
            reason: error.to_string(),
        })?;
        let run = spec.id();
        self.command(Command::Begin { spec }).await?;
        Ok(run)
    }

    /// Pauses a run of which this node is the steward.
    ///
    /// # Errors
    ///
    /// [`TrainError::Unknown`].
    pub async fn pause_run(&self, name: &str) -> Result<(), TrainError> {
        let run = self.find(name)?;
        self.command(Command::Pause { run }).await
    }

    /// Ends a run of which this node is the steward, or forgets one that was not started.
    ///
    /// # Errors
    ///
    /// [`TrainError::Unknown`].
    pub async fn stop_run(&self, name: &str) -> Result<(), TrainError> {
        if let Ok(run) = self.find(name) {
            return self.command(Command::Stop { run }).await;
        }
        let path = self.draft_path(name);
        if !path.is_file() {
            return Err(TrainError::Unknown { name: name.to_owned() });
        }
        let bytes = read(&path)?;
        fs::remove_file(&path).map_err(|source| TrainError::File { path, source })?;
        self.jobs.blobs.forget(RunId(polder_protocol::hash::digest(&bytes).0));
        Ok(())
    }

    /// Trains in a run again that was left.
    ///
    /// # Errors
    ///
    /// [`TrainError::Unknown`].
    pub async fn join_run(&self, name: &str) -> Result<(), TrainError> {
        let run = self.find(name)?;
        self.ask(Ask::Join(run)).await
    }

    /// Trains in a run no more, also after a restart.
    ///
    /// # Errors
    ///
    /// [`TrainError::Unknown`].
    pub async fn leave_run(&self, name: &str) -> Result<(), TrainError> {
        let run = self.find(name)?;
        self.ask(Ask::Leave(run)).await
    }

    /// Gives the device back (`false`): all runs are left until further notice. Or takes part again (`true`).
    ///
    /// # Errors
    ///
    /// [`TrainError::Stopped`].
    pub async fn work(&self, working: bool) -> Result<(), TrainError> {
        self.ask(Ask::Work(working)).await
    }

    /// All runs that this node knows, those not started included.
    pub fn status(&self) -> Vec<RunStatus> {
        let mut all = self.jobs.board.list();
        let started: Vec<String> = all.iter().map(|status| status.run.clone()).collect();
        for spec in self.drafts() {
            let run = spec.id().to_string();
            if !started.contains(&run) {
                all.push(RunStatus {
                    run,
                    name: spec.name,
                    steward: spec.steward.to_string(),
                    phase: "new".to_owned(),
                    rounds_total: spec.rounds,
                    ..RunStatus::default()
                });
            }
        }
        all
    }

    /// One run, by name or by the first digits of its id.
    ///
    /// # Errors
    ///
    /// [`TrainError::Unknown`].
    pub fn status_of(&self, name: &str) -> Result<RunStatus, TrainError> {
        let fits = |status: &RunStatus| status.name == name || (name.len() >= 4 && status.run.starts_with(name));
        let status = self.status().into_iter().find(fits);
        status.ok_or_else(|| TrainError::Unknown { name: name.to_owned() })
    }

    /// Writes the newest state of a run into `folder` as a Hugging Face model.
    ///
    /// # Errors
    ///
    /// [`TrainError`] where the state cannot be had or the folder cannot be written.
    pub async fn export(&self, name: &str, folder: &Path) -> Result<(), TrainError> {
        let run = self.find(name)?;
        let (spec, states) = self.newest_model(run).await?;
        let tokenizer = self.jobs.tokenizer(run, &spec).await.map_err(blob_error)?;
        let folder = folder.to_owned();
        let written = tokio::task::spawn_blocking(move || {
            export::write_folder(&folder, &spec.config_json, &tokenizer, spec.model(), &states)
        });
        Ok(written.await.map_err(|_| TrainError::Stopped)??)
    }

    /// Writes the newest adapters of a run into `folder` as Hugging Face's PEFT reads them.
    ///
    /// # Errors
    ///
    /// [`TrainError`] where the run trains no adapters, the state cannot be had or the folder cannot be written.
    pub async fn export_adapter(&self, name: &str, folder: &Path) -> Result<(), TrainError> {
        let run = self.find(name)?;
        let (spec, states) = self.newest_state(run).await?;
        let Some(adapters) = spec.adapters else {
            let reason = format!("run `{name}` trains a whole model and no adapters");
            return Err(TrainError::Spec { reason });
        };
        let folder = folder.to_owned();
        let written =
            tokio::task::spawn_blocking(move || adapted::write_adapter(&folder, &adapters, &spec.layout, &states));
        Ok(written.await.map_err(|_| TrainError::Stopped)??)
    }

    /// The data sets of this node.
    pub fn data(&self) -> BTreeMap<String, DataSet> {
        self.lock_data().list().clone()
    }

    /// Registers a file or folder of this machine for training. Runs that this node follows without data are joined.
    ///
    /// # Errors
    ///
    /// [`DataSetError`].
    pub async fn add_data(&self, name: &str, path: &Path, language: Option<String>) -> Result<(), TrainError> {
        self.lock_data().add(name, path, language)?;
        // Joins those runs that were not left by their owner.
        self.ask(Ask::Look).await
    }

    /// Forgets a data set; its files stay.
    ///
    /// # Errors
    ///
    /// [`DataSetError`].
    pub fn remove_data(&self, name: &str) -> Result<(), TrainError> {
        Ok(self.lock_data().remove(name)?)
    }

    /// A message about a run that `from` sent. Full queues lose it, as a network might.
    pub fn heard(&self, from: &Admitted, bytes: &[u8]) {
        if let Some(ask) = driver::heard(from, bytes) {
            // Whoever waits for an answer says it again.
            let _ = self.asks.try_send(ask);
        }
    }

    /// A node is connected that was not.
    pub fn peer_found(&self, node: NodeId) {
        let _ = self.asks.try_send(Ask::Input(Box::new(Input::PeerFound { node })));
    }

    /// The last connection to a node broke.
    pub fn peer_lost(&self, node: NodeId) {
        let _ = self.asks.try_send(Ask::Input(Box::new(Input::PeerLost { node })));
    }

    /// A peer opened a stream to a stage of a replica here.
    pub fn stream_opened(&self, from: NodeId, opening: &[u8], link: Box<dyn Link>) {
        match postcard::from_bytes::<Opening>(opening) {
            Ok(opening) => self.jobs.meeting.offer(from, opening, link),
            Err(error) => tracing::warn!(peer = %from.short(), %error, "malformed opening of a replica's stream"),
        }
    }

    /// Stops the driver. Everything is on disk already.
    pub async fn shutdown(&self) {
        // It may have stopped before.
        let _ = self.asks.send(Ask::Shutdown).await;
    }

    async fn command(&self, command: Command) -> Result<(), TrainError> {
        self.ask(Ask::Input(Box::new(Input::Local(command)))).await
    }

    async fn ask(&self, ask: Ask) -> Result<(), TrainError> {
        self.asks.send(ask).await.map_err(|_| TrainError::Stopped)
    }

    async fn put(&self, run: RunId, bytes: Vec<u8>) -> Result<polder_protocol::hash::BlobId, TrainError> {
        let put = self.jobs.blobs.put(run, bytes).await;
        put.map_err(|reason| TrainError::Blob { reason })
    }

    /// Keeps parameters, one file per part of a layout, as blobs.
    async fn put_parts(
        &self,
        layout: &polder_protocol::layout::Layout,
        files: &[PathBuf],
    ) -> Result<Vec<polder_protocol::hash::BlobId>, TrainError> {
        if files.len() != layout.parts.len() {
            let reason = format!("{} files for {} parts", files.len(), layout.parts.len());
            return Err(TrainError::Spec { reason });
        }
        let mut blobs = Vec::with_capacity(files.len());
        for (layout, path) in layout.parts.iter().zip(files) {
            let bytes = read(path)?;
            if polder_protocol::aggregate::PartState::from_bytes(layout, &bytes).is_err() {
                let reason = format!("{} does not hold its part's parameters", path.display());
                return Err(TrainError::Spec { reason });
            }
            // The run's id is not known before its blobs are.
            blobs.push(self.put(RunId::default(), bytes).await?);
        }
        Ok(blobs)
    }

    /// One state file per part of [`RunSpec::model`], with adapters merged into it.
    async fn newest_model(&self, run: RunId) -> Result<(RunSpec, Vec<PathBuf>), TrainError> {
        let (spec, states) = self.newest_state(run).await?;
        let merged = adapted::merged(&self.jobs, run, &spec, states).await;
        Ok((spec, merged.map_err(blob_error)?))
    }

    async fn newest_state(&self, run: RunId) -> Result<(RunSpec, Vec<PathBuf>), TrainError> {
        let unknown = || TrainError::Unknown { name: run.to_string() };
        let (spec, blobs, sources) = self.jobs.board.newest_state(run).ok_or_else(unknown)?;
        let numbered = (0..).map(polder_protocol::layout::Part).zip(blobs.iter().copied());
        let fetched = self
            .jobs
            .fetch_state(run, Arc::new(spec.clone()), numbered.collect(), sources)
            .await;
        fetched.map_err(blob_error)?;
        let paths = blobs
            .into_iter()
            .map(|blob| self.jobs.file(blob))
            .collect::<Result<_, _>>();
        Ok((spec, paths.map_err(blob_error)?))
    }

    /// A started run by name, or by the first digits of its id.
    fn find(&self, name: &str) -> Result<RunId, TrainError> {
        let fits = |status: &RunStatus| status.name == name || (name.len() >= 4 && status.run.starts_with(name));
        let status = self.jobs.board.list().into_iter().find(fits);
        let run = status.and_then(|status| status.run.parse().ok());
        let name = name.to_owned();
        run.ok_or_else(|| match self.draft_path(&name).is_file() {
            true => TrainError::NotStarted { name },
            false => TrainError::Unknown { name },
        })
    }

    fn drafts(&self) -> Vec<RunSpec> {
        let entries = fs::read_dir(self.drafts_folder()).into_iter().flatten().flatten();
        let mut specs: Vec<RunSpec> = entries
            .filter_map(|entry| RunSpec::from_bytes(&fs::read(entry.path()).ok()?).ok())
            .collect();
        specs.sort_by(|a, b| a.name.cmp(&b.name));
        specs
    }

    fn drafts_folder(&self) -> PathBuf {
        self.config.home.join("runs").join("new")
    }

    fn draft_path(&self, name: &str) -> PathBuf {
        self.drafts_folder().join(format!("{name}.run"))
    }

    fn lock_data(&self) -> std::sync::MutexGuard<'_, DataSets> {
        self.jobs.data.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A name that is also a file's name on every system.
fn check_name(name: &str) -> Result<(), TrainError> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if (1..=64).contains(&name.len()) && name.chars().all(good) && !name.starts_with('.') {
        return Ok(());
    }
    Err(TrainError::Spec {
        reason: format!("`{name}` is no name for a run: use letters, digits, `-`, `_` and `.`, at most 64"),
    })
}

fn read(path: &Path) -> Result<Vec<u8>, TrainError> {
    fs::read(path).map_err(|source| TrainError::File {
        path: path.to_owned(),
        source,
    })
}

fn blob_error(error: JobError) -> TrainError {
    match error {
        JobError::Failed(reason) | JobError::Invalid(reason) => TrainError::Blob { reason },
    }
}
