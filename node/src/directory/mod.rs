//! The directory on the network: this node's own announcements go out, others' come in by gossip and in pages.
//!
//! An own announcement is repeated every half minute, less often where there are many nodes, and at once when it changes. A node that meets another asks it
//! for its pages, so a newcomer need not wait for half a minute of gossip.

mod service;
mod serving;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use polder_protocol::charter::Capabilities;
use polder_protocol::directory::{
    ANNOUNCEMENT_VERSION, Announcement, AnnouncementError, Change, Directory, EPOCHS_MAX, EpochNotice, KnownEpoch,
    STAGES_MAX, Snapshots, StageOffer, Standing, announcement_seconds,
};
use polder_protocol::hash::{EpochId, FederationId, NodeId};
use polder_protocol::identity::{KeyPair, Signed, SignedError};
use polder_protocol::route::Offer;
use polder_protocol::time::UnixSeconds;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::control::ControlHandle;
use crate::gate::Gate;

/// Clocks of others that are remembered: enough for their middle.
const CLOCKS_MAX: usize = 64;

/// The directory, for the rest of the node. Clones are cheap and all mean the same.
#[derive(Clone)]
pub struct DirectoryHandle {
    inner: Arc<Inner>,
}

struct Inner {
    control: ControlHandle,
    key: KeyPair,
    federation: FederationId,
    gate: Arc<dyn Gate>,
    state: Mutex<State>,
    /// Counts changes of what others or this node offer.
    changes: watch::Sender<u64>,
    /// Wakes the task that announces.
    announce: Notify,
    stop: CancellationToken,
}

struct State {
    directory: Directory,
    /// What members told when they were asked for all.
    snapshots: Snapshots,
    stages: Vec<StageOffer>,
    epochs: BTreeMap<EpochId, EpochNotice>,
    sequence: u64,
    /// By how many seconds the clocks of others are ahead of this one, as their own announcements tell.
    clocks: BTreeMap<NodeId, i64>,
}

/// Starts to announce and to listen, on the present tokio runtime.
///
/// `key` is the node's own; `gate` judges the credentials of those who announce.
pub fn start(control: ControlHandle, key: KeyPair, federation: FederationId, gate: Arc<dyn Gate>) -> DirectoryHandle {
    let inner = Arc::new(Inner {
        control,
        key,
        federation,
        gate,
        state: Mutex::new(State {
            directory: Directory::new(federation),
            snapshots: Snapshots::default(),
            stages: Vec::new(),
            epochs: BTreeMap::new(),
            // Above every number of an earlier life of this node, unless the clock went back.
            sequence: unix_micros(),
            clocks: BTreeMap::new(),
        }),
        changes: watch::Sender::new(0),
        announce: Notify::new(),
        stop: CancellationToken::new(),
    });
    service::spawn(&inner);
    DirectoryHandle { inner }
}

impl DirectoryHandle {
    /// Offers `stages` in place of all that this node offered before. An empty list takes everything back.
    pub fn announce(&self, stages: Vec<StageOffer>) {
        let mut stages = stages;
        stages.truncate(STAGES_MAX);
        let mut state = self.inner.lock();
        if state.stages != stages {
            state.stages = stages;
            drop(state);
            self.inner.announce.notify_one();
        }
    }

    /// Tells others of an epoch whose bytes this node has. Of more than [`EPOCHS_MAX`], those with the smallest ids
    /// are told.
    pub fn publish_epoch(&self, notice: EpochNotice) {
        let mut state = self.inner.lock();
        if state.epochs.insert(notice.epoch, notice.clone()) != Some(notice) {
            drop(state);
            self.inner.announce.notify_one();
        }
    }

    /// Takes an epoch of this node back.
    pub fn withdraw_epoch(&self, epoch: EpochId) {
        let withdrawn = self.inner.lock().epochs.remove(&epoch).is_some();
        if withdrawn {
            self.inner.announce.notify_one();
        }
    }

    /// Stages of `epoch`, this node's own among them, in the order of their nodes. Latencies are not known here.
    pub fn offers(&self, epoch: EpochId) -> Vec<Offer> {
        self.inner.lock().directory.offers(epoch)
    }

    /// Published epochs and who has their bytes.
    pub fn epochs(&self) -> Vec<KnownEpoch> {
        self.inner.lock().directory.epochs()
    }

    /// How many nodes have announced themselves and have not left, this one among them.
    pub fn known(&self) -> usize {
        self.inner.lock().directory.nodes().count()
    }

    /// By how many seconds the clocks of members are ahead of this machine's; below zero they are behind. Announcements say
    /// until when they are believed, and how long that is is known, so it is exact to a second or two while fewer than 300
    /// nodes are known, and to a minute beyond.
    pub fn clock_differences(&self) -> Vec<i64> {
        self.inner.lock().clocks.values().copied().collect()
    }

    /// A count that rises whenever offers or epochs change.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.inner.changes.subscribe()
    }

    /// Takes everything back and stops.
    pub async fn shutdown(&self) {
        {
            let mut state = self.inner.lock();
            state.stages.clear();
            state.epochs.clear();
        }
        self.inner.publish().await;
        self.inner.stop.cancel();
    }
}

impl Inner {
    /// Takes the lock, also after a panic elsewhere: the state is valid after every statement.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn topic(&self) -> String {
        format!("polder/{}/directory", self.federation)
    }

    /// Judges an announcement of this or another node and keeps it.
    fn insert(&self, signed: Signed<Announcement>) -> Result<Change, AnnouncementError> {
        if NodeId(signed.by()) == self.key.node() {
            return Ok(self.hear_echo(&signed)?);
        }
        let kept = self.lock().directory.insert(unix_now(), signed, |node, credentials| {
            standing(self.gate.as_ref(), node, credentials)
        });
        if kept == Ok(Change::Offers) {
            self.tell();
        }
        kept
    }

    /// Hears what this node said: in this life, or in an earlier one when its clock was ahead.
    fn hear_echo(&self, signed: &Signed<Announcement>) -> Result<Change, SignedError> {
        let sequence = signed.open()?.sequence;
        let mut state = self.lock();
        if sequence > state.sequence {
            state.sequence = sequence;
            drop(state);
            self.announce.notify_one();
        }
        Ok(Change::Nothing)
    }

    /// Signs what this node offers now, keeps it, and sends it to everybody. Whether anybody was there to hear it.
    async fn publish(&self) -> bool {
        let signed = self.own();
        let bytes = signed.to_bytes();
        let kept = self.lock().directory.insert(unix_now(), signed, |node, credentials| {
            standing(self.gate.as_ref(), node, credentials)
        });
        match kept {
            Ok(Change::Offers) => self.tell(),
            Ok(Change::Renewed | Change::Nothing) => {}
            // Others would refuse it as well.
            Err(error) => {
                tracing::warn!(%error, "this node's own announcement does not hold");
                return true;
            }
        }
        match self.control.publish(&self.topic(), bytes).await {
            Ok(()) => true,
            Err(error) => {
                tracing::debug!(%error, "the announcement was not heard");
                false
            }
        }
    }

    fn own(&self) -> Signed<Announcement> {
        let mut state = self.lock();
        state.sequence = state.sequence.saturating_add(1);
        let announcement = Announcement {
            version: ANNOUNCEMENT_VERSION,
            federation: self.federation,
            node: self.key.node(),
            credentials: self.gate.credentials(),
            sequence: state.sequence,
            expires: UnixSeconds(unix_now().0.saturating_add(announcement_seconds(state.directory.len()))),
            stages: state.stages.clone(),
            epochs: state.epochs.values().take(EPOCHS_MAX).cloned().collect(),
        };
        drop(state);
        Signed::new(&self.key, &announcement)
    }

    fn tell(&self) {
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
    }
}

impl State {
    /// Reads a member's clock off an announcement that has just come from it.
    fn note_clock(&mut self, node: NodeId, expires: UnixSeconds) {
        let life = announcement_seconds(self.directory.len());
        let (told, here) = (expires.0.saturating_sub(life), unix_now().0);
        let ahead = i64::try_from(told.abs_diff(here)).unwrap_or(i64::MAX);
        let ahead = if told < here { -ahead } else { ahead };
        if self.clocks.len() < CLOCKS_MAX || self.clocks.contains_key(&node) {
            self.clocks.insert(node, ahead);
        }
    }
}

fn standing(gate: &dyn Gate, node: NodeId, credentials: &[u8]) -> Option<Standing> {
    let admitted = gate.admit(node, credentials).ok()?;
    Some(Standing {
        institution: admitted.institution,
        capabilities: Capabilities(admitted.capabilities),
    })
}

fn unix_now() -> UnixSeconds {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    UnixSeconds(since.map_or(0, |since| since.as_secs()))
}

fn unix_micros() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
}
