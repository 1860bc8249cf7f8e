//! Slow work that the machines ask for: computing, fetching, hashing. The driver does it and says what came of it.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::hash::{BlobId, NodeId, RunId};
use crate::layout::Part;
use crate::log::{Contribution, ReplicaId, Round, Stage};
use crate::run::RunSpec;

/// Names one job of one life of a node. An outcome whose job was cancelled or is unknown changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct JobId(pub u64);

/// Work for the driver. Every job ends in exactly one [`Outcome`], unless it is cancelled first; a job that cannot go
/// on ends in [`Outcome::Failed`] and is asked for again after a pause where it still matters. Blobs that an outcome
/// names lie in the node's store, verified and durable, before the outcome is handed in.
#[derive(Debug, Clone, PartialEq)]
pub enum Job {
    /// Train one round. Ends in [`Outcome::Trained`]. The stages of a chain each get this job, at about the same time;
    /// their drivers find each other by `replica` and `round`, and a driver whose neighbour is lost fails the job.
    Train {
        /// The run.
        run: RunId,
        /// Its facts.
        spec: Arc<RunSpec>,
        /// Which round.
        round: Round,
        /// As which replica.
        replica: ReplicaId,
        /// The replica's stages in order.
        stages: Vec<Stage>,
        /// Which of `stages` this node is.
        stage: usize,
        /// The state of the round: exactly the parts of this stage, in order. They are in the store.
        base: Vec<(Part, BlobId)>,
    },
    /// Fetch a commit's blobs and check that each is a pseudo-gradient of its part. Ends in [`Outcome::Fetched`].
    Fetch {
        /// The run.
        run: RunId,
        /// Its facts.
        spec: Arc<RunSpec>,
        /// The round that the update belongs to: decides the codec.
        round: Round,
        /// What to fetch, by part.
        parts: Vec<(Part, BlobId)>,
        /// Who has them.
        sources: Vec<NodeId>,
    },
    /// Fetch the set's blobs of the parts in `base`, then aggregate and take the outer step. Ends in
    /// [`Outcome::Applied`].
    Apply {
        /// The run.
        run: RunId,
        /// Its facts.
        spec: Arc<RunSpec>,
        /// Which round.
        round: Round,
        /// The state of the round: this node's parts, in order. They are in the store.
        base: Vec<(Part, BlobId)>,
        /// What to fold in. Weights: [`Contribution::weight`] of `round`.
        set: Vec<Contribution>,
        /// The stages of each replica in the set. Voices: [`crate::log::institution_of`] of them.
        makers: BTreeMap<ReplicaId, Vec<Stage>>,
        /// Who has the set's blobs, the best first.
        sources: Vec<NodeId>,
    },
    /// Fetch a state. Ends in [`Outcome::Fetched`].
    FetchState {
        /// The run.
        run: RunId,
        /// Its facts.
        spec: Arc<RunSpec>,
        /// The state of this round.
        round: Round,
        /// What to fetch, by part.
        parts: Vec<(Part, BlobId)>,
        /// Who has them, the best first.
        sources: Vec<NodeId>,
    },
    /// Score a state on the run's held-out texts. Ends in [`Outcome::Evaluated`].
    Evaluate {
        /// The run.
        run: RunId,
        /// Its facts.
        spec: Arc<RunSpec>,
        /// The state after this round.
        round: Round,
        /// That state, all parts in order. They are in the store.
        parts: Vec<(Part, BlobId)>,
    },
}

impl Job {
    /// The run that it is for.
    pub const fn run(&self) -> RunId {
        match self {
            Self::Train { run, .. }
            | Self::Fetch { run, .. }
            | Self::Apply { run, .. }
            | Self::FetchState { run, .. }
            | Self::Evaluate { run, .. } => *run,
        }
    }
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// A round is trained.
    Trained {
        /// The pseudo-gradient: exactly the parts of the job's base, in order.
        parts: Vec<(Part, BlobId)>,
        /// Tokens that the replica trained on.
        tokens: u64,
        /// Mean loss in millionths of a nat per token; zero where the stage does not see it.
        loss_ppm: u64,
    },
    /// The blobs are in the store.
    Fetched,
    /// The outer step is taken.
    Applied {
        /// The next state: exactly the parts of the job's base, in order.
        parts: Vec<(Part, BlobId)>,
    },
    /// The state is scored.
    Evaluated {
        /// Millionths of a bit per UTF-8 byte, by language.
        bits_per_byte_ppm: BTreeMap<String, u64>,
    },
    /// The bytes came and are not what they should be: trying again will not help.
    Invalid {
        /// For people.
        reason: String,
    },
    /// It did not work this time.
    Failed {
        /// For people.
        reason: String,
    },
}
