//! The device, the store and the network as the daemon has them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use polder_protocol::hash::{BlobId, NodeId, RunId};
use polder_protocol::work::{Answer, Task};
use tracing::warn;

use super::durable;
use super::world::{Blobs, Compute, Link, Received};
use crate::data::{DataPlane, FrameReceiver, FrameSender};
use crate::device::{Device, Life};

impl Compute for Device {
    fn order(&self, task: Task, payload: Bytes) -> BoxFuture<'_, Result<(Answer, Bytes), String>> {
        async move {
            Self::order(self, task, payload)
                .await
                .map_err(|error| error.to_string())
        }
        .boxed()
    }

    fn life(&self) -> u64 {
        match *Self::life(self).borrow() {
            Life::Running(number) => number,
            Life::Down(_) => 0,
        }
    }
}

/// A stream of the data plane between two stages.
#[derive(Debug)]
pub(super) struct Stream {
    /// Towards the other stage.
    pub(super) sender: FrameSender,
    /// From the other stage.
    pub(super) receiver: FrameReceiver,
}

impl Link for Stream {
    fn send(&mut self, header: Vec<u8>, payload: Bytes) -> BoxFuture<'_, Result<(), String>> {
        async move {
            let sent = self.sender.send(&header, payload).await;
            sent.map_err(|error| error.to_string())
        }
        .boxed()
    }

    fn receive(&mut self) -> BoxFuture<'_, Result<Received, String>> {
        async move { self.receiver.next().await.map_err(|error| error.to_string()) }.boxed()
    }
}

/// The node's blobs, and which of them are there for a run: a list of ids in `runs/RUN/blobs`.
#[derive(Debug, Clone)]
pub struct RunBlobs {
    plane: DataPlane,
    runs: PathBuf,
    kept: Arc<Mutex<BTreeMap<RunId, Kept>>>,
}

/// The blobs of one run. What came since the last housekeeping may belong to work that is under way and that the
/// machines have not heard of, so it stays until the next.
#[derive(Debug, Default)]
struct Kept {
    old: BTreeSet<BlobId>,
    young: BTreeSet<BlobId>,
}

impl Kept {
    fn contains(&self, blob: &BlobId) -> bool {
        self.old.contains(blob) || self.young.contains(blob)
    }
}

impl RunBlobs {
    /// Of `plane`'s store; `runs` is the folder of all runs.
    pub fn new(plane: DataPlane, runs: PathBuf) -> Self {
        let mut kept = BTreeMap::new();
        for entry in fs::read_dir(&runs).into_iter().flatten().flatten() {
            let run = entry.file_name().to_str().and_then(|name| name.parse::<RunId>().ok());
            if let (Some(run), Ok(bytes)) = (run, fs::read(entry.path().join("blobs"))) {
                // A torn last id is no id; its blob stays until somebody looks.
                let (ids, _) = bytes.as_chunks::<32>();
                let old = ids.iter().map(|id| BlobId(*id)).collect();
                let young = BTreeSet::new();
                kept.insert(run, Kept { old, young });
            }
        }
        Self {
            plane,
            runs,
            kept: Arc::new(Mutex::new(kept)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<RunId, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remove(&self, blobs: &[BlobId]) {
        for blob in blobs {
            if let Err(error) = self.plane.blobs().remove(*blob) {
                warn!(blob = %blob.short(), %error, "cannot remove a blob");
            }
        }
    }

    /// Notes that a blob is there for a run, so that it goes when the run needs it no more.
    fn note(&self, run: RunId, blob: BlobId) {
        // Blobs of no run stay.
        if run == RunId::default() {
            return;
        }
        let mut runs = self.lock();
        let kept = runs.entry(run).or_default();
        let new = !kept.contains(&blob);
        kept.young.insert(blob);
        drop(runs);
        if !new {
            return;
        }
        let folder = self.runs.join(run.to_string());
        let noted = fs::create_dir_all(&folder).and_then(|()| {
            let mut file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(folder.join("blobs"))?;
            file.write_all(&blob.0)
        });
        if let Err(error) = noted {
            warn!(run = %run.short(), blob = %blob.short(), %error, "a blob of a run will not be cleaned up");
        }
    }
}

/// Whether any run keeps a blob.
fn is_kept(runs: &BTreeMap<RunId, Kept>, blob: &BlobId) -> bool {
    runs.values().any(|kept| kept.contains(blob))
}

impl Blobs for RunBlobs {
    fn put(&self, run: RunId, bytes: Vec<u8>) -> BoxFuture<'_, Result<BlobId, String>> {
        let store = self.plane.blobs().clone();
        async move {
            let put = tokio::task::spawn_blocking(move || store.put_bytes(&bytes)).await;
            let blob = put
                .map_err(|error| error.to_string())?
                .map_err(|error| error.to_string())?;
            self.note(run, blob);
            Ok(blob)
        }
        .boxed()
    }

    fn keep(&self, run: RunId, blob: BlobId) {
        self.note(run, blob);
    }

    fn forget(&self, run: RunId) {
        let mut runs = self.lock();
        let kept = runs.remove(&run).unwrap_or_default();
        let unneeded = kept.old.union(&kept.young).copied();
        let unneeded: Vec<BlobId> = unneeded.filter(|blob| !is_kept(&runs, blob)).collect();
        drop(runs);
        self.remove(&unneeded);
        let path = self.runs.join(run.to_string()).join("blobs");
        if let Err(error) = fs::remove_file(&path) {
            warn!(path = %path.display(), %error, "cannot remove the list of a run's blobs");
        }
    }

    fn path(&self, blob: BlobId) -> Option<PathBuf> {
        self.plane.blobs().path(blob)
    }

    fn fetch(
        &self,
        run: RunId,
        blob: BlobId,
        sources: Vec<NodeId>,
        bytes_max: u64,
    ) -> BoxFuture<'_, Result<(), String>> {
        async move {
            self.note(run, blob);
            let path = match self.plane.blobs().path(blob) {
                Some(path) => path,
                None => self
                    .plane
                    .fetch(blob, &sources)
                    .await
                    .map_err(|error| error.to_string())?,
            };
            let bytes = tokio::fs::metadata(&path)
                .await
                .map_err(|error| error.to_string())?
                .len();
            if bytes > bytes_max {
                return Err(format!(
                    "blob {} is {bytes} bytes long, over the limit of {bytes_max}",
                    blob.short()
                ));
            }
            Ok(())
        }
        .boxed()
    }

    fn retain(&self, run: RunId, blobs: BTreeSet<BlobId>) {
        let mut runs = self.lock();
        let kept = runs.entry(run).or_default();
        let mut needed = std::mem::take(&mut kept.young);
        needed.extend(&blobs);
        let had = std::mem::replace(&mut kept.old, needed.clone());
        let unneeded: Vec<BlobId> = had.into_iter().filter(|blob| !is_kept(&runs, blob)).collect();
        drop(runs);
        self.remove(&unneeded);
        let ids: Vec<u8> = needed.iter().flat_map(|blob| blob.0).collect();
        let path = self.runs.join(run.to_string()).join("blobs");
        if let Err(error) = durable::write(&path, &ids) {
            warn!(path = %path.display(), %error, "cannot write the list of a run's blobs");
        }
    }
}
