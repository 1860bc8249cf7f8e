//! What the swarm reports: connections that come and go, and what the behaviours found out.

use std::time::Instant;

use libp2p::swarm::{ConnectionId, DialError, SwarmEvent};
use libp2p::{PeerId, gossipsub, mdns, ping};
use tokio::sync::mpsc;

use super::{Driver, unreachable};
use crate::control::address::{ip_of, is_relayed, node_of, peer_of};
use crate::control::behaviour::BehaviourEvent;
use crate::control::shared::{lock, unix_now};
use crate::control::{Path, PeerEvent};

impl Driver {
    pub(super) fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        let now = Instant::now();
        match event {
            SwarmEvent::Behaviour(event) => self.on_behaviour(event, now),
            SwarmEvent::ConnectionEstablished {
                peer_id,
                connection_id,
                endpoint,
                ..
            } => {
                let remote = endpoint.get_remote_address();
                let seen = if is_relayed(remote) { None } else { ip_of(remote) };
                self.on_connected(peer_id, connection_id, seen, endpoint.is_dialer(), now);
            }
            SwarmEvent::ConnectionClosed {
                peer_id,
                connection_id,
                cause,
                ..
            } => {
                let reason = cause.map_or_else(|| "the connection was closed".into(), |cause| cause.to_string());
                self.on_disconnected(peer_id, connection_id, &reason);
            }
            SwarmEvent::OutgoingConnectionError {
                peer_id: Some(peer),
                error,
                ..
            } => {
                if let Some(node) = node_of(&peer)
                    && !self.meetings.present.contains_key(&node)
                    && !matches!(error, DialError::DialPeerConditionFalse(_))
                    && !self.goes_on_around(node)
                {
                    self.meetings.failed(node, now);
                    let reason = error.to_string();
                    self.fail_waiting(node, || unreachable(node, &reason));
                }
            }
            SwarmEvent::NewListenAddr { address, .. } => self.on_new_address(address, now),
            SwarmEvent::ExpiredListenAddr { address, .. } => self.on_lost_address(&address, now),
            SwarmEvent::ListenerClosed { listener_id, .. } => self.reach.closed(listener_id, now),
            SwarmEvent::ListenerError { error, .. } => tracing::warn!(%error, "a listener failed"),
            _ => {}
        }
    }

    /// Writes down what everybody's gossip is worth.
    pub(super) fn score(&mut self, now: Instant) {
        let gossip = &self.swarm.behaviour().gossip;
        let graylist = gossipsub::PeerScoreThresholds::default().graylist_threshold;
        let mut unbearable = Vec::new();
        for node in self.meetings.present.keys() {
            if let Some(score) = peer_of(*node).and_then(|peer| gossip.peer_score(&peer)) {
                // Scores beyond a few thousand mean the same.
                self.shared.change(*node, |record| record.score = score as i32);
                if score < graylist {
                    unbearable.push(*node);
                }
            }
        }
        // Gossip hears it no longer, and its score recovers; if it stays so for a minute, it goes for a while.
        unbearable.into_iter().for_each(|node| self.blame(node, now));
    }

    pub(super) fn on_connected(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        seen: Option<std::net::IpAddr>,
        dialed: bool,
        now: Instant,
    ) {
        let Some(node) = node_of(&peer) else {
            // Our peers have ed25519 keys; whoever has another is none of them.
            let _ = self.swarm.disconnect_peer_id(peer);
            return;
        };
        self.arrived(node);
        if let Some(stranger) = self.meetings.connected(node, connection, seen, now) {
            self.disconnect(stranger);
        }
        let Some(meeting) = self.meetings.present.get(&node) else {
            return;
        };
        if meeting.member.is_none() && !meeting.greeting && (dialed || self.meetings.is_awaited(node)) {
            // A newcomer dials without anything to show, and is not turned away for it.
            if !self.gate.credentials().is_empty() {
                self.greet(node);
            }
        } else if seen.is_some() {
            self.shared.change(node, |record| record.path = Path::Direct);
        }
    }

    pub(super) fn on_disconnected(&mut self, peer: PeerId, connection: ConnectionId, reason: &str) {
        let Some(node) = node_of(&peer) else { return };
        let Some(meeting) = self.meetings.disconnected(node, connection) else {
            let relayed = self
                .meetings
                .present
                .get(&node)
                .is_some_and(|meeting| meeting.connections.values().all(|relayed| *relayed));
            if relayed {
                self.shared.change(node, |record| record.path = Path::Relayed);
            }
            return;
        };
        self.early.retain(|(from, ..)| *from != node);
        self.fail_waiting(node, || unreachable(node, reason));
        if meeting.member.is_some() && self.shared.is_present(node) {
            self.shared.change(node, |record| record.path = Path::Lost);
            self.shared.tell(PeerEvent::Left {
                node,
                reason: reason.to_owned(),
            });
        }
    }

    pub(super) fn on_behaviour(&mut self, event: BehaviourEvent, now: Instant) {
        match event {
            BehaviourEvent::Requests(event) => self.on_request_event(event, now),
            BehaviourEvent::Gossip(gossipsub::Event::Message {
                propagation_source,
                message_id,
                message,
            }) => {
                let passed_on_by_member =
                    node_of(&propagation_source).is_some_and(|node| self.meetings.member(node).is_some());
                let (acceptance, gossip) = if passed_on_by_member {
                    self.authors.judge(&message, self.gate.as_ref(), now)
                } else {
                    (gossipsub::MessageAcceptance::Ignore, None)
                };
                let behaviour = &mut self.swarm.behaviour_mut().gossip;
                behaviour.report_message_validation_result(&message_id, &propagation_source, acceptance);
                if let Some(gossip) = gossip {
                    let mut topics = lock(&self.shared.topics);
                    if let Some(readers) = topics.get_mut(message.topic.as_str()) {
                        // A reader that is behind misses announcements, which repeat.
                        readers.retain(|reader| {
                            !matches!(
                                reader.try_send(gossip.clone()),
                                Err(mpsc::error::TrySendError::Closed(_))
                            )
                        });
                    }
                }
            }
            BehaviourEvent::Ping(ping::Event {
                peer, result: Ok(rtt), ..
            }) => {
                if let Some(node) = node_of(&peer) {
                    self.shared.change(node, |record| {
                        record.rtt = Some(rtt);
                        record.last_seen = unix_now();
                    });
                }
            }
            BehaviourEvent::Ping(ping::Event {
                connection,
                result: Err(ping::Failure::Timeout),
                ..
            }) => {
                // Whatever is there does not hear us; a peer that is well is dialled again.
                self.swarm.close_connection(connection);
            }
            BehaviourEvent::Mdns(mdns::Event::Discovered(found)) => {
                for (peer, address) in found {
                    if let Some(node) = node_of(&peer)
                        && node != self.shared.node
                    {
                        self.meetings.remember(node, [address]);
                    }
                }
            }
            _ => {}
        }
    }
}
