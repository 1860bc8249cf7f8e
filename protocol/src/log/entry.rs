//! What a log holds: entries, and the ids and records inside them.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use serde::{Deserialize, Serialize};

use crate::hash::{BlobId, Digest, InstitutionId, NodeId, RunId, digest};
use crate::layout::{BlockRange, Part};

use super::Signature;

/// A round of a run, from 0. The state *of* round r is the one that its training starts from; round 0 starts from the
/// run's initial state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Round(pub u64);

impl Round {
    /// The round after this one.
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// Rounds from `earlier` to this one; zero when `earlier` is later.
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A chain that trains: counted up by the steward, never used twice in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct ReplicaId(pub u64);

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One node's share of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// Which node.
    pub node: NodeId,
    /// Which institution vouches for the node: whose voice the stage's part of an update is.
    pub institution: InstitutionId,
    /// Its blocks.
    pub range: BlockRange,
    /// Which life of the node: changes whenever the node forgot unfinished work. The stages of a chain train each
    /// round together, so a chain whose member has begun another life cannot finish the round that it is in.
    pub incarnation: u64,
}

/// The institution whose stage of a chain holds `part`, in a model of `blocks` blocks.
pub fn institution_of(stages: &[Stage], part: Part, blocks: u32) -> Option<InstitutionId> {
    let holds = |stage: &&Stage| stage.range.parts(blocks).contains(&part.0);
    stages.iter().find(holds).map(|stage| stage.institution)
}

/// One replica's update in a round's set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contribution {
    /// Whose.
    pub replica: ReplicaId,
    /// The round whose state it started from: the set's own round, or an earlier one when it came late.
    pub base: Round,
    /// Its weight before any discount for being late: tokens trained on.
    pub tokens: u64,
    /// Mean training loss in millionths of a nat per token, as the replica says; for people, nothing is decided by it.
    pub loss_ppm: u64,
    /// The pseudo-gradient, one blob per part, in part order.
    pub parts: Vec<BlobId>,
}

impl Contribution {
    /// Rounds by which it came late to `round`'s set.
    pub const fn late_rounds(&self, round: Round) -> u64 {
        round.since(self.base)
    }

    /// The weight in `round`'s set: tokens, halved for every round late, and never zero, since a set's weights are
    /// divided by their sum.
    pub fn weight(&self, round: Round) -> u64 {
        let halvings = u32::try_from(self.late_rounds(round)).unwrap_or(u32::MAX);
        self.tokens.checked_shr(halvings).unwrap_or(0).max(1)
    }
}

/// Why a replica trains no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum EndReason {
    /// A node said that it leaves.
    Left(NodeId),
    /// Nothing was heard of a node for too long.
    Silent(NodeId),
    /// A node of a chain began another life, so that the chain's round cannot be finished.
    Restarted(NodeId),
}

/// What one entry says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Body {
    /// The first entry: the canonical bytes of the [`crate::run::RunSpec`], whose hash is the run's id.
    Genesis {
        /// Those bytes.
        spec: Vec<u8>,
    },
    /// A replica is admitted.
    Replica {
        /// Its id, greater than all before it.
        id: ReplicaId,
        /// Its stages in order: together they cover every block once.
        stages: Vec<Stage>,
        /// The first round that it trains.
        from: Round,
    },
    /// A replica trains no more. What it contributed up to the present round still counts.
    ReplicaEnded {
        /// Which.
        id: ReplicaId,
        /// Why.
        reason: EndReason,
    },
    /// A round's set is fixed.
    Closed {
        /// Which round.
        round: Round,
        /// The hash of the state of that round.
        base: Digest,
        /// What is folded in, sorted by replica, then by base round.
        set: Vec<Contribution>,
    },
    /// The outer step of a closed round is done.
    Applied {
        /// Which round.
        round: Round,
        /// The state of the next round, one blob per part.
        parts: Vec<BlobId>,
        /// [`crate::run::state_hash`] of `parts`.
        state: Digest,
    },
    /// The state after a round was scored on the held-out texts.
    Evaluated {
        /// After which round.
        round: Round,
        /// Millionths of a bit per UTF-8 byte, by language.
        bits_per_byte_ppm: BTreeMap<String, u64>,
    },
    /// No round is trained or closed until [`Body::Resumed`].
    Paused,
    /// Rounds go on.
    Resumed,
    /// The run ended before its last round, because its steward was told so.
    Stopped,
    /// All rounds are done.
    Finished,
}

/// One link of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Of which run.
    pub run: RunId,
    /// Its place, from 0.
    pub index: u64,
    /// [`Entry::hash`] of the entry before it; zero for the first.
    pub previous: Digest,
    /// What it says.
    pub body: Body,
    /// The steward that wrote it.
    pub author: NodeId,
    /// The author's signature over all the above.
    pub signature: Signature,
}

impl Entry {
    /// Keeps signatures over entries apart from all others.
    pub const SIGNATURE_DOMAIN: &'static str = "polder log entry 1";

    /// The bytes under the signature.
    pub fn signed_bytes(&self) -> Vec<u8> {
        // A value of these types holds nothing that postcard cannot write.
        postcard::to_allocvec(&(self.run, self.index, self.previous, &self.body, self.author)).unwrap_or_default()
    }

    /// About how many bytes it takes in a message, without writing it.
    pub(crate) fn bytes(&self) -> usize {
        const REST: usize = 256; // Ids, hashes, signature.
        REST + match &self.body {
            Body::Genesis { spec } => spec.len(),
            Body::Replica { stages, .. } => stages.len().saturating_mul(96),
            Body::Closed { set, .. } => set.iter().map(|one| 64 + one.parts.len().saturating_mul(32)).sum(),
            Body::Applied { parts, .. } => parts.len().saturating_mul(32),
            Body::Evaluated { bits_per_byte_ppm, .. } => bits_per_byte_ppm.keys().map(|name| 16 + name.len()).sum(),
            Body::ReplicaEnded { .. } | Body::Paused | Body::Resumed | Body::Stopped | Body::Finished => 0,
        }
    }

    /// What the next entry calls `previous`. The signature is left out: signing again makes no other entry.
    pub fn hash(&self) -> Digest {
        digest(&self.signed_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn contribution(tokens: u64) -> Contribution {
        Contribution {
            replica: ReplicaId(1),
            base: Round(4),
            tokens,
            loss_ppm: 0,
            parts: vec![],
        }
    }

    #[test]
    fn a_late_contribution_weighs_half_for_every_round() {
        assert_eq!(contribution(1000).weight(Round(4)), 1000);
        assert_eq!(contribution(1000).weight(Round(6)), 250);
    }

    #[test]
    fn a_part_is_the_voice_of_the_stage_that_holds_it() {
        let stage = |n: u8, first, end| Stage {
            node: NodeId([n; 32]),
            institution: InstitutionId([n; 32]),
            range: BlockRange { first, end },
            incarnation: 0,
        };
        let stages = [stage(1, 0, 3), stage(2, 3, 4)];
        // Embedding and three blocks, then one block and the head.
        let voices = [1, 1, 1, 1, 2, 2].map(|n| Some(InstitutionId([n; 32])));
        assert_eq!(
            [0, 1, 2, 3, 4, 5].map(|part| institution_of(&stages, Part(part), 4)),
            voices
        );
        assert_eq!(institution_of(&stages, Part(6), 4), None);
    }

    #[test]
    fn no_contribution_weighs_nothing() {
        assert_eq!(contribution(1).weight(Round(5)), 1);
        assert_eq!(contribution(1000).weight(Round(u64::MAX)), 1);
    }
}
