//! Content-addressed bytes: what names them, which chunks of them are here, and which chunk to ask of whom.
//!
//! A blob is cut into chunks of [`CHUNK_BYTES`]. Its [`Manifest`] lists the length and the hash of every chunk, and the
//! hash of the manifest is the blob's id; so every chunk can be checked as it arrives, from whomever it came.

mod chunks;
mod manifest;
mod scheduler;

pub use chunks::ChunkSet;
pub use manifest::{CHUNK_BYTES, CHUNKS_MAX, ChunkError, MANIFEST_BYTES_MAX, Manifest, ManifestError, blob_id};
pub use scheduler::{Effect, Input, Limits, Scheduler};
