//! What goes into a node's step and what comes out.

use alloc::collections::BTreeSet;
use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::hash::{BlobId, InstitutionId, NodeId, RunId};
use crate::layout::Part;
use crate::log::{Entry, ReplicaId, Round};
use crate::round::{Job, JobId, JoinAnswer, Outcome, Refusal, RunMessage, SignedCommit};
use crate::run::RunSpec;

/// What happened.
#[derive(Debug, Clone, PartialEq)]
#[expect(
    clippy::large_enum_variant,
    reason = "few live at once, and each is used up where it is made"
)]
pub enum Input {
    /// A message came. The transport vouches for `from`, that it may take part in this federation's runs, and that the
    /// institution which a [`RunMessage::Join`] names has certified it.
    Message {
        /// The sender.
        from: NodeId,
        /// What it says.
        message: RunMessage,
    },
    /// A job ended.
    Done {
        /// Which.
        job: JobId,
        /// How.
        outcome: Outcome,
    },
    /// This node's owner wants something.
    Local(Command),
    /// The time of [`super::Node::wake_at`] has come.
    Wake,
    /// A node is connected that was not.
    PeerFound {
        /// Which node.
        node: NodeId,
    },
    /// The last connection to a node broke.
    PeerLost {
        /// Which node.
        node: NodeId,
    },
}

/// What a node's owner can want.
#[derive(Debug, Clone, PartialEq)]
#[expect(
    clippy::large_enum_variant,
    reason = "few live at once, and each is used up where it is made"
)]
pub enum Command {
    /// Begin a run whose steward is this node.
    Begin {
        /// Its facts.
        spec: RunSpec,
    },
    /// Follow a run's log.
    Follow {
        /// The run.
        run: RunId,
        /// Whom to ask for the log first.
        steward: NodeId,
    },
    /// Follow a run and train in it, until [`Command::Leave`]; a restart goes on with it.
    Join {
        /// The run.
        run: RunId,
        /// Whom to ask for the log first.
        steward: NodeId,
        /// How to take part.
        joining: Joining,
    },
    /// Train no more in a run.
    Leave {
        /// The run.
        run: RunId,
    },
    /// At the steward: train and close no round until [`Command::Resume`].
    Pause {
        /// The run.
        run: RunId,
    },
    /// At the steward: go on.
    Resume {
        /// The run.
        run: RunId,
    },
    /// At the steward: end the run after the round that is being applied, if one is.
    Stop {
        /// The run.
        run: RunId,
    },
}

/// How a node takes part in a run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Joining {
    /// The institution that vouches for this node.
    pub institution: InstitutionId,
    /// How many blocks it can hold. Fewer than the model's make it a stage of a chain.
    pub blocks_max: u32,
    /// Languages of its data, for people to see.
    pub languages: Vec<String>,
}

/// What the driver must now do, in order.
#[derive(Debug, Clone, PartialEq)]
#[expect(
    clippy::large_enum_variant,
    reason = "few live at once, and each is used up where it is made"
)]
pub enum Effect {
    /// Make this durable before going on.
    Persist {
        /// Of which run.
        run: RunId,
        /// What.
        what: Persist,
    },
    /// Send to one node. May be lost.
    Send {
        /// To whom.
        to: NodeId,
        /// What.
        message: RunMessage,
    },
    /// Send to all who follow the federation's runs. May be lost.
    Broadcast {
        /// What.
        message: RunMessage,
    },
    /// Begin a job.
    Start {
        /// Its name.
        job: JobId,
        /// What to do.
        work: Job,
    },
    /// Give a job up; its outcome is of no interest.
    Cancel {
        /// Which.
        job: JobId,
    },
    /// Of this run's blobs only these are needed still, beside the tokenizer and the held-out texts that the run's
    /// facts name, and what jobs that are under way make.
    Retain {
        /// The run.
        run: RunId,
        /// What to keep.
        blobs: BTreeSet<BlobId>,
    },
    /// Something that people and the rest of the daemon may want to know.
    Report(Report),
}

/// What a node must find again after a restart.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Persist {
    /// This run is followed; whom to ask for the log first. A run that this node keeps the log of has none.
    Follow {
        /// Whom.
        steward: NodeId,
    },
    /// Append to the run's log.
    Entry(Entry),
    /// Add a commit: an own one before it is sent, at the steward any that it holds. At most one for each round,
    /// replica and node; a second for the same is the same.
    Commit(SignedCommit),
    /// Commits of rounds before this one may be dropped.
    DropCommits {
        /// The first round that is kept.
        before: Round,
    },
    /// The state that this node holds, instead of the one before.
    State {
        /// The state of this round.
        round: Round,
        /// This node's parts, in order.
        parts: Vec<(Part, BlobId)>,
    },
    /// How this node takes part, instead of what was persisted before; `None` after it left.
    Joining(Option<Joining>),
}

/// What a node persisted of one run, for [`super::Node::restore`].
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RestoredRun {
    /// The steward of [`Persist::Follow`]; the default where there was none.
    pub steward: NodeId,
    /// All of [`Persist::Entry`], in order.
    pub entries: Vec<Entry>,
    /// [`Persist::Commit`]s that are not dropped, in any order.
    pub commits: Vec<SignedCommit>,
    /// The last [`Persist::State`].
    pub state: Option<(Round, Vec<(Part, BlobId)>)>,
    /// The last [`Persist::Joining`].
    pub joining: Option<Joining>,
}

/// What people and the rest of the daemon may want to know.
#[derive(Debug, Clone, PartialEq)]
#[expect(
    clippy::large_enum_variant,
    reason = "few live at once, and each is used up where it is made"
)]
pub enum Report {
    /// A steward speaks of a run that this node does not follow.
    Heard {
        /// The run.
        run: RunId,
        /// Who spoke.
        steward: NodeId,
    },
    /// The log has a new entry.
    Logged {
        /// The entry.
        entry: Entry,
    },
    /// The steward wrote two different entries for one place. Both are signed; this node keeps the first.
    Equivocation {
        /// The one that this node has.
        ours: Entry,
        /// The other: at the same place, or the next one on another chain.
        theirs: Entry,
    },
    /// At the steward: a node wants to train.
    Joined {
        /// The run.
        run: RunId,
        /// Who.
        node: NodeId,
        /// How.
        joining: Joining,
    },
    /// What the steward says to this node's wish to train.
    JoinAnswered {
        /// The run.
        run: RunId,
        /// The answer.
        answer: JoinAnswer,
    },
    /// This node's update is held by the steward and cannot be lost any more.
    CommitAccepted {
        /// The run.
        run: RunId,
        /// The update's round.
        round: Round,
        /// The replica.
        replica: ReplicaId,
    },
    /// This node's update will be in no set. With error feedback, it belongs back into the error.
    CommitRefused {
        /// The run.
        run: RunId,
        /// The update's round.
        round: Round,
        /// The replica.
        replica: ReplicaId,
        /// Why.
        refusal: Refusal,
    },
    /// This node's own outer step made other bits than the steward's; it fetches the steward's.
    Diverged {
        /// The run.
        run: RunId,
        /// The round whose outer step it was.
        round: Round,
        /// Which parts differ.
        parts: Vec<Part>,
    },
    /// This node's state after a round is the one in the log.
    Agreed {
        /// The run.
        run: RunId,
        /// The round whose outer step it was.
        round: Round,
    },
    /// A job failed; it is begun again where it still matters.
    JobFailed {
        /// The run.
        run: RunId,
        /// Which.
        job: JobId,
        /// What the driver said.
        reason: String,
    },
    /// A command could not be carried out.
    CommandRefused {
        /// The run.
        run: RunId,
        /// What to tell the owner.
        reason: String,
    },
    /// What was stored of a run's log does not follow its rules from this entry on. A follower fetches the rest again;
    /// a steward writes nothing any more, since it may have forgotten what it said.
    LogDamaged {
        /// The run.
        run: RunId,
        /// Entries that are good.
        entries: u64,
        /// What is wrong with the next.
        reason: String,
    },
}
