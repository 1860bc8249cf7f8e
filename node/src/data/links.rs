//! The connections that stand, by peer and class.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use polder_protocol::hash::NodeId;
use tokio::time::Instant;

use super::error::{Closing, DataError};
use super::greeting::{Greeted, close};
use super::settings::{Class, LINKS_PER_PEER_MAX};
use super::traffic::Counter;
use crate::gate::{Admitted, Gate};

/// One connection whose ends have admitted each other.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) connection: quinn::Connection,
    pub(super) admitted: Admitted,
    pub(super) class: Class,
    pub(super) counter: Arc<Counter>,
    /// Where the peer sees this node.
    pub(super) seen_as: SocketAddr,
    instance: u64,
    credentials: Bytes,
}

impl Link {
    pub(super) fn new(connection: quinn::Connection, class: Class, greeted: Greeted, counter: Arc<Counter>) -> Self {
        Self {
            connection,
            admitted: greeted.admitted,
            class,
            counter,
            seen_as: greeted.greeting.you_are,
            instance: greeted.greeting.instance,
            credentials: greeted.credentials,
        }
    }

    fn stands(&self) -> bool {
        self.connection.close_reason().is_none()
    }
}

type Key = (NodeId, Class);

/// Held while dialling. It keeps the last failure, for those who waited for that very dial.
pub(super) type Dialling = Arc<tokio::sync::Mutex<Option<(Instant, DataError)>>>;

/// All links. At most [`LINKS_PER_PEER_MAX`] of each class for each admitted peer.
#[derive(Debug, Default)]
pub(super) struct Links {
    standing: Mutex<BTreeMap<Key, Vec<Arc<Link>>>>,
    // Held while dialling, so that callers who want the same link wait for one dial.
    dialling: Mutex<BTreeMap<Key, Dialling>>,
}

impl Links {
    /// The newest standing link.
    pub(super) fn find(&self, peer: NodeId, class: Class) -> Option<Arc<Link>> {
        let standing = self.standing();
        let links = standing.get(&(peer, class))?;
        links.iter().rev().find(|link| link.stands()).cloned()
    }

    pub(super) fn add(&self, link: Arc<Link>) {
        let mut standing = self.standing();
        let peer = link.admitted.node;
        for class in [Class::Act, Class::Bulk] {
            for other in standing.get(&(peer, class)).into_iter().flatten() {
                if other.instance != link.instance {
                    close(&other.connection, Closing::Replaced, "the node was started again");
                }
            }
        }
        let links = standing.entry((peer, link.class)).or_default();
        links.retain(|link| link.stands());
        if links.len() >= LINKS_PER_PEER_MAX {
            let oldest = links.remove(0);
            close(&oldest.connection, Closing::Replaced, "too many connections");
        }
        links.push(link);
    }

    pub(super) fn remove(&self, link: &Arc<Link>) {
        let mut standing = self.standing();
        let key = (link.admitted.node, link.class);
        if let Some(links) = standing.get_mut(&key) {
            links.retain(|other| !Arc::ptr_eq(other, link));
            if links.is_empty() {
                standing.remove(&key);
            }
        }
    }

    /// The lock that a dialler of this link holds.
    pub(super) fn dialling(&self, peer: NodeId, class: Class) -> Dialling {
        let mut dialling = self.dialling.lock().unwrap_or_else(PoisonError::into_inner);
        // Locks that nobody holds are of no use any more.
        dialling.retain(|_, lock| Arc::strong_count(lock) > 1);
        dialling.entry((peer, class)).or_default().clone()
    }

    /// Asks the gate again about every link, and closes those that are no longer welcome.
    pub(super) fn recheck(&self, gate: &dyn Gate) {
        for link in self.all() {
            if let Err(refused) = gate.admit(link.admitted.node, &link.credentials) {
                tracing::warn!(peer = %link.admitted.node, reason = %refused.reason, "peer is no longer admitted");
                close(&link.connection, Closing::Refused, &refused.reason);
            }
        }
    }

    pub(super) fn all(&self) -> Vec<Arc<Link>> {
        self.standing().values().flatten().cloned().collect()
    }

    fn standing(&self) -> MutexGuard<'_, BTreeMap<Key, Vec<Arc<Link>>>> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
