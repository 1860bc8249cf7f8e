//! Peers that were met, over restarts: in the index, since they can be met again. The doors of the invite, without which
//! nobody can be met, stay in a file.

use std::sync::Arc;

use polder_protocol::hash::NodeId;
use polder_protocol::time::UnixSeconds;
use serde::{Deserialize, Serialize};

use crate::control::ControlHandle;
use crate::home::KnownPeer;
use crate::store::{Store, StoreError};

/// Keys are this and the node's id.
const PREFIX: &[u8] = b"peer/";

/// Acquaintances that are kept; a start dials a few of the latest.
const KEPT_MAX: usize = 1_024;

/// Those that a start begins with.
const BEGIN_WITH_MAX: usize = 64;

/// Who has not been met for so long has moved: 90 days.
const FORGET_AFTER_SECONDS: u64 = 90 * 24 * 3_600;

/// A peer, and when it was last here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Met {
    peer: KnownPeer,
    at: u64,
}

/// The index's part about peers.
#[derive(Clone)]
pub(crate) struct Acquaintances(Arc<dyn Store>);

impl Acquaintances {
    pub(super) fn new(store: Arc<dyn Store>) -> Self {
        Self(store)
    }

    /// Keeps the peers that are present.
    pub(super) fn remember(&self, control: &ControlHandle, now: UnixSeconds) {
        let present = control.present().into_iter().map(|record| KnownPeer {
            node: record.node.to_string(),
            control: record.control_addresses,
            data: record.data_addresses,
        });
        if let Err(error) = self.keep(present, now) {
            tracing::warn!(%error, "cannot keep the peers for the next start");
        }
    }

    fn keep(&self, peers: impl Iterator<Item = KnownPeer>, now: UnixSeconds) -> Result<(), StoreError> {
        for peer in peers {
            let key = [PREFIX, peer.node.as_bytes()].concat();
            // A peer holds nothing that JSON cannot write.
            let value = serde_json::to_vec(&Met { peer, at: now.0 }).unwrap_or_default();
            match self.0.put(&key, &value) {
                // Someone with a hundred addresses can be found through others.
                Ok(()) | Err(StoreError::TooLong { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        for (key, _) in self.all()?.iter().enumerate().filter_map(|(rank, (key, met))| {
            let forgotten = rank >= KEPT_MAX || now.0.saturating_sub(met.at) > FORGET_AFTER_SECONDS;
            forgotten.then_some((key, met))
        }) {
            self.0.remove(key)?;
        }
        self.0.flush()
    }

    /// The peers that were met last, the latest first.
    pub(super) fn latest(&self) -> Vec<(NodeId, Vec<String>)> {
        let known = self.all().unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot read the peers of the last time");
            Vec::new()
        });
        let begin = known.into_iter().take(BEGIN_WITH_MAX);
        begin
            .filter_map(|(_, met)| Some((met.peer.id()?, met.peer.control)))
            .collect()
    }

    /// All that can be read, the latest first.
    fn all(&self) -> Result<Vec<(Vec<u8>, Met)>, StoreError> {
        let entries = self.0.scan(PREFIX, KEPT_MAX.saturating_mul(2))?;
        let read = |(key, value): (Vec<u8>, Vec<u8>)| Some((key, serde_json::from_slice(&value).ok()?));
        let mut known: Vec<(Vec<u8>, Met)> = entries.into_iter().filter_map(read).collect();
        known.sort_by_key(|(_, met)| std::cmp::Reverse(met.at));
        Ok(known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    #[test]
    fn the_latest_come_first_and_the_long_gone_are_forgotten() {
        let known = Acquaintances::new(Arc::new(MemoryStore::default()));
        let peer = |id: u8| KnownPeer {
            node: NodeId([id; 32]).to_string(),
            control: vec![format!("/ip4/127.0.0.1/tcp/{id}")],
            data: Vec::new(),
        };
        let day = 24 * 3_600;
        known.keep([peer(1)].into_iter(), UnixSeconds(0)).expect("kept");
        known.keep([peer(2)].into_iter(), UnixSeconds(50 * day)).expect("kept");
        let nodes = |known: &Acquaintances| -> Vec<u8> { known.latest().iter().map(|(node, _)| node.0[0]).collect() };
        assert_eq!(nodes(&known), [2, 1]);
        known.keep([peer(3)].into_iter(), UnixSeconds(91 * day)).expect("kept");
        assert_eq!(nodes(&known), [3, 2]);
    }
}
