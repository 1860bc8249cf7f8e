//! A blob of which only some chunks have come.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use polder_protocol::blob::{ChunkError, ChunkSet, Manifest};
use polder_protocol::hash::BlobId;
use tokio::sync::watch;

use super::store::{BlobError, disk};

/// The file, and which of its chunks are right. Chunks are written where they belong, in any order.
#[derive(Debug)]
pub(super) struct Partial {
    id: BlobId,
    manifest: Arc<Manifest>,
    path: PathBuf,
    file: File,
    // A chunk is in the set only after its verified bytes have been handed to the file.
    has: Mutex<ChunkSet>,
    changes: watch::Sender<u32>,
}

/// Why a chunk was not kept.
#[derive(Debug)]
pub(super) enum NotKept {
    /// It is not the chunk.
    Wrong(ChunkError),
    /// The disk does not take it.
    Disk(BlobError),
}

impl Partial {
    /// Opens the file and checks every chunk in it: after a crash nothing else says which are whole.
    pub(super) fn open(id: BlobId, manifest: Arc<Manifest>, path: PathBuf) -> Result<Self, BlobError> {
        let mut options = OpenOptions::new();
        let mut file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(disk("open", &path))?;
        let mut has = ChunkSet::empty(manifest.chunks());
        let length = file.metadata().map_err(disk("read", &path))?.len();
        file.seek(SeekFrom::Start(0)).map_err(disk("read", &path))?;
        let mut bytes = Vec::new();
        for chunk in 0..manifest.chunks() {
            let chunk_bytes = manifest.chunk_bytes(chunk).unwrap_or(0) as u64;
            if Manifest::chunk_offset(chunk) + chunk_bytes > length {
                break;
            }
            bytes.clear();
            file.by_ref()
                .take(chunk_bytes)
                .read_to_end(&mut bytes)
                .map_err(disk("read", &path))?;
            if manifest.verify_chunk(chunk, &bytes).is_ok() {
                has.insert(chunk);
            }
        }
        let (changes, _) = watch::channel(has.count());
        let has = Mutex::new(has);
        Ok(Self {
            id,
            manifest,
            path,
            file,
            has,
            changes,
        })
    }

    pub(super) fn id(&self) -> BlobId {
        self.id
    }

    pub(super) fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// What has come.
    pub(super) fn has(&self) -> ChunkSet {
        self.set().clone()
    }

    /// Changes when more has come; ends when the fetch does.
    pub(super) fn changes(&self) -> watch::Receiver<u32> {
        self.changes.subscribe()
    }

    /// Checks a chunk and writes it.
    pub(super) fn keep(&self, chunk: u32, bytes: &[u8]) -> Result<(), NotKept> {
        self.manifest.verify_chunk(chunk, bytes).map_err(NotKept::Wrong)?;
        let written = write_at(&self.file, bytes, Manifest::chunk_offset(chunk));
        written.map_err(|error| NotKept::Disk(disk("write", &self.path)(error)))?;
        let count = {
            let mut has = self.set();
            has.insert(chunk);
            has.count()
        };
        self.changes.send_replace(count);
        Ok(())
    }

    pub(super) fn read(&self, chunk: u32) -> Result<Vec<u8>, BlobError> {
        read_chunk(&self.file, &self.path, self.id, &self.manifest, chunk)
    }

    pub(super) fn flush(&self) -> Result<(), BlobError> {
        self.file.sync_all().map_err(disk("flush", &self.path))
    }

    fn set(&self) -> MutexGuard<'_, ChunkSet> {
        self.has.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads one chunk of a blob's file and checks it, so that a damaged disk is never taken for a lie.
pub(super) fn read_chunk(
    file: &File,
    path: &Path,
    id: BlobId,
    manifest: &Manifest,
    chunk: u32,
) -> Result<Vec<u8>, BlobError> {
    let damaged = |reason| BlobError::Damaged { blob: id, reason };
    let chunks = manifest.chunks();
    let chunk_bytes = manifest
        .chunk_bytes(chunk)
        .ok_or(damaged(ChunkError::OutOfRange { chunk, chunks }))?;
    let mut bytes = vec![0; chunk_bytes];
    read_at(file, &mut bytes, Manifest::chunk_offset(chunk)).map_err(disk("read", path))?;
    manifest.verify_chunk(chunk, &bytes).map_err(damaged)?;
    Ok(bytes)
}

#[cfg(unix)]
fn write_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(unix)]
fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

#[cfg(windows)]
fn write_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let written = std::os::windows::fs::FileExt::seek_write(file, bytes, offset)?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = bytes.get(written..).unwrap_or_default();
        offset += written as u64;
    }
    Ok(())
}

#[cfg(windows)]
fn read_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let read = std::os::windows::fs::FileExt::seek_read(file, bytes, offset)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes = bytes.get_mut(read..).unwrap_or_default();
        offset += read as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use polder_protocol::blob::CHUNK_BYTES;

    #[test]
    fn after_a_crash_the_whole_chunks_are_kept_and_the_others_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..3 * CHUNK_BYTES + 9).map(|index| (index / 1000) as u8).collect();
        let manifest = Arc::new(Manifest::of(&bytes));
        let path = folder.path().join("partial");
        let open = || Partial::open(manifest.id(), manifest.clone(), path.clone()).unwrap();
        let partial = open();
        partial.keep(1, &bytes[CHUNK_BYTES..2 * CHUNK_BYTES]).unwrap();
        partial.keep(3, &bytes[3 * CHUNK_BYTES..]).unwrap();
        // Half of chunk 2 had reached the disk.
        write_at(&partial.file, &bytes[2 * CHUNK_BYTES..][..500_000], 2 << 20).unwrap();
        drop(partial);
        assert_eq!(open().has().iter().collect::<Vec<_>>(), [1, 3]);
    }

    #[test]
    fn a_wrong_chunk_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let manifest = Arc::new(Manifest::of(b"polder"));
        let partial = Partial::open(manifest.id(), manifest, folder.path().join("partial")).unwrap();
        assert!(matches!(partial.keep(0, b"poldeR"), Err(NotKept::Wrong(_))));
        assert!(matches!(partial.keep(1, b"polder"), Err(NotKept::Wrong(_))));
        assert_eq!(partial.file.metadata().unwrap().len(), 0);
    }
}
