//! The connections that stand, by peer and class.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use polder_protocol::hash::NodeId;
use tokio::time::Instant;

use super::error::{Closing, DataError};
use super::greeting::{Greeted, close};
use super::roads::{is_straight_tunnel, is_tunnel};
use super::settings::{Class, LINKS_PER_PEER_MAX};
use super::traffic::Counter;
use crate::gate::{Admitted, Gate};

/// How long after a punch a new connection is taken for its fruit.
const PUNCH_BEARS: Duration = Duration::from_secs(8);

/// Which way a connection goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Road {
    /// Straight to an address that answers.
    Direct,
    /// Straight, after both routers were made to let it through.
    Punched,
    /// Inside a stream of the control plane that goes straight to the peer: over TCP, where UDP is blocked.
    Tcp,
    /// Inside a stream of the control plane that goes through a gateway.
    Relayed,
}

impl Road {
    /// The word for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Punched => "punched",
            Self::Tcp => "tcp",
            Self::Relayed => "relayed",
        }
    }

    /// Whether packets travel inside a stream, so that a straight way would be better.
    pub fn is_tunnel(self) -> bool {
        matches!(self, Self::Tcp | Self::Relayed)
    }
}

/// One connection whose ends have admitted each other.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) connection: quinn::Connection,
    pub(super) admitted: Admitted,
    pub(super) class: Class,
    pub(super) counter: Arc<Counter>,
    /// Where the peer sees this node.
    pub(super) seen_as: SocketAddr,
    pub(super) road: Road,
    /// Where the peer was when the connection began.
    pub(super) remote: SocketAddr,
    /// Held while a chunk goes out: whole chunks, one after the other.
    pub(super) sending: tokio::sync::Mutex<()>,
    instance: u64,
    credentials: Bytes,
}

impl Link {
    pub(super) fn new(
        connection: quinn::Connection,
        class: Class,
        greeted: Greeted,
        counter: Arc<Counter>,
        road: Road,
    ) -> Self {
        Self {
            remote: connection.remote_address(),
            sending: tokio::sync::Mutex::default(),
            road,
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
    punched: Mutex<BTreeMap<NodeId, Instant>>,
    moves: Mutex<BTreeMap<NodeId, u64>>,
}

impl Links {
    /// The newest standing link, straight ones first.
    pub(super) fn find(&self, peer: NodeId, class: Class) -> Option<Arc<Link>> {
        let standing = self.standing();
        let links = standing.get(&(peer, class))?;
        let stands = links.iter().rev().filter(|link| link.stands());
        stands.min_by_key(|link| link.road.max(Road::Punched)).cloned()
    }

    /// A connection with `peer` that comes soon is the fruit of a punch.
    pub(super) fn expect_punched(&self, peer: NodeId) {
        let mut punched = self.punched.lock().unwrap_or_else(PoisonError::into_inner);
        punched.retain(|_, at| at.elapsed() < PUNCH_BEARS);
        punched.insert(peer, Instant::now());
    }

    /// Which way a new connection with `peer` goes.
    pub(super) fn road(&self, peer: NodeId, remote: SocketAddr) -> Road {
        let punched = self.punched.lock().unwrap_or_else(PoisonError::into_inner);
        match remote.ip().to_canonical() {
            _ if is_tunnel(remote) => match is_straight_tunnel(remote) {
                true => Road::Tcp,
                false => Road::Relayed,
            },
            // A neighbour behind the same router needs no hole.
            IpAddr::V4(ip) if ip.is_private() => Road::Direct,
            _ if punched.get(&peer).is_some_and(|at| at.elapsed() < PUNCH_BEARS) => Road::Punched,
            _ => Road::Direct,
        }
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
            // The detours go first: what they were for stands.
            let place = links.iter().position(|link| link.road.is_tunnel()).unwrap_or(0);
            let oldest = links.remove(place);
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

    /// This machine has lost the address that a connection with `peer` went out from.
    pub(super) fn note_move(&self, peer: NodeId) {
        let mut moves = self.moves.lock().unwrap_or_else(PoisonError::into_inner);
        *moves.entry(peer).or_default() += 1;
    }

    /// How often. To the peer each is as a restart: it closes what led to the old address.
    pub(super) fn moves(&self, peer: NodeId) -> u64 {
        let moves = self.moves.lock().unwrap_or_else(PoisonError::into_inner);
        moves.get(&peer).copied().unwrap_or_default()
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
