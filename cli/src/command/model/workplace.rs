//! A folder for files that are being made. It goes away when they are, when they cannot be, and when somebody ends the program.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;

use crate::interrupts::when_asked_to_end;

/// What a shell gives a program that Ctrl-C has ended.
const INTERRUPTED: i32 = 130;

/// How often things are taken away that are still being written.
const REMOVALS_MAX: u32 = 20;

/// A folder that goes away again.
pub(super) struct Workplace(pub(super) PathBuf);

impl Workplace {
    /// On the same disk as `path`, so that files can move.
    pub(super) fn beside(path: &Path) -> anyhow::Result<Self> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".work-{}", std::process::id()));
        let folder = path.with_file_name(name);
        let (interrupted, path) = (folder.clone(), path.to_owned());
        when_asked_to_end(move || {
            let mut clean = 0;
            // The thread that computes makes files until the process ends.
            for _ in 0..REMOVALS_MAX {
                let found = remove_partial(&path) | interrupted.exists();
                let _ = fs::remove_dir_all(&interrupted); // It is looked for again.
                clean = if found { 0 } else { clean + 1 };
                if clean == 2 {
                    break;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            std::process::exit(INTERRUPTED);
        })
        .context("cannot wait for signals")?;
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(Self(folder))
    }
}

/// Takes away what this process has written of `path` under the name that it has before it is whole. Answers whether there was
/// any.
fn remove_partial(path: &Path) -> bool {
    let mut found = false;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let partial = format!("{name}.partial-{}", std::process::id());
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    for entry in fs::read_dir(folder.unwrap_or(Path::new(".")))
        .into_iter()
        .flatten()
        .flatten()
    {
        if entry.file_name().to_string_lossy().starts_with(&partial) {
            found = true;
            // A folder or a file; what cannot be removed is found by its name.
            let _ = fs::remove_dir_all(entry.path()).or_else(|_| fs::remove_file(entry.path()));
        }
    }
    found
}

impl Drop for Workplace {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0); // What is left is only in the way.
    }
}
