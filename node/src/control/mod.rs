//! The control plane: a libp2p swarm in which only certified peers are heard.
//!
//! On every new connection the dialer says [`Hello`](polder_protocol::wire::Hello) and the listener answers with its
//! own; each asks its [`Gate`] about the other. Until both agree, nothing but greetings and enrolment
//! is answered, and a refusal says which rule it follows. Members then tell each other of the members they know.

mod address;
mod behaviour;
mod codec;
mod crowd;
mod door;
mod driver;
mod gossip;
mod handle;
mod knock;
mod meetings;
mod relayed;
mod shared;
mod table;
#[cfg(test)]
mod tests;
mod transport;
mod turnstile;
pub(crate) mod untrusted;
mod ways;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use polder_protocol::hash::{InstitutionId, NodeId};
use polder_protocol::time::UnixSeconds;
pub use polder_protocol::wire::Service;
use rustls::pki_types::CertificateDer;
use thiserror::Error;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::gate::{Admitted, Gate};
pub use address::is_multiaddress;
pub(crate) use address::{is_public, source_for};
pub use handle::{ControlHandle, Tunnels};
pub(crate) use knock::{Knocked, knock};
pub use relayed::RelayCaps;
pub use ways::{Proxy, ProxyError};

/// How long a request may take where the caller does not say: a dial over a slow path, a greeting and an answer.
pub const REQUEST_DEADLINE: Duration = Duration::from_secs(20);

/// Members that a node looks for by itself. It is found by as many on average, so it has twice as many; what each costs
/// (pings, and its share of everything that is told to all) does not grow with the federation.
const PEERS_TARGET: usize = 16;

/// How the control plane starts.
#[derive(Debug, Clone)]
pub struct ControlConfig {
    /// The ed25519 secret of the node.
    pub seed: [u8; 32],
    /// Where to listen, as multiaddresses such as `/ip4/0.0.0.0/tcp/4001` or `/ip4/0.0.0.0/udp/4001/quic-v1`.
    pub listen: Vec<String>,
    /// Addresses under which others reach this node, where its operator knows them.
    pub external: Vec<String>,
    /// Peers to meet first; they are dialled again whenever they are lost.
    pub bootstrap: Vec<(NodeId, Vec<String>)>,
    /// Find members on the local network.
    pub mdns: bool,
    /// The proxy through which TCP leaves for public addresses.
    pub proxy: Option<Proxy>,
    /// Root certificates that are trusted for WebSocket over TLS, beside those of browsers.
    pub roots: Vec<CertificateDer<'static>>,
    /// Carry connections for members that nobody can reach, and keep a routing table for others.
    pub relay_server: bool,
    /// Where the data plane answers. An unspecified address is completed by each peer with the address it sees.
    pub data_addresses: Vec<SocketAddr>,
    /// Stop trying to meet further members at so many.
    pub peers_target: usize,
    /// Connections in all; handshakes of those who come are limited to half as many, and a few for
    /// each network.
    pub connections_max: u32,
}

impl ControlConfig {
    /// Listens on any free port of the loopback interface and looks for nobody.
    pub fn loopback(seed: [u8; 32]) -> Self {
        Self {
            seed,
            listen: vec!["/ip4/127.0.0.1/tcp/0".into(), "/ip4/127.0.0.1/udp/0/quic-v1".into()],
            external: Vec::new(),
            bootstrap: Vec::new(),
            mdns: false,
            proxy: None,
            roots: Vec::new(),
            relay_server: false,
            data_addresses: Vec::new(),
            peers_target: PEERS_TARGET,
            connections_max: 512,
        }
    }
}

/// Why something on the control plane did not happen.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum ControlError {
    #[error("cannot listen on {address}: {reason}\n  hint: {hint}")]
    Listen {
        address: String,
        reason: String,
        hint: &'static str,
    },
    #[error("`{address}` is not a multiaddress: {reason}")]
    Address { address: String, reason: String },
    #[error("the seed is not an ed25519 key: {reason}")]
    Seed { reason: String },
    #[error("the transport cannot be set up: {reason}")]
    Transport { reason: String },
    #[error("node {node} does not answer: {reason}")]
    Unreachable { node: NodeId, reason: String },
    #[error("node {node} refuses us: {reason}")]
    RefusedBy { node: NodeId, reason: String },
    #[error("we refuse node {node}: {reason}")]
    Refused { node: NodeId, reason: String },
    #[error("node {node} does not offer {service:?}")]
    NoSuchService { node: NodeId, service: Service },
    #[error("node {node} is too busy for {service:?}")]
    Busy { node: NodeId, service: Service },
    #[error("node {node} cannot read our {service:?} request: {reason}")]
    Malformed {
        node: NodeId,
        service: Service,
        reason: String,
    },
    #[error("message of {len_bytes} bytes is over the limit of {limit_bytes}")]
    TooLong { len_bytes: usize, limit_bytes: usize },
    #[error("node {node} did not answer {service:?} within {after:?}")]
    Deadline {
        node: NodeId,
        service: Service,
        after: Duration,
    },
    #[error("nobody listens to topic `{topic}`")]
    NobodyListens { topic: String },
    #[error("gossip on `{topic}` failed: {reason}")]
    Gossip { topic: String, reason: String },
    #[error("the control plane has too much to do")]
    Overloaded,
    #[error("the control plane has stopped")]
    Stopped,
}

/// A request of a peer.
#[derive(Debug)]
pub struct Incoming {
    /// Who asks; its key was proved.
    pub from: NodeId,
    /// What its credentials say. `None` only for [`Service::Enrol`].
    pub admitted: Option<Admitted>,
    /// What the service defines.
    pub body: Vec<u8>,
    /// Where the answer goes. Dropped unanswered, the asker hears that this node is busy.
    pub reply: oneshot::Sender<Vec<u8>>,
}

/// A gossip message of a certified author.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gossip {
    /// The author; it signed the message.
    pub from: NodeId,
    /// What the author's credentials say.
    pub admitted: Admitted,
    /// What the topic defines.
    pub bytes: Vec<u8>,
}

/// How a peer is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// At least one connection goes straight to it.
    Direct,
    /// All connections go through a relay.
    Relayed,
    /// Not connected now.
    Lost,
}

/// Where a node says that it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Where its control plane answers, as multiaddresses, the most public first.
    pub control: Vec<String>,
    /// Where its data plane answers, best first.
    pub data: Vec<SocketAddr>,
}

/// What is known of a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerRecord {
    /// Who.
    pub node: NodeId,
    /// The institution that certified it.
    pub institution: InstitutionId,
    /// What it may do, as bits of the charter's capabilities.
    pub capabilities: u16,
    /// The program it runs and its version, as it says.
    pub agent: String,
    /// Where its control plane answers, as it says.
    pub control_addresses: Vec<String>,
    /// Where its data plane answers, best first.
    pub data_addresses: Vec<SocketAddr>,
    /// The last measured round trip.
    pub rtt: Option<Duration>,
    /// How it is connected.
    pub path: Path,
    /// What its gossip was worth: below zero, it sent what it should not have.
    pub score: i32,
    /// When it was last heard.
    pub last_seen: UnixSeconds,
}

/// With whom gossip and the routing table deal now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Circles {
    /// Nodes in the routing table.
    pub table: Vec<NodeId>,
    /// Nodes that gossip knows to listen to some topic, or has in a mesh.
    pub gossip: Vec<NodeId>,
}

/// What changed among the members that this node has met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerEvent {
    /// A member was admitted.
    Joined(PeerRecord),
    /// A member said goodbye, was lost, or is no longer admitted.
    Left {
        /// Who.
        node: NodeId,
        /// Why, for people.
        reason: String,
    },
    /// This machine has lost addresses; what went out from them is dead.
    Moved {
        /// Those that it no longer has.
        lost: Vec<IpAddr>,
    },
    /// A peer was turned away.
    Refused {
        /// Who.
        node: NodeId,
        /// Which rule, for people.
        reason: String,
    },
    /// A peer turned this node away.
    RefusedBy {
        /// Who.
        node: NodeId,
        /// Which rule, for people.
        reason: String,
    },
}

/// Starts the control plane on the present tokio runtime, listening when it returns.
///
/// The join handle ends after [`ControlHandle::shutdown`].
///
/// # Errors
///
/// [`ControlError::Listen`] for a port in use, [`ControlError::Address`] for a malformed address, and what else keeps
/// the swarm from starting.
pub async fn start(
    config: ControlConfig,
    gate: Arc<dyn Gate>,
) -> Result<(ControlHandle, JoinHandle<()>), ControlError> {
    driver::start(config, gate).await
}
