//! A host: a node that may die, and a disk that does not.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use polder_protocol::hash::{BlobId, NodeId, digest};
use polder_protocol::log::{Seal, Signature};
use polder_protocol::node::{Node, Persist, RestoredRun};
use polder_protocol::round::{Job, JobId};
use polder_protocol::time::Instant;

use crate::worlds::node_id;

/// What a crash leaves.
#[derive(Debug, Default)]
pub(crate) struct Disk {
    pub(crate) run: RestoredRun,
    pub(crate) blobs: BTreeSet<BlobId>,
}

impl Disk {
    pub(crate) fn persist(&mut self, what: Persist) {
        match what {
            Persist::Follow { steward } => self.run.steward = steward,
            Persist::Entry(entry) => self.run.entries.push(entry),
            Persist::Commit(signed) => {
                let key = |commit: &polder_protocol::round::Commit| (commit.round, commit.replica, commit.node);
                let new = key(&signed.commit);
                if self.run.commits.iter().all(|kept| key(&kept.commit) != new) {
                    self.run.commits.push(signed);
                }
            }
            Persist::DropCommits { before } => self.run.commits.retain(|kept| kept.commit.round >= before),
            Persist::State { round, parts } => self.run.state = Some((round, parts)),
            Persist::Joining(joining) => self.run.joining = joining,
        }
    }
}

/// One host.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) id: NodeId,
    pub(crate) seal: Arc<Key>,
    /// `None` while it is down.
    pub(crate) node: Option<Node>,
    /// Counts lives; what belongs to an earlier one is ignored.
    pub(crate) life: u64,
    /// When this life began: a node's clock starts anew with it.
    pub(crate) began: Instant,
    pub(crate) disk: Disk,
    /// What a flawed disk would undo at a crash.
    pub(crate) undo: Vec<RestoredRun>,
    /// The earliest wake that is scheduled.
    pub(crate) wake_at: Option<Instant>,
    pub(crate) jobs: BTreeMap<JobId, Job>,
    pub(crate) slow_until: Instant,
    /// Its owner wants it to train.
    pub(crate) wants_in: bool,
    /// The next outer step has a wrong bit.
    pub(crate) corrupt: bool,
}

impl Host {
    pub(crate) fn new(index: usize) -> Self {
        let id = node_id(index);
        Self {
            id,
            seal: Arc::new(Key(id)),
            node: None,
            life: 0,
            began: Instant(0),
            disk: Disk::default(),
            undo: Vec::new(),
            wake_at: None,
            jobs: BTreeMap::new(),
            slow_until: Instant(0),
            wants_in: false,
            corrupt: false,
        }
    }

    /// The host's own clock.
    pub(crate) fn clock(&self, now: Instant) -> Instant {
        Instant((now - self.began).0)
    }
}

/// A key whose signatures are hashes. Nobody here forges, and a thousand worlds would spend most of their time in curves.
#[derive(Debug)]
pub(crate) struct Key(NodeId);

impl Seal for Key {
    fn node(&self) -> NodeId {
        self.0
    }

    fn sign(&self, domain: &'static str, bytes: &[u8]) -> Signature {
        signature(self.0, domain, bytes)
    }

    fn verify(&self, node: NodeId, domain: &'static str, bytes: &[u8], given: &Signature) -> bool {
        signature(node, domain, bytes) == *given
    }
}

fn signature(node: NodeId, domain: &str, bytes: &[u8]) -> Signature {
    let sealed = digest(&[&node.0, domain.as_bytes(), bytes].concat()).0;
    let mut twice = [0; 64];
    twice[..32].copy_from_slice(&sealed);
    twice[32..].copy_from_slice(&sealed);
    Signature::from_bytes(&twice)
}
