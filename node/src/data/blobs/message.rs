//! What is asked about a blob, and what is answered: postcard headers of frames.

use polder_protocol::hash::BlobId;
use serde::{Deserialize, Serialize};

/// The header with which a blob stream is opened. New cases are appended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::data) enum Ask {
    /// What do you have of it? Answered with [`Tell::Unknown`], or with [`Tell::Manifest`] and then [`Tell::Has`] each
    /// time that more is there, until all is.
    Has {
        /// Which blob.
        blob: BlobId,
    },
    /// Send one chunk. Answered with [`Tell::Chunk`] or [`Tell::Unknown`].
    Chunk {
        /// Which blob.
        blob: BlobId,
        /// Which chunk.
        chunk: u32,
    },
}

/// The header of an answer. New cases are appended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::data) enum Tell {
    /// It is not here.
    Unknown,
    /// The payload is the manifest.
    Manifest,
    /// The payload is the set of chunks that are here, as `ChunkSet::to_bytes` writes it.
    Has,
    /// The payload is the chunk.
    Chunk,
}

impl Ask {
    pub(in crate::data) fn to_bytes(self) -> Vec<u8> {
        // A hash and an integer always encode.
        postcard::to_allocvec(&self).unwrap_or_default()
    }
}

impl Tell {
    pub(in crate::data) fn to_bytes(self) -> Vec<u8> {
        // A case without fields always encodes.
        postcard::to_allocvec(&self).unwrap_or_default()
    }
}
