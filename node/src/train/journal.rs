//! What a node must find again of one run: records appended to one file, each durable before anything follows from it.
//!
//! A record is a length (u32, little-endian), the first 8 bytes of its BLAKE3 hash and postcard bytes. A crash may tear
//! the last one; it is cut off at the next start and reported. Each start writes the file anew with what still counts,
//! so it grows with the rounds of one life of the daemon and with the run's log.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use polder_protocol::hash::{NodeId, digest};
use polder_protocol::log::ENTRY_BYTES_MAX;
use polder_protocol::node::{Persist, RestoredRun};

use super::durable;

/// Bytes before each record: length and check.
const FRONT_BYTES: usize = 12;
/// A record holds at most an entry and its wrapping.
const RECORD_BYTES_MAX: usize = ENTRY_BYTES_MAX + (64 << 10);

/// The open journal of one run.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    /// The length up to which everything is whole.
    good_bytes: u64,
}

/// What a journal held.
#[derive(Debug, Default)]
pub(super) struct Recovered {
    /// What it said.
    pub(super) run: RestoredRun,
    /// Bytes at its end that were no whole record, and are gone.
    pub(super) torn_bytes: u64,
}

impl Journal {
    /// Opens the journal at `path`, or begins one.
    pub(super) fn open(path: &Path) -> io::Result<(Self, Recovered)> {
        Self::open_with(path, usize::MAX)
    }

    /// Opens the journal at `path` and forgets all but the first entries of its log.
    pub(super) fn open_with(path: &Path, entries_max: usize) -> io::Result<(Self, Recovered)> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        let mut recovered = read(&bytes);
        recovered.run.entries.truncate(entries_max);
        let whole = records(&recovered.run);
        durable::write_with(path, |file| {
            for record in &whole {
                file.write_all(&frame(record)?)?;
            }
            Ok(())
        })?;
        let file = OpenOptions::new().append(true).open(path)?;
        let good_bytes = file.metadata()?.len();
        Ok((Self { file, good_bytes }, recovered))
    }

    /// Appends a record. It is durable when this returns.
    pub(super) fn append(&mut self, record: &Persist) -> io::Result<()> {
        let bytes = frame(record)?;
        let appended = self.file.write_all(&bytes).and_then(|()| self.file.sync_data());
        if let Err(error) = appended {
            // Half a record would hide those after it.
            self.file.set_len(self.good_bytes)?;
            return Err(error);
        }
        self.good_bytes += bytes.len() as u64;
        Ok(())
    }
}

fn read(bytes: &[u8]) -> Recovered {
    let mut recovered = Recovered::default();
    let mut rest = bytes;
    while let Some((record, after)) = split_record(rest) {
        fold(&mut recovered.run, record);
        rest = after;
    }
    recovered.torn_bytes = rest.len() as u64;
    recovered
}

/// A journal, and a single record without its check, which no chance would hit; as fuzz targets see them.
pub(crate) fn untrusted_journal(bytes: &[u8]) {
    let rewritten = |run: &RestoredRun| -> Vec<u8> {
        let whole = records(run);
        whole.iter().filter_map(|record| frame(record).ok()).flatten().collect()
    };
    let mut run = read(bytes).run;
    if let Ok(record) = postcard::from_bytes(bytes) {
        fold(&mut run, record);
    }
    let once = rewritten(&run);
    assert_eq!(
        rewritten(&read(&once).run),
        once,
        "a journal that is rewritten says the same"
    );
}

/// Where its fuzzing begins.
pub(crate) fn honest_journal() -> Vec<u8> {
    let run = RestoredRun {
        steward: NodeId([7; 32]),
        joining: Some(Default::default()),
        ..RestoredRun::default()
    };
    records(&run)
        .iter()
        .filter_map(|record| frame(record).ok())
        .flatten()
        .collect()
}

fn frame(record: &Persist) -> io::Result<Vec<u8>> {
    let body = postcard::to_allocvec(record).map_err(io::Error::other)?;
    if body.len() > RECORD_BYTES_MAX {
        return Err(io::Error::other(format!(
            "a record of {} bytes is too long",
            body.len()
        )));
    }
    let len = u32::try_from(body.len()).map_err(io::Error::other)?;
    let [a, b, c, d, e, f, g, h, ..] = digest(&body).0;
    let mut bytes = Vec::with_capacity(FRONT_BYTES + body.len());
    bytes.extend_from_slice(&len.to_le_bytes());
    bytes.extend_from_slice(&[a, b, c, d, e, f, g, h]);
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

fn split_record(bytes: &[u8]) -> Option<(Persist, &[u8])> {
    let (len, rest) = bytes.split_first_chunk::<4>()?;
    let (check, rest) = rest.split_first_chunk::<8>()?;
    let len = usize::try_from(u32::from_le_bytes(*len)).ok()?;
    let (body, rest) = rest.split_at_checked(len)?;
    if !digest(body).0.starts_with(check) {
        return None;
    }
    Some((postcard::from_bytes(body).ok()?, rest))
}

fn fold(run: &mut RestoredRun, record: Persist) {
    match record {
        Persist::Follow { steward } => run.steward = steward,
        Persist::Entry(entry) => run.entries.push(entry),
        Persist::Commit(commit) => {
            let key = |c: &polder_protocol::round::SignedCommit| (c.commit.round, c.commit.replica, c.commit.node);
            run.commits.retain(|kept| key(kept) != key(&commit));
            run.commits.push(commit);
        }
        Persist::DropCommits { before } => run.commits.retain(|kept| kept.commit.round >= before),
        Persist::State { round, parts } => run.state = Some((round, parts)),
        Persist::Joining(joining) => run.joining = joining,
    }
}

fn records(run: &RestoredRun) -> Vec<Persist> {
    let follow = (run.steward != NodeId::default()).then_some(Persist::Follow { steward: run.steward });
    let entries = run.entries.iter().cloned().map(Persist::Entry);
    let commits = run.commits.iter().cloned().map(Persist::Commit);
    let state = run
        .state
        .iter()
        .cloned()
        .map(|(round, parts)| Persist::State { round, parts });
    let joining = run
        .joining
        .iter()
        .cloned()
        .map(|joining| Persist::Joining(Some(joining)));
    follow
        .into_iter()
        .chain(entries)
        .chain(commits)
        .chain(state)
        .chain(joining)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use polder_protocol::hash::BlobId;
    use polder_protocol::layout::Part;
    use polder_protocol::log::Round;
    use polder_protocol::node::Joining;

    fn state(round: u64) -> Persist {
        Persist::State {
            round: Round(round),
            parts: vec![(Part(0), BlobId([7; 32]))],
        }
    }

    #[test]
    fn what_was_appended_is_found_after_a_crash_and_a_torn_tail_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let (mut journal, _) = Journal::open(&path).unwrap();
        journal.append(&state(1)).unwrap();
        journal.append(&Persist::Joining(Some(Joining::default()))).unwrap();
        journal.append(&state(2)).unwrap();
        drop(journal);
        let whole = fs::read(&path).unwrap();
        for cut in 1..20 {
            fs::write(&path, &whole[..whole.len() - cut]).unwrap();
            let (mut journal, recovered) = Journal::open(&path).unwrap();
            assert!(recovered.torn_bytes > 0);
            assert_eq!(recovered.run.state.map(|(round, _)| round), Some(Round(1)));
            assert!(recovered.run.joining.is_some());
            journal.append(&state(3)).unwrap();
            let (_, again) = Journal::open(&path).unwrap();
            assert_eq!(
                (again.torn_bytes, again.run.state.map(|(round, _)| round)),
                (0, Some(Round(3)))
            );
        }
    }

    #[test]
    fn opening_forgets_what_no_longer_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let (mut journal, _) = Journal::open(&path).unwrap();
        for round in 0..100 {
            journal.append(&state(round)).unwrap();
        }
        let long = fs::metadata(&path).unwrap().len();
        let (_, recovered) = Journal::open(&path).unwrap();
        assert_eq!(recovered.run.state.map(|(round, _)| round), Some(Round(99)));
        assert!(fs::metadata(&path).unwrap().len() * 50 < long);
    }
}
