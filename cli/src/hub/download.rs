//! One file onto the disk: resumed where it broke off, and nothing under its name before its hash is right.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use aws_lc_rs::digest;

use super::client::{FileHash, Refusal};
use super::{Facts, Hub, Place};
use crate::failure::{Hint as _, hinted};

/// Attempts in a row that bring nothing; then the hub or the way to it is down.
const ATTEMPTS_MAX: u32 = 5;
/// Before the second attempt; doubled before each further one.
const PAUSE: Duration = Duration::from_millis(500);

/// Fetches a file to `to`. What a former attempt left in `to` with `.part` behind its name is gone on from.
/// `on_bytes` hears of each piece, and of what was here already.
///
/// # Errors
///
/// What cannot be read or written, and content of another hash, which is removed.
pub(crate) fn fetch(
    hub: &Hub,
    place: &Place,
    commit: &str,
    facts: &Facts,
    to: &Path,
    on_bytes: &mut dyn FnMut(i64),
) -> anyhow::Result<()> {
    if fs::metadata(to).is_ok_and(|found| found.len() == facts.bytes) {
        on_bytes(facts.bytes as i64);
        return Ok(()); // It got its name when its hash was right.
    }
    let mut name = to.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    let part = to.with_file_name(name);
    let mut partial = Partial::open(&part, facts)?;
    on_bytes(partial.bytes as i64);
    let mut failures = 0;
    while partial.bytes < facts.bytes {
        let before = partial.bytes;
        let reason = match partial.go_on(hub, place, commit, facts, on_bytes) {
            Ok(()) => continue,
            Err(Stopped::Final(error)) => return Err(error).with_context(|| format!("cannot fetch {}", facts.file)),
            Err(Stopped::Broken(reason)) => reason,
        };
        failures = if partial.bytes > before { 1 } else { failures + 1 };
        if failures >= ATTEMPTS_MAX {
            partial.file.sync_all().ok();
            return Err(hinted(
                anyhow!(
                    "{} broke off at {} of {} bytes: {reason}",
                    facts.file,
                    partial.bytes,
                    facts.bytes
                ),
                "run the same command again: it goes on where it stopped",
            ));
        }
        thread::sleep(PAUSE * 2u32.pow(failures - 1));
    }
    if !partial.is_right(facts) {
        drop(partial);
        fs::remove_file(&part).with_context(|| format!("cannot remove {}", part.display()))?;
        return Err(hinted(
            anyhow!("{} has another hash than the hub says", facts.file),
            "it was removed; run the same command again, and trust nothing between here and the hub if it stays so",
        ));
    }
    partial
        .file
        .sync_all()
        .with_context(|| format!("cannot write {}", part.display()))?;
    fs::rename(&part, to).with_context(|| format!("cannot make {}", to.display()))
}

/// What is here of a file, and the hash of it.
struct Partial {
    file: File,
    bytes: u64,
    hash: digest::Context,
}

/// Why a request did not bring the rest.
enum Stopped {
    Broken(String),
    Final(anyhow::Error),
}

impl Partial {
    fn open(path: &Path, facts: &Facts) -> anyhow::Result<Self> {
        let what = || format!("cannot write {}", path.display());
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .with_context(what)?;
        // Two processes that append to one file would only spoil it.
        if file.try_lock().is_err() {
            return Err(anyhow!("{} is being fetched by another process", facts.file))
                .hint("wait until that one is done");
        }
        if file.metadata().with_context(what)?.len() > facts.bytes {
            file.set_len(0).with_context(what)?;
        }
        let mut hash = facts.hash.begin(facts.bytes);
        let mut piece = vec![0; 1 << 20];
        let mut bytes = 0;
        loop {
            match file.read(&mut piece).with_context(what)? {
                0 => break,
                read => {
                    hash.update(piece.get(..read).unwrap_or_default());
                    bytes += read as u64;
                }
            }
        }
        Ok(Self { file, bytes, hash })
    }

    /// One request for the rest.
    fn go_on(
        &mut self,
        hub: &Hub,
        place: &Place,
        commit: &str,
        facts: &Facts,
        on_bytes: &mut dyn FnMut(i64),
    ) -> Result<(), Stopped> {
        let disk = |error: io::Error| Stopped::Final(anyhow!(error).context("cannot write to the disk"));
        let mut answer = match hub.bytes(place, commit, &facts.file, self.bytes) {
            Ok(answer) => answer,
            Err(Refusal::Broken(reason)) => return Err(Stopped::Broken(reason)),
            Err(Refusal::Final(error)) => return Err(Stopped::Final(error)),
            Err(Refusal::Beyond) => {
                self.begin_anew(facts, on_bytes).map_err(disk)?;
                return Err(Stopped::Broken("the hub has less of it than is here".to_owned()));
            }
        };
        if answer.from == 0 && self.bytes > 0 {
            self.begin_anew(facts, on_bytes).map_err(disk)?; // The server knows no ranges.
        }
        if answer.from != self.bytes {
            return Err(Stopped::Broken("another part came than was asked for".to_owned()));
        }
        let mut piece = vec![0; 256 << 10];
        while self.bytes < facts.bytes {
            let read = answer
                .reader
                .read(&mut piece)
                .map_err(|error| Stopped::Broken(error.to_string()))?;
            let room = usize::try_from(facts.bytes - self.bytes).unwrap_or(usize::MAX);
            let piece = piece.get(..read.min(room)).unwrap_or_default();
            if piece.is_empty() {
                return Err(Stopped::Broken("the connection ended".to_owned()));
            }
            self.file.write_all(piece).map_err(disk)?;
            self.hash.update(piece);
            self.bytes += piece.len() as u64;
            on_bytes(piece.len() as i64);
        }
        Ok(())
    }

    fn begin_anew(&mut self, facts: &Facts, on_bytes: &mut dyn FnMut(i64)) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.hash = facts.hash.begin(facts.bytes);
        on_bytes(-(self.bytes as i64));
        self.bytes = 0;
        Ok(())
    }

    fn is_right(&self, facts: &Facts) -> bool {
        let (FileHash::Sha256(expected) | FileHash::GitBlob(expected)) = &facts.hash;
        let found = self.hash.clone().finish();
        let digits: String = found.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        digits == *expected
    }
}

impl FileHash {
    /// A hash of a file of so many bytes, of which none is in yet.
    fn begin(&self, bytes: u64) -> digest::Context {
        match self {
            Self::Sha256(_) => digest::Context::new(&digest::SHA256),
            Self::GitBlob(_) => {
                let mut hash = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
                hash.update(format!("blob {bytes}\0").as_bytes());
                hash
            }
        }
    }
}
