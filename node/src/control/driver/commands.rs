//! What the rest of the node asks of the control plane: meet, request, publish, subscribe.

use std::collections::BTreeSet;
use std::time::Instant;

use libp2p::Multiaddr;
use libp2p::gossipsub::{self, IdentTopic};
use libp2p::swarm::DialError;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use polder_protocol::hash::NodeId;
use polder_protocol::wire::{self, Envelope, Request};

use super::{Asked, Driver, refuse_id, unreachable};
use crate::control::address::{is_relayed, node_of, peer_of};
use crate::control::behaviour::{SEARCH_TIME_MAX, topic_score};
use crate::control::handle::Command;
use crate::control::meetings::Waiting;
use crate::control::{Circles, ControlError};

impl Driver {
    pub(super) fn on_command(&mut self, command: Command) {
        match command {
            Command::Request {
                to,
                addresses,
                service,
                body,
                answer,
            } => {
                let request = Request { service, body };
                if service.before_membership() {
                    let Some(peer) = peer_of(to) else {
                        return refuse_id(to, answer);
                    };
                    let id = self
                        .swarm
                        .behaviour_mut()
                        .requests
                        .send_request_with_addresses(&peer, request, addresses);
                    self.asked.insert(id, (to, Asked::Request { service, answer }));
                } else if self.meetings.member(to).is_some() {
                    self.send(to, request, Asked::Request { service, answer });
                } else {
                    self.meet(
                        to,
                        addresses,
                        Waiting {
                            request: Some(request),
                            answer,
                        },
                    );
                }
            }
            Command::Meet { to, addresses, answer } => {
                if self.meetings.member(to).is_some() {
                    // The asker may have given up.
                    let _ = answer.send(Ok(Vec::new()));
                } else {
                    self.meet(to, addresses, Waiting { request: None, answer });
                }
            }
            Command::Publish { topic, bytes, answer } => {
                // The asker may have given up.
                let _ = answer.send(self.publish(topic, bytes));
            }
            Command::Subscribe { topic } => self.subscribe(&topic),
            Command::Reintroduce => {
                let members: Vec<NodeId> = self.meetings.present.keys().copied().collect();
                members.into_iter().for_each(|node| self.greet(node));
            }
            Command::Mapped { addresses } => self.on_mapped(addresses, Instant::now()),
            Command::Circles { answer } => {
                let behaviour = self.swarm.behaviour_mut();
                let buckets = behaviour.kad.kbuckets();
                let table = buckets.flat_map(|bucket| {
                    let nodes = bucket.iter().filter_map(|entry| node_of(entry.node.key.preimage()));
                    nodes.collect::<Vec<NodeId>>()
                });
                let table = table.collect();
                let subscribed = behaviour.gossip.all_peers().filter(|(_, topics)| !topics.is_empty());
                let meshed = behaviour.gossip.all_mesh_peers();
                let gossip: BTreeSet<NodeId> = subscribed
                    .map(|(peer, _)| peer)
                    .chain(meshed)
                    .filter_map(node_of)
                    .collect();
                // The asker may have given up.
                let _ = answer.send(Circles {
                    table,
                    gossip: gossip.into_iter().collect(),
                });
            }
            // Handled by the loop, which ends with it.
            Command::Shutdown { .. } => {}
        }
    }

    /// Keeps a request until its peer is a member, and goes to meet it.
    pub(super) fn meet(&mut self, to: NodeId, addresses: Vec<Multiaddr>, waiting: Waiting) {
        if to == self.shared.node {
            let reason = "it is this node itself".into();
            let _ = waiting.answer.send(Err(ControlError::Unreachable { node: to, reason }));
            return;
        }
        self.meetings.remember(to, addresses);
        if let Err(waiting) = self.meetings.wait(to, waiting) {
            let _ = waiting.answer.send(Err(ControlError::Overloaded));
            return;
        }
        match self.meetings.present.get(&to) {
            Some(meeting) if !meeting.greeting && meeting.closes.is_none() => self.greet(to),
            Some(_) => {}
            None => self.dial(to),
        }
    }

    pub(super) fn dial(&mut self, node: NodeId) {
        let Some(peer) = peer_of(node) else {
            return self.fail_waiting(node, || unreachable(node, "its id is not a key"));
        };
        let (around, straight): (Vec<_>, Vec<_>) = self.meetings.addresses(node).into_iter().partition(is_relayed);
        let options = DialOpts::peer_id(peer)
            .addresses(straight)
            .extend_addresses_through_behaviour()
            .condition(PeerCondition::DisconnectedAndNotDialing)
            .build();
        match self.swarm.dial(options) {
            Ok(()) => self.go_around_later(node, around),
            Err(DialError::DialPeerConditionFalse(_)) => {}
            Err(DialError::NoAddresses) if self.go_around(node, around) => {}
            Err(DialError::NoAddresses) => {
                // Perhaps the routing table leads there; a later try finds what it learnt.
                let kad = &mut self.swarm.behaviour_mut().kad;
                kad.let_dial(true);
                kad.get_closest_peers(peer);
                self.searches_until = Some(Instant::now() + SEARCH_TIME_MAX);
                self.fail_waiting(node, || unreachable(node, "none of its addresses is known"));
            }
            Err(error) => {
                self.meetings.failed(node, Instant::now());
                let reason = error.to_string();
                self.fail_waiting(node, || unreachable(node, &reason));
            }
        }
    }

    pub(super) fn publish(&mut self, topic: String, bytes: Vec<u8>) -> Result<(), ControlError> {
        let envelope = Envelope {
            credentials: self.gate.credentials(),
            body: bytes,
        };
        let published = self
            .swarm
            .behaviour_mut()
            .gossip
            .publish(IdentTopic::new(&topic), wire::encode(&envelope));
        match published {
            Ok(_) | Err(gossipsub::PublishError::Duplicate) => Ok(()),
            Err(gossipsub::PublishError::NoPeersSubscribedToTopic) => Err(ControlError::NobodyListens { topic }),
            Err(error) => Err(ControlError::Gossip {
                topic,
                reason: error.to_string(),
            }),
        }
    }

    pub(super) fn subscribe(&mut self, topic: &str) {
        let topic = IdentTopic::new(topic);
        let gossip = &mut self.swarm.behaviour_mut().gossip;
        match gossip.subscribe(&topic) {
            Ok(true) => {
                if let Err(reason) = gossip.set_topic_params(topic, topic_score()) {
                    tracing::debug!(reason, "a topic keeps the default score");
                }
            }
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, %topic, "cannot subscribe"),
        }
    }
}
