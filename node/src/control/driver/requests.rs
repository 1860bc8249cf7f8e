//! Requests and their answers, both ways.

use std::time::Instant;

use libp2p::request_response::{self, OutboundRequestId, ResponseChannel};
use libp2p::swarm::ConnectionId;
use polder_protocol::hash::NodeId;
use polder_protocol::wire::{Refusal, Reply, Request, Service};
use tokio::sync::{mpsc, oneshot};

use super::{Asked, Driver, EARLY_MAX, EARLY_PER_PEER_MAX, REPLIES_MAX, refuse_id, unreachable};
use crate::control::address::{node_of, peer_of};
use crate::control::shared::lock;
use crate::control::{ControlError, Incoming};

impl Driver {
    pub(super) fn send(&mut self, to: NodeId, request: Request, asked: Asked) {
        let Some(peer) = peer_of(to) else {
            if let Asked::Request { answer, .. } = asked {
                refuse_id(to, answer);
            }
            return;
        };
        let id = self.swarm.behaviour_mut().requests.send_request(&peer, request);
        self.asked.insert(id, (to, asked));
    }

    pub(super) fn reply(&mut self, channel: ResponseChannel<Reply>, reply: Reply) {
        // A peer that has gone needs no answer.
        let _ = self.swarm.behaviour_mut().requests.send_response(channel, reply);
    }

    pub(super) fn on_request_event(&mut self, event: request_response::Event<Request, Reply>, now: Instant) {
        match event {
            request_response::Event::Message {
                peer,
                connection_id,
                message,
            } => match message {
                request_response::Message::Request { request, channel, .. } => {
                    if let Some(node) = node_of(&peer) {
                        self.on_request((node, connection_id), request, channel, now);
                    }
                }
                request_response::Message::Response { request_id, response } => {
                    self.on_reply(request_id, connection_id, response, now)
                }
            },
            request_response::Event::OutboundFailure { request_id, error, .. } => {
                let Some((node, asked)) = self.asked.remove(&request_id) else {
                    return;
                };
                match asked {
                    Asked::Greeting => {
                        self.meetings.failed(node, now);
                        if let Some(meeting) = self.meetings.present.get_mut(&node) {
                            meeting.greeting = false;
                        }
                        let reason = error.to_string();
                        self.fail_waiting(node, || unreachable(node, &reason));
                    }
                    Asked::Farewell => {}
                    Asked::Request { answer, .. } => {
                        // The asker may have given up.
                        let _ = answer.send(Err(unreachable(node, &error.to_string())));
                    }
                }
            }
            request_response::Event::InboundFailure {
                peer,
                error: request_response::InboundFailure::Io(error),
                ..
            } if error.kind() == std::io::ErrorKind::InvalidData => {
                // Too long, or no message at all: no honest program sends that.
                if let Some(node) = node_of(&peer) {
                    self.blame(node, now);
                }
            }
            request_response::Event::InboundFailure { .. } | request_response::Event::ResponseSent { .. } => {}
        }
    }

    pub(super) fn on_request(
        &mut self,
        (node, connection): (NodeId, ConnectionId),
        request: Request,
        channel: ResponseChannel<Reply>,
        now: Instant,
    ) {
        match request.service {
            Service::Hello => {
                let reply = self.on_hello(node, connection, &request.body, now);
                self.reply(channel, reply);
                self.flush(node);
            }
            Service::Goodbye => {
                self.reply(channel, Reply::Done(Vec::new()));
                self.on_goodbye(node, &request.body, now);
            }
            Service::Enrol => self.dispatch(node, request, channel),
            _ if self.meetings.member(node).is_some() => self.dispatch(node, request, channel),
            _ => {
                let coming = self
                    .meetings
                    .present
                    .get(&node)
                    .is_some_and(|meeting| meeting.greeting && meeting.closes.is_none());
                let own = self.early.iter().filter(|(from, ..)| *from == node).count();
                if coming && self.early.len() < EARLY_MAX && own < EARLY_PER_PEER_MAX {
                    self.early.push_back((node, request, channel));
                } else {
                    let reason = "show valid credentials first".into();
                    self.reply(channel, Reply::Refused(Refusal::NotAdmitted { reason }));
                }
            }
        }
    }

    /// Hands a request to its service; the answer comes back through `replies`.
    pub(super) fn dispatch(&mut self, node: NodeId, request: Request, channel: ResponseChannel<Reply>) {
        if self.replies.len() >= REPLIES_MAX {
            return self.reply(channel, Reply::Refused(Refusal::Busy));
        }
        let admitted = self.meetings.member(node).map(|member| member.admitted.clone());
        let (reply, answer) = oneshot::channel();
        let incoming = Incoming {
            from: node,
            admitted,
            body: request.body,
            reply,
        };
        let handed = match lock(&self.shared.services).get(&request.service) {
            None => Err(Refusal::NoSuchService),
            Some(service) => match service.try_send(incoming) {
                Ok(()) => Ok(()),
                Err(mpsc::error::TrySendError::Full(_)) => Err(Refusal::Busy),
                Err(mpsc::error::TrySendError::Closed(_)) => Err(Refusal::NoSuchService),
            },
        };
        match handed {
            Ok(()) => self.replies.push(Box::pin(async move { (channel, answer.await.ok()) })),
            Err(refusal) => self.reply(channel, Reply::Refused(refusal)),
        }
    }

    pub(super) fn on_reply(&mut self, id: OutboundRequestId, connection: ConnectionId, reply: Reply, now: Instant) {
        let Some((node, asked)) = self.asked.remove(&id) else {
            return;
        };
        match asked {
            Asked::Greeting => {
                if let Some(meeting) = self.meetings.present.get_mut(&node) {
                    meeting.greeting = false;
                }
                self.on_greeting(node, connection, reply, now);
                self.flush(node);
            }
            Asked::Farewell => {}
            Asked::Request { service, answer } => {
                // The asker may have given up.
                let _ = answer.send(match reply {
                    Reply::Done(body) => Ok(body),
                    Reply::Refused(Refusal::NotAdmitted { reason }) => Err(ControlError::RefusedBy { node, reason }),
                    Reply::Refused(Refusal::NoSuchService) => Err(ControlError::NoSuchService { node, service }),
                    Reply::Refused(Refusal::Busy) => Err(ControlError::Busy { node, service }),
                    Reply::Refused(Refusal::Malformed { reason }) => {
                        Err(ControlError::Malformed { node, service, reason })
                    }
                });
            }
        }
    }
}
