//! Counts what crossed the wire, for each peer and class.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use polder_protocol::hash::NodeId;

use super::settings::Class;

/// Bytes of frames between this node and one peer since the data plane started. QUIC adds about three per cent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerTraffic {
    /// The peer.
    pub peer: NodeId,
    /// The connection.
    pub class: Class,
    /// Bytes sent to it.
    pub bytes_sent: u64,
    /// Bytes received from it.
    pub bytes_received: u64,
}

/// The counters of one peer and class.
#[derive(Debug, Default)]
pub(super) struct Counter {
    pub(super) sent: AtomicU64,
    pub(super) received: AtomicU64,
}

impl Counter {
    pub(super) fn add_sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn add_received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// All counters. Only admitted peers get one, so there are at most two for each member of the federation.
#[derive(Debug, Default)]
pub(super) struct Traffic(Mutex<BTreeMap<(NodeId, Class), Arc<Counter>>>);

impl Traffic {
    pub(super) fn counter(&self, peer: NodeId, class: Class) -> Arc<Counter> {
        let mut counters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counters.entry((peer, class)).or_default().clone()
    }

    pub(super) fn all(&self) -> Vec<PeerTraffic> {
        let counters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let read = |((peer, class), counter): (&(NodeId, Class), &Arc<Counter>)| PeerTraffic {
            peer: *peer,
            class: *class,
            bytes_sent: counter.sent.load(Ordering::Relaxed),
            bytes_received: counter.received.load(Ordering::Relaxed),
        };
        counters.iter().map(read).collect()
    }
}
