//! Drives the swarm: one task that hears the network, the rest of the node, and the clock.

mod commands;
mod events;
mod greetings;
mod reach;
mod requests;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use libp2p::core::transport::ListenerId;
use libp2p::request_response::{OutboundRequestId, ResponseChannel};
use libp2p::swarm::SwarmEvent;
use libp2p::{Multiaddr, Swarm};
use polder_protocol::hash::NodeId;
use polder_protocol::rng::Random;
use polder_protocol::wire::{self, Farewell, Refusal, Reply, Request, Service};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use super::address::{keypair, listen_error, multiaddresses, node_of, probe_port};
use super::behaviour::{Behaviour, BehaviourEvent, build};
use super::gossip::Authors;
use super::handle::Command;
use super::meetings::{Answer, Meetings, STRANGER_STAYS};
use super::shared::{Shared, lock};
use super::{ControlConfig, ControlError, ControlHandle};
use crate::gate::Gate;

/// What waits for the driver.
const COMMANDS_MAX: usize = 512;

/// How long a listener may take to come up.
const LISTEN_TIME_MAX: Duration = Duration::from_secs(10);

/// When no further address comes within this time, all are known.
const LISTEN_SETTLES: Duration = Duration::from_millis(50);

/// What may happen meanwhile before the driver must go on.
const MISSED_MAX: usize = 64;

/// How often the driver looks at the clock.
const TICK: Duration = Duration::from_millis(500);

/// How often every member's credentials are asked about again: a revocation takes effect no later than this.
const RECHECK: Duration = Duration::from_secs(10);

/// Dials begun at one tick.
const DIALS_PER_TICK: usize = 8;

/// Requests of peers whose greeting is on its way to us. A listener may ask as soon as it has greeted.
const EARLY_MAX: usize = 256;

/// Those of one peer; each may have a MiB.
const EARLY_PER_PEER_MAX: usize = 16;

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
    let missed = listen(&mut swarm, &config, &shared).await?;
    if config.relay_server {
        let listening = lock(&shared.listen_addresses).clone();
        multiaddresses(&listening)?
            .into_iter()
            .filter(reach::is_worth_telling)
            .for_each(|address| swarm.add_external_address(address));
    }
    for address in multiaddresses(&config.external)? {
        swarm.add_external_address(address);
    }
    let mut meetings = Meetings::default();
    for (node, addresses) in &config.bootstrap {
        meetings.remember_bootstrap(*node, multiaddresses(addresses)?);
    }
    let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
    let streams = swarm.behaviour().streams.new_control();
    let driver = Driver {
        peers_target: config.peers_target,
        connections_max: config.connections_max as usize,
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
        // Without random numbers all nodes look for the same ones first, which is slow and not wrong.
        random: Random::from_seed(getrandom::u64().unwrap_or(0)),
        searches_until: None,
        rechecked: Instant::now(),
        reach: reach::Reach::new(config.relay_server),
    };
    let handle = ControlHandle {
        shared,
        commands,
        streams,
    };
    Ok((handle, tokio::spawn(driver.run(missed, inbox))))
}

/// Listens, and gives what happened meanwhile that is no news of a listener.
async fn listen(
    swarm: &mut Swarm<Behaviour>,
    config: &ControlConfig,
    shared: &Shared,
) -> Result<Vec<SwarmEvent<BehaviourEvent>>, ControlError> {
    let mut missed = Vec::new();
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
                event => missed.push(event),
            }
        }
        Ok(())
    };
    // A network without addresses must not keep a node from starting: it listens once there is one.
    tokio::time::timeout(LISTEN_TIME_MAX, all_up).await.unwrap_or(Ok(()))?;
    // A listener on every interface tells of one after the other, often of the loopback one first; invites name them all.
    while let Ok(event) = tokio::time::timeout(LISTEN_SETTLES, swarm.select_next_some()).await {
        match event {
            SwarmEvent::NewListenAddr { address, .. } => lock(&shared.listen_addresses).push(address.to_string()),
            event => missed.push(event),
        }
        if missed.len() >= MISSED_MAX {
            break;
        }
    }
    Ok(missed)
}

/// What an outgoing request was for.
enum Asked {
    Greeting,
    Farewell,
    Request { service: Service, answer: Answer },
}

struct Driver {
    peers_target: usize,
    connections_max: usize,
    instance: u64,
    swarm: Swarm<Behaviour>,
    gate: Arc<dyn Gate>,
    shared: Arc<Shared>,
    meetings: Meetings,
    authors: Authors,
    asked: BTreeMap<OutboundRequestId, (NodeId, Asked)>,
    replies: FuturesUnordered<Reached>,
    early: VecDeque<(NodeId, Request, ResponseChannel<Reply>)>,
    random: Random,
    /// Until when the routing table may dial those whom it hears of.
    searches_until: Option<Instant>,
    rechecked: Instant,
    reach: reach::Reach,
}

impl Driver {
    async fn run(mut self, missed: Vec<SwarmEvent<BehaviourEvent>>, mut inbox: mpsc::Receiver<Command>) {
        missed.into_iter().for_each(|event| self.on_event(event));
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

    fn on_tick(&mut self, now: Instant) {
        self.meetings.drop_abandoned();
        let leaving = self.meetings.present.iter().filter(|(_, meeting)| {
            let overdue = meeting.closes.is_some_and(|closes| closes <= now);
            overdue || (meeting.member.is_none() && now.saturating_duration_since(meeting.since) > STRANGER_STAYS)
        });
        let leaving: Vec<NodeId> = leaving.map(|(node, _)| *node).collect();
        leaving.into_iter().for_each(|node| self.disconnect(node));
        if now.saturating_duration_since(self.rechecked) >= RECHECK {
            self.score(now);
            self.rechecked = now;
            self.recheck(now);
        }
        self.keep_reachable(now);
        let own = self.own_addresses();
        self.shared.told.send_if_modified(|told| {
            let changed = *told != own;
            if changed {
                *told = own;
            }
            changed
        });
        if self.searches_until.is_some_and(|until| until <= now) {
            self.searches_until = None;
            self.swarm.behaviour_mut().kad.let_dial(false);
        }
        let topics: Vec<String> = lock(&self.shared.topics).keys().cloned().collect();
        topics.iter().for_each(|topic| self.subscribe(topic));
        if self.gate.credentials().is_empty() {
            return;
        }
        self.look_for_peers(now);
    }

    /// Dials further members while there are too few.
    fn look_for_peers(&mut self, now: Instant) {
        let members = self.meetings.members();
        if members >= self.peers_target {
            return;
        }
        // Those that are being met count, so that a slow machine does not meet everybody; one more is always tried.
        let dialling = self.reach.dialling();
        let coming = self.meetings.greeted() + dialling.len();
        let missing = self.peers_target.saturating_sub(members + coming);
        let count = missing.clamp(1, DIALS_PER_TICK);
        let mut next = self
            .meetings
            .worth_a_dial(count + dialling.len(), now, &mut self.random);
        next.retain(|node| *node != self.shared.node && !dialling.contains(node));
        next.into_iter().take(count).for_each(|node| self.dial(node));
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
