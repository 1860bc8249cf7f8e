//! A door before a protocol: what strangers say waits in front of it until they are members, and is forgotten otherwise.
//!
//! libp2p's gossip, routing and probing talk to whoever connects. Behind this door they hear members only: no stranger
//! can enter a mesh or a routing table, ask for either, or have addresses probed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::{Deref, DerefMut};
use std::task::{Context, Poll};

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, DialError, DialFailure, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent,
    THandlerOutEvent, ToSwarm,
};
use libp2p::{Multiaddr, PeerId};

/// What one stranger may have said: its protocols and its subscriptions come before our answer to its greeting does.
const HELD_PER_PEER_MAX: usize = 8;

/// `B`, which hears members only.
pub(super) struct Door<B: NetworkBehaviour> {
    inner: B,
    members: BTreeSet<PeerId>,
    dials: bool,
    held: BTreeMap<PeerId, VecDeque<(ConnectionId, THandlerOutEvent<B>)>>,
}

impl<B: NetworkBehaviour> Door<B> {
    pub(super) fn before(inner: B) -> Self {
        Self {
            inner,
            members: BTreeSet::new(),
            dials: true,
            held: BTreeMap::new(),
        }
    }

    /// Whether the protocol may dial whom it has heard of. Where not, its dials fail at once, and it deals with those who are
    /// connected.
    pub(super) fn let_dial(&mut self, dials: bool) {
        self.dials = dials;
    }

    /// Lets `peer` be heard until its last connection ends or [`Self::dismiss`]; first what it has said.
    pub(super) fn admit(&mut self, peer: PeerId) {
        self.members.insert(peer);
        for (connection, event) in self.held.remove(&peer).unwrap_or_default() {
            self.inner.on_connection_handler_event(peer, connection, event);
        }
    }

    /// Hears `peer` no longer.
    pub(super) fn dismiss(&mut self, peer: &PeerId) {
        self.members.remove(peer);
        self.held.remove(peer);
    }
}

impl<B: NetworkBehaviour> Deref for Door<B> {
    type Target = B;

    fn deref(&self) -> &B {
        &self.inner
    }
}

impl<B: NetworkBehaviour> DerefMut for Door<B> {
    fn deref_mut(&mut self) -> &mut B {
        &mut self.inner
    }
}

impl<B: NetworkBehaviour> NetworkBehaviour for Door<B> {
    type ConnectionHandler = B::ConnectionHandler;
    type ToSwarm = B::ToSwarm;

    fn handle_pending_inbound_connection(
        &mut self,
        id: ConnectionId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        self.inner.handle_pending_inbound_connection(id, local, remote)
    }

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.inner
            .handle_established_inbound_connection(id, peer, local, remote)
    }

    fn handle_pending_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: Option<PeerId>,
        addresses: &[Multiaddr],
        role: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        self.inner.handle_pending_outbound_connection(id, peer, addresses, role)
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        remote: &Multiaddr,
        role: Endpoint,
        port: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.inner
            .handle_established_outbound_connection(id, peer, remote, role, port)
    }

    fn on_swarm_event(&mut self, event: FromSwarm) {
        if let FromSwarm::ConnectionClosed(closed) = &event {
            if closed.remaining_established == 0 {
                self.dismiss(&closed.peer_id);
            } else if let Some(held) = self.held.get_mut(&closed.peer_id) {
                held.retain(|(connection, _)| *connection != closed.connection_id);
            }
        }
        self.inner.on_swarm_event(event);
    }

    fn on_connection_handler_event(&mut self, peer: PeerId, connection: ConnectionId, event: THandlerOutEvent<Self>) {
        if self.members.contains(&peer) {
            return self.inner.on_connection_handler_event(peer, connection, event);
        }
        let held = self.held.entry(peer).or_default();
        if held.len() < HELD_PER_PEER_MAX {
            held.push_back((connection, event));
        }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        loop {
            match self.inner.poll(context) {
                Poll::Ready(ToSwarm::Dial { opts }) if !self.dials => {
                    let failure = DialFailure {
                        peer_id: opts.get_peer_id(),
                        error: &DialError::Aborted,
                        connection_id: opts.connection_id(),
                    };
                    self.inner.on_swarm_event(FromSwarm::DialFailure(failure));
                }
                polled => return polled,
            }
        }
    }
}
