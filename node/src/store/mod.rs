//! An index on disk of what can be rebuilt: peers met, chunks held, bookkeeping of rounds.
//!
//! What must not be lost lives in plain files ([`crate::home`]). An index that is damaged is set aside, replaced by an
//! empty one, and reported; a node never refuses to start because of it.

mod disk;
mod memory;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use thiserror::Error;

pub use disk::{DiskStore, Opened, SetAside};
pub use memory::MemoryStore;

/// The longest key.
pub const KEY_BYTES_MAX: usize = 256;

/// The longest value: with key and checksum it stays within a page of 4 KiB. What is longer is a file or a blob.
pub const VALUE_BYTES_MAX: usize = 3_800;

/// The most entries that one scan answers with.
pub const SCAN_MAX: usize = 65_536;

/// A key and its value.
pub type KeyValue = (Vec<u8>, Vec<u8>);

/// Small values under small keys, in the order of the keys. Shared between threads; no method waits for a network.
pub trait Store: Send + Sync + 'static {
    /// The value of `key`.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the index cannot be read.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;

    /// Gives `key` a value in place of what it had. It is durable after [`Self::flush`], or half a second later.
    ///
    /// # Errors
    ///
    /// [`StoreError::TooLong`], or where the index cannot be written.
    fn put(&self, key: &[u8], value: &[u8]) -> Result<(), StoreError>;

    /// Removes `key`, where it is there.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the index cannot be written.
    fn remove(&self, key: &[u8]) -> Result<(), StoreError>;

    /// The first `limit` entries whose keys begin with `prefix`, in order; never more than [`SCAN_MAX`].
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the index cannot be read.
    fn scan(&self, prefix: &[u8], limit: usize) -> Result<Vec<KeyValue>, StoreError>;

    /// Returns when all that was written is on disk.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the index cannot be written.
    fn flush(&self) -> Result<(), StoreError>;
}

/// Why the index did not do as asked.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Ours: a key or a value that belongs elsewhere.
    #[error("{what} of {length_bytes} bytes is over the limit of {limit_bytes}")]
    TooLong {
        /// Key or value.
        what: &'static str,
        /// Its length.
        length_bytes: usize,
        /// The most.
        limit_bytes: usize,
    },
    /// Another process has it open.
    #[error("the index {path} is in use by another process\n  hint: does another node run in this home?")]
    InUse {
        /// Its folder.
        path: PathBuf,
    },
    /// The disk does not let us.
    #[error("cannot {what} the index {path}")]
    Disk {
        /// What was tried.
        what: &'static str,
        /// Its folder.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// It was damaged while open. The next start sets it aside.
    #[error("the index {path} is damaged: {reason}\n  hint: restart the node, which rebuilds it")]
    Damaged {
        /// Its folder.
        path: PathBuf,
        /// How it showed.
        reason: String,
    },
}

fn check_length(what: &'static str, length_bytes: usize, limit_bytes: usize) -> Result<(), StoreError> {
    if length_bytes <= limit_bytes {
        return Ok(());
    }
    Err(StoreError::TooLong {
        what,
        length_bytes,
        limit_bytes,
    })
}
