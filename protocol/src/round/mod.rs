//! A training round, from the state that everybody starts with to the state that everybody ends with.
//!
//! One round of one run, with the steward `S` and a participant `P`:
//!
//! ```text
//! P  holds the state of round r; the log says that r is open
//! P  Job::Train .................. inner steps; the pseudo-gradient lies in blobs
//! P  Persist::Commit, Commit ──► S   the names of the blobs: nothing can be changed any more
//! S  Job::Fetch ................. their bytes, checked
//! S  Persist::Commit, Ack ─────► P   from here on the update cannot be lost
//! S  Closed {r, set} ──────────► all  at quorum and grace, when all are there, or at the deadline
//! all Job::Apply ................ the same set on the same state in the same order: the same bits
//! S  Applied {r, parts} ───────► all  whoever has other bits fetches these
//! ```
//!
//! What is late waits for the next set, within the run's limit; what is later is refused, and nobody is thrown out for
//! it. Three machines do this, all of them parts of [`crate::node::Node`], which is what a driver steps. The keeper holds
//! one node's parts of the state and keeps them up with the log. The trainer takes part: it joins, trains, commits and
//! leaves. The steward admits, gathers and closes.
//!
//! They are apart because a slow trainer must not hold up the state, and a steward needs all parts even where it trains
//! only a stage, or nothing. The next round opens with `Applied`, not with `Closed`, so every update starts from a state
//! that the log has named; what this costs is one message's way.
//!
//! A chain of several stages finishes a round together or not at all. When one of them begins another life (a restart,
//! or a training job that failed), its share of the round is gone while the others may have committed theirs already,
//! so the steward ends the replica and pairs its nodes anew. A replica of one node just trains the round again.

mod admission;
mod commit;
mod context;
mod gathering;
mod job;
mod keeper;
mod message;
mod steward;
mod trainer;

pub use commit::{Commit, CommitAnswer, Refusal, SignedCommit};
pub(crate) use context::{Context, earlier};
pub use job::{Job, JobId, Outcome};
pub(crate) use keeper::Keeper;
pub(crate) use message::ENTRIES_PER_MESSAGE_MAX;
pub use message::{JoinAnswer, MESSAGE_BYTES_MAX, MessageError, RunMessage};
pub(crate) use steward::Steward;
pub(crate) use trainer::Trainer;

use crate::time::Span;

/// How often a participant tells the steward that it lives. Cheap beside a round, and four fit in [`LEASE`].
pub const ALIVE_EVERY: Span = Span::seconds(5);
/// A replica ends when a node of it was silent for so long: four signs of life missed.
pub const LEASE: Span = Span::seconds(20);
/// What is left of a lease once the connection to the node broke: time to connect again after a restart.
pub const LEASE_AFTER_LOSS: Span = Span::seconds(10);
/// The first wait before something unanswered is said again.
pub const RETRY_FIRST: Span = Span::seconds(1);
/// The longest wait before something unanswered is said again.
pub const RETRY_MAX: Span = Span::seconds(8);
/// The longest wait before failed work is begun again.
pub const FAILURE_RETRY_MAX: Span = Span::seconds(60);
/// A node this many rounds behind applies the rounds; one further behind fetches the newest state instead. Sets are
/// smaller than states by the codec's ratio, but each takes an outer step.
pub const APPLY_BEHIND_MAX: u64 = 2;
/// Nodes that wait to be paired into a replica.
pub const WAITING_MAX: usize = 1024;

/// The wait before try number `tries + 1`: doubles from [`RETRY_FIRST`] up to `longest`.
pub(crate) fn retry_after(tries: u32, longest: Span) -> Span {
    Span(RETRY_FIRST.0.saturating_mul(1u64 << tries.min(16)).min(longest.0))
}
