//! Drives the swarm: one task that hears the network, the rest of the node, and the clock.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use libp2p::core::transport::ListenerId;
use libp2p::gossipsub::IdentTopic;
use libp2p::multiaddr::Protocol;
use libp2p::request_response::{self, OutboundRequestId, ResponseChannel};
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError, SwarmEvent};
use libp2p::{Multiaddr, PeerId, Swarm, autonat, gossipsub, mdns, ping};
use polder_protocol::charter::Capabilities;
use polder_protocol::hash::NodeId;
use polder_protocol::wire::{
    self, ADDRESSES_MAX, Envelope, Farewell, Greeting, HINTS_MAX, Hello, PeerHint, Refusal, Reply, Request, Service,
};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use super::address::{
    data_addresses, ip_of, is_relayed, keypair, listen_error, multiaddresses, node_of, peer_of, probe_port, readable,
};
use super::behaviour::{AGENT, Behaviour, BehaviourEvent, build, topic_score};
use super::gossip::Authors;
use super::handle::Command;
use super::meetings::{Answer, Meetings, Member, REFUSED_STAYS, STRANGER_STAYS, Waiting};
use super::shared::{Shared, lock, unix_now};
use super::{ControlConfig, ControlError, ControlHandle, Incoming, Path, PeerEvent, PeerRecord};
use crate::gate::Gate;

/// What waits for the driver.
const COMMANDS_MAX: usize = 512;

/// How long a listener may take to come up.
const LISTEN_TIME_MAX: Duration = Duration::from_secs(10);

/// How often the driver looks at the clock.
const TICK: Duration = Duration::from_millis(500);

/// How often every member's credentials are asked about again: a revocation takes effect no later than this.
const RECHECK: Duration = Duration::from_secs(10);

/// Dials begun at one tick.
const DIALS_PER_TICK: usize = 8;

/// Requests of peers whose greeting is on its way to us. A listener may ask as soon as it has greeted.
const EARLY_MAX: usize = 256;

/// Requests that services are working on; more are answered with "busy".
const REPLIES_MAX: usize = 4096;

/// What goodbyes may take when the node stops.
const GOODBYE_TIME_MAX: Duration = Duration::from_millis(700);

type Reached = BoxFuture<'static, (ResponseChannel<Reply>, Option<Vec<u8>>)>;

/// Builds the swarm, listens, and spawns the driver.
pub(super) async fn start(
    config: ControlConfig,
    gate: Arc<dyn Gate>,
) -> Result<(ControlHandle, JoinHandle<()>), ControlError> {
    let keypair = keypair(config.seed)?;
    let node = node_of(&keypair.public().to_peer_id()).ok_or_else(|| ControlError::Seed {
        reason: "its public key is not ed25519".into(),
    })?;
    let shared = Arc::new(Shared::new(node, config.data_addresses.clone()));
    let mut swarm = build(keypair, &config, &shared)?;
    listen(&mut swarm, &config, &shared).await?;
    for address in multiaddresses(&config.external)? {
        swarm.add_external_address(address);
    }
    let mut meetings = Meetings::default();
    for (node, addresses) in &config.bootstrap {
        meetings.remember_bootstrap(*node, multiaddresses(addresses)?);
    }
    let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
    let driver = Driver {
        peers_target: config.peers_target,
        // Without random numbers a restart is noticed only when the old connections end.
        instance: getrandom::u64().unwrap_or(0),
        swarm,
        gate,
        shared: Arc::clone(&shared),
        meetings,
        authors: Authors::default(),
        asked: BTreeMap::new(),
        replies: FuturesUnordered::new(),
        early: VecDeque::new(),
        rechecked: Instant::now(),
        relayed_by: None,
    };
    Ok((ControlHandle { shared, commands }, tokio::spawn(driver.run(inbox))))
}

async fn listen(swarm: &mut Swarm<Behaviour>, config: &ControlConfig, shared: &Shared) -> Result<(), ControlError> {
    let mut coming: HashMap<ListenerId, Multiaddr> = HashMap::new();
    for address in multiaddresses(&config.listen)? {
        probe_port(&address)?;
        let listener = swarm.listen_on(address.clone()).map_err(|error| ControlError::Listen {
            address: address.to_string(),
            reason: error.to_string(),
            hint: "check the address; `/ip4/0.0.0.0/tcp/4001` listens on every interface",
        })?;
        coming.insert(listener, address);
    }
    let all_up = async {
        while !coming.is_empty() {
            match swarm.select_next_some().await {
                SwarmEvent::NewListenAddr { listener_id, address } => {
                    lock(&shared.listen_addresses).push(address.to_string());
                    coming.remove(&listener_id);
                }
                SwarmEvent::ListenerError { listener_id, error } => {
                    if let Some(address) = coming.get(&listener_id) {
                        return Err(listen_error(address, &error));
                    }
                }
                SwarmEvent::ListenerClosed {
                    listener_id,
                    reason: Err(error),
                    ..
                } => {
                    if let Some(address) = coming.get(&listener_id) {
                        return Err(listen_error(address, &error));
                    }
                }
                _ => {}
            }
        }
        Ok(())
    };
    // A network without addresses must not keep a node from starting: it listens once there is one.
    tokio::time::timeout(LISTEN_TIME_MAX, all_up).await.unwrap_or(Ok(()))
}

/// What an outgoing request was for.
enum Asked {
    Greeting,
    Farewell,
    Request { service: Service, answer: Answer },
}

struct Driver {
    peers_target: usize,
    instance: u64,
    swarm: Swarm<Behaviour>,
    gate: Arc<dyn Gate>,
    shared: Arc<Shared>,
    meetings: Meetings,
    authors: Authors,
    asked: BTreeMap<OutboundRequestId, (NodeId, Asked)>,
    replies: FuturesUnordered<Reached>,
    early: VecDeque<(NodeId, Request, ResponseChannel<Reply>)>,
    rechecked: Instant,
    /// The member through which this node may be reached, where it asked one.
    relayed_by: Option<NodeId>,
}

impl Driver {
    async fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = self.swarm.select_next_some() => self.on_event(event),
                Some((channel, answer)) = self.replies.next(), if !self.replies.is_empty() => {
                    let reply = answer.map_or(Reply::Refused(Refusal::Busy), Reply::Done);
                    self.reply(channel, reply);
                }
                command = inbox.recv() => match command {
                    Some(Command::Shutdown { done }) => {
                        self.say_goodbye().await;
                        // Whoever asked may have gone.
                        let _ = done.send(());
                        return;
                    }
                    Some(command) => self.on_command(command),
                    None => return self.say_goodbye().await,
                },
                _ = tick.tick() => self.on_tick(Instant::now()),
            }
        }
    }

    fn on_command(&mut self, command: Command) {
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
            // Handled by the loop, which ends with it.
            Command::Shutdown { .. } => {}
        }
    }

    /// Keeps a request until its peer is a member, and goes to meet it.
    fn meet(&mut self, to: NodeId, addresses: Vec<Multiaddr>, waiting: Waiting) {
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

    fn dial(&mut self, node: NodeId) {
        let Some(peer) = peer_of(node) else {
            return self.fail_waiting(node, || unreachable(node, "its id is not a key"));
        };
        let options = DialOpts::peer_id(peer)
            .addresses(self.meetings.addresses(node))
            .extend_addresses_through_behaviour()
            .condition(PeerCondition::DisconnectedAndNotDialing)
            .build();
        match self.swarm.dial(options) {
            Ok(()) | Err(DialError::DialPeerConditionFalse(_)) => {}
            Err(DialError::NoAddresses) => {
                // Perhaps the routing table leads there; a later try finds what it learnt.
                self.swarm.behaviour_mut().kad.get_closest_peers(peer);
                self.fail_waiting(node, || unreachable(node, "none of its addresses is known"));
            }
            Err(error) => {
                self.meetings.failed(node, Instant::now());
                let reason = error.to_string();
                self.fail_waiting(node, || unreachable(node, &reason));
            }
        }
    }

    fn own_hello(&self) -> Hello {
        let listening = lock(&self.shared.listen_addresses).clone();
        let mut control_addresses: Vec<String> = self.swarm.external_addresses().map(ToString::to_string).collect();
        control_addresses.extend(listening);
        control_addresses.truncate(ADDRESSES_MAX);
        let mut data_addresses = lock(&self.shared.data_addresses).clone();
        data_addresses.truncate(ADDRESSES_MAX);
        Hello {
            agent: AGENT.into(),
            instance: self.instance,
            credentials: self.gate.credentials(),
            control_addresses,
            data_addresses,
        }
    }

    /// Shows this node's credentials. A newcomer has none, and only asks to be enrolled.
    fn greet(&mut self, node: NodeId) {
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

    fn send(&mut self, to: NodeId, request: Request, asked: Asked) {
        let Some(peer) = peer_of(to) else {
            if let Asked::Request { answer, .. } = asked {
                refuse_id(to, answer);
            }
            return;
        };
        let id = self.swarm.behaviour_mut().requests.send_request(&peer, request);
        self.asked.insert(id, (to, asked));
    }

    fn reply(&mut self, channel: ResponseChannel<Reply>, reply: Reply) {
        // A peer that has gone needs no answer.
        let _ = self.swarm.behaviour_mut().requests.send_response(channel, reply);
    }

    fn publish(&mut self, topic: String, bytes: Vec<u8>) -> Result<(), ControlError> {
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

    fn subscribe(&mut self, topic: &str) {
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

    fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
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
                {
                    self.meetings.failed(node, now);
                    let reason = error.to_string();
                    self.fail_waiting(node, || unreachable(node, &reason));
                }
            }
            SwarmEvent::NewListenAddr { address, .. } => {
                let mut addresses = lock(&self.shared.listen_addresses);
                let address = address.to_string();
                if !addresses.contains(&address) {
                    addresses.push(address);
                }
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                let address = address.to_string();
                lock(&self.shared.listen_addresses).retain(|known| *known != address);
            }
            SwarmEvent::ListenerError { error, .. } => tracing::warn!(%error, "a listener failed"),
            _ => {}
        }
    }

    fn on_connected(
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

    fn on_disconnected(&mut self, peer: PeerId, connection: ConnectionId, reason: &str) {
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
        if self.relayed_by == Some(node) {
            self.relayed_by = None;
        }
        if meeting.member.is_some() && self.shared.is_present(node) {
            self.shared.change(node, |record| record.path = Path::Lost);
            self.shared.tell(PeerEvent::Left {
                node,
                reason: reason.to_owned(),
            });
        }
    }

    fn on_behaviour(&mut self, event: BehaviourEvent, now: Instant) {
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
            BehaviourEvent::Reachable(autonat::v2::client::Event { result: Err(_), .. }) => self.ask_for_a_relay(),
            _ => {}
        }
    }

    /// Listens through a member that relays, once this node knows that it cannot be reached.
    fn ask_for_a_relay(&mut self) {
        if self.relayed_by.is_some() {
            return;
        }
        let relays = |record: &PeerRecord| Capabilities(record.capabilities).has(Capabilities::RELAY);
        let record = lock(&self.shared.peers)
            .values()
            .find(|record| relays(record) && record.path == Path::Direct)
            .cloned();
        let Some(record) = record else { return };
        let Some(peer) = peer_of(record.node) else { return };
        for address in readable(&record.control_addresses) {
            let circuit = address.with(Protocol::P2p(peer)).with(Protocol::P2pCircuit);
            if self.swarm.listen_on(circuit).is_ok() {
                self.relayed_by = Some(record.node);
                return;
            }
        }
    }

    fn on_request_event(&mut self, event: request_response::Event<Request, Reply>, now: Instant) {
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
            request_response::Event::InboundFailure { .. } | request_response::Event::ResponseSent { .. } => {}
        }
    }

    fn on_request(
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
                if coming && self.early.len() < EARLY_MAX {
                    self.early.push_back((node, request, channel));
                } else {
                    let reason = "show valid credentials first".into();
                    self.reply(channel, Reply::Refused(Refusal::NotAdmitted { reason }));
                }
            }
        }
    }

    /// Hands a request to its service; the answer comes back through `replies`.
    fn dispatch(&mut self, node: NodeId, request: Request, channel: ResponseChannel<Reply>) {
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

    fn on_hello(&mut self, node: NodeId, connection: ConnectionId, body: &[u8], now: Instant) -> Reply {
        let hello: Hello = match wire::decode(body) {
            Ok(hello) => hello,
            Err(error) => {
                return Reply::Refused(Refusal::Malformed {
                    reason: error.to_string(),
                });
            }
        };
        match self.accept(node, connection, &hello, now) {
            Ok(()) => {
                let greeting = Greeting {
                    hello: self.own_hello(),
                    peers: self.hints(node),
                };
                Reply::Done(wire::encode(&greeting))
            }
            Err(reason) => {
                // It may have been a member until now.
                self.shared.forget(node, reason.clone());
                if let Some(meeting) = self.meetings.present.get_mut(&node) {
                    meeting.member = None;
                }
                self.turn_away(node, now);
                Reply::Refused(Refusal::NotAdmitted { reason })
            }
        }
    }

    /// Asks the gate about a peer, and keeps what it told of itself.
    fn accept(&mut self, node: NodeId, connection: ConnectionId, hello: &Hello, now: Instant) -> Result<(), String> {
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
            for address in &addresses {
                self.swarm.behaviour_mut().kad.add_address(&peer, address.clone());
            }
        }
        self.meetings.remember(node, addresses);
        Ok(())
    }

    fn hints(&self, newcomer: NodeId) -> Vec<PeerHint> {
        let peers = lock(&self.shared.peers);
        let others = peers
            .values()
            .filter(|record| record.node != newcomer && record.path != Path::Lost);
        others
            .take(HINTS_MAX)
            .map(|record| PeerHint {
                node: record.node,
                control_addresses: record.control_addresses.clone(),
            })
            .collect()
    }

    fn on_reply(&mut self, id: OutboundRequestId, connection: ConnectionId, reply: Reply, now: Instant) {
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

    fn on_greeting(&mut self, node: NodeId, connection: ConnectionId, reply: Reply, now: Instant) {
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
            self.fail_waiting(node, || ControlError::Refused {
                node,
                reason: reason.clone(),
            });
            return self.turn_away(node, now);
        }
        for hint in greeting.peers {
            if hint.node != self.shared.node {
                self.meetings.remember(hint.node, readable(&hint.control_addresses));
            }
        }
    }

    fn on_goodbye(&mut self, node: NodeId, body: &[u8], now: Instant) {
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
        self.shared.forget(node, farewell.reason);
        if let Some(meeting) = self.meetings.present.get_mut(&node) {
            meeting.member = None;
        }
        self.turn_away(node, now);
        self.meetings.forget(node);
    }

    /// Lets a peer read why, then closes.
    fn turn_away(&mut self, node: NodeId, now: Instant) {
        self.meetings.failed(node, now);
        if let Some(meeting) = self.meetings.present.get_mut(&node) {
            meeting.closes = Some(now + REFUSED_STAYS);
        }
    }

    /// A new member gets what waited for it, and what it asked early is answered.
    fn flush(&mut self, node: NodeId) {
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

    fn fail_waiting(&mut self, node: NodeId, error: impl Fn() -> ControlError) {
        for waiting in self.meetings.take_waiting(node) {
            // The asker may have given up.
            let _ = waiting.answer.send(Err(error()));
        }
    }

    fn disconnect(&mut self, node: NodeId) {
        if let Some(peer) = peer_of(node) {
            // It may have gone by itself.
            let _ = self.swarm.disconnect_peer_id(peer);
        }
    }

    fn on_tick(&mut self, now: Instant) {
        self.meetings.drop_abandoned();
        let leaving = self.meetings.present.iter().filter(|(_, meeting)| {
            let overdue = meeting.closes.is_some_and(|closes| closes <= now);
            overdue || (meeting.member.is_none() && now.saturating_duration_since(meeting.since) > STRANGER_STAYS)
        });
        let leaving: Vec<NodeId> = leaving.map(|(node, _)| *node).collect();
        leaving.into_iter().for_each(|node| self.disconnect(node));
        if now.saturating_duration_since(self.rechecked) >= RECHECK {
            self.rechecked = now;
            self.recheck(now);
        }
        let topics: Vec<String> = lock(&self.shared.topics).keys().cloned().collect();
        topics.iter().for_each(|topic| self.subscribe(topic));
        if self.gate.credentials().is_empty() {
            return;
        }
        if self.meetings.members() < self.peers_target {
            for node in self.meetings.worth_a_dial(DIALS_PER_TICK, now) {
                if node != self.shared.node {
                    self.dial(node);
                }
            }
        }
    }

    /// Asks the gate about every member again: certificates expire and are revoked.
    fn recheck(&mut self, now: Instant) {
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
            self.shared.forget(node, reason);
            if let Some(meeting) = self.meetings.present.get_mut(&node) {
                meeting.member = None;
            }
            self.turn_away(node, now);
        }
    }

    async fn say_goodbye(&mut self) {
        let farewell = wire::encode(&Farewell {
            reason: "it has left".into(),
            refused: false,
        });
        let members: Vec<NodeId> = self.meetings.present.keys().copied().collect();
        for node in members {
            if self.meetings.member(node).is_some() {
                let request = Request {
                    service: Service::Goodbye,
                    body: farewell.clone(),
                };
                self.send(node, request, Asked::Farewell);
            }
        }
        let said = async {
            while self.asked.values().any(|(_, asked)| matches!(asked, Asked::Farewell)) {
                let event = self.swarm.select_next_some().await;
                self.on_event(event);
            }
        };
        // Whoever does not hear it notices the closed connection.
        let _ = tokio::time::timeout(GOODBYE_TIME_MAX, said).await;
    }
}

fn unreachable(node: NodeId, reason: &str) -> ControlError {
    ControlError::Unreachable {
        node,
        reason: reason.to_owned(),
    }
}

fn refuse_id(node: NodeId, answer: Answer) {
    // The asker may have given up.
    let _ = answer.send(Err(unreachable(node, "its id is not a key")));
}
