//! Who serves what, and which epochs exist: announcements that nodes sign, that expire, and that anybody may pass on.
//!
//! Nobody owns the directory. Each node keeps what it has heard, checks it alone, and forgets it when its author falls
//! silent; a node that joins asks another for all that it holds.

mod announcement;
mod snapshot;
#[cfg(test)]
mod tests;

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::Bound;

use thiserror::Error;

use crate::charter::{CLOCK_SKEW_SECONDS, Capabilities};
use crate::hash::{EpochId, FederationId, InstitutionId, NodeId};
use crate::identity::{Signed, SignedError};
use crate::route::Offer;
use crate::time::UnixSeconds;

pub use snapshot::{Snapshots, Verdict};

pub use announcement::{
    ANNOUNCED_CREDENTIALS_BYTES_MAX, ANNOUNCEMENT_BYTES_MAX, ANNOUNCEMENT_SECONDS, ANNOUNCEMENT_VERSION, Announcement,
    EPOCH_NAME_BYTES_MAX, EPOCHS_MAX, EpochNotice, PAGE_ANNOUNCEMENTS_MAX, PAGE_BYTES_MAX, Page, PageRequest,
    STAGES_MAX, StageOffer,
};

/// The most nodes of a directory: a large federation. An announcement is some 500 bytes, so 8 MiB; at worst, when every
/// certified node says as much as it may, 192 MiB.
pub const NODES_MAX: usize = 16_384;

/// Those of one institution, however many certificates it signs.
pub const INSTITUTION_NODES_MAX: usize = NODES_MAX / 4;

/// Announcements of all nodes together, each second. Gossip brings each some four times: 20 KiB/s at every node.
pub const ANNOUNCEMENTS_PER_SECOND: u64 = 10;

/// The longest that any announcement is believed: in a full directory.
pub const ANNOUNCEMENT_SECONDS_MAX: u64 = 3 * (NODES_MAX as u64).div_ceil(ANNOUNCEMENTS_PER_SECOND);

/// Room for the version, the count and the end of a page, and for the length of each announcement.
const PAGE_OVERHEAD_BYTES: usize = 64;
const LENGTH_BYTES_MAX: usize = 3;

/// What an announcing node may say, from its credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Whose node it is.
    pub institution: InstitutionId,
    /// What it may do.
    pub capabilities: Capabilities,
}

/// An epoch, as the nodes that have its bytes describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownEpoch {
    /// What they say.
    pub notice: EpochNotice,
    /// Who says exactly this, in the order of their ids.
    pub holders: Vec<NodeId>,
}

/// What an announcement changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The node offers something else than before.
    Offers,
    /// The node offers the same for longer.
    Renewed,
    /// This or a newer one was known.
    Nothing,
}

/// Why an announcement is not kept.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum AnnouncementError {
    #[error("announcement is not signed: {0}")]
    Signed(#[from] SignedError),
    #[error("announcement has format version {version}, this program reads {ANNOUNCEMENT_VERSION}")]
    Version { version: u16 },
    #[error("announcement is of the federation {0}")]
    OtherFederation(FederationId),
    #[error("announcement of node {node} is signed by another key")]
    WrongKey { node: NodeId },
    #[error("announcement of node {node} expired at {expired} (unix seconds); it is now {now}")]
    Expired { node: NodeId, expired: u64, now: u64 },
    #[error("announcement of node {node} is for {life_seconds} seconds, over the limit of {ANNOUNCEMENT_SECONDS_MAX}")]
    TooLong { node: NodeId, life_seconds: u64 },
    #[error("announcement of node {node} has {count} {what}, over the limit of {limit}")]
    TooMany {
        node: NodeId,
        what: &'static str,
        count: usize,
        limit: usize,
    },
    #[error("announcement of node {node} has an empty range of blocks")]
    Range { node: NodeId },
    #[error("node {node}, which announces something, may not be here")]
    NotAdmitted { node: NodeId },
    #[error("directory holds {INSTITUTION_NODES_MAX} nodes of institution {institution}, which is its share")]
    Share { institution: InstitutionId },
    #[error("directory holds {NODES_MAX} nodes, which is its limit")]
    Full,
}

/// What one node has announced.
#[derive(Debug, Clone)]
struct Entry {
    signed: Signed<Announcement>,
    sequence: u64,
    institution: InstitutionId,
    stages: Vec<StageOffer>,
    epochs: Vec<EpochNotice>,
    heard_at: UnixSeconds,
    // Its node has left, or was not heard for too long; it stays so that an old announcement does not bring it back,
    left: bool,
    // until no clock believes any announcement that came before it.
    end: UnixSeconds,
}

impl Entry {
    fn gone_at(&self, life_seconds: u64) -> UnixSeconds {
        UnixSeconds(self.heard_at.0.saturating_add(life_seconds)).min(self.end)
    }
}

/// How often a node repeats its announcement where so many are known: all of them together are heard
/// [`ANNOUNCEMENTS_PER_SECOND`] times a second at most, so what a node hears does not grow with the federation.
pub fn repeat_seconds(nodes: usize) -> u64 {
    let nodes = u64::try_from(nodes.min(NODES_MAX)).unwrap_or(u64::MAX);
    nodes.div_ceil(ANNOUNCEMENTS_PER_SECOND).max(ANNOUNCEMENT_SECONDS / 3)
}

/// How long an announcement is believed where so many nodes are known: two of its repetitions may be lost.
pub fn announcement_seconds(nodes: usize) -> u64 {
    repeat_seconds(nodes).saturating_mul(3)
}

/// What this node has heard of all nodes.
///
/// It holds at most one announcement for each of [`NODES_MAX`] nodes, and each is at most [`ANNOUNCEMENT_BYTES_MAX`]
/// long.
#[derive(Debug, Clone)]
pub struct Directory {
    federation: FederationId,
    entries: BTreeMap<NodeId, Entry>,
}

impl Directory {
    /// Nothing is known yet.
    pub fn new(federation: FederationId) -> Self {
        Self {
            federation,
            entries: BTreeMap::new(),
        }
    }

    /// Keeps an announcement, if its signature holds, its node may be here, and it is the newest of its node.
    ///
    /// `admit` judges the node's credentials. Stages of a node that may not serve are not kept.
    ///
    /// # Errors
    ///
    /// [`AnnouncementError`] for anything else; the directory is as before.
    pub fn insert(
        &mut self,
        now: UnixSeconds,
        signed: Signed<Announcement>,
        admit: impl FnOnce(NodeId, &[u8]) -> Option<Standing>,
    ) -> Result<Change, AnnouncementError> {
        // Most of what arrives is known already: that is seen before a signature costs anything.
        let known = self.entries.get(&NodeId(signed.by()));
        if known.is_some_and(|known| known.signed == signed) {
            return Ok(Change::Nothing);
        }
        if let (Some(known), Some(claim)) = (known, signed.claim())
            && claim.sequence <= known.sequence
        {
            return Ok(Change::Nothing);
        }
        let announcement = signed.open()?;
        self.check(now, signed.by(), &announcement)?;
        let node = announcement.node;
        let standing = admit(node, &announcement.credentials).ok_or(AnnouncementError::NotAdmitted { node })?;
        if !self.entries.contains_key(&node) {
            self.make_room(standing.institution)?;
        }
        let may = |what| standing.capabilities.has(what);
        let stages = if may(Capabilities::SERVE) {
            announcement.stages
        } else {
            Vec::new()
        };
        let epochs = if may(Capabilities::SERVE) || may(Capabilities::PUBLISH) {
            announcement.epochs
        } else {
            Vec::new()
        };
        // Clocks differ: it is believed for its time from now on, and never beyond its end on the slowest clock.
        let end = UnixSeconds(announcement.expires.0.saturating_add(CLOCK_SKEW_SECONDS));
        let entry = Entry {
            signed,
            sequence: announcement.sequence,
            institution: standing.institution,
            stages,
            epochs,
            heard_at: now,
            left: false,
            end,
        };
        let same = |old: &Entry| !old.left && old.stages == entry.stages && old.epochs == entry.epochs;
        let nothing = entry.stages.is_empty() && entry.epochs.is_empty();
        let change = match self.entries.get(&node) {
            Some(old) if same(old) => Change::Renewed,
            None if nothing => Change::Renewed,
            Some(_) | None => Change::Offers,
        };
        self.entries.insert(node, entry);
        Ok(change)
    }

    /// A place for one more node of `institution`, in the stead of one that has left where there is none.
    fn make_room(&mut self, institution: InstitutionId) -> Result<(), AnnouncementError> {
        let own = self.entries.values().filter(|entry| entry.institution == institution);
        let (full, crowded) = (self.entries.len() >= NODES_MAX, own.count() >= INSTITUTION_NODES_MAX);
        if !full && !crowded {
            return Ok(());
        }
        let gone = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.left && (!crowded || entry.institution == institution));
        let first = gone.min_by_key(|(_, entry)| entry.end).map(|(node, _)| *node);
        match first {
            Some(node) => {
                self.entries.remove(&node);
                Ok(())
            }
            None if crowded => Err(AnnouncementError::Share { institution }),
            None => Err(AnnouncementError::Full),
        }
    }

    fn check(&self, now: UnixSeconds, by: [u8; 32], announcement: &Announcement) -> Result<(), AnnouncementError> {
        let node = announcement.node;
        let too_many = |what, count, limit| {
            Err(AnnouncementError::TooMany {
                node,
                what,
                count,
                limit,
            })
        };
        if announcement.version != ANNOUNCEMENT_VERSION {
            let version = announcement.version;
            return Err(AnnouncementError::Version { version });
        }
        if announcement.federation != self.federation {
            return Err(AnnouncementError::OtherFederation(announcement.federation));
        }
        if node != NodeId(by) {
            return Err(AnnouncementError::WrongKey { node });
        }
        let expires = announcement.expires.0;
        if expires.saturating_add(CLOCK_SKEW_SECONDS) <= now.0 {
            let (expired, now) = (expires, now.0);
            return Err(AnnouncementError::Expired { node, expired, now });
        }
        if expires > now.0.saturating_add(ANNOUNCEMENT_SECONDS_MAX + CLOCK_SKEW_SECONDS) {
            let life_seconds = expires - now.0;
            return Err(AnnouncementError::TooLong { node, life_seconds });
        }
        let credentials = announcement.credentials.len();
        if credentials > ANNOUNCED_CREDENTIALS_BYTES_MAX {
            return too_many("bytes of credentials", credentials, ANNOUNCED_CREDENTIALS_BYTES_MAX);
        }
        if announcement.stages.len() > STAGES_MAX {
            return too_many("stages", announcement.stages.len(), STAGES_MAX);
        }
        if announcement.epochs.len() > EPOCHS_MAX {
            return too_many("epochs", announcement.epochs.len(), EPOCHS_MAX);
        }
        let long = announcement.epochs.iter().map(|notice| notice.name.len());
        if let Some(count) = long.max().filter(|length| *length > EPOCH_NAME_BYTES_MAX) {
            return too_many("bytes of an epoch's name", count, EPOCH_NAME_BYTES_MAX);
        }
        if announcement
            .stages
            .iter()
            .any(|stage| stage.range.first >= stage.range.end)
        {
            return Err(AnnouncementError::Range { node });
        }
        Ok(())
    }

    /// Takes back what a node that has left offered, until it announces something newer. Whether that changes anything.
    pub fn forget(&mut self, node: NodeId) -> bool {
        match self.entries.get_mut(&node) {
            Some(entry) if !entry.left => {
                entry.left = true;
                true
            }
            Some(_) | None => false,
        }
    }

    /// Drops what has expired. Whether that changes anything.
    pub fn expire(&mut self, now: UnixSeconds) -> bool {
        let mut changed = false;
        let life = announcement_seconds(self.entries.len());
        self.entries.retain(|_, entry| {
            if now >= entry.gone_at(life) && !entry.left {
                entry.left = true;
                changed = true;
            }
            now < entry.end
        });
        changed
    }

    /// When to call [`Self::expire`] next.
    pub fn wake_at(&self) -> Option<UnixSeconds> {
        let life = announcement_seconds(self.entries.len());
        let due = |entry: &Entry| if entry.left { entry.end } else { entry.gone_at(life) };
        self.entries.values().map(due).min()
    }

    /// The number of the newest announcement of `node` that is known.
    pub fn sequence(&self, node: NodeId) -> Option<u64> {
        self.entries.get(&node).map(|entry| entry.sequence)
    }

    /// How many nodes are known, those that have left a short while ago among them.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nobody is known.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Nodes that are here, with or without offers.
    pub fn nodes(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.present().map(|(node, _)| node)
    }

    /// Stages of `epoch`, in the order of their nodes; latencies are not known here.
    pub fn offers(&self, epoch: EpochId) -> Vec<Offer> {
        let offers = self.present().flat_map(|(node, entry)| {
            let stages = entry.stages.iter().filter(move |stage| stage.epoch == epoch);
            stages.map(move |stage| Offer {
                node,
                institution: entry.institution,
                range: stage.range,
                token_micros: stage.token_micros,
                latency_micros: 0,
                sessions_free: stage.sessions_free,
            })
        });
        offers.collect()
    }

    /// Published epochs, by id. Where nodes describe one differently, each description stands with those who gave it.
    pub fn epochs(&self) -> Vec<KnownEpoch> {
        let mut known: BTreeMap<&EpochNotice, Vec<NodeId>> = BTreeMap::new();
        for (node, entry) in self.present() {
            for notice in &entry.epochs {
                let holders = known.entry(notice).or_default();
                if holders.last() != Some(&node) {
                    holders.push(node);
                }
            }
        }
        let known = known.into_iter().map(|(notice, holders)| KnownEpoch {
            notice: notice.clone(),
            holders,
        });
        known.collect()
    }

    /// The announcements of the nodes after `request.after`, as many as a page holds.
    pub fn page(&self, request: PageRequest) -> Page {
        let after = request.after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut page = Page::default();
        let mut bytes = PAGE_OVERHEAD_BYTES;
        let mut last = None;
        let present = self
            .entries
            .range((after, Bound::Unbounded))
            .filter(|(_, entry)| !entry.left);
        for (node, entry) in present {
            let signed = entry.signed.to_bytes();
            bytes = bytes.saturating_add(signed.len()).saturating_add(LENGTH_BYTES_MAX);
            if bytes > PAGE_BYTES_MAX || page.announcements.len() >= PAGE_ANNOUNCEMENTS_MAX {
                page.next = last;
                break;
            }
            page.announcements.push(signed);
            last = Some(*node);
        }
        page
    }

    fn present(&self) -> impl Iterator<Item = (NodeId, &Entry)> + '_ {
        let here = self.entries.iter().filter(|(_, entry)| !entry.left);
        here.map(|(node, entry)| (*node, entry))
    }
}
