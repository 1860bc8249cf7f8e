//! What the rest of the node holds of the control plane.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use libp2p::{Multiaddr, StreamProtocol};
use polder_protocol::hash::NodeId;
use polder_protocol::wire::{CONTROL_BYTES_MAX, CREDENTIALS_BYTES_MAX, GOSSIP_BYTES_MAX, Service};
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use super::address::{ip_of, mapped_address, multiaddresses, node_of, peer_of, port_of};
use super::shared::{Shared, lock};
use super::{
    Addresses, Circles, ControlError, Gossip, Incoming, Path, PeerEvent, PeerRecord, REQUEST_DEADLINE, RelayCaps,
};
use crate::gate::AddressBook;
use crate::mapping::{Opened, Port};

/// Requests of one service that may wait for it; more are answered with "busy".
const INCOMING_MAX: usize = 128;

/// Gossip of one topic that may wait for a subscriber; more is dropped, since announcements repeat.
const GOSSIP_MAX: usize = 512;

/// Streams that carry the data plane's packets.
const TUNNEL: StreamProtocol = StreamProtocol::new("/polder/tunnel/1");

/// Room for version, service and length around a body.
const ENVELOPE_BYTES: usize = 64;

/// What the handle asks of the driver.
#[derive(Debug)]
pub(super) enum Command {
    Request {
        to: NodeId,
        addresses: Vec<Multiaddr>,
        service: Service,
        body: Vec<u8>,
        answer: oneshot::Sender<Result<Vec<u8>, ControlError>>,
    },
    Meet {
        to: NodeId,
        addresses: Vec<Multiaddr>,
        answer: oneshot::Sender<Result<Vec<u8>, ControlError>>,
    },
    Publish {
        topic: String,
        bytes: Vec<u8>,
        answer: oneshot::Sender<Result<(), ControlError>>,
    },
    Subscribe {
        topic: String,
    },
    Reintroduce,
    Mapped {
        addresses: Vec<Multiaddr>,
    },
    Circles {
        answer: oneshot::Sender<Circles>,
    },
    Shutdown {
        done: oneshot::Sender<()>,
    },
}

/// The control plane, for the rest of the node. Clones are cheap and all mean the same swarm.
#[derive(Clone)]
pub struct ControlHandle {
    pub(super) shared: Arc<Shared>,
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) streams: libp2p_stream::Control,
}

impl std::fmt::Debug for ControlHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControlHandle")
            .field("shared", &self.shared)
            .finish_non_exhaustive()
    }
}

/// Tunnels that members open to this node.
pub struct Tunnels {
    streams: libp2p_stream::IncomingStreams,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Tunnels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tunnels").finish_non_exhaustive()
    }
}

impl Tunnels {
    /// The next one; `None` once the control plane has stopped. Safe to drop.
    pub async fn next(&mut self) -> Option<(NodeId, libp2p::Stream)> {
        loop {
            let (peer, stream) = self.streams.next().await?;
            // Whoever has shown no credentials gets no answer.
            if let Some(node) = node_of(&peer).filter(|node| self.shared.is_present(*node)) {
                return Some((node, stream));
            }
        }
    }
}

impl ControlHandle {
    /// This node.
    pub fn node(&self) -> NodeId {
        self.shared.node
    }

    /// Caps what this node relays for others from now on.
    pub fn set_relay_caps(&self, caps: RelayCaps) {
        self.shared.relayed.set(caps);
    }

    /// Bytes that came out of circuits through this node since it started.
    pub fn relayed_bytes(&self) -> u64 {
        self.shared.relayed.bytes()
    }

    /// Where this node answers, as multiaddresses without the node's id.
    pub fn listen_addresses(&self) -> Vec<String> {
        lock(&self.shared.listen_addresses).clone()
    }

    /// Where this node tells others that it is, whenever that changes; nothing before the first moment is over.
    pub fn told_addresses(&self) -> watch::Receiver<Addresses> {
        self.shared.told.subscribe()
    }

    /// Asks a member, dialling and greeting it first where needed.
    ///
    /// # Errors
    ///
    /// [`ControlError`]: unreachable, refused on either side, not offered, busy, or no answer within
    /// [`REQUEST_DEADLINE`].
    pub async fn request(&self, to: NodeId, service: Service, body: Vec<u8>) -> Result<Vec<u8>, ControlError> {
        self.request_within(to, service, body, REQUEST_DEADLINE).await
    }

    /// As [`Self::request`], with another deadline.
    ///
    /// # Errors
    ///
    /// As for [`Self::request`].
    pub async fn request_within(
        &self,
        to: NodeId,
        service: Service,
        body: Vec<u8>,
        deadline: Duration,
    ) -> Result<Vec<u8>, ControlError> {
        self.ask(to, Vec::new(), service, body, deadline).await
    }

    /// As [`Self::request`], at addresses that the caller knows. The only way to [`Service::Enrol`], which needs no
    /// membership.
    ///
    /// # Errors
    ///
    /// As for [`Self::request`], and [`ControlError::Address`].
    pub async fn request_at(
        &self,
        to: NodeId,
        addresses: &[String],
        service: Service,
        body: Vec<u8>,
    ) -> Result<Vec<u8>, ControlError> {
        self.ask(to, multiaddresses(addresses)?, service, body, REQUEST_DEADLINE)
            .await
    }

    /// Connects to a peer and exchanges credentials with it.
    ///
    /// # Errors
    ///
    /// [`ControlError::RefusedBy`] with the peer's reason, [`ControlError::Refused`] with ours, or why it cannot be
    /// reached.
    pub async fn dial(&self, to: NodeId, addresses: &[String]) -> Result<PeerRecord, ControlError> {
        let addresses = multiaddresses(addresses)?;
        let (answer, answered) = oneshot::channel();
        let command = Command::Meet { to, addresses, answer };
        self.wait(to, Service::Hello, REQUEST_DEADLINE, command, answered)
            .await?;
        let record = lock(&self.shared.peers).get(&to).cloned();
        record.ok_or_else(|| ControlError::Unreachable {
            node: to,
            reason: "it left at once".into(),
        })
    }

    /// Opens a stream for the data plane's packets to a member, over whatever connection stands: straight, or through
    /// a relay, which sees noise. The member is met first where needed.
    ///
    /// # Errors
    ///
    /// As for [`Self::request`].
    pub async fn tunnel(&self, to: NodeId) -> Result<libp2p::Stream, ControlError> {
        self.dial(to, &[]).await?;
        let failed = |reason: String| ControlError::Unreachable { node: to, reason };
        let peer = peer_of(to).ok_or_else(|| failed("its id is not a key".into()))?;
        let mut streams = self.streams.clone();
        match tokio::time::timeout(REQUEST_DEADLINE, streams.open_stream(peer, TUNNEL)).await {
            Ok(opened) => opened.map_err(|error| failed(error.to_string())),
            Err(_) => Err(failed("it does not take a tunnel".into())),
        }
    }

    /// Tunnels that members open, from now on; `None` where somebody takes them already.
    pub fn tunnels(&self) -> Option<Tunnels> {
        let streams = self.streams.clone().accept(TUNNEL).ok()?;
        let shared = Arc::clone(&self.shared);
        Some(Tunnels { streams, shared })
    }

    /// Answers a service from now on. A later registration replaces an earlier one.
    pub fn register(&self, service: Service) -> mpsc::Receiver<Incoming> {
        let (sender, receiver) = mpsc::channel(INCOMING_MAX);
        lock(&self.shared.services).insert(service, sender);
        receiver
    }

    /// Sends `bytes` to all members that subscribe to `topic`.
    ///
    /// # Errors
    ///
    /// [`ControlError::NobodyListens`] while no connected peer subscribes, [`ControlError::TooLong`] above about
    /// 16 KiB, since a message also carries this node's credentials.
    pub async fn publish(&self, topic: &str, bytes: Vec<u8>) -> Result<(), ControlError> {
        within(bytes.len(), GOSSIP_BYTES_MAX - CREDENTIALS_BYTES_MAX - ENVELOPE_BYTES)?;
        let (answer, answered) = oneshot::channel();
        let topic = topic.to_owned();
        self.send(Command::Publish { topic, bytes, answer }).await?;
        answered.await.map_err(|_| ControlError::Stopped)?
    }

    /// Hears what certified members publish under `topic`. What a slow reader does not take in time is dropped.
    pub fn subscribe(&self, topic: &str) -> mpsc::Receiver<Gossip> {
        let (sender, receiver) = mpsc::channel(GOSSIP_MAX);
        let topic = topic.to_owned();
        let mut topics = lock(&self.shared.topics);
        let readers = topics.entry(topic.clone()).or_default();
        readers.retain(|reader| !reader.is_closed());
        readers.push(sender);
        drop(topics);
        // Where the queue is full, the driver's next tick subscribes to every topic that has readers.
        let _ = self.commands.try_send(Command::Subscribe { topic });
        receiver
    }

    /// What is known of one member.
    pub fn peer(&self, node: NodeId) -> Option<PeerRecord> {
        lock(&self.shared.peers).get(&node).cloned()
    }

    /// Where the data plane is said to answer.
    pub fn data_addresses(&self) -> Vec<SocketAddr> {
        lock(&self.shared.data_addresses).clone()
    }

    /// The addresses of this machine on which the control plane listens, each once.
    pub fn own_ips(&self) -> Vec<IpAddr> {
        let own = multiaddresses(&self.listen_addresses()).unwrap_or_default();
        let mut ips: Vec<IpAddr> = own.iter().filter_map(ip_of).filter(|ip| !ip.is_unspecified()).collect();
        ips.sort();
        ips.dedup();
        ips
    }

    /// Members that this node has met, in the order of their ids.
    pub fn peers(&self) -> Vec<PeerRecord> {
        lock(&self.shared.peers).values().cloned().collect()
    }

    /// Members that are connected now.
    pub fn present(&self) -> Vec<PeerRecord> {
        let peers = lock(&self.shared.peers);
        peers.values().filter(|peer| peer.path != Path::Lost).cloned().collect()
    }

    /// Tells of members that come and go. A listener that lags misses events and is told so; [`Self::peers`] is whole.
    pub fn events(&self) -> broadcast::Receiver<PeerEvent> {
        self.shared.events.subscribe()
    }

    /// Says where the data plane answers, to those already met too.
    pub async fn set_data_addresses(&self, addresses: Vec<SocketAddr>) {
        *lock(&self.shared.data_addresses) = addresses;
        self.reintroduce().await;
    }

    /// The TCP and QUIC ports on which the control plane listens beyond this machine, each once.
    pub fn own_ports(&self) -> Vec<Port> {
        let own = multiaddresses(&self.listen_addresses()).unwrap_or_default();
        let mut ports: Vec<Port> = own.iter().filter_map(port_of).collect();
        ports.sort();
        ports.dedup();
        ports
    }

    /// Says at which ports of a router the control plane answers, in place of those that were said before.
    pub async fn set_mapped(&self, opened: Vec<Opened>) {
        let addresses = opened.iter().map(mapped_address).collect();
        // A stopped control plane has nobody to tell.
        let _ = self.send(Command::Mapped { addresses }).await;
    }

    /// Greets all members again, after this node's credentials or addresses have changed.
    pub async fn reintroduce(&self) {
        // A stopped control plane has nobody to greet.
        let _ = self.send(Command::Reintroduce).await;
    }

    /// With whom gossip and the routing table deal now; nobody once the control plane has stopped.
    pub async fn circles(&self) -> Circles {
        let (answer, answered) = oneshot::channel();
        match self.send(Command::Circles { answer }).await {
            Ok(()) => answered.await.unwrap_or_default(),
            Err(_) => Circles::default(),
        }
    }

    /// Says goodbye to all members and stops.
    pub async fn shutdown(self) {
        let (done, finished) = oneshot::channel();
        if self.send(Command::Shutdown { done }).await.is_ok() {
            let _ = finished.await;
        }
    }

    async fn ask(
        &self,
        to: NodeId,
        addresses: Vec<Multiaddr>,
        service: Service,
        body: Vec<u8>,
        deadline: Duration,
    ) -> Result<Vec<u8>, ControlError> {
        within(body.len(), CONTROL_BYTES_MAX - ENVELOPE_BYTES)?;
        let (answer, answered) = oneshot::channel();
        let command = Command::Request {
            to,
            addresses,
            service,
            body,
            answer,
        };
        self.wait(to, service, deadline, command, answered).await
    }

    async fn wait(
        &self,
        node: NodeId,
        service: Service,
        after: Duration,
        command: Command,
        answered: oneshot::Receiver<Result<Vec<u8>, ControlError>>,
    ) -> Result<Vec<u8>, ControlError> {
        let answer = async {
            self.send(command).await?;
            answered.await.map_err(|_| ControlError::Stopped)?
        };
        let late = ControlError::Deadline { node, service, after };
        tokio::time::timeout(after, answer).await.unwrap_or(Err(late))
    }

    async fn send(&self, command: Command) -> Result<(), ControlError> {
        self.commands.send(command).await.map_err(|_| ControlError::Stopped)
    }
}

impl AddressBook for ControlHandle {
    fn data_addresses(&self, peer: NodeId) -> Vec<SocketAddr> {
        lock(&self.shared.peers)
            .get(&peer)
            .map(|record| record.data_addresses.clone())
            .unwrap_or_default()
    }
}

fn within(len_bytes: usize, limit_bytes: usize) -> Result<(), ControlError> {
    if len_bytes <= limit_bytes {
        Ok(())
    } else {
        Err(ControlError::TooLong { len_bytes, limit_bytes })
    }
}
