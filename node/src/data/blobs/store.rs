//! Blobs as plain files: what has a blob's name is whole.
//!
//! For a blob `3f…` the folder holds `3f….manifest` and one of `3f….blob` (the bytes), `3f….link` (where the bytes are,
//! for files that stay where they were) or `3f….partial` (the chunks that have come so far). Every file is written
//! under another name, flushed, and renamed, so a crash or a full disk leaves nothing that passes for whole.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::UNIX_EPOCH;

use polder_protocol::blob::{CHUNK_BYTES, CHUNKS_MAX, ChunkError, MANIFEST_BYTES_MAX, Manifest, ManifestError};
use polder_protocol::hash::{BlobId, digest};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::partial::Partial;

/// Manifests kept in memory. A node serves a few models of some dozen parts each; one manifest is 32 bytes per MiB.
const MANIFESTS_MAX: usize = 256;

/// The longest path in a link file.
const LINK_BYTES_MAX: u64 = 64 << 10;

/// Files that are being written. Never the name of a blob.
const NEW: &str = "new-";

/// What [`BlobStore::put_file`] does with the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Copies the bytes.
    Copy,
    /// Moves the file in; across file systems this is a copy and a removal.
    Move,
    /// Leaves it where it is. The blob is gone when the file changes.
    Reference,
}

/// Why the store could not do what was asked.
#[derive(Debug, Clone, Error)]
pub enum BlobError {
    /// The file system refuses: full, read-only, not allowed.
    #[error("cannot {action} {}: {reason}", path.display())]
    Disk {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// The kind, to tell a full disk from others.
        kind: io::ErrorKind,
        /// What the system says.
        reason: String,
    },
    /// The blob is not here, or not all of it.
    #[error("blob {} is not here", blob.short())]
    Missing {
        /// Which.
        blob: BlobId,
    },
    /// The bytes on disk are no longer those of the blob.
    #[error("blob {} is damaged on disk: {reason}", blob.short())]
    Damaged {
        /// Which.
        blob: BlobId,
        /// What is wrong.
        reason: ChunkError,
    },
    /// What should be a manifest is none, or that of another blob.
    #[error("blob {}: {reason}", blob.short())]
    Manifest {
        /// Which.
        blob: BlobId,
        /// What is wrong.
        reason: ManifestError,
    },
    /// Too large to be a blob.
    #[error("{} has {bytes} bytes, a blob at most {CHUNKS_MAX} chunks of {CHUNK_BYTES}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
}

/// The blobs of one node. Clones are the same store. Its calls block on the disk.
#[derive(Debug, Clone)]
pub struct BlobStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    folder: PathBuf,
    new_files: AtomicU64,
    // Held for writing while blobs are removed, so that none loses its manifest while its bytes are being named.
    removing: RwLock<()>,
    manifests: Mutex<BTreeMap<BlobId, Arc<Manifest>>>,
    partials: Mutex<BTreeMap<BlobId, Arc<Partial>>>,
}

/// A file that is a blob and stays where it was.
#[derive(Debug, Serialize, Deserialize)]
struct Link {
    path: String,
    bytes: u64,
    // A changed file is no longer the blob; a reader checks every chunk all the same.
    modified_nanos: u128,
}

impl BlobStore {
    /// Opens the store in `<home>/blobs`, making the folder where there is none.
    ///
    /// # Errors
    ///
    /// [`BlobError::Disk`] when the folder cannot be made or read.
    pub fn open(home: &Path) -> Result<Self, BlobError> {
        let folder = home.join("blobs");
        fs::create_dir_all(&folder).map_err(disk("make", &folder))?;
        // What an earlier process was writing when it ended.
        for entry in fs::read_dir(&folder).map_err(disk("read", &folder))?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(NEW) {
                fs::remove_file(entry.path()).ok();
            }
        }
        let inner = Inner {
            folder,
            new_files: AtomicU64::new(0),
            removing: RwLock::new(()),
            manifests: Mutex::default(),
            partials: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Keeps `bytes`. When it returns they are on disk.
    ///
    /// # Errors
    ///
    /// [`BlobError::Disk`]; nothing is kept then.
    pub fn put_bytes(&self, bytes: &[u8]) -> Result<BlobId, BlobError> {
        let manifest = Manifest::of(bytes);
        let id = manifest.id();
        let _nothing_goes = self.keeping();
        if !self.has(id) {
            self.keep_manifest(id, &manifest)?;
            self.write_whole(&self.blob_path(id), |file| file.write_all(bytes))?;
            self.flush_folder()?;
        }
        Ok(id)
    }

    /// Keeps a file's bytes. When it returns they are on disk.
    ///
    /// # Errors
    ///
    /// [`BlobError::Disk`] or [`BlobError::TooLarge`]; nothing is kept then, and the file is where it was.
    pub fn put_file(&self, path: &Path, keep: Keep) -> Result<BlobId, BlobError> {
        let _nothing_goes = self.keeping();
        let link = link_to(path)?;
        let mut source = File::open(path).map_err(disk("open", path))?;
        let manifest = match keep {
            Keep::Copy => return self.copy_in(path, &mut source),
            Keep::Move | Keep::Reference => read_manifest(path, &mut source, |_| Ok(()))?,
        };
        let id = manifest.id();
        if self.has(id) {
            if keep == Keep::Move {
                fs::remove_file(path).map_err(disk("remove", path))?;
            }
            return Ok(id);
        }
        self.keep_manifest(id, &manifest)?;
        if keep == Keep::Reference {
            // A struct of a string and two integers always encodes.
            let link = postcard::to_allocvec(&link).unwrap_or_default();
            self.write_whole(&self.link_path(id), |file| file.write_all(&link))?;
            self.flush_folder()?;
            return Ok(id);
        }
        source.sync_all().map_err(disk("flush", path))?;
        match fs::rename(path, self.blob_path(id)) {
            Ok(()) => self.flush_folder()?,
            Err(_) => {
                let id = self.copy_in(path, &mut File::open(path).map_err(disk("open", path))?)?;
                fs::remove_file(path).map_err(disk("remove", path))?;
                return Ok(id);
            }
        }
        Ok(id)
    }

    /// Whether all of it is here.
    pub fn has(&self, id: BlobId) -> bool {
        self.path(id).is_some()
    }

    /// The file that holds the blob, all of it.
    pub fn path(&self, id: BlobId) -> Option<PathBuf> {
        let path = self.blob_path(id);
        if path.is_file() {
            return Some(path);
        }
        let mut bytes = Vec::new();
        let link = File::open(self.link_path(id)).ok()?;
        link.take(LINK_BYTES_MAX).read_to_end(&mut bytes).ok()?;
        let link: Link = postcard::from_bytes(&bytes).ok()?;
        let path = PathBuf::from(&link.path);
        let now = link_to(&path).ok()?;
        (now.bytes == link.bytes && now.modified_nanos == link.modified_nanos).then_some(path)
    }

    /// The blob's manifest, also while the blob is still being fetched.
    ///
    /// # Errors
    ///
    /// [`BlobError::Missing`] where there is none, [`BlobError::Manifest`] where it is damaged.
    pub fn manifest(&self, id: BlobId) -> Result<Arc<Manifest>, BlobError> {
        if let Some(manifest) = self.manifests().get(&id) {
            return Ok(manifest.clone());
        }
        let path = self.manifest_path(id);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(BlobError::Missing { blob: id }),
            Err(error) => return Err(disk("open", &path)(error)),
        };
        let mut bytes = Vec::new();
        let limit = MANIFEST_BYTES_MAX as u64 + 1;
        file.take(limit).read_to_end(&mut bytes).map_err(disk("read", &path))?;
        let manifest =
            Manifest::from_bytes_of(id, &bytes).map_err(|reason| BlobError::Manifest { blob: id, reason })?;
        Ok(self.remember(id, manifest))
    }

    /// All bytes of the blob, each chunk checked. The caller knows how large it may be.
    ///
    /// # Errors
    ///
    /// [`BlobError`] when it is not all here, damaged, or cannot be read.
    pub fn read(&self, id: BlobId) -> Result<Vec<u8>, BlobError> {
        let path = self.path(id).ok_or(BlobError::Missing { blob: id })?;
        let manifest = self.manifest(id)?;
        let bytes = fs::read(&path).map_err(disk("read", &path))?;
        let damaged = |reason| BlobError::Damaged { blob: id, reason };
        if bytes.len() as u64 != manifest.bytes {
            return Err(damaged(ChunkError::Length {
                chunk: manifest.chunks().saturating_sub(1),
                expected: usize::try_from(manifest.bytes).unwrap_or(usize::MAX),
                found: bytes.len(),
            }));
        }
        for (chunk, part) in (0..).zip(bytes.chunks(CHUNK_BYTES)) {
            manifest.verify_chunk(chunk, part).map_err(damaged)?;
        }
        Ok(bytes)
    }

    /// Forgets the blob. A referenced file stays where it is.
    ///
    /// # Errors
    ///
    /// [`BlobError::Disk`] when a file cannot be removed.
    pub fn remove(&self, id: BlobId) -> Result<(), BlobError> {
        let _nothing_comes = self.inner.removing.write().unwrap_or_else(PoisonError::into_inner);
        self.remove_files(id)
    }

    /// Every blob of which anything is here.
    ///
    /// # Errors
    ///
    /// [`BlobError::Disk`] when the folder cannot be read.
    pub fn list(&self) -> Result<BTreeSet<BlobId>, BlobError> {
        let folder = &self.inner.folder;
        let entries = fs::read_dir(folder).map_err(disk("read", folder))?;
        let id = |entry: fs::DirEntry| entry.file_name().to_str()?.split('.').next()?.parse().ok();
        Ok(entries.flatten().filter_map(id).collect())
    }

    /// Removes every blob that is not in `keep` and is not being fetched. Returns the bytes that were freed.
    ///
    /// # Errors
    ///
    /// [`BlobError::Disk`] when a file cannot be removed.
    pub fn retain(&self, keep: &BTreeSet<BlobId>) -> Result<u64, BlobError> {
        let _nothing_comes = self.inner.removing.write().unwrap_or_else(PoisonError::into_inner);
        let mut freed = 0;
        for id in self.list()? {
            if keep.contains(&id) || self.partials().contains_key(&id) {
                continue;
            }
            let own = [self.blob_path(id), self.partial_path(id)];
            freed += own
                .iter()
                .filter_map(|path| fs::metadata(path).ok())
                .map(|file| file.len())
                .sum::<u64>();
            self.remove_files(id)?;
        }
        Ok(freed)
    }

    /// One checked chunk, of a whole blob or of one that is being fetched.
    pub(super) fn chunk(&self, id: BlobId, chunk: u32) -> Result<Vec<u8>, BlobError> {
        if let Some(partial) = self.partial(id) {
            if !partial.has().contains(chunk) {
                return Err(BlobError::Missing { blob: id });
            }
            return partial.read(chunk);
        }
        let path = self.path(id).ok_or(BlobError::Missing { blob: id })?;
        let manifest = self.manifest(id)?;
        let file = File::open(&path).map_err(disk("open", &path))?;
        super::partial::read_chunk(&file, &path, id, &manifest, chunk)
    }

    /// The fetch of a blob that is under way.
    pub(super) fn partial(&self, id: BlobId) -> Option<Arc<Partial>> {
        self.partials().get(&id).cloned()
    }

    /// Begins or resumes a fetch: checks what an earlier one left.
    pub(super) fn begin(&self, id: BlobId, manifest: &Manifest) -> Result<Arc<Partial>, BlobError> {
        let _nothing_goes = self.keeping();
        self.keep_manifest(id, manifest)?;
        let manifest = self.remember(id, manifest.clone());
        let partial = Arc::new(Partial::open(id, manifest, self.partial_path(id))?);
        self.partials().insert(id, partial.clone());
        Ok(partial)
    }

    /// Makes a fetched blob whole: flushed first, named last.
    pub(super) fn complete(&self, partial: &Partial) -> Result<PathBuf, BlobError> {
        let path = self.blob_path(partial.id());
        partial.flush()?;
        fs::rename(self.partial_path(partial.id()), &path).map_err(disk("rename", &path))?;
        self.flush_folder()?;
        self.partials().remove(&partial.id());
        Ok(path)
    }

    /// Ends a fetch that did not get everything. What came stays for the next.
    pub(super) fn suspend(&self, partial: &Arc<Partial>) {
        let mut partials = self.partials();
        // A later fetch of the same blob may have begun already.
        if partials
            .get(&partial.id())
            .is_some_and(|other| Arc::ptr_eq(other, partial))
        {
            partials.remove(&partial.id());
        }
    }

    fn remove_files(&self, id: BlobId) -> Result<(), BlobError> {
        // The manifest last: without it the rest is not found again.
        for path in [
            self.blob_path(id),
            self.link_path(id),
            self.partial_path(id),
            self.manifest_path(id),
        ] {
            match fs::remove_file(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(disk("remove", &path)(error)),
            }
        }
        self.manifests().remove(&id);
        Ok(())
    }

    fn copy_in(&self, path: &Path, source: &mut File) -> Result<BlobId, BlobError> {
        let new = self.new_path();
        let copied = (|| {
            let mut file = File::create(&new).map_err(disk("make", &new))?;
            let manifest = read_manifest(path, source, |chunk| file.write_all(chunk).map_err(disk("write", &new)))?;
            file.sync_all().map_err(disk("flush", &new))?;
            let id = manifest.id();
            self.keep_manifest(id, &manifest)?;
            let blob = self.blob_path(id);
            fs::rename(&new, &blob).map_err(disk("rename", &blob))?;
            self.flush_folder()?;
            Ok(id)
        })();
        if copied.is_err() {
            fs::remove_file(&new).ok();
        }
        copied
    }

    fn keep_manifest(&self, id: BlobId, manifest: &Manifest) -> Result<(), BlobError> {
        let path = self.manifest_path(id);
        let bytes = manifest.to_bytes();
        // One that is there but damaged is written anew.
        let there = fs::read(&path).is_ok_and(|there| digest(&there).0 == id.0);
        match there {
            true => Ok(()),
            false => self.write_whole(&path, |file| file.write_all(&bytes)),
        }
    }

    fn remember(&self, id: BlobId, manifest: Manifest) -> Arc<Manifest> {
        let manifest = Arc::new(manifest);
        let mut manifests = self.manifests();
        if manifests.len() >= MANIFESTS_MAX {
            manifests.pop_first(); // Ids are hashes, so the first is any.
        }
        manifests.insert(id, manifest.clone());
        manifest
    }

    /// Writes a file under another name, flushes it, and gives it its name. The caller flushes the folder.
    fn write_whole(&self, path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), BlobError> {
        let new = self.new_path();
        let written = (|| {
            let mut file = File::create(&new).map_err(disk("make", &new))?;
            write(&mut file).map_err(disk("write", &new))?;
            file.sync_all().map_err(disk("flush", &new))?;
            fs::rename(&new, path).map_err(disk("rename", path))
        })();
        if written.is_err() {
            fs::remove_file(&new).ok();
        }
        written
    }

    /// Makes renames survive a power cut.
    fn flush_folder(&self) -> Result<(), BlobError> {
        let folder = &self.inner.folder;
        // Windows cannot open a folder, and needs no flush for a rename.
        if cfg!(unix) {
            File::open(folder)
                .and_then(|folder| folder.sync_all())
                .map_err(disk("flush", folder))?;
        }
        Ok(())
    }

    fn new_path(&self) -> PathBuf {
        let number = self.inner.new_files.fetch_add(1, Ordering::Relaxed);
        self.inner.folder.join(format!("{NEW}{number}"))
    }

    fn blob_path(&self, id: BlobId) -> PathBuf {
        self.inner.folder.join(format!("{id}.blob"))
    }

    fn link_path(&self, id: BlobId) -> PathBuf {
        self.inner.folder.join(format!("{id}.link"))
    }

    fn partial_path(&self, id: BlobId) -> PathBuf {
        self.inner.folder.join(format!("{id}.partial"))
    }

    fn manifest_path(&self, id: BlobId) -> PathBuf {
        self.inner.folder.join(format!("{id}.manifest"))
    }

    fn keeping(&self) -> RwLockReadGuard<'_, ()> {
        self.inner.removing.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn manifests(&self) -> MutexGuard<'_, BTreeMap<BlobId, Arc<Manifest>>> {
        self.inner.manifests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn partials(&self) -> MutexGuard<'_, BTreeMap<BlobId, Arc<Partial>>> {
        self.inner.partials.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Names what was tried with which file.
pub(super) fn disk(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BlobError {
    let path = path.to_owned();
    move |error| BlobError::Disk {
        action,
        path,
        kind: error.kind(),
        reason: error.to_string(),
    }
}

/// Hashes a file chunk by chunk, showing each chunk to `each`.
fn read_manifest(
    path: &Path,
    source: &mut File,
    mut each: impl FnMut(&[u8]) -> Result<(), BlobError>,
) -> Result<Manifest, BlobError> {
    let mut manifest = Manifest {
        bytes: 0,
        chunk_hashes: Vec::new(),
    };
    let mut chunk = Vec::with_capacity(CHUNK_BYTES);
    loop {
        chunk.clear();
        let limit = CHUNK_BYTES as u64;
        let read = Read::by_ref(source)
            .take(limit)
            .read_to_end(&mut chunk)
            .map_err(disk("read", path))?;
        if read == 0 {
            return Ok(manifest);
        }
        manifest.bytes += read as u64;
        if manifest.chunks() == CHUNKS_MAX {
            return Err(BlobError::TooLarge {
                path: path.to_owned(),
                bytes: manifest.bytes,
            });
        }
        manifest.chunk_hashes.push(digest(&chunk));
        each(&chunk)?;
    }
}

fn link_to(path: &Path) -> Result<Link, BlobError> {
    let real = fs::canonicalize(path).map_err(disk("find", path))?;
    let file = fs::metadata(&real).map_err(disk("read", path))?;
    if !file.is_file() {
        return Err(disk("keep", path)(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a file",
        )));
    }
    let modified = file.modified().map_err(disk("read", path))?;
    let text = real
        .to_str()
        .ok_or(io::Error::new(io::ErrorKind::InvalidInput, "the path is not UTF-8"));
    Ok(Link {
        path: text.map_err(disk("keep", path))?.to_owned(),
        bytes: file.len(),
        modified_nanos: modified.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_as_they_were_put() {
        let home = tempfile::tempdir().unwrap();
        let store = BlobStore::open(home.path()).unwrap();
        let bytes = vec![3; 2 * CHUNK_BYTES + 1];
        let id = store.put_bytes(&bytes).unwrap();
        assert_eq!(store.put_bytes(&bytes).unwrap(), id);
        assert_eq!(BlobStore::open(home.path()).unwrap().read(id).unwrap(), bytes);
        assert_eq!(store.chunk(id, 2).unwrap(), [3]);
        assert!(matches!(store.chunk(id, 3), Err(BlobError::Damaged { .. })));
    }

    #[test]
    fn a_file_is_copied_moved_or_left_where_it_is() {
        let home = tempfile::tempdir().unwrap();
        let store = BlobStore::open(home.path()).unwrap();
        for (keep, text) in [
            (Keep::Copy, "copy"),
            (Keep::Move, "move"),
            (Keep::Reference, "reference"),
        ] {
            let path = home.path().join(text);
            fs::write(&path, text).unwrap();
            let id = store.put_file(&path, keep).unwrap();
            assert_eq!(store.read(id).unwrap(), text.as_bytes());
            assert_eq!(path.exists(), keep != Keep::Move);
            assert_eq!(id, polder_protocol::blob::blob_id(text.as_bytes()));
        }
    }

    #[test]
    fn a_referenced_file_that_changes_is_no_longer_the_blob() {
        let home = tempfile::tempdir().unwrap();
        let store = BlobStore::open(home.path()).unwrap();
        let path = home.path().join("weights");
        fs::write(&path, "before").unwrap();
        let id = store.put_file(&path, Keep::Reference).unwrap();
        fs::write(&path, "afterwards").unwrap();
        assert!(!store.has(id));
        assert!(matches!(store.read(id), Err(BlobError::Missing { .. })));
        store.remove(id).unwrap();
        assert!(path.exists());
    }

    #[test]
    fn a_bit_that_flips_on_disk_is_found() {
        let home = tempfile::tempdir().unwrap();
        let store = BlobStore::open(home.path()).unwrap();
        let id = store.put_bytes(b"polder").unwrap();
        fs::write(store.path(id).unwrap(), b"poldeR").unwrap();
        assert!(matches!(store.read(id), Err(BlobError::Damaged { .. })));
        assert!(matches!(store.chunk(id, 0), Err(BlobError::Damaged { .. })));
    }

    #[test]
    fn what_is_not_kept_is_removed_and_the_rest_stays() {
        let home = tempfile::tempdir().unwrap();
        let store = BlobStore::open(home.path()).unwrap();
        let kept = store.put_bytes(b"kept").unwrap();
        let gone = store.put_bytes(b"gone!").unwrap();
        assert_eq!(store.retain(&BTreeSet::from([kept])).unwrap(), 5);
        assert!(store.has(kept) && !store.has(gone));
        assert_eq!(store.list().unwrap(), BTreeSet::from([kept]));
    }

    #[test]
    fn a_file_that_was_being_written_when_the_process_ended_is_removed() {
        let home = tempfile::tempdir().unwrap();
        let store = BlobStore::open(home.path()).unwrap();
        let half = store.new_path();
        fs::write(&half, "half").unwrap();
        BlobStore::open(home.path()).unwrap();
        assert!(!half.exists());
    }
}
