//! Who is let in: greetings, goodbyes, and the door.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Instant;

use libp2p::swarm::ConnectionId;
use libp2p::{Multiaddr, PeerId};
use polder_protocol::hash::{InstitutionId, NodeId};
use polder_protocol::wire::{
    self, ADDRESSES_MAX, Farewell, Greeting, HINTS_MAX, Hello, PeerHint, Refusal, Reply, Request, Service,
};

use super::{Asked, Driver, RECHECK, unreachable};
use crate::control::address::{data_addresses, ip_of, is_public, is_relayed, node_of, peer_of, readable};
use crate::control::behaviour::AGENT;
use crate::control::meetings::{Member, REFUSED_STAYS};
use crate::control::shared::{lock, unix_now};
use crate::control::table::{Origin, has_room};
use crate::control::{Addresses, ControlError, Path, PeerEvent, PeerRecord};
use crate::neighbourhood::Neighbourhood;

impl Driver {
    pub(super) fn own_hello(&self) -> Hello {
        let own = self.own_addresses();
        Hello {
            agent: AGENT.into(),
            instance: self.instance,
            credentials: self.gate.credentials(),
            control_addresses: own.control,
            data_addresses: own.data,
        }
    }

    /// Where others are told to look for this node: where it listens, what its operator says, and what a router has opened.
    pub(super) fn own_addresses(&self) -> Addresses {
        let listening = lock(&self.shared.listen_addresses).clone();
        let mut control: Vec<String> = self.swarm.external_addresses().map(ToString::to_string).collect();
        control.extend(listening);
        // Others on this machine know it by 127.0.0.1, so that stays, last; what is told twice goes.
        control.sort_by_cached_key(|address| rank(address));
        control.dedup();
        control.truncate(ADDRESSES_MAX);
        let mut data = lock(&self.shared.data_addresses).clone();
        data.truncate(ADDRESSES_MAX);
        Addresses { control, data }
    }

    /// Shows this node's credentials. A newcomer has none, and only asks to be enrolled.
    pub(super) fn greet(&mut self, node: NodeId) {
        let hello = self.own_hello();
        if hello.credentials.is_empty() {
            return self.fail_waiting(node, || unreachable(node, "this node has no certificate to show"));
        }
        let Some(meeting) = self.meetings.present.get_mut(&node) else {
            return;
        };
        meeting.greeting = true;
        let request = Request {
            service: Service::Hello,
            body: wire::encode(&hello),
        };
        self.send(node, request, Asked::Greeting);
    }

    pub(super) fn on_hello(&mut self, node: NodeId, connection: ConnectionId, body: &[u8], now: Instant) -> Reply {
        let hello: Hello = match wire::decode(body) {
            Ok(hello) => hello,
            Err(error) => {
                return Reply::Refused(Refusal::Malformed {
                    reason: error.to_string(),
                });
            }
        };
        if self.is_crowded_out(node, &hello) {
            self.turn_away(node, now);
            return Reply::Refused(Refusal::Busy);
        }
        match self.accept(node, connection, &hello, now) {
            Ok(()) => {
                let greeting = Greeting {
                    hello: self.own_hello(),
                    peers: self.hints(node),
                };
                Reply::Done(wire::encode(&greeting))
            }
            Err(reason) => {
                self.forget_member(node, reason.clone());
                self.turn_away(node, now);
                self.blame(node, now);
                Reply::Refused(Refusal::NotAdmitted { reason })
            }
        }
    }

    /// Asks the gate about a peer, and keeps what it told of itself.
    pub(super) fn accept(
        &mut self,
        node: NodeId,
        connection: ConnectionId,
        hello: &Hello,
        now: Instant,
    ) -> Result<(), String> {
        let admitted = self.gate.admit(node, &hello.credentials).map_err(|refused| {
            self.shared.tell(PeerEvent::Refused {
                node,
                reason: refused.reason.clone(),
            });
            tracing::info!(%node, reason = refused.reason, "peer refused");
            refused.reason
        })?;
        let Some(meeting) = self.meetings.present.get_mut(&node) else {
            return Ok(());
        };
        let restarted = meeting
            .member
            .as_ref()
            .is_some_and(|member| member.instance != hello.instance);
        if restarted {
            // The other connections end in a process that is gone, though nobody has told this one.
            for gone in meeting.connections.keys().filter(|id| **id != connection) {
                self.swarm.close_connection(*gone);
            }
            self.shared.forget(node, "it has restarted".into());
        }
        let (seen, institution) = (meeting.seen, admitted.institution);
        let relayed = meeting.connections.values().all(|relayed| *relayed);
        let rtt = lock(&self.shared.peers).get(&node).and_then(|record| record.rtt);
        let record = PeerRecord {
            node,
            institution: admitted.institution,
            capabilities: admitted.capabilities,
            agent: hello.agent.clone(),
            control_addresses: hello.control_addresses.clone(),
            data_addresses: data_addresses(&hello.data_addresses, meeting.seen),
            rtt,
            path: if relayed { Path::Relayed } else { Path::Direct },
            score: 0,
            last_seen: unix_now(),
        };
        meeting.member = Some(Member {
            admitted,
            credentials: hello.credentials.clone(),
            greeted: now,
            instance: hello.instance,
        });
        meeting.closes = None;
        self.shared.keep(record);
        self.meetings.succeeded(node);
        let addresses = readable(&hello.control_addresses);
        if let Some(peer) = peer_of(node) {
            self.open_doors(peer, seen);
            self.enter_table(&peer, &addresses, (seen, institution));
        }
        self.meetings.remember(node, addresses);
        Ok(())
    }

    /// Members that a newcomer may meet, others for each: were they the same, all would hang on a few.
    pub(super) fn hints(&mut self, newcomer: NodeId) -> Vec<PeerHint> {
        let peers = lock(&self.shared.peers);
        let others = peers
            .values()
            .filter(|record| record.node != newcomer && record.path != Path::Lost);
        let mut drawn: Vec<(u64, &PeerRecord)> = others.map(|record| (self.random.next_u64(), record)).collect();
        drawn.sort_unstable_by_key(|(number, _)| *number);
        let told = drawn.into_iter().take(HINTS_MAX).map(|(_, record)| PeerHint {
            node: record.node,
            control_addresses: record.control_addresses.clone(),
        });
        told.collect()
    }

    pub(super) fn on_greeting(&mut self, node: NodeId, connection: ConnectionId, reply: Reply, now: Instant) {
        let greeting: Greeting = match reply {
            Reply::Done(body) => match wire::decode(&body) {
                Ok(greeting) => greeting,
                Err(error) => {
                    let reason = error.to_string();
                    self.fail_waiting(node, || unreachable(node, &reason));
                    return self.turn_away(node, now);
                }
            },
            Reply::Refused(Refusal::NotAdmitted { reason }) => {
                tracing::warn!(%node, reason, "a peer refuses this node");
                self.shared.tell(PeerEvent::RefusedBy {
                    node,
                    reason: reason.clone(),
                });
                self.fail_waiting(node, || ControlError::RefusedBy {
                    node,
                    reason: reason.clone(),
                });
                return self.turn_away(node, now);
            }
            Reply::Refused(_) => {
                self.fail_waiting(node, || unreachable(node, "it does not answer greetings"));
                return self.turn_away(node, now);
            }
        };
        if let Err(reason) = self.accept(node, connection, &greeting.hello, now) {
            self.fail_waiting(node, || ControlError::Refused {
                node,
                reason: reason.clone(),
            });
            return self.show_out(node, reason, now);
        }
        for hint in greeting.peers {
            if hint.node != self.shared.node {
                self.meetings.remember(hint.node, readable(&hint.control_addresses));
            }
        }
    }

    pub(super) fn on_goodbye(&mut self, node: NodeId, body: &[u8], now: Instant) {
        let Ok(farewell) = wire::decode::<Farewell>(body) else {
            return;
        };
        if farewell.refused {
            self.shared.tell(PeerEvent::RefusedBy {
                node,
                reason: farewell.reason.clone(),
            });
            self.fail_waiting(node, || ControlError::RefusedBy {
                node,
                reason: farewell.reason.clone(),
            });
        }
        self.forget_member(node, farewell.reason);
        self.turn_away(node, now);
        self.meetings.forget(node);
    }

    /// Tells a peer that it is refused and why, and turns it away. It may have been a member until now.
    fn show_out(&mut self, node: NodeId, reason: String, now: Instant) {
        let farewell = Farewell {
            reason: reason.clone(),
            refused: true,
        };
        self.send(
            node,
            Request {
                service: Service::Goodbye,
                body: wire::encode(&farewell),
            },
            Asked::Farewell,
        );
        self.forget_member(node, reason);
        self.turn_away(node, now);
    }

    /// A member is heard by gossip, routing and probing, which are deaf to strangers.
    fn open_doors(&mut self, peer: PeerId, seen: Option<IpAddr>) {
        let behaviour = self.swarm.behaviour_mut();
        behaviour.crowd.0.admit(peer, seen);
        behaviour.gossip.admit(peer);
        behaviour.kad.admit(peer);
        behaviour.prober.admit(peer);
    }

    /// Whether the institution of one who comes has its share here while room is scarce for others.
    fn is_crowded_out(&self, node: NodeId, hello: &Hello) -> bool {
        let members = self.meetings.members();
        if self.meetings.member(node).is_some() || members < self.connections_max / 4 * 3 {
            return false;
        }
        let Ok(admitted) = self.gate.admit(node, &hello.credentials) else {
            return false;
        };
        self.meetings.of_institution(admitted.institution) >= self.connections_max / 4
    }

    /// Enters a member into the routing table, where its network and its institution have room in its bucket.
    fn enter_table(
        &mut self,
        peer: &PeerId,
        addresses: &[Multiaddr],
        (seen, institution): (Option<IpAddr>, InstitutionId),
    ) {
        let public = |seen: Option<IpAddr>| seen.filter(|ip| is_public(*ip)).map(|ip| Neighbourhood::of(Some(ip)));
        let kad = &mut self.swarm.behaviour_mut().kad;
        let others: Vec<NodeId> = kad.kbucket(*peer).map_or_else(Vec::new, |bucket| {
            let others = bucket
                .iter()
                .map(|entry| *entry.node.key.preimage())
                .filter(|other| other != peer);
            others.filter_map(|other| node_of(&other)).collect()
        });
        let known = lock(&self.shared.peers);
        let origin = |node: &NodeId| {
            let seen = self.meetings.present.get(node).and_then(|meeting| meeting.seen);
            let institution = known.get(node).map(|record| record.institution);
            (public(seen), institution.unwrap_or_default())
        };
        let bucket: Vec<Origin> = others.iter().map(origin).collect();
        drop(known);
        let kad = &mut self.swarm.behaviour_mut().kad;
        if has_room(&bucket, &(public(seen), institution)) {
            for address in addresses {
                kad.add_address(peer, address.clone());
            }
        }
    }

    fn close_doors(&mut self, peer: &PeerId) {
        let behaviour = self.swarm.behaviour_mut();
        behaviour.gossip.dismiss(peer);
        behaviour.kad.dismiss(peer);
        behaviour.kad.remove_peer(peer);
        behaviour.prober.dismiss(peer);
    }

    /// Notes what no honest peer does, and ends its connections when it has done so too often.
    pub(super) fn blame(&mut self, node: NodeId, now: Instant) {
        if let Some(peer) = peer_of(node)
            && self.swarm.behaviour_mut().crowd.0.offended(peer, now)
        {
            tracing::warn!(%node, "banned for a while");
            self.turn_away(node, now);
        }
    }

    /// A member is one no longer, wherever it is listed.
    fn forget_member(&mut self, node: NodeId, reason: String) {
        self.shared.forget(node, reason);
        if let Some(peer) = peer_of(node) {
            self.close_doors(&peer);
        }
        if let Some(meeting) = self.meetings.present.get_mut(&node) {
            meeting.member = None;
        }
    }

    /// Lets a peer read why, then closes.
    pub(super) fn turn_away(&mut self, node: NodeId, now: Instant) {
        self.meetings.failed(node, now);
        if let Some(meeting) = self.meetings.present.get_mut(&node) {
            meeting.closes = Some(now + REFUSED_STAYS);
        }
    }

    /// A new member gets what waited for it, and what it asked early is answered.
    pub(super) fn flush(&mut self, node: NodeId) {
        let member = self.meetings.member(node).is_some();
        let (early, rest): (VecDeque<_>, VecDeque<_>) = std::mem::take(&mut self.early)
            .into_iter()
            .partition(|(from, ..)| *from == node);
        self.early = rest;
        for (_, request, channel) in early {
            if member {
                self.dispatch(node, request, channel);
            } else {
                let reason = "show valid credentials first".into();
                self.reply(channel, Reply::Refused(Refusal::NotAdmitted { reason }));
            }
        }
        if !member {
            return;
        }
        for waiting in self.meetings.take_waiting(node) {
            match waiting.request {
                Some(request) => {
                    let service = request.service;
                    self.send(
                        node,
                        request,
                        Asked::Request {
                            service,
                            answer: waiting.answer,
                        },
                    );
                }
                // The asker may have given up.
                None => drop(waiting.answer.send(Ok(Vec::new()))),
            }
        }
    }

    pub(super) fn fail_waiting(&mut self, node: NodeId, error: impl Fn() -> ControlError) {
        for waiting in self.meetings.take_waiting(node) {
            // The asker may have given up.
            let _ = waiting.answer.send(Err(error()));
        }
    }

    pub(super) fn disconnect(&mut self, node: NodeId) {
        if let Some(peer) = peer_of(node) {
            // It may have gone by itself.
            let _ = self.swarm.disconnect_peer_id(peer);
        }
    }

    /// Asks the gate about every member again: certificates expire and are revoked.
    pub(super) fn recheck(&mut self, now: Instant) {
        let members = self
            .meetings
            .present
            .iter()
            .filter_map(|(node, meeting)| Some((*node, meeting.member.as_ref()?)));
        let due = members.filter(|(_, member)| now.saturating_duration_since(member.greeted) >= RECHECK);
        let refused =
            due.filter_map(|(node, member)| Some((node, self.gate.admit(node, &member.credentials).err()?.reason)));
        let refused: Vec<(NodeId, String)> = refused.collect();
        for (node, reason) in refused {
            self.show_out(node, reason, now);
        }
    }
}

/// Straight public addresses first, then circuits, then those of one network or one machine.
fn rank(address: &str) -> (u8, String) {
    let place = match address.parse::<Multiaddr>() {
        Ok(address) if is_relayed(&address) => 1,
        Ok(address) => match ip_of(&address) {
            Some(ip) if ip.is_loopback() => 3,
            Some(ip) if !is_public(ip) => 2,
            Some(_) | None => 0,
        },
        Err(_) => 4,
    };
    (place, address.to_owned())
}
