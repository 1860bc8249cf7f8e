//! Steps the machines of [`Node`] with what happens in the world, and carries out their effects in order.
//!
//! One task owns the machines, their journals and the clock. A step's effects are carried out before the next step, and a
//! record is durable before any effect after it. When the disk refuses a record, the machines are as good as crashed:
//! they are dropped, and built anew from their journals after a wait.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use polder_protocol::charter::Capabilities;
use polder_protocol::hash::{InstitutionId, RunId};
use polder_protocol::log::{Body, Entry, Round, Seal};
use polder_protocol::node::{Command, Effect, Input, Joining, Node, Report};
use polder_protocol::round::{Job, JobId, Outcome, RunMessage};
use polder_protocol::time::Instant;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::{error, info, warn};

use super::durable;
use super::feedback::Buffers;
use super::jobs::{Jobs, layout_of};
use super::journal::Journal;
use super::status::RoundReport;
use crate::gate::Admitted;

/// What this node saw of each round, one line of JSON each; the last line of a round holds.
const REPORTS: &str = "rounds.jsonl";

/// Outcomes that wait for the driver; jobs beyond wait to tell theirs.
const OUTCOMES_MAX: usize = 256;

/// How long after a failed write the machines are built anew.
const AFTER_DISK_FAILURE: Duration = Duration::from_secs(5);

/// What the rest of the node tells the driver.
#[derive(Debug)]
pub(super) enum Ask {
    /// For the machines.
    Input(Box<Input>),
    /// Train in this run, unless it was left by its owner.
    Join(RunId),
    /// Train no more in this run, also after a restart.
    Leave(RunId),
    /// There is new data: look again at the runs that are followed without any.
    Look,
    /// Give the device back or take it up again: leave all runs for now, or join them again.
    Work(bool),
    /// Stop, with everything on disk.
    Shutdown,
}

/// Who this node is and how much it takes on.
#[derive(Debug, Clone)]
pub(super) struct Participant {
    pub(super) seal: Arc<dyn Seal>,
    pub(super) institution: InstitutionId,
    pub(super) train: bool,
    pub(super) blocks_max: u32,
}

pub(super) struct Driver {
    own: Participant,
    jobs: Arc<Jobs>,
    node: Node,
    began: tokio::time::Instant,
    journals: BTreeMap<RunId, Journal>,
    running: BTreeMap<JobId, JoinHandle<()>>,
    done: mpsc::Sender<(JobId, Outcome)>,
    done_seen: mpsc::Receiver<(JobId, Outcome)>,
    asks: mpsc::Receiver<Ask>,
    /// False while the device belongs to its owner.
    working: bool,
    /// Runs in which the machines train or wait to.
    joined: BTreeSet<RunId>,
    /// What the machines asked for when they were built.
    effects: Vec<Effect>,
    /// What follows from effects, for the steps after this one.
    queue: VecDeque<Input>,
}

/// A record that is not durable.
struct NotDurable(io::Error);

impl Driver {
    /// Reads all journals and builds the machines.
    pub(super) fn open(own: Participant, jobs: Arc<Jobs>, asks: mpsc::Receiver<Ask>) -> io::Result<Self> {
        let (done, done_seen) = mpsc::channel(OUTCOMES_MAX);
        let node = Node::new(Arc::clone(&own.seal), 0);
        let mut driver = Self {
            own,
            jobs,
            node,
            began: tokio::time::Instant::now(),
            journals: BTreeMap::new(),
            running: BTreeMap::new(),
            done,
            done_seen,
            asks,
            working: true,
            joined: BTreeSet::new(),
            effects: Vec::new(),
            queue: VecDeque::new(),
        };
        driver.effects = driver.restore()?;
        Ok(driver)
    }

    /// Runs until [`Ask::Shutdown`], or until nobody is left to ask.
    pub(super) async fn run(mut self) {
        self.go_on().await;
        loop {
            while let Some(input) = self.queue.pop_front() {
                self.step(input).await;
            }
            let now = self.now();
            let wake_at = self
                .node
                .wake_at()
                .map(|at| self.began + Duration::from_micros(at.0.max(now.0)));
            let wake = async {
                match wake_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // An outcome that is here is worth more than a message.
                biased;
                done = self.done_seen.recv() => {
                    let Some((job, outcome)) = done else { return };
                    // A job's outcome may have been on its way when it was cancelled.
                    if self.running.remove(&job).is_some() {
                        self.step(Input::Done { job, outcome }).await;
                    }
                }
                ask = self.asks.recv() => match ask {
                    None | Some(Ask::Shutdown) => return self.stop(),
                    Some(Ask::Input(input)) => self.step(*input).await,
                    Some(Ask::Join(run)) => {
                        // The marker need not be there.
                        let _ = fs::remove_file(self.left_marker(run));
                        self.wish(run).await;
                    }
                    Some(Ask::Leave(run)) => {
                        if let Err(error) = durable::write(&self.left_marker(run), b"") {
                            warn!(run = %run.short(), %error, "leaving will be forgotten at the next start");
                        }
                        self.leave(run).await;
                    }
                    Some(Ask::Look) => self.work(self.working).await,
                    Some(Ask::Work(working)) => self.work(working).await,
                },
                () = wake => self.step(Input::Wake).await,
            }
        }
    }

    fn now(&self) -> Instant {
        let micros = self.began.elapsed().as_micros();
        Instant(u64::try_from(micros).unwrap_or(u64::MAX))
    }

    /// Builds the machines from their journals; answers with what they ask for.
    fn restore(&mut self) -> io::Result<Vec<Effect>> {
        fs::create_dir_all(&self.jobs.runs)?;
        let mut stored = BTreeMap::new();
        for entry in fs::read_dir(&self.jobs.runs)? {
            let folder = entry?.path();
            let id = folder.file_name().and_then(|name| name.to_str()?.parse::<RunId>().ok());
            let Some(run) = id.filter(|_| folder.join("journal").is_file()) else {
                continue;
            };
            let (journal, recovered) = Journal::open(&folder.join("journal"))?;
            if recovered.torn_bytes > 0 {
                warn!(run = %run.short(), torn_bytes = recovered.torn_bytes, "cut off a torn record");
            }
            self.jobs.board.seen(run, reports(&self.jobs.folder(run)));
            for entry in &recovered.run.entries {
                self.jobs.board.entry(entry, None);
            }
            // Under another institution than before, it must join anew.
            let institution = recovered.run.joining.as_ref().map(|joining| joining.institution);
            if institution == Some(self.own.institution) {
                self.joined.insert(run);
            }
            self.journals.insert(run, journal);
            stored.insert(run, recovered.run);
        }
        let mut effects = Vec::new();
        self.node = Node::restore(
            Arc::clone(&self.own.seal),
            incarnation(),
            self.now(),
            stored,
            &mut effects,
        );
        for effect in &effects {
            if let Effect::Report(Report::LogDamaged { run, entries, .. }) = effect {
                // What comes next continues the good entries.
                let path = self.jobs.folder(*run).join("journal");
                let entries = usize::try_from(*entries).unwrap_or(usize::MAX);
                self.journals.insert(*run, Journal::open_with(&path, entries)?.0);
            }
        }
        Ok(effects)
    }

    /// Carries out what the machines asked for when they were built, and joins what is to be joined.
    async fn go_on(&mut self) {
        let effects = std::mem::take(&mut self.effects);
        self.carry_out_all(effects).await;
        for run in self.jobs.board.ids() {
            self.learned(run);
            self.wish(run).await;
        }
    }

    async fn step(&mut self, input: Input) {
        let mut effects = Vec::new();
        self.node.step(self.now(), input, &mut effects);
        self.carry_out_all(effects).await;
    }

    async fn carry_out_all(&mut self, effects: Vec<Effect>) {
        let mut runs = Vec::new();
        for effect in effects {
            match self.carry_out(effect).await {
                Ok(learned) => runs.extend(learned),
                Err(NotDurable(error)) => {
                    error!(%error, "cannot write a run's journal; training stops until it can be written");
                    return Box::pin(self.begin_anew(&error)).await;
                }
            }
        }
        for run in runs {
            self.learned(run);
            Box::pin(self.wish(run)).await;
        }
    }

    /// Carries out one effect; answers with the run whose facts this node has just learned.
    async fn carry_out(&mut self, effect: Effect) -> Result<Option<RunId>, NotDurable> {
        match effect {
            Effect::Persist { run, what } => {
                let journal = match self.journals.remove(&run) {
                    Some(journal) => Ok(journal),
                    None => Journal::open(&self.jobs.folder(run).join("journal")).map(|(journal, _)| journal),
                };
                let mut journal = journal.map_err(NotDurable)?;
                if let polder_protocol::node::Persist::Joining(joining) = &what {
                    if joining.is_some() {
                        self.joined.insert(run);
                    } else {
                        self.joined.remove(&run);
                    }
                }
                // A few milliseconds of disk, and nothing else may go on meanwhile.
                let written = tokio::task::spawn_blocking(move || {
                    let written = journal.append(&what);
                    (journal, written)
                });
                let (journal, written) = written.await.map_err(|error| NotDurable(io::Error::other(error)))?;
                self.journals.insert(run, journal);
                written.map_err(NotDurable)?;
            }
            Effect::Send { to, message } => self.jobs.network.send(to, message),
            Effect::Broadcast { message } => self.jobs.network.broadcast(message),
            Effect::Start { job, work } => self.begin(job, work),
            Effect::Cancel { job } => {
                if let Some(task) = self.running.remove(&job) {
                    task.abort();
                }
            }
            Effect::Retain { run, mut blobs } => {
                if let Some(spec) = self.jobs.board.spec(run) {
                    blobs.insert(spec.tokenizer);
                    blobs.extend(spec.evaluation);
                }
                self.jobs.blobs.retain(run, blobs);
            }
            Effect::Report(report) => return Ok(self.report(report)),
        }
        Ok(None)
    }

    fn begin(&mut self, job: JobId, work: Job) {
        let (jobs, done) = (Arc::clone(&self.jobs), self.done.clone());
        self.jobs.board.activity(work.run(), activity(&work).to_owned());
        let trained = match &work {
            Job::Train { run, round, .. } => Some((*run, *round)),
            _ => None,
        };
        let remember = self.jobs.board.clone();
        let task = tokio::spawn(async move {
            let run = work.run();
            let outcome = jobs.run(work).await;
            if let (Some((run, round)), Outcome::Trained { parts, .. }) = (trained, &outcome) {
                remember.updated(run, round, parts.clone());
            }
            remember.activity(run, "waiting for the others".to_owned());
            // The driver may have ended.
            let _ = done.send((job, outcome)).await;
        });
        self.running.insert(job, task);
    }

    /// Takes note of a report; answers with the run whose facts this node has just learned.
    fn report(&mut self, report: Report) -> Option<RunId> {
        let board = Arc::clone(&self.jobs.board);
        match report {
            Report::Heard { run, steward } => {
                info!(run = %run.short(), steward = %steward.short(), "heard of a run");
                // Asked for later, so that this step's effects come first.
                self.queue.push_back(Input::Local(Command::Follow { run, steward }));
            }
            Report::Logged { entry } => {
                let changed = board.entry(&entry, Some(self.jobs.network.traffic()));
                self.log(&entry, changed);
                return matches!(entry.body, Body::Genesis { .. }).then_some(entry.run);
            }
            Report::Agreed { run, round } => {
                let changed = board.agreed(run, round, true);
                self.note(run, changed);
            }
            Report::Diverged { run, round, parts } => {
                warn!(run = %run.short(), round = round.0, ?parts, "own outer step gave another state");
                let changed = board.agreed(run, round, false);
                self.note(run, changed);
            }
            Report::CommitRefused {
                run, round, refusal, ..
            } => {
                warn!(run = %run.short(), round = round.0, ?refusal, "update was refused");
                self.take_back(run, round);
            }
            Report::JobFailed { run, job, reason } => {
                warn!(run = %run.short(), job = job.0, reason, "job failed");
                board.trouble(run, Some(reason));
            }
            Report::CommandRefused { run, reason } => {
                warn!(run = %run.short(), reason, "command refused");
                board.trouble(run, Some(reason));
            }
            Report::LogDamaged { run, entries, reason } => {
                error!(run = %run.short(), entries, reason, "stored log is damaged");
                board.trouble(
                    run,
                    Some(format!("the stored log is damaged after {entries} entries: {reason}")),
                );
            }
            Report::Equivocation { ours, theirs } => {
                error!(run = %ours.run.short(), index = theirs.index, "the steward signed two logs");
                board.trouble(
                    ours.run,
                    Some(format!("the steward signed two entries {}", theirs.index)),
                );
            }
            Report::JoinAnswered { run, answer } => info!(run = %run.short(), ?answer, "steward answered"),
            Report::Joined { run, node, .. } => info!(run = %run.short(), node = %node.short(), "node wants to train"),
            Report::CommitAccepted { run, round, .. } => {
                tracing::debug!(run = %run.short(), round = round.0, "update accepted");
            }
        }
        None
    }

    fn log(&self, entry: &Entry, changed: Option<RoundReport>) {
        if let Some(report) = &changed {
            info!(
                run = %entry.run.short(),
                round = report.round,
                loss = report.loss,
                tokens_per_second = report.tokens_per_second,
                contributions = report.contributions,
                "round"
            );
        }
        self.note(entry.run, changed);
    }

    /// Appends a report to [`REPORTS`].
    fn note(&self, run: RunId, report: Option<RoundReport>) {
        let Some(report) = report else { return };
        let path = self.jobs.folder(run).join(REPORTS);
        let written = serde_json::to_string(&report)
            .map_err(io::Error::other)
            .and_then(|line| {
                use io::Write;
                let mut file = fs::OpenOptions::new().create(true).append(true).open(&path)?;
                writeln!(file, "{line}")
            });
        if let Err(error) = written {
            warn!(path = %path.display(), %error, "cannot write the round's report");
        }
    }

    /// Puts a refused update back into the error buffers.
    fn take_back(&mut self, run: RunId, round: Round) {
        let Some(parts) = self.jobs.board.own_update(run, round) else {
            return;
        };
        let Some(spec) = self.jobs.board.spec(run) else { return };
        let buffers = Buffers::new(self.jobs.folder(run).join("feedback"));
        for (part, blob) in parts {
            let (Some(path), Ok(layout)) = (self.jobs.blobs.path(blob), layout_of(&spec, part)) else {
                continue;
            };
            let restored = fs::read(path).and_then(|frame| buffers.restore(part, layout, &frame));
            if let Err(error) = restored {
                warn!(run = %run.short(), part = part.0, %error, "a refused update is lost");
            }
        }
    }

    /// Gets the baselines of a run whose facts are known.
    fn learned(&self, run: RunId) {
        let Some(spec) = self.jobs.board.spec(run) else { return };
        let jobs = Arc::clone(&self.jobs);
        tokio::spawn(async move {
            match jobs.evaluation(run, &spec).await {
                Ok(evaluation) => jobs.board.baselines(run, &evaluation),
                Err(error) => warn!(run = %run.short(), ?error, "cannot get the held-out texts"),
            }
        });
    }

    /// Joins a run, if this node is to train, has data where it needs some, and was not told to leave.
    async fn wish(&mut self, run: RunId) {
        let Some(spec) = self.jobs.board.spec(run) else { return };
        let left = self.left_marker(run).exists();
        if !self.own.train || !self.working || left || self.joined.contains(&run) || !self.jobs.board.is_open(run) {
            return;
        }
        let blocks = spec.layout.blocks();
        let blocks_max = if self.own.blocks_max == 0 {
            blocks
        } else {
            self.own.blocks_max
        };
        let texts = self.jobs.texts(&spec);
        if let (Err(error), true) = (&texts, blocks_max >= blocks) {
            self.jobs.board.activity(run, "follows without data".to_owned());
            info!(run = %run.short(), ?error, "does not train");
            return;
        }
        let languages = self.jobs.languages(&spec);
        let joining = Joining {
            institution: self.own.institution,
            blocks_max,
            languages,
        };
        let steward = spec.steward;
        Box::pin(self.step(Input::Local(Command::Join { run, steward, joining }))).await;
    }

    async fn leave(&mut self, run: RunId) {
        Box::pin(self.step(Input::Local(Command::Leave { run }))).await;
    }

    async fn work(&mut self, working: bool) {
        self.working = working;
        for run in self.jobs.board.ids() {
            if working {
                self.wish(run).await;
            } else if self.joined.contains(&run) {
                self.jobs
                    .board
                    .activity(run, "yields to the machine's owner".to_owned());
                self.leave(run).await;
            }
        }
    }

    fn left_marker(&self, run: RunId) -> PathBuf {
        self.jobs.folder(run).join("left")
    }

    async fn begin_anew(&mut self, error: &io::Error) {
        for run in self.jobs.board.ids() {
            self.jobs
                .board
                .trouble(run, Some(format!("cannot write the journal: {error}")));
        }
        self.stop_jobs();
        loop {
            tokio::time::sleep(AFTER_DISK_FAILURE).await;
            self.journals.clear();
            self.joined.clear();
            self.jobs.board.clear();
            match self.restore() {
                Ok(effects) => {
                    self.effects = effects;
                    return self.go_on().await;
                }
                Err(error) => error!(%error, "cannot read or write the journals of training runs"),
            }
        }
    }

    fn stop_jobs(&mut self) {
        for (_, task) in std::mem::take(&mut self.running) {
            task.abort();
        }
        // Machines that are built anew name their jobs from the beginning: outcomes that are on their way are of others.
        (self.done, self.done_seen) = mpsc::channel(OUTCOMES_MAX);
    }

    fn stop(&mut self) {
        self.stop_jobs();
    }
}

/// The reports that lie in a run's folder. A torn line was of the round in which the node died; it is missed by nobody.
fn reports(folder: &Path) -> BTreeMap<u64, RoundReport> {
    let text = fs::read_to_string(folder.join(REPORTS)).unwrap_or_default();
    let reports = text
        .lines()
        .filter_map(|line| serde_json::from_str::<RoundReport>(line).ok());
    reports.map(|report| (report.round, report)).collect()
}

/// A number that no earlier life of this node had.
fn incarnation() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
}

fn activity(job: &Job) -> &'static str {
    match job {
        Job::Train { .. } => "training",
        Job::Fetch { .. } => "fetching an update",
        Job::Apply { .. } => "taking the outer step",
        Job::FetchState { .. } => "fetching the state",
        Job::Evaluate { .. } => "evaluating",
    }
}

/// What a peer says, for the machines. A peer may speak for its own institution alone, and train only where its
/// certificate says so.
pub(super) fn heard(from: &Admitted, bytes: &[u8]) -> Option<Ask> {
    match RunMessage::from_bytes(bytes) {
        Ok(message) if may_say(from, &message) => Some(Ask::Input(Box::new(Input::Message {
            from: from.node,
            message,
        }))),
        Ok(_) => {
            warn!(peer = %from.node.short(), "message about a run that its sender's certificate does not cover");
            None
        }
        Err(error) => {
            warn!(peer = %from.node.short(), %error, "malformed message about a run");
            None
        }
    }
}

fn may_say(from: &Admitted, message: &RunMessage) -> bool {
    let trains = Capabilities(from.capabilities).has(Capabilities::TRAIN);
    match message {
        RunMessage::Join { institution, .. } => trains && *institution == from.institution,
        RunMessage::Commit(_) => trains,
        _ => true,
    }
}
