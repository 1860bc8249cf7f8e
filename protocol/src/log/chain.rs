//! The entries of a log, each bound to the one before it and signed: written by the steward, followed by all.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use thiserror::Error;

use crate::hash::{Digest, NodeId, RunId};
use crate::run::RunSpec;

use super::{Body, ENTRIES_MAX, ENTRY_BYTES_MAX, Entry, Ledger, RuleError, Seal};

/// Who may append to a log.
///
/// One steward now. Several will vote, and then this holds them and their threshold; nothing else asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stewards {
    /// This node alone.
    One(NodeId),
}

impl Stewards {
    /// Those that the facts of a run name.
    pub const fn of(spec: &RunSpec) -> Self {
        Self::One(spec.steward)
    }

    /// Whether an entry by `author` counts.
    pub fn accept(&self, author: NodeId) -> bool {
        match self {
            Self::One(steward) => *steward == author,
        }
    }
}

/// Two signed entries for one place of one log: proof that a steward says different things to different nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fork {
    /// The entry that this log has.
    pub ours: Entry,
    /// Another at the same place, or one whose `previous` is another at that place.
    pub theirs: Entry,
}

/// What came of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Received {
    /// It is the new last one.
    Appended,
    /// The log has it already.
    Known,
    /// Entries before it are missing.
    Gap,
    /// It contradicts one that the log has.
    Forked(Box<Fork>),
    /// It is not an entry of this log.
    Refused(LogError),
}

/// Why an entry does not belong to a log.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum LogError {
    #[error("the entry is of run {0}")]
    OtherRun(RunId),
    #[error("node {0} may not append to this log")]
    Author(NodeId),
    #[error("the signature is not that of {0}")]
    Signature(NodeId),
    #[error("the entry is {len_bytes} bytes long, over the limit of {limit_bytes}")]
    TooLong { len_bytes: usize, limit_bytes: usize },
    #[error("the log has {0} entries, as many as may be")]
    Full(u64),
    #[error("the entry breaks a rule: {0}")]
    Rule(#[from] RuleError),
}

/// A run's log as one node has it: a prefix of the steward's, verified.
#[derive(Debug, Clone)]
pub struct Log {
    run: RunId,
    /// Verified, in order; `entries[i].index == i`.
    entries: Vec<Entry>,
    head: Digest,
    /// `None` exactly while there is no entry.
    ledger: Option<Ledger>,
}

impl Log {
    /// The empty log of `run`.
    pub const fn new(run: RunId) -> Self {
        Self {
            run,
            entries: Vec::new(),
            head: Digest([0; 32]),
            ledger: None,
        }
    }

    /// The run.
    pub const fn run(&self) -> RunId {
        self.run
    }

    /// The number of entries.
    pub fn len(&self) -> u64 {
        u64::try_from(self.entries.len()).unwrap_or(u64::MAX)
    }

    /// Whether there is no entry yet.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The hash of the last entry; zero where there is none.
    pub const fn head(&self) -> Digest {
        self.head
    }

    /// The entries so far.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// What follows from the entries; `None` before the first.
    pub const fn ledger(&self) -> Option<&Ledger> {
        self.ledger.as_ref()
    }

    /// The run's facts; `None` before the first entry.
    pub fn spec(&self) -> Option<&Arc<RunSpec>> {
        self.ledger.as_ref().map(Ledger::spec)
    }

    /// Takes an entry from anybody.
    pub fn receive(&mut self, entry: Entry, seal: &dyn Seal) -> Received {
        if entry.run != self.run {
            return Received::Refused(LogError::OtherRun(entry.run));
        }
        let known = usize::try_from(entry.index)
            .ok()
            .and_then(|index| self.entries.get(index));
        if let Some(ours) = known {
            if ours == &entry {
                return Received::Known;
            }
            return self.compare(ours.clone(), entry, seal);
        }
        if entry.index > self.len() {
            return Received::Gap;
        }
        if entry.previous != self.head {
            return match self.entries.last() {
                Some(ours) => self.compare(ours.clone(), entry, seal),
                None => Received::Refused(LogError::Rule(RuleError::Genesis)),
            };
        }
        match self.append(entry, seal) {
            Ok(()) => Received::Appended,
            Err(error) => Received::Refused(error),
        }
    }

    /// Writes the next entry, as its steward.
    ///
    /// # Errors
    ///
    /// [`LogError`] where the rules forbid it; then nothing changes.
    pub fn write(&mut self, body: Body, seal: &dyn Seal) -> Result<Entry, LogError> {
        let mut entry = Entry {
            run: self.run,
            index: self.len(),
            previous: self.head,
            body,
            author: seal.node(),
            signature: super::Signature::from_bytes(&[0; 64]),
        };
        let bytes = entry.signed_bytes();
        self.check_size(&bytes)?;
        let accepted = match (&self.ledger, &entry.body) {
            (Some(ledger), _) => Stewards::of(ledger.spec()).accept(entry.author),
            (None, _) => true, // The rules of a genesis ask.
        };
        if !accepted {
            return Err(LogError::Author(entry.author));
        }
        self.take(&entry)?;
        entry.signature = seal.sign(Entry::SIGNATURE_DOMAIN, &bytes);
        self.head = crate::hash::digest(&bytes);
        self.entries.push(entry.clone());
        Ok(entry)
    }

    /// Entries from `from` on: at most `entries_max`, of at most `bytes_max` bytes in all, but one at least if there is
    /// one.
    pub fn range(&self, from: u64, entries_max: usize, bytes_max: usize) -> Vec<Entry> {
        let start = usize::try_from(from).unwrap_or(usize::MAX);
        let mut bytes = 0usize;
        let mut range = Vec::new();
        for entry in self.entries.iter().skip(start).take(entries_max) {
            bytes = bytes.saturating_add(entry.bytes());
            if bytes > bytes_max && !range.is_empty() {
                break;
            }
            range.push(entry.clone());
        }
        range
    }

    fn append(&mut self, entry: Entry, seal: &dyn Seal) -> Result<(), LogError> {
        let bytes = entry.signed_bytes();
        self.check_size(&bytes)?;
        if let Some(ledger) = &self.ledger
            && !Stewards::of(ledger.spec()).accept(entry.author)
        {
            return Err(LogError::Author(entry.author));
        }
        if !seal.verify(entry.author, Entry::SIGNATURE_DOMAIN, &bytes, &entry.signature) {
            return Err(LogError::Signature(entry.author));
        }
        self.take(&entry)?;
        self.head = crate::hash::digest(&bytes);
        self.entries.push(entry);
        Ok(())
    }

    fn take(&mut self, entry: &Entry) -> Result<(), LogError> {
        match (&mut self.ledger, &entry.body) {
            (Some(ledger), body) => ledger.append(body)?,
            (None, Body::Genesis { spec }) => {
                let ledger = Ledger::begin(self.run, spec)?;
                if !Stewards::of(ledger.spec()).accept(entry.author) {
                    return Err(LogError::Author(entry.author));
                }
                self.ledger = Some(ledger);
            }
            (None, _) => return Err(LogError::Rule(RuleError::Genesis)),
        }
        Ok(())
    }

    fn check_size(&self, bytes: &[u8]) -> Result<(), LogError> {
        if bytes.len() > ENTRY_BYTES_MAX {
            return Err(LogError::TooLong {
                len_bytes: bytes.len(),
                limit_bytes: ENTRY_BYTES_MAX,
            });
        }
        if self.len() >= ENTRIES_MAX {
            return Err(LogError::Full(ENTRIES_MAX));
        }
        Ok(())
    }

    /// Whether `theirs`, which does not fit to `ours`, is the steward's own contradiction or only somebody's noise.
    fn compare(&self, ours: Entry, theirs: Entry, seal: &dyn Seal) -> Received {
        let bytes = theirs.signed_bytes();
        if theirs.index == ours.index && crate::hash::digest(&bytes) == ours.hash() {
            return Received::Known; // Signed again.
        }
        let accepted = self.spec().is_some_and(|spec| Stewards::of(spec).accept(theirs.author));
        if !accepted {
            return Received::Refused(LogError::Author(theirs.author));
        }
        if !seal.verify(theirs.author, Entry::SIGNATURE_DOMAIN, &bytes, &theirs.signature) {
            return Received::Refused(LogError::Signature(theirs.author));
        }
        Received::Forked(Box::new(Fork { ours, theirs }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Key, closed, replica, spec};

    #[test]
    fn a_follower_ends_with_the_steward_s_chain() {
        let steward = written();
        let mut follower = Log::new(spec().id());
        for entry in steward.entries() {
            assert_eq!(follower.receive(entry.clone(), &Key(9)), Received::Appended);
        }
        assert_eq!(follower.head(), steward.head());
        assert_eq!(follower.receive(steward.entries()[1].clone(), &Key(9)), Received::Known);
    }

    #[test]
    fn an_entry_from_further_on_is_a_gap() {
        let steward = written();
        let mut follower = Log::new(spec().id());
        assert_eq!(follower.receive(steward.entries()[1].clone(), &Key(9)), Received::Gap);
        assert!(follower.is_empty());
    }

    #[test]
    fn finds_two_entries_for_one_place() {
        let (mut one, mut other) = (begun(), begun());
        let ours = one.write(replica(0, &[1], 0), &Key(1)).unwrap();
        let theirs = other.write(replica(0, &[2], 0), &Key(1)).unwrap();
        let fork = Box::new(Fork {
            ours: ours.clone(),
            theirs: theirs.clone(),
        });
        assert_eq!(one.receive(theirs, &Key(9)), Received::Forked(fork));
        let next = other.write(Body::Paused, &Key(1)).unwrap();
        let fork = Box::new(Fork {
            ours,
            theirs: next.clone(),
        });
        assert_eq!(one.receive(next, &Key(9)), Received::Forked(fork));
    }

    #[test]
    fn refuses_what_the_steward_did_not_sign() {
        let mut log = begun();
        let mut forged = begun().write(replica(0, &[1], 0), &Key(1)).unwrap();
        forged.body = replica(0, &[2], 0);
        let refused = log.receive(forged.clone(), &Key(9));
        assert!(matches!(refused, Received::Refused(LogError::Signature(_))));
        forged.author = Key(2).node();
        let refused = log.receive(forged, &Key(9));
        assert!(matches!(refused, Received::Refused(LogError::Author(_))));
        assert_eq!(log.len(), 1);
    }

    #[test]
    fn nobody_but_the_steward_writes() {
        let genesis = Body::Genesis {
            spec: spec().to_bytes(),
        };
        let refused = Log::new(spec().id()).write(genesis, &Key(2));
        assert_eq!(refused, Err(LogError::Author(Key(2).node())));
        let refused = begun().write(Body::Paused, &Key(2));
        assert_eq!(refused, Err(LogError::Author(Key(2).node())));
    }

    #[test]
    fn an_entry_that_breaks_a_rule_changes_nothing() {
        let mut log = begun();
        let set = closed(log.ledger().unwrap(), &[(0, 0)]);
        assert!(matches!(log.write(set, &Key(1)), Err(LogError::Rule(_))));
        assert_eq!(log.len(), 1);
    }

    #[test]
    fn a_range_is_bounded_in_entries_and_bytes() {
        let log = written();
        assert_eq!(log.range(0, 2, usize::MAX).len(), 2);
        assert_eq!(log.range(1, 9, 1).len(), 1);
        assert_eq!(log.range(u64::MAX, 9, 9), []);
    }

    fn begun() -> Log {
        let mut log = Log::new(spec().id());
        let genesis = Body::Genesis {
            spec: spec().to_bytes(),
        };
        log.write(genesis, &Key(1)).unwrap();
        log
    }

    fn written() -> Log {
        let mut log = begun();
        log.write(replica(0, &[1], 0), &Key(1)).unwrap();
        let set = closed(log.ledger().unwrap(), &[(0, 0)]);
        log.write(set, &Key(1)).unwrap();
        log
    }
}
