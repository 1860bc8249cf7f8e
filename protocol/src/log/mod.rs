//! The signed, hash-chained log of one training run: who trains, which contributions each round took, what came of it.
//!
//! The log is the run's only truth. Whoever has it can name every update that was ever folded in, the state hash after
//! every round, and who said so. One steward appends to it now; [`Stewards`] is the place where "who may append" is
//! decided, and entries carry their author, so that a vote of several stewards changes that type and nothing else.
//!
//! - [`Entry`], [`Body`]: what is written.
//! - [`Ledger`]: the rules, and what follows from the entries so far.
//! - [`Log`]: the entries with their chain, as the steward writes and everybody else follows it.
//! - [`Seal`]: how entries and commits are signed.
//!
//! All entries stay in memory: a run of 10,000 rounds with 8 replicas and 32 parts takes about 90 MB, which a node that
//! trains has. [`ENTRIES_MAX`] is the end of a log that somebody fills on purpose.

mod chain;
mod entry;
mod ledger;
mod seal;

pub use chain::{Fork, Log, LogError, Received, Stewards};
pub use entry::{Body, Contribution, EndReason, Entry, ReplicaId, Round, Stage, institution_of};
pub(crate) use ledger::parts_of;
pub use ledger::{Ledger, Phase, Replica, RoundRecord, RuleError, tokens_max};
pub use seal::{Seal, Signature};

/// Entries of one log. At three entries a round this is 300,000 rounds.
pub const ENTRIES_MAX: u64 = 1 << 20;
/// Bytes of one entry: a genesis with the layout of a model of a thousand tensors takes 100 kB, and a set of
/// [`REPLICAS_MAX`] contributions of 64 parts takes 530 kB.
pub const ENTRY_BYTES_MAX: usize = 1 << 20;
/// Replicas that train at once. More than this belong behind their institution's own reduce.
pub const REPLICAS_MAX: usize = 256;
/// Stages of one replica. A pipeline of more stages idles most of its time.
pub const STAGES_MAX: usize = 64;
/// Parts of a model.
pub const PARTS_MAX: usize = 1024;
/// Rounds for which any run may fold in a late contribution. Beyond, its direction says little about the state.
pub const LATE_ROUNDS_MAX: u32 = 8;
/// Languages of one evaluation.
pub const LANGUAGES_MAX: usize = 256;
/// Bytes of a language's name.
pub const LANGUAGE_BYTES_MAX: usize = 64;
