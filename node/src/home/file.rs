//! Files that are written whole or not at all, and files that only their owner may read.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::HomeError;

/// Who may read a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Its owner alone.
    Owner,
    /// Whoever the process's mask lets.
    Anyone,
}

/// Replaces a file by `bytes`, or leaves it as it was: a temporary file beside it is flushed and renamed, and the
/// folder flushed.
///
/// # Errors
///
/// [`HomeError::File`], which names the file.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), HomeError> {
    write_whole_as(path, bytes, Access::Anyone)
}

/// As [`write_whole`], for a file that its owner alone may read.
///
/// # Errors
///
/// [`HomeError::File`], which names the file.
pub fn write_secret(path: &Path, bytes: &[u8]) -> Result<(), HomeError> {
    write_whole_as(path, bytes, Access::Owner)
}

pub(super) fn write_whole_as(path: &Path, bytes: &[u8], access: Access) -> Result<(), HomeError> {
    // Two threads that write one file must not share a temporary one.
    static WRITES: AtomicU64 = AtomicU64::new(0);
    let number = WRITES.fetch_add(1, Ordering::Relaxed);
    let folder = folder_of(path);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = folder.join(format!(".{name}.{}.{number}.new", std::process::id()));
    let written = write_new(&temporary, bytes, access)
        .and_then(|()| fs::rename(&temporary, path))
        .and_then(|()| flush_folder(folder));
    written.map_err(|source| {
        // It is only in the way; where it cannot be removed, it is found by its name.
        let _ = fs::remove_file(&temporary);
        HomeError::File {
            what: "write",
            path: path.to_path_buf(),
            source,
        }
    })
}

/// The folder of a path as a person types it: a bare name is in the folder at hand, which the empty path is not.
fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn write_new(path: &Path, bytes: &[u8], access: Access) -> io::Result<()> {
    let mut file = options(access).create(true).truncate(true).write(true).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Options that make new files with the access asked for.
pub(super) fn options(access: Access) -> OpenOptions {
    let mut options = OpenOptions::new();
    #[cfg(unix)]
    if access == Access::Owner {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(0o600);
    }
    #[cfg(not(unix))]
    let _ = access;
    options
}

/// A rename is durable once the folder is. Windows has no such call and needs none.
fn flush_folder(folder: &Path) -> io::Result<()> {
    #[cfg(unix)]
    File::open(folder)?.sync_all()?;
    #[cfg(not(unix))]
    let _ = folder;
    Ok(())
}

/// Makes a folder, and those above it; a new one is for its owner alone.
pub(super) fn make_folder(path: &Path) -> Result<(), HomeError> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::DirBuilderExt;
        builder.mode(0o700);
    }
    builder.create(path).map_err(|source| HomeError::File {
        what: "make the folder",
        path: path.to_path_buf(),
        source,
    })
}

/// Reads a secret text; `None` where there is none. A file that others may read is closed to them first.
pub(super) fn read_secret(path: &Path) -> Result<Option<String>, HomeError> {
    let failed = |what| {
        move |source| HomeError::File {
            what,
            path: path.to_path_buf(),
            source,
        }
    };
    match fs::metadata(path) {
        Ok(metadata) => close_to_others(path, &metadata).map_err(failed("take from others the right to read"))?,
        Err(error) if is_absent(&error) => return Ok(None),
        Err(error) => return Err(failed("read")(error)),
    }
    fs::read_to_string(path).map(Some).map_err(failed("read"))
}

#[cfg(unix)]
fn close_to_others(path: &Path, metadata: &fs::Metadata) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        tracing::warn!(path = %path.display(), mode = format!("{mode:o}"), "others could read this secret: closing it");
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    }
    Ok(())
}

#[cfg(not(unix))]
fn close_to_others(_path: &Path, _metadata: &fs::Metadata) -> io::Result<()> {
    Ok(())
}

pub(super) fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_written_file_leaves_nothing_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("charter");
        write_whole(&path, b"one").unwrap();
        write_whole(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_bare_name_is_in_the_folder_at_hand() {
        assert_eq!(folder_of(Path::new("next.charter")), Path::new("."));
        assert_eq!(folder_of(Path::new("there/next.charter")), Path::new("there"));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_leaves_the_old_file_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let disk = match TinyDisk::mount(folder.path()) {
            Ok(disk) => disk,
            Err(reason) => return eprintln!("skipped: cannot mount a tiny disk: {reason}"),
        };
        let path = disk.0.join("charter");
        write_whole(&path, b"old").unwrap();
        let error = write_whole(&path, &vec![7; 1 << 20]).unwrap_err();
        assert!(error.to_string().contains("charter"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(&disk.0).unwrap().count(), 1);
    }

    #[cfg(target_os = "linux")]
    struct TinyDisk(std::path::PathBuf);

    #[cfg(target_os = "linux")]
    impl TinyDisk {
        fn mount(folder: &Path) -> Result<Self, String> {
            let mount = Command::new("mount")
                .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"])
                .arg(folder)
                .output();
            match mount {
                Ok(output) if output.status.success() => Ok(Self(folder.to_path_buf())),
                Ok(output) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
                Err(error) => Err(error.to_string()),
            }
        }
    }

    #[cfg(target_os = "linux")]
    impl Drop for TinyDisk {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(&self.0).status();
        }
    }
}
