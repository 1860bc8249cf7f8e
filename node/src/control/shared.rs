//! What the handle and the driver both see.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use polder_protocol::hash::NodeId;
use polder_protocol::time::UnixSeconds;
use polder_protocol::wire::Service;
use tokio::sync::{broadcast, mpsc, watch};

use super::relayed::Relayed;
use super::{Addresses, Gossip, Incoming, Path, PeerEvent, PeerRecord};

/// Members remembered, connected or not. The longest unseen of those not connected is forgotten first.
const RECORDS_MAX: usize = 4096;

/// Events that a slow listener may lag behind before it misses some.
const EVENTS_MAX: usize = 256;

/// State behind short locks. No lock is held while another is taken, nor across an `await`.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) node: NodeId,
    pub(super) listen_addresses: Mutex<Vec<String>>,
    pub(super) data_addresses: Mutex<Vec<SocketAddr>>,
    /// Where this node tells others that it is.
    pub(super) told: watch::Sender<Addresses>,
    pub(super) peers: Mutex<BTreeMap<NodeId, PeerRecord>>,
    pub(super) services: Mutex<BTreeMap<Service, mpsc::Sender<Incoming>>>,
    pub(super) topics: Mutex<BTreeMap<String, Vec<mpsc::Sender<Gossip>>>>,
    pub(super) events: broadcast::Sender<PeerEvent>,
    pub(super) relayed: Relayed,
}

impl Shared {
    pub(super) fn new(node: NodeId, data_addresses: Vec<SocketAddr>) -> Self {
        Self {
            node,
            listen_addresses: Mutex::default(),
            data_addresses: Mutex::new(data_addresses),
            told: watch::Sender::default(),
            peers: Mutex::default(),
            services: Mutex::default(),
            topics: Mutex::default(),
            events: broadcast::Sender::new(EVENTS_MAX),
            relayed: Relayed::default(),
        }
    }

    /// Whether `node` is a member that is connected now.
    pub(super) fn is_present(&self, node: NodeId) -> bool {
        lock(&self.peers)
            .get(&node)
            .is_some_and(|record| record.path != Path::Lost)
    }

    /// Keeps a record, and tells listeners when its node was not present before.
    pub(super) fn keep(&self, record: PeerRecord) {
        let new = {
            let mut peers = lock(&self.peers);
            let new = peers.get(&record.node).is_none_or(|old| old.path == Path::Lost);
            peers.insert(record.node, record.clone());
            if peers.len() > RECORDS_MAX {
                let lost = peers.values().filter(|peer| peer.path == Path::Lost);
                let oldest = lost.min_by_key(|peer| peer.last_seen).map(|peer| peer.node);
                oldest.map(|node| peers.remove(&node));
            }
            new
        };
        if new {
            self.tell(PeerEvent::Joined(record));
        }
    }

    /// Changes the record of `node`, where there is one.
    pub(super) fn change(&self, node: NodeId, change: impl FnOnce(&mut PeerRecord)) {
        if let Some(record) = lock(&self.peers).get_mut(&node) {
            change(record);
        }
    }

    /// Forgets a member that left or is no longer one.
    pub(super) fn forget(&self, node: NodeId, reason: String) {
        let known = lock(&self.peers).remove(&node).is_some();
        if known {
            self.tell(PeerEvent::Left { node, reason });
        }
    }

    pub(super) fn tell(&self, event: PeerEvent) {
        // An error means that nobody listens.
        let _ = self.events.send(event);
    }
}

/// Takes a lock, also after a panic elsewhere: all values behind these locks are valid after every statement.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The machine's clock, for records and certificates.
pub(super) fn unix_now() -> UnixSeconds {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    UnixSeconds(since.map_or(0, |since| since.as_secs()))
}
