//! What training needs of the rest of the node, so that tests can stand in for a network, a store and a device.

use std::collections::BTreeSet;
use std::path::PathBuf;

use bytes::Bytes;
use futures::future::BoxFuture;
use polder_protocol::hash::{BlobId, NodeId, RunId};
use polder_protocol::round::RunMessage;
use polder_protocol::work::{Answer, StageId, Task};

/// The stage that trains. Serving counts its stages up from zero and never gets here.
pub(super) const TRAINING_STAGE: StageId = 1 << 31;
/// The stage that scores held-out texts while the other trains.
pub(super) const SCORING_STAGE: StageId = TRAINING_STAGE + 1;

/// The device's process.
pub trait Compute: Send + Sync + 'static {
    /// Hands in an order and waits for its answer. Orders are done in the order in which they were handed in.
    fn order(&self, task: Task, payload: Bytes) -> BoxFuture<'_, Result<(Answer, Bytes), String>>;

    /// Changes whenever everything that was loaded is gone.
    fn life(&self) -> u64;
}

/// Blobs on this machine, and how more of them come here.
pub trait Blobs: Send + Sync + 'static {
    /// Keeps bytes for a run, durable when it returns.
    fn put(&self, run: RunId, bytes: Vec<u8>) -> BoxFuture<'_, Result<BlobId, String>>;

    /// Notes that a blob which is here is kept for a run too.
    fn keep(&self, run: RunId, blob: BlobId);

    /// Lets go of everything that was kept for a run.
    fn forget(&self, run: RunId);

    /// The file that holds a whole blob.
    fn path(&self, blob: BlobId) -> Option<PathBuf>;

    /// Fetches a blob of a run, of at most `bytes_max`, from whichever of `sources` has it. Returns at once where it is
    /// here.
    fn fetch(
        &self,
        run: RunId,
        blob: BlobId,
        sources: Vec<NodeId>,
        bytes_max: u64,
    ) -> BoxFuture<'_, Result<(), String>>;

    /// Of what was kept for `run`, only `blobs` are needed still.
    fn retain(&self, run: RunId, blobs: BTreeSet<BlobId>);
}

/// Messages and streams between nodes.
pub trait Network: Send + Sync + 'static {
    /// Sends to one node; may lose it.
    fn send(&self, to: NodeId, message: RunMessage);

    /// Sends to all who follow runs; may lose it.
    fn broadcast(&self, message: RunMessage);

    /// Opens a stream to a stage of the same replica. `opening` is the first thing that the other end sees.
    fn open(&self, to: NodeId, opening: Vec<u8>) -> BoxFuture<'_, Result<Box<dyn Link>, String>>;

    /// Bytes sent and received by the data plane since the node started.
    fn traffic(&self) -> (u64, u64);
}

/// A header and a payload, or the end of the stream.
pub type Received = Option<(Vec<u8>, Bytes)>;

/// One stream between two stages.
pub trait Link: Send + Sync {
    /// Sends a header of at most 64 KiB and a payload.
    fn send(&mut self, header: Vec<u8>, payload: Bytes) -> BoxFuture<'_, Result<(), String>>;

    /// The next header and payload, `None` after the last. May be dropped halfway and called again.
    fn receive(&mut self) -> BoxFuture<'_, Result<Received, String>>;
}
