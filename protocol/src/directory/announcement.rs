//! What a node says of itself, signed and for a short while.

use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::hash::{BlobId, EpochId, FederationId, NodeId};
use crate::identity::Statement;
use crate::layout::BlockRange;
use crate::time::UnixSeconds;
use crate::wire::{DecodeError, Message};

/// The form that this program writes and reads.
pub const ANNOUNCEMENT_VERSION: u16 = 1;

/// How long an announcement is believed in a small federation: three of the intervals of 30 s at which nodes repeat
/// theirs.
pub const ANNOUNCEMENT_SECONDS: u64 = 90;

/// The longest announcement. It goes to everybody every half minute, so it stays small.
pub const ANNOUNCEMENT_BYTES_MAX: usize = 12 << 10;

/// The most stages of one node. A node has few devices, and a stage fills most of one.
pub const STAGES_MAX: usize = 32;

/// The most epochs that one node tells of.
pub const EPOCHS_MAX: usize = 32;

/// The longest name of an epoch.
pub const EPOCH_NAME_BYTES_MAX: usize = 128;

/// The longest credentials inside an announcement, so that the rest has room.
pub const ANNOUNCED_CREDENTIALS_BYTES_MAX: usize = 4 << 10;

/// A stage that the announcing node holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageOffer {
    /// Of which epoch.
    pub epoch: EpochId,
    /// Which blocks.
    pub range: BlockRange,
    /// Measured time for one token.
    pub token_micros: u32,
    /// Sessions for which it has room.
    pub sessions_free: u32,
    /// The longest context of one session; 0 where the node does not say.
    pub context_tokens_max: u32,
}

/// A published epoch whose bytes the announcing node has.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct EpochNotice {
    /// The epoch; the hash of its bytes, so a lie is noticed when they are fetched.
    pub epoch: EpochId,
    /// What people call it.
    pub name: String,
    /// Blocks of the whole model.
    pub blocks: u32,
    /// The blob of the bytes of the [`Epoch`](crate::epoch::Epoch).
    pub manifest: BlobId,
    /// How many bytes that blob has.
    pub bytes: u64,
}

/// All that a node offers, in place of all that it offered before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    /// Format version, 1.
    pub version: u16,
    /// In which federation.
    pub federation: FederationId,
    /// Who; it signs.
    pub node: NodeId,
    /// What the node shows of itself, for those who have not met it.
    pub credentials: Vec<u8>,
    /// Of a node's announcements the one with the highest number holds.
    pub sequence: u64,
    /// From then on it says nothing.
    pub expires: UnixSeconds,
    /// What it serves.
    pub stages: Vec<StageOffer>,
    /// What it knows to be published.
    pub epochs: Vec<EpochNotice>,
}

impl Statement for Announcement {
    const DOMAIN: &'static str = "polder announcement 1";
    const BYTES_MAX: usize = ANNOUNCEMENT_BYTES_MAX;
}

/// Asks a member for a page of its directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PageRequest {
    /// The last node of the page before; `None` for the first page.
    pub after: Option<NodeId>,
}

/// Announcements in the order of their nodes, as they were signed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Page {
    /// Encoded [`Signed`](crate::identity::Signed) announcements.
    pub announcements: Vec<Vec<u8>>,
    /// What to ask for next; `None` after the last page.
    pub next: Option<NodeId>,
}

/// The longest page; a request to the control plane may be four times as long.
pub const PAGE_BYTES_MAX: usize = 256 << 10;

/// The most announcements of a page; the smallest has about 150 bytes.
pub const PAGE_ANNOUNCEMENTS_MAX: usize = 1_024;

impl Message for PageRequest {
    const BYTES_MAX: usize = 64;
    fn check(&self) -> Result<(), DecodeError> {
        Ok(())
    }
}

impl Message for Page {
    const BYTES_MAX: usize = PAGE_BYTES_MAX;
    fn check(&self) -> Result<(), DecodeError> {
        let count = self.announcements.len();
        if count <= PAGE_ANNOUNCEMENTS_MAX {
            return Ok(());
        }
        Err(DecodeError::TooMany {
            what: "announcements",
            count,
            limit: PAGE_ANNOUNCEMENTS_MAX,
        })
    }
}
