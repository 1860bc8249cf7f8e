//! How bytes reach a peer: TCP, QUIC, WebSocket with and without TLS, each secured with the peers' own keys.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::timeout::TransportTimeout;
use libp2p::core::transport::{Boxed, DialOpts, ListenerId, TransportError, TransportEvent};
use libp2p::core::upgrade::Version;
use libp2p::identity::Keypair;
use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId, Transport, dns, noise, quic, websocket, yamux};
use rustls::pki_types::CertificateDer;

use super::relayed::Metered;
use super::shared::Shared;
use super::ways::{Proxy, Ways};

/// What it takes to reach a peer and to know that it is the one, at most.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);

/// Streams that a peer may have open on one connection: 32 requests, as many of the routing table, tunnels, gossip.
const STREAMS_MAX: usize = 128;

/// What a QUIC connection may hold that nobody has read: a tunnel of 400 Mbit/s at 80 ms, and room for the rest.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// See [`STREAM_WINDOW_BYTES`].
const CONNECTION_WINDOW_BYTES: u32 = 6 << 20;

/// How often an idle QUIC connection says that it is there: before a router forgets it, which none does within 15 s.
const QUIC_KEEP_ALIVE: Duration = Duration::from_secs(12);

/// Without a packet for so long it has ended: two were lost.
const QUIC_SILENCE_MAX: Duration = Duration::from_secs(30);

/// A transport that authenticates peers and carries many streams.
pub(super) type Carrier = Boxed<(PeerId, StreamMuxerBox)>;

/// All of them. `roots` are trusted for WebSocket over TLS beside those of browsers; `meter` is for the caps of a node that
/// relays.
pub(super) fn build(
    key: &Keypair,
    proxy: Option<Proxy>,
    roots: &[CertificateDer<'static>],
    meter: Option<Arc<Shared>>,
) -> Result<Carrier, Box<dyn std::error::Error + Send + Sync>> {
    let plain = boxed(
        Ways::new(proxy.clone())
            .upgrade(Version::V1Lazy)
            .authenticate(noise::Config::new(key)?)
            .multiplex(multiplexer()),
    );
    let tls = tls(roots)?;
    let mut by_address = websocket::Config::new(Ways::new(proxy.clone()));
    by_address.set_tls_config(tls.clone());
    let by_address = boxed(
        by_address
            .upgrade(Version::V1Lazy)
            .authenticate(noise::Config::new(key)?)
            .multiplex(multiplexer()),
    );
    let mut limits = quic::Config::new(key);
    limits.max_concurrent_stream_limit = u32::try_from(STREAMS_MAX).unwrap_or(u32::MAX);
    limits.max_stream_data = STREAM_WINDOW_BYTES;
    limits.max_connection_data = CONNECTION_WINDOW_BYTES;
    limits.keep_alive_interval = QUIC_KEEP_ALIVE;
    limits.max_idle_timeout = u32::try_from(QUIC_SILENCE_MAX.as_millis()).unwrap_or(u32::MAX);
    let quic = boxed(quic::tokio::Transport::new(limits));
    // Names are looked up before everything else, except where TLS has to be told the name: there, below it.
    let mut by_name = websocket::Config::new(named(Ways::new(proxy))?);
    by_name.set_tls_config(tls);
    let by_name = SecureByName(boxed(
        by_name
            .upgrade(Version::V1Lazy)
            .authenticate(noise::Config::new(key)?)
            .multiplex(multiplexer()),
    ));
    let any = plain
        .or_transport(by_address)
        .map(|either, _| either.into_inner())
        .or_transport(quic)
        .map(|either, _| either.into_inner());
    let all = by_name.or_transport(named(any)?).map(|either, _| either.into_inner());
    let metered = all.map(move |(peer, muxer), _| {
        let metered = Metered::new(muxer, peer, meter.clone());
        (peer, StreamMuxerBox::new(metered))
    });
    Ok(TransportTimeout::new(metered, CONNECT_TIME_MAX).boxed())
}

/// Streams over TCP: as few as one connection needs, since each may hold a window of bytes that nobody has read.
pub(super) fn multiplexer() -> yamux::Config {
    let mut config = yamux::Config::default();
    config.set_max_num_streams(STREAMS_MAX);
    config
}

fn tls(roots: &[CertificateDer<'static>]) -> Result<websocket::tls::Config, websocket::tls::Error> {
    let mut trust = websocket::tls::Config::builder();
    for root in roots {
        trust.add_trust(&websocket::tls::Certificate::new(root.to_vec()))?;
    }
    Ok(trust.finish())
}

/// Looks names up before `inner` dials. A machine without a resolver's configuration still reaches numeric addresses.
fn named<T>(inner: T) -> io::Result<dns::tokio::Transport<T>> {
    // Either takes the transport, so which it will be is tried out without one.
    match dns::tokio::Transport::system(()) {
        Ok(_) => dns::tokio::Transport::system(inner),
        Err(_) => {
            let (config, options) = (dns::ResolverConfig::default(), dns::ResolverOpts::default());
            Ok(dns::tokio::Transport::custom(inner, config, options))
        }
    }
}

fn boxed<T, M>(transport: T) -> Carrier
where
    T: Transport<Output = (PeerId, M)> + Send + Unpin + 'static,
    T::Dial: Send + 'static,
    T::ListenerUpgrade: Send + 'static,
    T::Error: Send + Sync,
    M: libp2p::core::StreamMuxer + Send + 'static,
    M::Substream: Send + 'static,
    M::Error: Send + Sync + 'static,
{
    transport
        .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)))
        .boxed()
}

/// Takes dials of names over TLS and leaves all else to others.
struct SecureByName(Carrier);

impl Transport for SecureByName {
    type Output = <Carrier as Transport>::Output;
    type Error = io::Error;
    type ListenerUpgrade = <Carrier as Transport>::ListenerUpgrade;
    type Dial = <Carrier as Transport>::Dial;

    fn listen_on(&mut self, _: ListenerId, address: Multiaddr) -> Result<(), TransportError<io::Error>> {
        Err(TransportError::MultiaddrNotSupported(address))
    }

    fn remove_listener(&mut self, _: ListenerId) -> bool {
        false
    }

    fn dial(&mut self, address: Multiaddr, options: DialOpts) -> Result<Self::Dial, TransportError<io::Error>> {
        match is_secure_by_name(&address) {
            true => self.0.dial(address, options),
            false => Err(TransportError::MultiaddrNotSupported(address)),
        }
    }

    fn poll(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, Self::Error>> {
        Pin::new(&mut self.0).poll(context)
    }
}

fn is_secure_by_name(address: &Multiaddr) -> bool {
    let named = matches!(
        address.iter().next(),
        Some(Protocol::Dns(_) | Protocol::Dns4(_) | Protocol::Dns6(_))
    );
    let secure = |part| matches!(part, Protocol::Wss(_) | Protocol::Tls);
    let circuit = address.iter().any(|part| part == Protocol::P2pCircuit);
    named && !circuit && address.iter().any(secure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_over_tls_are_looked_up_below_it() {
        for (address, expected) in [
            ("/dns4/gateway.example.org/tcp/443/wss", true),
            ("/dns/gateway.example.org/tcp/443/tls/ws", true),
            ("/dns4/gateway.example.org/tcp/443/ws", false),
            ("/dns4/gateway.example.org/tcp/4001", false),
            ("/ip4/192.0.2.1/tcp/443/wss", false),
        ] {
            let address = address.parse().expect("an address");
            assert_eq!(is_secure_by_name(&address), expected, "{address}");
        }
    }
}
