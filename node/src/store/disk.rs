//! The index in sled, with a version and a checksum around every value, and its damage contained.
//!
//! sled 0.34 checks its pages, but some damage makes it panic where it should say so, and some it does not see. So its
//! panics are caught, and each value proves itself.

use std::fs;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use super::{KEY_BYTES_MAX, KeyValue, SCAN_MAX, Store, StoreError, VALUE_BYTES_MAX, check_length};

/// The form of a value: this byte, eight bytes of checksum, the value.
const VERSION: u8 = 1;
const CHECKSUM_BYTES: usize = 8;

/// A tree of its own for one mark, which every index has from its first moment. sled takes a file that it cannot read
/// at all for an empty one; without its mark it is not.
const MARKS: &[u8] = b"marks";
const BEGUN: &[u8] = b"begun";

/// A node's whole index is a few megabytes, and the memory belongs to models.
const CACHE_BYTES: u64 = 16 << 20;

/// What sled writes at once: its default.
const SEGMENT_BYTES: usize = 512 << 10;

/// An index in a folder of its own.
#[derive(Debug)]
pub struct DiskStore {
    database: sled::Db,
    path: PathBuf,
    damaged_values: AtomicU64,
}

/// An index that was opened.
#[derive(Debug)]
pub struct Opened {
    /// The index.
    pub store: DiskStore,
    /// The damaged index in whose place it was begun anew.
    pub set_aside: Option<SetAside>,
}

/// An index that could not be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetAside {
    /// Where it is now. It may be looked at or deleted; the next one set aside replaces it.
    pub path: PathBuf,
    /// What was wrong.
    pub reason: String,
}

/// What sled, or a panic of it, said.
enum Failure {
    InUse,
    Io(std::io::Error),
    Damaged(String),
}

impl DiskStore {
    /// Opens the index in the folder `path`, or begins one. A damaged one is set aside.
    ///
    /// It reads the whole index once, so call it where blocking is allowed.
    ///
    /// # Errors
    ///
    /// [`StoreError::InUse`] where another process has it open, [`StoreError::Disk`] where the disk does not let us.
    pub fn open(path: &Path) -> Result<Opened, StoreError> {
        let reason = match open_patiently(path) {
            Ok(database) => {
                return Ok(Opened {
                    store: Self::new(database, path),
                    set_aside: None,
                });
            }
            Err(Failure::Damaged(reason)) => reason,
            Err(failure) => return Err(named(failure, "open", path)),
        };
        // A write that found no room makes sled panic too, and what it meets is no damage.
        find_room(path).map_err(|source| StoreError::Disk {
            what: "write",
            path: path.to_path_buf(),
            source,
        })?;
        let aside = set_aside(path).map_err(|source| StoreError::Disk {
            what: "set aside",
            path: path.to_path_buf(),
            source,
        })?;
        tracing::warn!(path = %path.display(), aside = %aside.display(), reason, "a damaged index was set aside");
        let database = open_patiently(path).map_err(|failure| named(failure, "begin", path))?;
        Ok(Opened {
            store: Self::new(database, path),
            set_aside: Some(SetAside { path: aside, reason }),
        })
    }

    fn new(database: sled::Db, path: &Path) -> Self {
        Self {
            database,
            path: path.to_path_buf(),
            damaged_values: AtomicU64::new(0),
        }
    }

    /// Values that did not match their checksums since the index was opened. They are treated as absent.
    pub fn damaged_values(&self) -> u64 {
        self.damaged_values.load(Ordering::Relaxed)
    }

    fn guard<T>(&self, what: &'static str, work: impl FnOnce() -> sled::Result<T>) -> Result<T, StoreError> {
        caught(work).map_err(|failure| named(failure, what, &self.path))
    }

    /// The value inside `stored`, or `None` where it is damaged.
    fn value(&self, key: &[u8], stored: &[u8]) -> Option<Vec<u8>> {
        let value = unsealed(key, stored);
        if value.is_none() {
            self.damaged_values.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(path = %self.path.display(), "a damaged value of the index is treated as absent");
        }
        value
    }
}

/// sled's own threads let go of the lock a moment after its owner has dropped it.
fn open_patiently(path: &Path) -> Result<sled::Db, Failure> {
    for _ in 0..40 {
        match open_and_read(path) {
            Err(Failure::InUse) => std::thread::sleep(std::time::Duration::from_millis(50)),
            opened => return opened,
        }
    }
    open_and_read(path)
}

impl Store for DiskStore {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let stored = self.guard("read", || self.database.get(key))?;
        Ok(stored.and_then(|stored| self.value(key, &stored)))
    }

    fn put(&self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        check_length("key", key.len(), KEY_BYTES_MAX)?;
        check_length("value", value.len(), VALUE_BYTES_MAX)?;
        self.guard("write", || self.database.insert(key, sealed(key, value)).map(drop))
    }

    fn remove(&self, key: &[u8]) -> Result<(), StoreError> {
        self.guard("write", || self.database.remove(key).map(drop))
    }

    fn scan(&self, prefix: &[u8], limit: usize) -> Result<Vec<KeyValue>, StoreError> {
        let limit = limit.min(SCAN_MAX);
        let mut found = Vec::new();
        let mut entries = self.database.scan_prefix(prefix);
        while found.len() < limit {
            let Some((key, stored)) = self.guard("read", || entries.next().transpose())? else {
                break;
            };
            if let Some(value) = self.value(&key, &stored) {
                found.push((key.to_vec(), value));
            }
        }
        Ok(found)
    }

    fn flush(&self) -> Result<(), StoreError> {
        self.guard("flush", || self.database.flush().map(drop))
    }
}

/// Opens sled and reads every entry, since damage shows only where it is read.
fn open_and_read(path: &Path) -> Result<sled::Db, Failure> {
    let begun = fs::metadata(path.join("db")).is_ok_and(|file| file.len() > 0);
    let (database, marked) = caught(|| {
        let database = sled::Config::new()
            .path(path)
            .mode(sled::Mode::LowSpace)
            .cache_capacity(CACHE_BYTES)
            .open()?;
        for entry in database.iter() {
            entry?;
        }
        let marks = database.open_tree(MARKS)?;
        let marked = marks.get(BEGUN)?.is_some();
        if !begun {
            marks.insert(BEGUN, &[VERSION])?;
            marks.flush()?;
        }
        Ok((database, marked))
    })?;
    if begun && !marked {
        return Err(Failure::Damaged("its beginning is lost".into()));
    }
    Ok(database)
}

fn caught<T>(work: impl FnOnce() -> sled::Result<T>) -> Result<T, Failure> {
    // What sled leaves behind after a panic is not used again: every later call is caught as well.
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(sled::Error::Io(error))) => Err(failure_of(error)),
        Ok(Err(error)) => Err(Failure::Damaged(error.to_string())),
        Err(panic) => {
            let words = panic.downcast_ref::<String>().map(String::as_str);
            let words = words.or_else(|| panic.downcast_ref::<&str>().copied());
            Err(Failure::Damaged(words.unwrap_or("it made sled panic").to_owned()))
        }
    }
}

fn failure_of(error: std::io::Error) -> Failure {
    use ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
    let text = error.to_string();
    // sled has no error of its own for this; the text is that of its `Config::open_file`.
    if text.contains("could not acquire lock") {
        return Failure::InUse;
    }
    match error.kind() {
        // The file's contents, not the disk.
        InvalidData | InvalidInput | UnexpectedEof => Failure::Damaged(text),
        _ => Failure::Io(error),
    }
}

fn named(failure: Failure, what: &'static str, path: &Path) -> StoreError {
    let path = path.to_path_buf();
    match failure {
        Failure::InUse => StoreError::InUse { path },
        Failure::Io(source) => StoreError::Disk { what, path, source },
        Failure::Damaged(reason) => StoreError::Damaged { path, reason },
    }
}

/// Fails where the disk has no room for as much as sled writes at once.
fn find_room(path: &Path) -> std::io::Result<()> {
    let file = path.join("room");
    let written = fs::write(&file, vec![0; SEGMENT_BYTES]);
    // It is only in the way, and the next try writes it again.
    let _ = fs::remove_file(&file);
    match written {
        Err(error) if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => Err(error),
        _ => Ok(()),
    }
}

/// Renames the folder, and deletes those set aside before: one is enough to look at, and disks are finite.
fn set_aside(path: &Path) -> std::io::Result<PathBuf> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let prefix = format!("{name}.damaged-");
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    for sibling in fs::read_dir(folder)?.flatten() {
        if sibling.file_name().to_string_lossy().starts_with(&prefix) {
            // It is only in the way of the disk's space.
            let _ = fs::remove_dir_all(sibling.path());
        }
    }
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let aside = folder.join(format!("{prefix}{}", since.map_or(0, |since| since.as_secs())));
    fs::rename(path, &aside)?;
    Ok(aside)
}

fn checksum(key: &[u8], value: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&u64::try_from(key.len()).unwrap_or(u64::MAX).to_le_bytes());
    hasher.update(key);
    hasher.update(value);
    let mut checksum = [0; CHECKSUM_BYTES];
    hasher.finalize_xof().fill(&mut checksum);
    checksum
}

fn sealed(key: &[u8], value: &[u8]) -> Vec<u8> {
    [[VERSION].as_slice(), &checksum(key, value), value].concat()
}

fn unsealed(key: &[u8], stored: &[u8]) -> Option<Vec<u8>> {
    let (version, rest) = stored.split_first()?;
    let (theirs, value) = rest.split_first_chunk::<CHECKSUM_BYTES>()?;
    (*version == VERSION && *theirs == checksum(key, value)).then(|| value.to_vec())
}

#[cfg(test)]
impl DiskStore {
    /// Writes what no checksum covers.
    pub(super) fn put_raw(&self, key: &[u8], stored: &[u8]) {
        self.database.insert(key, stored).expect("written");
    }
}
