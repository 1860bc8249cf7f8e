//! The manifest of a blob: its length and the hash of each chunk.

use alloc::vec::Vec;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::hash::{BlobId, Digest, digest};

/// Bytes of every chunk but the last. Large enough that a request per chunk costs nothing, small enough that a chunk
/// lost with its sender is cheap and that a wrong one is found early.
pub const CHUNK_BYTES: usize = 1 << 20;

/// The most chunks of one blob: 256 GiB. A part of a model with a trillion parameters is well below.
pub const CHUNKS_MAX: u32 = 1 << 18;

/// The most bytes of an encoded manifest: every hash, and two variable-length integers.
pub const MANIFEST_BYTES_MAX: usize = 20 + CHUNKS_MAX as usize * 32;

/// What a blob is made of. Its hash is the [`BlobId`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The length of the blob.
    pub bytes: u64,
    /// The hash of each chunk, in order; `bytes` says how many there are.
    pub chunk_hashes: Vec<Digest>,
}

/// Why bytes are not the manifest of a blob.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum ManifestError {
    /// Longer than any manifest.
    #[error("a manifest of {found} bytes, at most {MANIFEST_BYTES_MAX} are allowed")]
    TooLong {
        /// Its length.
        found: usize,
    },
    /// Not the canonical encoding of a manifest.
    #[error("these {found} bytes are not a canonical manifest")]
    Malformed {
        /// How many.
        found: usize,
    },
    /// As many hashes as its length does not call for.
    #[error("a blob of {bytes} bytes has {expected} chunks, the manifest lists {found}")]
    ChunkCount {
        /// The length of the blob.
        bytes: u64,
        /// Chunks that it has.
        expected: u64,
        /// Hashes listed.
        found: usize,
    },
    /// A blob above the limit.
    #[error("a blob of {bytes} bytes is above the limit of {CHUNKS_MAX} chunks")]
    TooManyChunks {
        /// The length of the blob.
        bytes: u64,
    },
    /// The manifest of another blob.
    #[error("expected the manifest of {expected}, found that of {found}")]
    WrongId {
        /// What was asked for.
        expected: BlobId,
        /// What came.
        found: BlobId,
    },
}

/// Why bytes are not a chunk of a blob.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum ChunkError {
    /// There is no such chunk.
    #[error("chunk {chunk} of a blob of {chunks} chunks")]
    OutOfRange {
        /// The index.
        chunk: u32,
        /// Chunks of the blob.
        chunks: u32,
    },
    /// Its length is wrong.
    #[error("chunk {chunk} has {found} bytes, expected {expected}")]
    Length {
        /// The index.
        chunk: u32,
        /// Bytes it must have.
        expected: usize,
        /// Bytes that came.
        found: usize,
    },
    /// Its hash is wrong.
    #[error("chunk {chunk} does not have the hash that the manifest gives")]
    Hash {
        /// The index.
        chunk: u32,
    },
}

impl Manifest {
    /// The manifest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self {
            bytes: bytes.len() as u64,
            chunk_hashes: bytes.chunks(CHUNK_BYTES).map(digest).collect(),
        }
    }

    /// The canonical bytes that are hashed, stored and sent.
    pub fn to_bytes(&self) -> Vec<u8> {
        // A value of this type holds nothing that postcard cannot write.
        postcard::to_allocvec(self).unwrap_or_default()
    }

    /// Reads canonical bytes, and nothing else.
    ///
    /// # Errors
    ///
    /// [`ManifestError`] for bytes that are too long, not canonical, or contradict themselves.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ManifestError> {
        let found = bytes.len();
        if found > MANIFEST_BYTES_MAX {
            return Err(ManifestError::TooLong { found });
        }
        let manifest: Self = postcard::from_bytes(bytes).map_err(|_| ManifestError::Malformed { found })?;
        let expected = manifest.bytes.div_ceil(CHUNK_BYTES as u64);
        if expected > u64::from(CHUNKS_MAX) {
            return Err(ManifestError::TooManyChunks { bytes: manifest.bytes });
        }
        if expected != manifest.chunk_hashes.len() as u64 {
            return Err(ManifestError::ChunkCount {
                bytes: manifest.bytes,
                expected,
                found: manifest.chunk_hashes.len(),
            });
        }
        // Two encodings of one blob would be two names for it.
        if manifest.to_bytes() != bytes {
            return Err(ManifestError::Malformed { found });
        }
        Ok(manifest)
    }

    /// Reads the canonical bytes of the manifest of `id`.
    ///
    /// # Errors
    ///
    /// As [`Manifest::from_bytes`], and [`ManifestError::WrongId`] for the manifest of another blob.
    pub fn from_bytes_of(id: BlobId, bytes: &[u8]) -> Result<Self, ManifestError> {
        let found = bytes.len();
        if found > MANIFEST_BYTES_MAX {
            return Err(ManifestError::TooLong { found });
        }
        let found = BlobId(digest(bytes).0);
        if found != id {
            return Err(ManifestError::WrongId { expected: id, found });
        }
        Self::from_bytes(bytes)
    }

    /// The blob's id: the hash of the canonical bytes.
    pub fn id(&self) -> BlobId {
        BlobId(digest(&self.to_bytes()).0)
    }

    /// The number of chunks.
    pub fn chunks(&self) -> u32 {
        u32::try_from(self.chunk_hashes.len()).unwrap_or(u32::MAX)
    }

    /// The length of a chunk; `None` where there is no such chunk.
    pub fn chunk_bytes(&self, chunk: u32) -> Option<usize> {
        if chunk >= self.chunks() {
            return None;
        }
        let rest = self.bytes.checked_sub(Self::chunk_offset(chunk))?;
        Some(usize::try_from(rest).unwrap_or(usize::MAX).min(CHUNK_BYTES))
    }

    /// Where a chunk begins in the blob.
    pub fn chunk_offset(chunk: u32) -> u64 {
        u64::from(chunk) * CHUNK_BYTES as u64
    }

    /// Checks the bytes of one chunk.
    ///
    /// # Errors
    ///
    /// [`ChunkError`] where index, length or hash is wrong.
    pub fn verify_chunk(&self, chunk: u32, bytes: &[u8]) -> Result<(), ChunkError> {
        let out_of_range = ChunkError::OutOfRange {
            chunk,
            chunks: self.chunks(),
        };
        let expected = self.chunk_bytes(chunk).ok_or(out_of_range)?;
        if bytes.len() != expected {
            return Err(ChunkError::Length {
                chunk,
                expected,
                found: bytes.len(),
            });
        }
        let hash = usize::try_from(chunk)
            .ok()
            .and_then(|index| self.chunk_hashes.get(index));
        if hash != Some(&digest(bytes)) {
            return Err(ChunkError::Hash { chunk });
        }
        Ok(())
    }
}

/// The id of the blob that holds `bytes`.
pub fn blob_id(bytes: &[u8]) -> BlobId {
    Manifest::of(bytes).id()
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    #[test]
    fn a_manifest_survives_its_bytes() {
        let bytes = vec![7; 2 * CHUNK_BYTES + 5];
        let manifest = Manifest::of(&bytes);
        assert_eq!(manifest.chunks(), 3);
        assert_eq!(manifest.chunk_bytes(2), Some(5));
        assert_eq!(manifest.chunk_bytes(3), None);
        assert_eq!(
            Manifest::from_bytes_of(blob_id(&bytes), &manifest.to_bytes()),
            Ok(manifest)
        );
    }

    #[test]
    fn the_id_of_the_empty_blob_is_pinned() {
        // Length 0, no chunks: two zero bytes. A change here renames every blob there is.
        assert_eq!(Manifest::of(&[]).to_bytes(), [0, 0]);
        assert_eq!(blob_id(&[]).0, digest(&[0, 0]).0);
        assert_eq!(Manifest::of(b"polder").to_bytes().len(), 1 + 1 + 32);
    }

    #[test]
    fn a_chunk_of_the_wrong_index_length_or_hash_is_refused() {
        let manifest = Manifest::of(b"polder");
        assert_eq!(manifest.verify_chunk(0, b"polder"), Ok(()));
        assert_eq!(manifest.verify_chunk(0, b"poldeR"), Err(ChunkError::Hash { chunk: 0 }));
        assert!(matches!(
            manifest.verify_chunk(0, b"polde"),
            Err(ChunkError::Length { found: 5, .. })
        ));
        assert!(matches!(
            manifest.verify_chunk(1, b""),
            Err(ChunkError::OutOfRange { .. })
        ));
    }

    #[test]
    fn a_manifest_that_contradicts_itself_is_refused() {
        let mut manifest = Manifest::of(b"polder");
        manifest.bytes = 3 * CHUNK_BYTES as u64;
        assert!(matches!(
            Manifest::from_bytes(&manifest.to_bytes()),
            Err(ManifestError::ChunkCount {
                expected: 3,
                found: 1,
                ..
            })
        ));
        manifest.bytes = u64::MAX;
        assert!(matches!(
            Manifest::from_bytes(&manifest.to_bytes()),
            Err(ManifestError::TooManyChunks { .. })
        ));
    }

    #[test]
    fn a_second_encoding_of_the_same_manifest_is_refused() {
        let mut bytes = Manifest::of(b"polder").to_bytes();
        bytes.push(0);
        assert!(matches!(
            Manifest::from_bytes(&bytes),
            Err(ManifestError::Malformed { .. })
        ));
        assert!(matches!(
            Manifest::from_bytes(&[0x80, 0, 0]),
            Err(ManifestError::Malformed { .. })
        ));
    }

    #[test]
    fn a_length_that_lies_allocates_nothing() {
        // Ten hashes of 2^35 announced, none there.
        let bytes = [10, 0xff, 0xff, 0xff, 0xff, 0x7f];
        assert!(matches!(
            Manifest::from_bytes(&bytes),
            Err(ManifestError::Malformed { .. })
        ));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_manifest_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(manifest) = Manifest::from_bytes(&bytes) {
                prop_assert_eq!(manifest.to_bytes(), bytes);
            }
        }
    }
}
