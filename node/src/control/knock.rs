//! Tries one address: whether a peer answers there, which one, and how soon. Nothing is said to it but keys.

use std::time::{Duration, Instant};

use libp2p::core::Endpoint;
use libp2p::core::transport::{DialOpts, PortUse};
use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, Transport};
use polder_protocol::hash::NodeId;
use rustls::pki_types::CertificateDer;

use super::address::{keypair, node_of, peer_of};
use super::transport;
use super::ways::Proxy;

/// What one address gets.
const KNOCK_TIME_MAX: Duration = Duration::from_secs(6);

/// Who answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Knocked {
    /// The peer; its key was proved.
    pub(crate) node: NodeId,
    /// From the first packet until that.
    pub(crate) after: Duration,
}

/// Dials `address` with a key of `seed`; the error is for people.
pub(crate) async fn knock(
    seed: [u8; 32],
    proxy: Option<Proxy>,
    roots: &[CertificateDer<'static>],
    node: Option<NodeId>,
    address: &str,
) -> Result<Knocked, String> {
    let key = keypair(seed).map_err(|error| error.to_string())?;
    let mut address: Multiaddr = address.parse().map_err(|error| format!("no multiaddress ({error})"))?;
    let names_peer = address.iter().any(|part| matches!(part, Protocol::P2p(_)));
    if !names_peer && let Some(peer) = node.and_then(peer_of) {
        address.push(Protocol::P2p(peer));
    }
    let mut carrier = transport::build(&key, proxy, roots, None).map_err(|error| error.to_string())?;
    let options = DialOpts {
        role: Endpoint::Dialer,
        port_use: PortUse::New,
    };
    let began = Instant::now();
    let dial = carrier.dial(address, options).map_err(|error| error.to_string())?;
    let dialled = tokio::time::timeout(KNOCK_TIME_MAX, dial).await;
    let late = |_| format!("no answer within {} s", KNOCK_TIME_MAX.as_secs());
    let (peer, _connection) = dialled.map_err(late)?.map_err(|error| plain(&error))?;
    let answered = node_of(&peer).ok_or("who answers there has no key of a node")?;
    match node {
        Some(node) if node != answered => Err(format!("another node answers there: {}", answered.short())),
        _ => Ok(Knocked {
            node: answered,
            after: began.elapsed(),
        }),
    }
}

/// The innermost reason: the layers above it repeat where they are.
fn plain(error: &dyn std::error::Error) -> String {
    let mut inner = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}
