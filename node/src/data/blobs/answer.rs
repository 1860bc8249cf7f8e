//! Answers those who ask for blobs, also for blobs of which only some chunks are here yet.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use polder_protocol::blob::ChunkSet;
use polder_protocol::hash::BlobId;
use tokio::time::{sleep, timeout};

use super::message::{Ask, Tell};
use super::store::{BlobError, BlobStore};
use crate::data::caps::SLICE_BYTES;
use crate::data::error::{DataError, StreamEnd};
use crate::data::frames::{FrameReceiver, FrameSender};
use crate::data::links::Link;
use crate::data::plane::DataPlane;

/// Chunks held in memory for sending at once, over all peers: 128 MiB.
pub(in crate::data) const SENDING_CHUNKS_MAX: usize = 128;

/// A peer that takes longer for one chunk gives way to others: 1 MiB at 140 kbit/s.
const SENDING_MAX: Duration = Duration::from_secs(60);

/// New chunks are told together: often enough that a swarm flows, rarely enough that the telling costs nothing.
const TELL_EVERY: Duration = Duration::from_millis(100);

/// Answers one stream.
pub(in crate::data) async fn answer(
    plane: &DataPlane,
    link: &Link,
    header: &[u8],
    mut sender: FrameSender,
    mut receiver: FrameReceiver,
) {
    let result = match postcard::from_bytes(header) {
        Ok(Ask::Has { blob }) => {
            // The asker leaves by closing its side.
            tokio::select! {
                result = tell_has(plane, blob, &mut sender) => result,
                _ = receiver.next() => Ok(()),
            }
        }
        Ok(Ask::Chunk { blob, chunk }) => send_chunk(plane, link, blob, chunk, &mut sender).await,
        Err(_) => {
            receiver.stop(StreamEnd::Malformed);
            sender.break_off(StreamEnd::Malformed);
            return;
        }
    };
    match result {
        Ok(()) => sender.finish(),
        Err(error) => tracing::debug!(%error, "blob not sent"),
    }
}

async fn tell_has(plane: &DataPlane, blob: BlobId, sender: &mut FrameSender) -> Result<(), DataError> {
    let store = plane.blobs().clone();
    let found = blocking(move || Ok((store.manifest(blob)?, store.has(blob)))).await;
    let Ok((manifest, whole)) = found else {
        return sender.send(&Tell::Unknown.to_bytes(), Bytes::new()).await;
    };
    let partial = plane.blobs().partial(blob);
    if !whole && partial.is_none() {
        return sender.send(&Tell::Unknown.to_bytes(), Bytes::new()).await;
    }
    sender
        .send(&Tell::Manifest.to_bytes(), Bytes::from(manifest.to_bytes()))
        .await?;
    if let (Some(partial), false) = (partial, whole) {
        let mut changes = partial.changes();
        loop {
            changes.borrow_and_update();
            let has = partial.has();
            sender.send(&Tell::Has.to_bytes(), Bytes::from(has.to_bytes())).await?;
            // A fetch that ended is gone from the store, whether it got everything or not.
            if has.is_full() || plane.blobs().partial(blob).is_none() {
                return Ok(());
            }
            sleep(TELL_EVERY).await;
            // The count changes at least once more, unless the fetch is given up: look again now and then.
            timeout(Duration::from_secs(2), changes.changed()).await.ok();
        }
    }
    let has = ChunkSet::full(manifest.chunks());
    sender.send(&Tell::Has.to_bytes(), Bytes::from(has.to_bytes())).await
}

async fn send_chunk(
    plane: &DataPlane,
    link: &Link,
    blob: BlobId,
    chunk: u32,
    sender: &mut FrameSender,
) -> Result<(), DataError> {
    // What was asked for first goes first: whole chunks come one after the other, and of those that are taken back
    // nothing has been sent. After 2^30 chunks the order begins anew.
    let asked = plane.inner.chunks_asked.fetch_add(1, Ordering::Relaxed) & 0x3fff_ffff;
    sender.set_priority(-1 - i32::try_from(asked).unwrap_or_default());
    // One after the other also where a cap makes them wait. The turn comes before memory is taken: a peer that asks for
    // much and reads nothing, or whose institution is capped, holds one chunk and not everybody's.
    let turn = link.sending.lock().await;
    // The semaphore is never closed.
    let _permit = plane.inner.sending_chunks.acquire().await.ok();
    let store = plane.blobs().clone();
    let bytes = match blocking(move || store.chunk(blob, chunk)).await {
        Ok(bytes) => bytes,
        Err(error) => {
            match error {
                BlobError::Missing { .. } => tracing::debug!(%error, chunk, "chunk asked for"),
                _ => tracing::error!(%error, chunk, "chunk cannot be sent"),
            }
            return sender.send(&Tell::Unknown.to_bytes(), Bytes::new()).await;
        }
    };
    let peer = sender.peer();
    let stalled = |_| DataError::Stalled {
        peer,
        what: "to take one chunk",
        after: SENDING_MAX,
    };
    let mut body = Bytes::from(bytes);
    let header = Tell::Chunk.to_bytes();
    let started = sender.begin(&header, body.len());
    timeout(SENDING_MAX, started).await.map_err(stalled)??;
    let mut left = SENDING_MAX;
    while !body.is_empty() {
        let slice = body.split_to(body.len().min(SLICE_BYTES));
        // What the caps make it wait is not the peer's fault.
        sleep(
            plane
                .inner
                .uploads
                .take(Instant::now(), link.admitted.institution, slice.len()),
        )
        .await;
        let began = Instant::now();
        timeout(left, sender.go_on(slice)).await.map_err(stalled)??;
        left = left.saturating_sub(began.elapsed());
    }
    drop(turn);
    sender.end();
    sender.finish();
    // The permit stands for memory that quinn holds until the peer has acknowledged it.
    timeout(left, sender.delivered()).await.map_err(stalled)?
}

/// Runs disk work where it may block.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BlobError> + Send + 'static,
) -> Result<T, BlobError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down, and nobody will read the answer.
            Err(_) => std::future::pending().await,
        },
    }
}

impl BlobStore {
    /// As [`BlobStore::read`], off the runtime's threads.
    ///
    /// # Errors
    ///
    /// As [`BlobStore::read`].
    pub async fn read_off_thread(&self, id: BlobId) -> Result<Vec<u8>, BlobError> {
        let store = self.clone();
        blocking(move || store.read(id)).await
    }
}
