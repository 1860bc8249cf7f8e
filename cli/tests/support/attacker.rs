//! What an attacker does, with real sockets from many loopback networks: nothing here is kept to any rule of ours.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use libp2p::{Multiaddr, StreamProtocol, SwarmBuilder, noise, tcp, yamux};
use polder_node::control::{self, ControlConfig};
use polder_node::gate::{Admitted, Gate, Refused};
use polder_protocol::hash::{InstitutionId, NodeId};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Endpoint, EndpointConfig, TokioRuntime, UdpPoller};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpSocket, TcpStream};

/// Networks (/24) that attackers come from, none of them that of honest nodes.
pub(crate) const NETWORKS: u8 = 8;

/// An address of an attacker's network.
pub(crate) fn from(network: usize) -> Ipv4Addr {
    Ipv4Addr::new(127, 66, u8::try_from(network % usize::from(NETWORKS)).unwrap(), 1)
}

/// Begins `count` QUIC handshakes and answers nothing: the other end waits, with a key exchange behind it.
pub(crate) async fn half_open_quic(target: SocketAddr, alpn: &[u8], count: usize) {
    let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    tls.alpn_protocols = vec![alpn.to_vec()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let mut client = quinn::ClientConfig::new(Arc::new(crypto));
    let mut transport = quinn::TransportConfig::default();
    transport.max_idle_timeout(Some(Duration::from_secs(4).try_into().unwrap()));
    client.transport_config(Arc::new(transport));
    let endpoints: Vec<Endpoint> = (0..usize::from(NETWORKS))
        .map(|network| {
            let socket = UdpSocket::bind((from(network), 0)).unwrap();
            socket.set_nonblocking(true).unwrap();
            let deaf = Arc::new(Deaf(socket));
            Endpoint::new_with_abstract_socket(EndpointConfig::default(), None, deaf, Arc::new(TokioRuntime)).unwrap()
        })
        .collect();
    let mut begun = Vec::new();
    for number in 0..count {
        let endpoint = &endpoints[number % endpoints.len()];
        begun.push(endpoint.connect_with(client.clone(), target, "polder").unwrap());
        // 10,000 in half a minute.
        if number % 10 == 9 {
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        if begun.len() >= 2_000 {
            begun.drain(..1_000);
        }
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
}

/// A socket that hears nothing.
#[derive(Debug)]
struct Deaf(UdpSocket);

#[derive(Debug)]
struct Always;

impl UdpPoller for Always {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncUdpSocket for Deaf {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Always)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        // What the system does not take is lost, as on any network.
        let _ = self.0.send_to(transmit.contents, transmit.destination);
        Ok(())
    }

    fn poll_recv(&self, _: &mut Context<'_>, _: &mut [IoSliceMut<'_>], _: &mut [RecvMeta]) -> Poll<io::Result<usize>> {
        Poll::Pending
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// Opens `count` TCP connections and says one byte of a greeting every second for as long as `time` lasts.
pub(crate) async fn slow_loris(target: SocketAddr, words: &'static [u8], count: usize, time: Duration) -> usize {
    let heard = Arc::new(AtomicUsize::new(0));
    let each = (0..count).map(|number| {
        let heard = Arc::clone(&heard);
        async move {
            let Ok(mut stream) = tcp_from(number, target).await else {
                return;
            };
            heard.fetch_add(1, Ordering::Relaxed);
            for byte in words.iter().cycle() {
                if stream.write_all(&[*byte]).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    });
    let all = futures::future::join_all(each);
    let _ = tokio::time::timeout(time, all).await;
    heard.load(Ordering::Relaxed)
}

/// Writes noise to a TCP listener, `count` times.
pub(crate) async fn tcp_garbage(target: SocketAddr, prefix: &[u8], count: usize) {
    for number in 0..count {
        if let Ok(mut stream) = tcp_from(number, target).await {
            let bytes = [prefix, &noise(number as u64, 2_000)].concat();
            // The node may hang up in the middle.
            let _ = stream.write_all(&bytes).await;
        }
    }
}

/// Sends noise to a UDP port, every second packet with the first bytes of QUIC.
pub(crate) async fn udp_garbage(target: SocketAddr, count: usize) {
    for number in 0..count {
        let socket = UdpSocket::bind((from(number), 0)).unwrap();
        let mut packet = noise(number as u64, 1 + number % 1_400);
        if number % 2 == 0 && packet.len() > 5 {
            packet[0] = 0xc0 | (packet[0] & 0x0f);
            packet[1..5].copy_from_slice(&1u32.to_be_bytes());
        }
        let _ = socket.send_to(&packet, target);
        if number % 16 == 15 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// An address of a network with few Sybils, so that they get as far as a greeting.
fn sybil_from(number: usize) -> Ipv4Addr {
    Ipv4Addr::new(127, 67, u8::try_from(number % 128).unwrap(), 1)
}

/// A whole node with a key of its own and credentials that no institution gave. The sentence with which it is refused,
/// where it got as far as that.
pub(crate) async fn sybil(number: usize, victim: NodeId, address: String) -> Option<String> {
    let mut seed = [0x5b; 32];
    seed[..8].copy_from_slice(&(number as u64).to_le_bytes());
    let mut config = ControlConfig::loopback(seed);
    config.listen = vec![format!("/ip4/{}/tcp/0", sybil_from(number))];
    config.bootstrap = vec![(victim, vec![address])];
    config.relay_server = true;
    let (control, driver) = control::start(config, Arc::new(Forged(number))).await.unwrap();
    let _heard = control.subscribe("polder/everything");
    let said = control.request_within(victim, control::Service::Directory, Vec::new(), Duration::from_secs(4));
    let answer = said.await;
    // It may have gossip and routes to spread, too.
    let _ = control.publish("polder/everything", noise(number as u64, 4_000)).await;
    control.shutdown().await;
    driver.abort();
    match answer {
        Ok(_) => panic!("a Sybil was answered"),
        Err(error) => Some(error.to_string()),
    }
}

/// Shows noise and lets everybody in.
struct Forged(usize);

impl Gate for Forged {
    fn credentials(&self) -> Vec<u8> {
        noise(self.0 as u64, 300)
    }

    fn admit(&self, node: NodeId, _: &[u8]) -> Result<Admitted, Refused> {
        Ok(Admitted {
            node,
            institution: InstitutionId([6; 32]),
            capabilities: u16::MAX,
        })
    }
}

/// Strangers that open streams of the control protocol: half announce more than any message has, half a MiB that then
/// comes byte by byte. How many streams the node closed.
pub(crate) async fn oversized(number: usize, target: SocketAddr, streams: usize, time: Duration) -> usize {
    let mut swarm = SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_behaviour(|_| libp2p_stream::Behaviour::new())
        .unwrap()
        .with_swarm_config(|config| config.with_idle_connection_timeout(Duration::from_secs(60)))
        .build();
    let mut control = swarm.behaviour().new_control();
    let own: Multiaddr = format!("/ip4/{}/tcp/0", from(number)).parse().unwrap();
    swarm.listen_on(own).unwrap();
    let address: Multiaddr = format!("/ip4/{}/tcp/{}", target.ip(), target.port()).parse().unwrap();
    swarm.dial(address).unwrap();
    let (connected, peer) = futures::channel::oneshot::channel();
    let mut connected = Some(connected);
    let drive = async move {
        loop {
            if let libp2p::swarm::SwarmEvent::ConnectionEstablished { peer_id, .. } = swarm.select_next_some().await
                && let Some(connected) = connected.take()
            {
                let _ = connected.send(peer_id);
            }
        }
    };
    let attack = async move {
        let Ok(peer) = peer.await else { return 0 };
        let mut closed = 0;
        let mut kept = Vec::new();
        for number in 0..streams {
            let opened = control
                .open_stream(peer, StreamProtocol::new("/polder/control/1"))
                .await;
            let Ok(mut stream) = opened else { break };
            let length: u32 = if number % 2 == 0 { u32::MAX } else { 1 << 20 };
            if stream.write_all(&length.to_le_bytes()).await.is_err() || stream.flush().await.is_err() {
                closed += 1;
                continue;
            }
            if number % 2 == 0 {
                let _ = stream.write_all(&noise(number as u64, 200_000)).await;
                let mut answer = [0; 1];
                let read = tokio::time::timeout(Duration::from_secs(2), stream.read(&mut answer)).await;
                closed += usize::from(!matches!(read, Ok(Ok(1)) | Err(_)));
            } else {
                kept.push(stream);
            }
        }
        loop {
            for stream in &mut kept {
                if stream.write_all(&[0]).await.is_err() || stream.flush().await.is_err() {
                    return closed;
                }
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    tokio::select! {
        () = drive => 0,
        closed = attack => closed,
        () = tokio::time::sleep(time) => 0,
    }
}

async fn tcp_from(network: usize, target: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::new(IpAddr::V4(from(network)), 0))?;
    tokio::time::timeout(Duration::from_secs(2), socket.connect(target))
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Bytes that look like nothing, the same at each call.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut byte = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..length).map(|_| byte()).collect()
}
