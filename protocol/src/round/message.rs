//! What the nodes of a run say to each other.
//!
//! All of it may be lost, repeated, reordered or invented: what must hold is signed (entries and commits), the rest
//! is a request or a hint. The transport vouches for the sender, and that it is a node of the federation.

use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::hash::{Digest, InstitutionId, RunId};
use crate::log::{ENTRY_BYTES_MAX, Entry, LANGUAGE_BYTES_MAX, LANGUAGES_MAX, PARTS_MAX, ReplicaId, Round};

use super::{CommitAnswer, SignedCommit};

/// Bytes of one message: an entry of the greatest size and its wrapping.
pub const MESSAGE_BYTES_MAX: usize = ENTRY_BYTES_MAX + (64 << 10);
/// Entries of one message.
pub(crate) const ENTRIES_PER_MESSAGE_MAX: usize = 256;
/// Bytes of a message that is broadcast: gossip carries 64 KiB at most. A longer entry is announced by a
/// [`RunMessage::Head`] and asked for.
pub(crate) const GOSSIP_BYTES_MAX: usize = 48 << 10;
/// Characters of an explanation that one node gives another.
const REASON_BYTES_MAX: usize = 512;

/// One message about one run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RunMessage {
    /// Consecutive entries of the log: newly written ones to all, or those that were asked for.
    Entries {
        /// The run.
        run: RunId,
        /// In order.
        entries: Vec<Entry>,
    },
    /// How far the log goes. The steward says it to all every few seconds, which heals what gossip lost and lets
    /// others learn of the run.
    Head {
        /// The run.
        run: RunId,
        /// Entries so far.
        entries: u64,
        /// Hash of the last.
        head: Digest,
    },
    /// Please send the entries from here on. Anyone who follows the run answers.
    Ask {
        /// The run.
        run: RunId,
        /// Index of the first entry wanted.
        from: u64,
    },
    /// To the steward: I want to train.
    Join {
        /// The run.
        run: RunId,
        /// Which institution vouches for me. The transport compares it with the sender's certificate.
        institution: InstitutionId,
        /// How many blocks I can hold.
        blocks_max: u32,
        /// Languages of my data, for people to see.
        languages: Vec<String>,
        /// Which life of mine this is.
        incarnation: u64,
        /// Entries of the log that I have.
        entries: u64,
    },
    /// From the steward: what comes of a [`RunMessage::Join`], for people to see. Being admitted is an entry of the log.
    JoinAnswer {
        /// The run.
        run: RunId,
        /// The answer.
        answer: JoinAnswer,
    },
    /// To the steward: I train no more.
    Leave {
        /// The run.
        run: RunId,
    },
    /// To the steward: I live.
    Alive {
        /// The run.
        run: RunId,
        /// Which life of mine this is.
        incarnation: u64,
        /// Entries of the log that I have.
        entries: u64,
    },
    /// To the steward: this is my update.
    Commit(SignedCommit),
    /// From the steward: what comes of a commit.
    Ack {
        /// The run.
        run: RunId,
        /// The commit's round.
        round: Round,
        /// The commit's replica.
        replica: ReplicaId,
        /// The answer.
        answer: CommitAnswer,
    },
}

/// What a steward says to a node that wants to train.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum JoinAnswer {
    /// The node cannot hold all blocks, and those that wait cannot hold the rest.
    Waiting {
        /// Blocks for which nobody has room yet.
        blocks_missing: u32,
    },
    /// The node is a stage of this replica.
    Admitted {
        /// Which.
        replica: ReplicaId,
        /// The first round that it trains.
        from: Round,
    },
    /// It cannot take part.
    Refused {
        /// For people.
        reason: String,
    },
}

/// Why a peer's bytes are not a message of a run.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum MessageError {
    #[error("message is {len_bytes} bytes long, over the limit of {limit_bytes}")]
    TooLong { len_bytes: usize, limit_bytes: usize },
    #[error("message is malformed: {0}")]
    Malformed(postcard::Error),
    #[error("{what}: {count}, over the limit of {limit}")]
    TooMany {
        what: &'static str,
        count: usize,
        limit: usize,
    },
}

impl RunMessage {
    /// The run that it is about.
    pub const fn run(&self) -> RunId {
        match self {
            Self::Entries { run, .. }
            | Self::Head { run, .. }
            | Self::Ask { run, .. }
            | Self::Join { run, .. }
            | Self::JoinAnswer { run, .. }
            | Self::Leave { run }
            | Self::Alive { run, .. }
            | Self::Ack { run, .. } => *run,
            Self::Commit(signed) => signed.commit.run,
        }
    }

    /// The bytes on the wire.
    pub fn to_bytes(&self) -> Vec<u8> {
        // A value of these types holds nothing that postcard cannot write.
        postcard::to_allocvec(self).unwrap_or_default()
    }

    /// Reads bytes from the wire and checks every limit.
    ///
    /// # Errors
    ///
    /// [`MessageError`] where the bytes are no message within the limits.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, MessageError> {
        if bytes.len() > MESSAGE_BYTES_MAX {
            return Err(MessageError::TooLong {
                len_bytes: bytes.len(),
                limit_bytes: MESSAGE_BYTES_MAX,
            });
        }
        // Lengths inside are bounded by the bytes that are left, so this takes no more memory than a few times them.
        let message: Self = postcard::from_bytes(bytes).map_err(MessageError::Malformed)?;
        message.check()?;
        Ok(message)
    }

    /// Checks the limits that its type does not have.
    ///
    /// # Errors
    ///
    /// [`MessageError::TooMany`] for the first that is passed.
    pub fn check(&self) -> Result<(), MessageError> {
        match self {
            Self::Entries { entries, .. } => limit("entries", entries.len(), ENTRIES_PER_MESSAGE_MAX),
            Self::Join { languages, .. } => {
                limit("languages", languages.len(), LANGUAGES_MAX)?;
                let longest = languages.iter().map(String::len).max().unwrap_or(0);
                limit("bytes of a language's name", longest, LANGUAGE_BYTES_MAX)
            }
            Self::JoinAnswer {
                answer: JoinAnswer::Refused { reason },
                ..
            } => limit("bytes of a reason", reason.len(), REASON_BYTES_MAX),
            Self::Commit(signed) => limit("parts", signed.commit.parts.len(), PARTS_MAX),
            Self::Head { .. }
            | Self::Ask { .. }
            | Self::JoinAnswer { .. }
            | Self::Leave { .. }
            | Self::Alive { .. }
            | Self::Ack { .. } => Ok(()),
        }
    }
}

fn limit(what: &'static str, count: usize, limit: usize) -> Result<(), MessageError> {
    if count > limit {
        return Err(MessageError::TooMany { what, count, limit });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    #[test]
    fn a_message_survives_its_bytes() {
        let message = RunMessage::Alive {
            run: RunId([7; 32]),
            incarnation: 3,
            entries: 12,
        };
        assert_eq!(RunMessage::from_bytes(&message.to_bytes()), Ok(message));
    }

    #[test]
    fn refuses_more_languages_than_there_may_be() {
        let message = RunMessage::Join {
            run: RunId::default(),
            institution: InstitutionId::default(),
            blocks_max: 1,
            languages: vec![String::from("nl"); LANGUAGES_MAX + 1],
            incarnation: 0,
            entries: 0,
        };
        let refused = RunMessage::from_bytes(&message.to_bytes());
        assert!(matches!(refused, Err(MessageError::TooMany { what: "languages", .. })));
    }

    #[test]
    fn refuses_a_message_over_its_limit_unread() {
        let refused = RunMessage::from_bytes(&vec![0; MESSAGE_BYTES_MAX + 1]);
        assert!(matches!(refused, Err(MessageError::TooLong { .. })));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            if let Ok(message) = RunMessage::from_bytes(&bytes) {
                prop_assert!(message.check().is_ok());
            }
        }
    }
}
