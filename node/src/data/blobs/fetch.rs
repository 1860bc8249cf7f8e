//! Fetches: one task per blob, which drives the scheduler of `protocol::blob` over the connections of this node.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use polder_protocol::blob::{CHUNK_BYTES, ChunkSet, Effect, Input, MANIFEST_BYTES_MAX, Manifest, Scheduler};
use polder_protocol::hash::{BlobId, NodeId};
use polder_protocol::time;
use thiserror::Error;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::answer::blocking;
use super::message::{Ask, Tell};
use super::partial::{NotKept, Partial};
use super::store::BlobError;
use crate::data::error::DataError;
use crate::data::plane::DataPlane;
use crate::data::settings::{Class, Service};

/// Fetches that run at once; the others wait for their turn. Bounds memory together with the limits of each fetch.
const FETCHES_MAX: usize = 8;

/// The first pause before a source is tried again; it doubles five times, to 8 s.
const RETRY_PAUSE: Duration = Duration::from_millis(250);

/// What has come of a blob so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Bytes that are here and checked, those of an earlier process included.
    pub bytes_done: u64,
    /// Bytes of the blob; zero until the manifest is here.
    pub bytes_total: u64,
    /// Sources that have said what they have.
    pub sources: usize,
}

/// Why a blob was not fetched. What has come of it stays for the next attempt.
#[derive(Debug, Clone, Error)]
pub enum FetchError {
    /// No source could send what is missing.
    #[error("blob {}: {} of {} chunks came; {tried}", blob.short(), chunks_done, chunks)]
    NoSource {
        /// Which.
        blob: BlobId,
        /// Chunks that are here.
        chunks_done: u32,
        /// Chunks of the blob; zero where not even the manifest came.
        chunks: u32,
        /// Each source, and what happened there.
        tried: String,
    },
    /// This node's disk refuses.
    #[error(transparent)]
    Disk(#[from] BlobError),
    /// The data plane was shut down.
    #[error("blob {}: the data plane was shut down", blob.short())]
    ShutDown {
        /// Which.
        blob: BlobId,
    },
}

/// A fetch that runs, shared by all who want the blob. It goes on until the last of these handles is dropped.
#[derive(Debug, Clone)]
pub struct Fetch {
    blob: BlobId,
    job: Arc<Job>,
}

#[derive(Debug)]
struct Job {
    sources: mpsc::Sender<Vec<NodeId>>,
    progress: watch::Receiver<Progress>,
    result: watch::Receiver<Option<Result<PathBuf, FetchError>>>,
    _stop: DropGuard,
}

/// The fetches of a node that run, by blob.
#[derive(Debug)]
pub(in crate::data) struct Fetches {
    jobs: Mutex<Jobs>,
    slots: Semaphore,
}

#[derive(Debug, Default)]
struct Jobs {
    started: u64,
    // The number tells a job from a later one for the same blob.
    running: BTreeMap<BlobId, (u64, Weak<Job>)>,
}

impl Default for Fetches {
    fn default() -> Self {
        Self {
            jobs: Mutex::default(),
            slots: Semaphore::new(FETCHES_MAX),
        }
    }
}

impl Fetch {
    /// What has come so far; changes as it goes on.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.job.progress.clone()
    }

    /// Waits for the whole blob: the file that holds it. Safe to drop.
    ///
    /// # Errors
    ///
    /// [`FetchError`] when it cannot be had.
    pub async fn done(&self) -> Result<PathBuf, FetchError> {
        let mut result = self.job.result.clone();
        let stopped = Err(FetchError::ShutDown { blob: self.blob });
        match result.wait_for(Option::is_some).await {
            Ok(result) => result.clone().unwrap_or(stopped),
            Err(_) => stopped,
        }
    }
}

impl DataPlane {
    /// Fetches a blob from `sources`, all at once, and returns the file that holds it. Every chunk is checked; chunks
    /// that an earlier fetch left are not fetched again; sources that lie, stall or die are replaced by the others.
    /// Dropping the future ends the fetch unless somebody else wants the same blob.
    ///
    /// # Errors
    ///
    /// [`FetchError`] when no source has the rest, or the disk refuses it.
    pub async fn fetch(&self, blob: BlobId, sources: &[NodeId]) -> Result<PathBuf, FetchError> {
        self.start_fetch(blob, sources).done().await
    }

    /// Begins a fetch, or joins the one that runs and adds `sources` to it.
    pub fn start_fetch(&self, blob: BlobId, sources: &[NodeId]) -> Fetch {
        let mut jobs = self.inner.fetches.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(job) = jobs.running.get(&blob).and_then(|(_, job)| job.upgrade()) {
            // A full queue means that many sources have just been added.
            job.sources.try_send(sources.to_vec()).ok();
            return Fetch { blob, job };
        }
        jobs.started += 1;
        let number = jobs.started;
        let (source_sender, source_receiver) = mpsc::channel(16);
        source_sender.try_send(sources.to_vec()).ok();
        let (progress_sender, progress) = watch::channel(Progress::default());
        let (result_sender, result) = watch::channel(None);
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let job = Arc::new(Job {
            sources: source_sender,
            progress,
            result,
            _stop: stop.drop_guard(),
        });
        jobs.running.insert(blob, (number, Arc::downgrade(&job)));
        drop(jobs);
        self.spawn(move |plane| async move {
            let result = tokio::select! {
                result = run(&plane, blob, source_receiver, &progress_sender) => Some(result),
                () = stopped.cancelled() => None,
            };
            // First out of the list, so that whoever asks after a failure begins anew.
            let mut jobs = plane.inner.fetches.jobs.lock().unwrap_or_else(PoisonError::into_inner);
            if jobs.running.get(&blob).is_some_and(|(other, _)| *other == number) {
                jobs.running.remove(&blob);
            }
            drop(jobs);
            result_sender.send_replace(result);
        });
        Fetch { blob, job }
    }
}

async fn run(
    plane: &DataPlane,
    blob: BlobId,
    more: mpsc::Receiver<Vec<NodeId>>,
    progress: &watch::Sender<Progress>,
) -> Result<PathBuf, FetchError> {
    // The semaphore is never closed.
    let _slot = plane.inner.fetches.slots.acquire().await.ok();
    let store = plane.blobs().clone();
    let there = blocking(move || Ok((store.path(blob), store.manifest(blob).ok()))).await?;
    if let (Some(path), _) = there {
        return Ok(path);
    }
    let (events, events_receiver) = mpsc::channel(256);
    let mut fetching = Fetching {
        plane,
        blob,
        progress,
        started: Instant::now(),
        useful_at: Instant::now(),
        events,
        tasks: JoinSet::new(),
        sources: BTreeMap::new(),
        requests: BTreeMap::new(),
        open: None,
    };
    if let (_, Some(manifest)) = there {
        fetching.begin(&manifest).await?;
    }
    let partial = fetching.drive(more, events_receiver).await?;
    let store = plane.blobs().clone();
    Ok(blocking(move || store.complete(&partial)).await?)
}

/// What the tasks of a fetch report.
#[derive(Debug)]
enum Event {
    Manifest { source: NodeId, bytes: Vec<u8> },
    Has { source: NodeId, bytes: Vec<u8> },
    // The source cannot be reached, or does not have the blob; worth another try later.
    Lost { source: NodeId, reason: String },
    // The source turned this node away, or the other way round.
    Refused { source: NodeId, reason: String },
    Progress { source: NodeId },
    Chunk { source: NodeId, chunk: u32, came: Came },
}

#[derive(Debug)]
enum Came {
    Kept,
    Wrong(String),
    NotThere,
    Lost(DataError),
    Disk(BlobError),
}

/// One source of a fetch.
#[derive(Debug, Default)]
struct Source {
    watcher: Option<AbortHandle>,
    attempts: u32,
    trouble: Option<String>,
    // Lied, or does not want to talk to this node.
    given_up: bool,
}

/// What is known once the manifest is here.
struct Open {
    scheduler: Scheduler,
    partial: Suspended,
}

/// Takes a partial blob out of the store's list however the fetch ends.
struct Suspended(Arc<Partial>, DataPlane);

impl Drop for Suspended {
    fn drop(&mut self) {
        self.1.blobs().suspend(&self.0);
    }
}

struct Fetching<'a> {
    plane: &'a DataPlane,
    blob: BlobId,
    progress: &'a watch::Sender<Progress>,
    started: Instant,
    useful_at: Instant,
    events: mpsc::Sender<Event>,
    // Dropping it ends every task of this fetch.
    tasks: JoinSet<()>,
    sources: BTreeMap<NodeId, Source>,
    requests: BTreeMap<(NodeId, u32), AbortHandle>,
    open: Option<Open>,
}

impl Fetching<'_> {
    /// Until every chunk is here.
    async fn drive(
        &mut self,
        mut more: mpsc::Receiver<Vec<NodeId>>,
        mut events: mpsc::Receiver<Event>,
    ) -> Result<Arc<Partial>, FetchError> {
        let patience = self.plane.inner.config.fetch_patience;
        let mut done = self.step(Input::Wake);
        loop {
            if let (true, Some(open)) = (done, &self.open) {
                return Ok(open.partial.0.clone());
            }
            let give_up_at = self.is_starved().then_some(self.useful_at + patience);
            if give_up_at.is_some_and(|at| at <= Instant::now()) || (self.is_hopeless() && more.is_empty()) {
                return Err(self.no_source());
            }
            let wake_at = self.open.as_ref().and_then(|open| open.scheduler.wake_at());
            let wake_at = wake_at.map(|at| self.started + Duration::from_micros(at.0));
            let next = [give_up_at, wake_at].into_iter().flatten().min();
            // The queue of events is kept open by `self.events`; that of sources ends with the last handle.
            tokio::select! {
                Some(event) = events.recv() => done = self.on_event(event).await?,
                Some(sources) = more.recv() => self.add_sources(&sources),
                Some(_) = self.tasks.join_next() => {}
                () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => done = self.step(Input::Wake),
            }
        }
    }

    async fn on_event(&mut self, event: Event) -> Result<bool, FetchError> {
        match event {
            Event::Manifest { source, bytes } => {
                if self.open.is_none() {
                    match Manifest::from_bytes_of(self.blob, &bytes) {
                        Ok(manifest) => {
                            self.useful_at = Instant::now();
                            self.begin(&manifest).await?;
                            return Ok(self.step(Input::Wake));
                        }
                        Err(error) => self.give_up_on(source, error.to_string()),
                    }
                }
            }
            Event::Has { source, bytes } => return Ok(self.on_has(source, &bytes)),
            Event::Lost { source, reason } => return Ok(self.on_lost(source, reason)),
            Event::Refused { source, reason } => {
                self.give_up_on(source, reason);
                return Ok(self.step(Input::Gone { source }));
            }
            Event::Progress { source } => {
                self.useful_at = Instant::now();
                return Ok(self.step(Input::Progress { source }));
            }
            Event::Chunk { source, chunk, came } => {
                self.requests.remove(&(source, chunk));
                return self.on_chunk(source, chunk, came);
            }
        }
        Ok(false)
    }

    fn on_has(&mut self, source: NodeId, bytes: &[u8]) -> bool {
        // Manifests come first on each stream, so this one was good or another's was.
        let Some(open) = &self.open else { return false };
        let Some(has) = ChunkSet::from_bytes(open.scheduler.have().chunks(), bytes) else {
            self.give_up_on(source, "said nonsense about what it has".to_owned());
            return self.step(Input::Gone { source });
        };
        if self.sources.get(&source).is_some_and(|source| source.given_up) {
            return false;
        }
        self.step(Input::Source { source, has })
    }

    fn on_lost(&mut self, source: NodeId, reason: String) -> bool {
        self.watch(source, Some(reason));
        self.step(Input::Gone { source })
    }

    fn on_chunk(&mut self, source: NodeId, chunk: u32, came: Came) -> Result<bool, FetchError> {
        match came {
            Came::Kept => {
                self.useful_at = Instant::now();
                if let Some(source) = self.sources.get_mut(&source) {
                    source.attempts = 0;
                }
                Ok(self.step(Input::Arrived { source, chunk }))
            }
            Came::Wrong(reason) => {
                tracing::warn!(peer = %source, blob = %self.blob, chunk, reason, "source sent a wrong chunk");
                self.give_up_on(source, reason);
                Ok(self.step(Input::Wrong { source, chunk }))
            }
            Came::NotThere => Ok(self.step(Input::Refused { source, chunk })),
            Came::Lost(error) => Ok(self.on_lost(source, error.to_string())),
            Came::Disk(error) => Err(FetchError::Disk(error)),
        }
    }

    /// Opens the file, now that it is known what belongs into it.
    async fn begin(&mut self, manifest: &Manifest) -> Result<(), FetchError> {
        let store = self.plane.blobs().clone();
        let (blob, manifest) = (self.blob, manifest.clone());
        let partial = blocking(move || store.begin(blob, &manifest)).await?;
        let [a, b, c, d, e, f, g, h, ..] = self.plane.node().0;
        let seed = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let scheduler = Scheduler::new(self.plane.inner.config.fetch, seed, partial.has());
        let partial = Suspended(partial, self.plane.clone());
        self.open = Some(Open { scheduler, partial });
        Ok(())
    }

    /// Steps the scheduler and does what it says. Says whether every chunk is here.
    fn step(&mut self, input: Input) -> bool {
        let Some(open) = &mut self.open else { return false };
        let mut effects = Vec::new();
        let micros = u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX);
        open.scheduler.step(time::Instant(micros), input, &mut effects);
        let partial = open.partial.0.clone();
        let mut done = false;
        for effect in effects {
            match effect {
                Effect::Request { source, chunk } => {
                    let (plane, events) = (self.plane.clone(), self.events.clone());
                    let task = fetch_chunk(plane, partial.clone(), source, chunk, events);
                    self.requests.insert((source, chunk), self.tasks.spawn(task));
                }
                Effect::Cancel { source, chunk } => {
                    if let Some(request) = self.requests.remove(&(source, chunk)) {
                        request.abort();
                    }
                }
                Effect::Drop { source } => self.watch(source, Some("silent".to_owned())),
                Effect::Ban { source } => self.give_up_on(source, "sent a wrong chunk".to_owned()),
                Effect::Done => done = true,
            }
        }
        self.report(&partial);
        done
    }

    fn report(&self, partial: &Partial) {
        let Some(open) = &self.open else { return };
        let have = open.scheduler.have();
        let manifest = partial.manifest();
        let last = manifest.chunks().saturating_sub(1);
        let short = match have.contains(last) {
            true => CHUNK_BYTES.saturating_sub(manifest.chunk_bytes(last).unwrap_or(CHUNK_BYTES)),
            false => 0,
        };
        let progress = Progress {
            bytes_done: Manifest::chunk_offset(have.count()).saturating_sub(short as u64),
            bytes_total: manifest.bytes,
            sources: open.scheduler.sources().count(),
        };
        self.progress
            .send_if_modified(|before| std::mem::replace(before, progress) != progress);
    }

    fn add_sources(&mut self, sources: &[NodeId]) {
        let limit = self.plane.inner.config.fetch.sources_max;
        for source in sources {
            let known = self.sources.contains_key(source);
            let present = self.sources.values().filter(|source| !source.given_up).count();
            if !known && present < limit && *source != self.plane.node() {
                self.watch(*source, None);
            }
        }
    }

    /// Asks a source what it has; after trouble, only after a pause.
    fn watch(&mut self, id: NodeId, trouble: Option<String>) {
        let source = self.sources.entry(id).or_default();
        if source.given_up {
            return;
        }
        if let Some(watcher) = source.watcher.take() {
            watcher.abort();
        }
        let mut pause = Duration::ZERO;
        if trouble.is_some() {
            pause = RETRY_PAUSE * (1 << source.attempts.min(5));
            source.attempts = source.attempts.saturating_add(1);
            source.trouble = trouble;
        }
        let (plane, events, blob) = (self.plane.clone(), self.events.clone(), self.blob);
        source.watcher = Some(self.tasks.spawn(async move {
            sleep(pause).await;
            let event = match watch_source(&plane, blob, id, &events).await {
                Ok(()) => return,
                Err(error @ (DataError::RefusedByPeer { .. } | DataError::RefusedByUs { .. })) => Event::Refused {
                    source: id,
                    reason: error.to_string(),
                },
                Err(error) => Event::Lost {
                    source: id,
                    reason: error.to_string(),
                },
            };
            events.send(event).await.ok();
        }));
    }

    fn give_up_on(&mut self, id: NodeId, trouble: String) {
        let source = self.sources.entry(id).or_default();
        source.given_up = true;
        source.trouble.get_or_insert(trouble);
        if let Some(watcher) = source.watcher.take() {
            watcher.abort();
        }
    }

    fn is_starved(&self) -> bool {
        self.open.as_ref().is_none_or(|open| open.scheduler.is_starved())
    }

    /// Whether there is nobody left who might still help.
    fn is_hopeless(&self) -> bool {
        let given_up = |source: &Source| source.given_up;
        !self.sources.is_empty() && self.sources.values().all(given_up)
    }

    fn no_source(&self) -> FetchError {
        let have = self.open.as_ref().map(|open| open.scheduler.have());
        let told = |(id, source): (&NodeId, &Source)| {
            let trouble = source.trouble.as_deref().unwrap_or("does not have the rest");
            format!("{}: {trouble}", id.short())
        };
        let tried: Vec<String> = self.sources.iter().map(told).collect();
        FetchError::NoSource {
            blob: self.blob,
            chunks_done: have.map_or(0, ChunkSet::count),
            chunks: have.map_or(0, ChunkSet::chunks),
            tried: match tried.is_empty() {
                true => "no source is known".to_owned(),
                false => tried.join("; "),
            },
        }
    }
}

/// Hears what one source has, until it has all.
async fn watch_source(
    plane: &DataPlane,
    blob: BlobId,
    source: NodeId,
    events: &mpsc::Sender<Event>,
) -> Result<(), DataError> {
    let ask = Ask::Has { blob }.to_bytes();
    // The sender is kept: closing it would end the answer.
    let (_sender, mut receiver) = plane.open(source, Class::Bulk, Service::Blob, ask).await?;
    let mut told = false;
    while let Some((header, payload)) = receiver.next_within(MANIFEST_BYTES_MAX as u64).await? {
        let bytes = payload.to_vec();
        let event = match postcard::from_bytes(&header) {
            Ok(Tell::Manifest) => Event::Manifest { source, bytes },
            Ok(Tell::Has) => {
                told = true;
                Event::Has { source, bytes }
            }
            Ok(Tell::Unknown) => break,
            Ok(Tell::Chunk) | Err(_) => {
                return Err(DataError::Malformed {
                    peer: source,
                    what: "something else than what it has".to_owned(),
                });
            }
        };
        events.send(event).await.ok();
    }
    if told {
        return Ok(());
    }
    let reason = "does not have the blob".to_owned();
    events.send(Event::Lost { source, reason }).await.ok();
    Ok(())
}

async fn fetch_chunk(plane: DataPlane, partial: Arc<Partial>, source: NodeId, chunk: u32, events: mpsc::Sender<Event>) {
    let came = match receive_chunk(&plane, &partial, source, chunk, &events).await {
        Err(error) => Came::Lost(error),
        Ok(None) => Came::NotThere,
        Ok(Some(bytes)) => {
            let kept = tokio::task::spawn_blocking(move || partial.keep(chunk, &bytes)).await;
            match kept {
                Ok(Ok(())) => Came::Kept,
                Ok(Err(NotKept::Wrong(error))) => Came::Wrong(error.to_string()),
                Ok(Err(NotKept::Disk(error))) => Came::Disk(error),
                // The runtime is shutting down.
                Err(_) => return,
            }
        }
    };
    events.send(Event::Chunk { source, chunk, came }).await.ok();
}

/// The bytes of a chunk as the source sent them; `None` when it does not have it.
async fn receive_chunk(
    plane: &DataPlane,
    partial: &Partial,
    source: NodeId,
    chunk: u32,
    events: &mpsc::Sender<Event>,
) -> Result<Option<Vec<u8>>, DataError> {
    let blob = partial.id();
    let ask = Ask::Chunk { blob, chunk }.to_bytes();
    let (mut sender, mut receiver) = plane.open(source, Class::Bulk, Service::Blob, ask).await?;
    sender.finish();
    let mut told_at = Instant::now();
    let progress = |_| {
        if told_at.elapsed() > Duration::from_millis(500) {
            told_at = Instant::now();
            // A full queue holds news of progress already.
            events.try_send(Event::Progress { source }).ok();
        }
    };
    let Some((header, payload)) = receiver.only(CHUNK_BYTES as u64, progress).await? else {
        return Ok(None);
    };
    match postcard::from_bytes(&header) {
        Ok(Tell::Chunk) => Ok(Some(payload)),
        Ok(Tell::Unknown) => Ok(None),
        Ok(Tell::Manifest | Tell::Has) | Err(_) => Err(DataError::Malformed {
            peer: source,
            what: "something else than a chunk".to_owned(),
        }),
    }
}
