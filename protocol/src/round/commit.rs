//! A commit: the promise, signed before any byte is shown, of which blobs are a node's update.

use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::hash::{BlobId, Digest, NodeId, RunId};
use crate::layout::Part;
use crate::log::{ReplicaId, Round, Seal, Signature};

/// One stage's share of one replica's update of one round.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// Of which run.
    pub run: RunId,
    /// The round whose state the update started from.
    pub round: Round,
    /// The replica.
    pub replica: ReplicaId,
    /// The hash of that state.
    pub base: Digest,
    /// The pseudo-gradient of exactly the stage's parts, in part order.
    pub parts: Vec<(Part, BlobId)>,
    /// Tokens that the replica trained on.
    pub tokens: u64,
    /// Mean loss in millionths of a nat per token; zero from a stage that does not see it.
    pub loss_ppm: u64,
    /// Who promises.
    pub node: NodeId,
}

/// A commit with its node's signature, so that it can be kept, and shown to others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedCommit {
    /// What is promised.
    pub commit: Commit,
    /// By `commit.node`.
    pub signature: Signature,
}

impl SignedCommit {
    /// Keeps signatures over commits apart from all others.
    pub const SIGNATURE_DOMAIN: &'static str = "polder commit 1";

    /// Signs `commit`, whose node must be the seal's.
    pub fn new(commit: Commit, seal: &dyn Seal) -> Self {
        let signature = seal.sign(Self::SIGNATURE_DOMAIN, &signed_bytes(&commit));
        Self { commit, signature }
    }

    /// Whether the signature is that of the commit's node.
    pub fn is_signed(&self, seal: &dyn Seal) -> bool {
        let bytes = signed_bytes(&self.commit);
        seal.verify(self.commit.node, Self::SIGNATURE_DOMAIN, &bytes, &self.signature)
    }
}

fn signed_bytes(commit: &Commit) -> Vec<u8> {
    // A value of this type holds nothing that postcard cannot write.
    postcard::to_allocvec(commit).unwrap_or_default()
}

/// What a steward says to a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CommitAnswer {
    /// The steward does not hold all of it yet: bytes are on their way, or other stages of the replica are missing.
    Waiting,
    /// The whole replica's update is held and will be in the next set. It cannot be lost any more.
    Accepted,
    /// It will not be in any set.
    Refused(Refusal),
}

/// Why a commit is in no set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// Its round is too long ago.
    TooLate {
        /// The round that is next to close.
        open: Round,
    },
    /// The run has ended, or closed its last round.
    RunOver,
    /// The node is no stage of such a replica in that round, or the parts are not the stage's.
    NotAdmitted,
    /// It does not start from the run's state of that round.
    OtherBase,
    /// Another commit of the same stage and round came first.
    Different,
    /// The blobs are no pseudo-gradient of this run.
    Invalid,
    /// The signature is not the node's.
    Signature,
}
