//! The endpoint: dials, answers, and hands streams to those who serve them.

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use polder_protocol::hash::NodeId;
use quinn::{Connection, Endpoint, Incoming, RecvStream, SendStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::blobs::{self, BlobStore, Fetches};
use super::caps::{UploadCaps, Uploads};
use super::detour::{Detour, STRAIGHT_FIRST};
use super::error::{Closing, DataError, StreamEnd, lost};
use super::frames::{FrameReceiver, FrameSender, KIND_OPENING};
use super::greeting::{self, Greeted, Greeting};
use super::links::{Link, Links};
use super::roads::{Roads, is_tunnel};
use super::settings::{
    ADDRESS_STAGGER, ADDRESSES_MAX, Class, DataConfig, ECHO_BYTES_MAX, ECHOES_MAX, HANDSHAKES_MAX,
    HANDSHAKES_SHARE_MAX, HANDSHAKES_UNPROVEN_MAX, INCOMING_MAX, RECHECK_EVERY, Service, welcome,
};
use super::sink::Sinks;
use super::tls::{self, Identity};
use super::traffic::{Counter, PeerTraffic, Traffic};
use crate::gate::{AddressBook, Admitted, Gate};
use crate::neighbourhood::{Census, Neighbourhood};

/// The name in the TLS handshake. Who answers is told by the key, so the name means nothing.
pub(super) const SERVER_NAME: &str = "polder";

/// The data plane of one node. Clones are the same plane; it answers until [`DataPlane::shutdown`].
#[derive(Clone)]
pub struct DataPlane {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) config: DataConfig,
    identity: Identity,
    endpoint: Endpoint,
    // The same socket as the endpoint's, for packets that are not QUIC.
    socket: UdpSocket,
    local_address: SocketAddr,
    pub(super) roads: Arc<Roads>,
    pub(super) detour: OnceLock<Arc<dyn Detour>>,
    instance: u64,
    gate: Arc<dyn Gate>,
    book: Arc<dyn AddressBook>,
    pub(super) blobs: BlobStore,
    pub(super) fetches: Fetches,
    pub(super) sending_chunks: Semaphore,
    pub(super) chunks_asked: AtomicU32,
    pub(super) uploads: Uploads,
    echoes: Semaphore,
    pub(super) sinks: Sinks,
    pub(super) links: Links,
    traffic: Traffic,
    services: Mutex<BTreeMap<Service, mpsc::Sender<IncomingStream>>>,
    pub(super) stop: CancellationToken,
    pub(super) tasks: TaskTracker,
}

/// A stream that an admitted peer opened.
#[derive(Debug)]
pub struct IncomingStream {
    /// Who, and what it may do.
    pub peer: Admitted,
    /// On which connection.
    pub class: Class,
    /// What the peer said it is for.
    pub header: Vec<u8>,
    /// To the peer.
    pub sender: FrameSender,
    /// From the peer.
    pub receiver: FrameReceiver,
}

/// A place among the handshakes of one neighbourhood, until it is dropped.
struct Share {
    census: Arc<Mutex<Census>>,
    neighbourhood: Neighbourhood,
}

impl Share {
    fn take(census: &Arc<Mutex<Census>>, from: SocketAddr) -> Option<Self> {
        // A tunnel's address says nothing; members alone have tunnels.
        let neighbourhood = Neighbourhood::of((!is_tunnel(from)).then(|| from.ip()));
        let mut shares = census.lock().unwrap_or_else(PoisonError::into_inner);
        let census = Arc::clone(census);
        shares
            .enter(neighbourhood, HANDSHAKES_SHARE_MAX)
            .then_some(Self { census, neighbourhood })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut census = self.census.lock().unwrap_or_else(PoisonError::into_inner);
        census.leave(self.neighbourhood);
    }
}

/// One way to a peer.
#[derive(Debug, Clone, Copy)]
pub(super) enum Way {
    Straight(SocketAddr),
    Tunnel,
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Straight(address) => address.fmt(f),
            Self::Tunnel => f.write_str("through the control plane"),
        }
    }
}

impl std::fmt::Debug for DataPlane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DataPlane")
            .field("node", &self.inner.identity.node)
            .field("local_address", &self.inner.local_address)
            .finish_non_exhaustive()
    }
}

impl DataPlane {
    /// Binds the port and answers from now on. Call it within a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`DataError::Listen`] when the port is in use, [`DataError::Certificate`] for a seed that is no key.
    pub fn start(
        config: DataConfig,
        gate: Arc<dyn Gate>,
        book: Arc<dyn AddressBook>,
        blobs: BlobStore,
    ) -> Result<Self, DataError> {
        // Others in the process may have installed it already; libp2p enables a second provider, so rustls cannot
        // choose by itself.
        rustls::crypto::aws_lc_rs::default_provider().install_default().ok();
        let (address, upload) = (config.listen, config.upload);
        let listen = |error: std::io::Error| DataError::Listen {
            address,
            reason: error.to_string(),
        };
        let identity = Identity::from_seed(config.seed)?;
        let server = identity.server(&config)?;
        let socket = tls::bind(address)?;
        let own = socket.try_clone().map_err(listen)?;
        let runtime = quinn::default_runtime().ok_or_else(|| DataError::Listen {
            address,
            reason: "no tokio runtime".to_owned(),
        })?;
        let roads = Arc::new(Roads::new(runtime.wrap_udp_socket(socket).map_err(listen)?).map_err(listen)?);
        let below = Arc::clone(&roads) as Arc<dyn quinn::AsyncUdpSocket>;
        let endpoint = Endpoint::new_with_abstract_socket(tls::endpoint(&config.seed), Some(server), below, runtime)
            .map_err(listen)?;
        let local_address = endpoint.local_addr().map_err(listen)?;
        let plane = Self {
            inner: Arc::new(Inner {
                config,
                identity,
                endpoint,
                socket: own,
                local_address,
                roads,
                detour: OnceLock::new(),
                instance: getrandom::u64().unwrap_or_default(),
                gate,
                book,
                blobs,
                fetches: Fetches::default(),
                sending_chunks: Semaphore::new(blobs::SENDING_CHUNKS_MAX),
                chunks_asked: AtomicU32::new(0),
                uploads: Uploads::new(upload),
                echoes: Semaphore::new(ECHOES_MAX),
                sinks: Sinks::default(),
                links: Links::default(),
                traffic: Traffic::default(),
                services: Mutex::default(),
                stop: CancellationToken::new(),
                tasks: TaskTracker::new(),
            }),
        };
        plane.spawn(Self::answer);
        plane.spawn(Self::recheck);
        plane.spawn(Self::set_windows);
        Ok(plane)
    }

    /// This node.
    pub fn node(&self) -> NodeId {
        self.inner.identity.node
    }

    /// The address that the socket is bound to.
    pub fn local_address(&self) -> SocketAddr {
        self.inner.local_address
    }

    /// The blobs of this node.
    pub fn blobs(&self) -> &BlobStore {
        &self.inner.blobs
    }

    /// Opens a stream to `peer`, dialling it where the address book says when no connection stands. `header` is what
    /// [`IncomingStream::header`] will be. It does not wait for the peer to take the stream: a service that the peer
    /// does not offer shows as [`DataError::NotServed`] at the first receive.
    ///
    /// # Errors
    ///
    /// [`DataError`] when the peer cannot be reached, or either side refuses the other.
    pub async fn open(
        &self,
        peer: NodeId,
        class: Class,
        service: Service,
        header: Vec<u8>,
    ) -> Result<(FrameSender, FrameReceiver), DataError> {
        self.open_at(peer, &[], class, service, header).await
    }

    /// As [`DataPlane::open`], trying `addresses` before those of the address book.
    ///
    /// # Errors
    ///
    /// As [`DataPlane::open`].
    pub async fn open_at(
        &self,
        peer: NodeId,
        addresses: &[SocketAddr],
        class: Class,
        service: Service,
        header: Vec<u8>,
    ) -> Result<(FrameSender, FrameReceiver), DataError> {
        // The service number travels in front of the header.
        let mut opening = vec![service as u8];
        opening.extend_from_slice(&header);
        let mut again = true;
        loop {
            let link = self.link(peer, class, addresses).await?;
            let opened = async {
                let (send, receive) = link.connection.open_bi().await.map_err(|error| lost(peer, &error))?;
                let mut sender = FrameSender::new(send, peer, link.counter.clone());
                sender.send_kind(KIND_OPENING, &opening, Bytes::new()).await?;
                let receiver = self.receiver(receive, peer, link.counter.clone()).asked_for(service);
                Ok((sender, receiver))
            };
            match opened.await {
                // The connection ended just now: dial once more.
                Err(DataError::Lost { .. }) if again => again = false,
                result => return result,
            }
        }
    }

    /// Takes the streams that peers open for `service` from now on, in the order in which they come. At most 64 wait;
    /// peers see [`DataError::NotServed`] while nobody serves. A second call takes over from the first, and a call for
    /// a service that the plane answers itself takes over from the plane.
    pub fn serve(&self, service: Service) -> mpsc::Receiver<IncomingStream> {
        let (sender, receiver) = mpsc::channel(INCOMING_MAX);
        let mut services = self.inner.services.lock().unwrap_or_else(PoisonError::into_inner);
        services.insert(service, sender);
        receiver
    }

    /// Makes sure that a connection stands, for those who want the dialling done early.
    ///
    /// # Errors
    ///
    /// As [`DataPlane::open`].
    pub async fn connect(&self, peer: NodeId, class: Class) -> Result<Admitted, DataError> {
        self.link(peer, class, &[]).await.map(|link| link.admitted.clone())
    }

    /// The smoothed round-trip time to a connected peer.
    pub fn round_trip(&self, peer: NodeId, class: Class) -> Option<Duration> {
        self.inner.links.find(peer, class).map(|link| link.connection.rtt())
    }

    /// The peers with which a connection stands.
    pub fn connected(&self) -> Vec<(NodeId, Class)> {
        let links = self.inner.links.all();
        let mut connected: Vec<_> = links.iter().map(|link| (link.admitted.node, link.class)).collect();
        connected.dedup();
        connected
    }

    /// Where peers see this node's data port. Equal answers of several peers mean that a router maps it to one port.
    pub fn seen_as(&self) -> Vec<(NodeId, SocketAddr)> {
        let links = self.inner.links.all();
        let straight = links.iter().filter(|link| !link.road.is_tunnel());
        straight.map(|link| (link.admitted.node, link.seen_as)).collect()
    }

    /// Sends one packet that is not QUIC to each address from the data port, so that a router in front of this node
    /// lets packets from there in. The peers' endpoints drop it.
    pub fn punch(&self, addresses: &[SocketAddr]) {
        // A first byte of zero lacks QUIC's fixed bit; 48 bytes are too few to be answered with a reset.
        let packet = [0; 48];
        for address in addresses.iter().take(ADDRESSES_MAX) {
            // A full socket buffer loses it, as the network may.
            self.inner
                .socket
                .send_to(&packet, self.as_the_socket_says(*address))
                .ok();
        }
    }

    /// A socket of both families writes IPv4 addresses in the form of IPv6.
    fn as_the_socket_says(&self, address: SocketAddr) -> SocketAddr {
        match (self.inner.local_address, address) {
            (SocketAddr::V6(_), SocketAddr::V4(address)) => {
                SocketAddr::new(address.ip().to_ipv6_mapped().into(), address.port())
            }
            _ => address,
        }
    }

    /// What crossed the wire since the start, by peer and class.
    pub fn traffic(&self) -> Vec<PeerTraffic> {
        self.inner.traffic.all()
    }

    /// Bytes of frames sent since the start; of one class, or of both.
    pub fn bytes_sent(&self, class: Option<Class>) -> u64 {
        let counted = |traffic: &PeerTraffic| class.is_none_or(|class| class == traffic.class);
        let traffic = self.traffic();
        traffic
            .iter()
            .filter(|traffic| counted(traffic))
            .map(|traffic| traffic.bytes_sent)
            .sum()
    }

    /// Bytes of frames received since the start; of one class, or of both.
    pub fn bytes_received(&self, class: Option<Class>) -> u64 {
        let counted = |traffic: &PeerTraffic| class.is_none_or(|class| class == traffic.class);
        let traffic = self.traffic();
        traffic
            .iter()
            .filter(|traffic| counted(traffic))
            .map(|traffic| traffic.bytes_received)
            .sum()
    }

    /// Caps what goes out as blobs from now on.
    pub fn set_upload_caps(&self, caps: UploadCaps) {
        self.inner.uploads.set(caps);
    }

    /// Asks the gate about every connected peer now, after a revocation or a new charter. It also happens every minute.
    pub fn recheck_now(&self) {
        self.inner.links.recheck(&*self.inner.gate);
    }

    /// Closes the connections with a peer that another plane knows to be gone, so that whoever waits for it learns so
    /// now and not after the idle time. A peer that is there after all is dialled anew by the next open.
    pub fn hang_up(&self, peer: NodeId) {
        for link in self.inner.links.all() {
            if link.admitted.node == peer {
                greeting::close(&link.connection, Closing::Replaced, "taken for gone");
            }
        }
    }

    /// Tells all peers, and waits until they know or a second has passed.
    pub async fn shutdown(&self) {
        self.inner.stop.cancel();
        self.inner.tasks.close();
        let reason = b"the node goes away";
        self.inner.endpoint.close(Closing::ShutDown.code(), reason);
        // A peer that is gone must not hold up the others.
        timeout(Duration::from_secs(1), async {
            self.inner.tasks.wait().await;
            self.inner.endpoint.wait_idle().await;
        })
        .await
        .ok();
    }

    /// Runs `work` until it is done or the plane is shut down.
    pub(super) fn spawn<W: Future<Output = ()> + Send + 'static>(&self, work: impl FnOnce(Self) -> W) {
        let stop = self.inner.stop.clone();
        let work = work(self.clone());
        self.inner.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = work => {}
            }
        });
    }

    async fn recheck(self) {
        loop {
            tokio::time::sleep(RECHECK_EVERY).await;
            self.recheck_now();
        }
    }

    /// The standing link, or a new one.
    pub(super) async fn link(
        &self,
        peer: NodeId,
        class: Class,
        addresses: &[SocketAddr],
    ) -> Result<Arc<Link>, DataError> {
        if peer == self.node() {
            return Err(DataError::Ourselves { peer });
        }
        if self.inner.stop.is_cancelled() {
            return Err(DataError::ShutDown);
        }
        if let Some(link) = self.inner.links.find(peer, class) {
            return Ok(link);
        }
        let asked_at = Instant::now();
        let lock = self.inner.links.dialling(peer, class);
        let mut last = lock.lock().await;
        if let Some(link) = self.inner.links.find(peer, class) {
            return Ok(link);
        }
        if let Some((_, error)) = last.as_ref().filter(|(at, _)| *at > asked_at) {
            return Err(error.clone());
        }
        let dialled = self.dial(peer, class, addresses).await;
        *last = dialled.as_ref().err().map(|error| (Instant::now(), error.clone()));
        dialled
    }

    /// Tries all addresses, the better ones with a head start; the first that answers as `peer` wins.
    async fn dial(&self, peer: NodeId, class: Class, first: &[SocketAddr]) -> Result<Arc<Link>, DataError> {
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for address in first.iter().copied().chain(self.inner.book.data_addresses(peer)) {
            // A peer that names a tunnel's address means another tunnel.
            if !addresses.contains(&address) && addresses.len() < ADDRESSES_MAX && !is_tunnel(address) {
                addresses.push(address);
            }
        }
        let mut ways: Vec<(Duration, Way)> = addresses
            .into_iter()
            .zip(0u32..)
            .map(|(address, place)| (ADDRESS_STAGGER * place, Way::Straight(address)))
            .collect();
        if let Some(detour) = self.inner.detour.get() {
            let at_once = ways.is_empty() || detour.likely(peer);
            ways.push((if at_once { Duration::ZERO } else { STRAIGHT_FIRST }, Way::Tunnel));
        }
        if ways.is_empty() {
            return Err(DataError::NoAddress { peer });
        }
        let link = self.race(peer, class, ways).await?;
        if link.road.is_tunnel()
            && let Some(detour) = self.inner.detour.get()
        {
            detour.taken(peer);
        }
        Ok(link)
    }

    /// Tries all ways, each after its delay; the first that leads to `peer` wins.
    pub(super) async fn race(
        &self,
        peer: NodeId,
        class: Class,
        ways: Vec<(Duration, Way)>,
    ) -> Result<Arc<Link>, DataError> {
        let client = self.inner.identity.client(&self.inner.config, peer, class)?;
        let mut attempts: FuturesUnordered<_> = ways
            .into_iter()
            .map(|(delay, way)| {
                let client = client.clone();
                async move {
                    tokio::time::sleep(delay).await;
                    let attempt = timeout(self.inner.config.greeting_max, async {
                        match way {
                            Way::Straight(address) => self.dial_one(peer, class, address, client).await,
                            Way::Tunnel => self.dial_around(peer, class, client).await,
                        }
                    })
                    .await;
                    let outcome = attempt.unwrap_or(Err(DataError::Stalled {
                        peer,
                        what: "to greet",
                        after: self.inner.config.greeting_max,
                    }));
                    (way, outcome)
                }
            })
            .collect();
        let mut tried = Vec::new();
        while let Some((way, outcome)) = attempts.next().await {
            match outcome {
                Ok(link) => return Ok(link),
                // The peer's own word, wherever it was met.
                Err(error @ (DataError::RefusedByPeer { .. } | DataError::RefusedByUs { .. })) => return Err(error),
                Err(DataError::Lost { reason, .. }) => tried.push(format!("{way}: {reason}")),
                Err(error) => tried.push(format!("{way}: {error}")),
            }
        }
        Err(DataError::Unreachable {
            peer,
            tried: tried.join("; "),
        })
    }

    async fn dial_around(
        &self,
        peer: NodeId,
        class: Class,
        client: quinn::ClientConfig,
    ) -> Result<Arc<Link>, DataError> {
        let address = self.dig(peer).await?;
        let link = self.dial_one(peer, class, address, client).await;
        if link.is_err() {
            self.inner.roads.close(address);
        }
        link
    }

    async fn dial_one(
        &self,
        peer: NodeId,
        class: Class,
        address: SocketAddr,
        client: quinn::ClientConfig,
    ) -> Result<Arc<Link>, DataError> {
        let connecting = self.inner.endpoint.connect_with(client, address, SERVER_NAME);
        let connecting = connecting.map_err(|error| DataError::Lost {
            peer,
            reason: error.to_string(),
        })?;
        let connection = connecting.await.map_err(|error| lost(peer, &error))?;
        // Not in the books before the peer is admitted.
        let counter = Arc::new(Counter::default());
        let (send, receive) = connection.open_bi().await.map_err(|error| lost(peer, &error))?;
        let mut sender = FrameSender::new(send, peer, counter.clone());
        let mut receiver = self.receiver(receive, peer, counter);
        greeting::show(&mut sender, &*self.inner.gate, self.greeting(peer, class, &connection)).await?;
        let greeted = greeting::check(&connection, &mut receiver, &*self.inner.gate, peer).await?;
        Ok(self.admit(connection, class, greeted))
    }

    /// Answers whoever comes.
    async fn answer(self) {
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        let shares: Arc<Mutex<Census>> = Arc::default();
        while let Some(incoming) = self.inner.endpoint.accept().await {
            if self.inner.endpoint.open_connections() > self.inner.config.connections_max {
                incoming.refuse();
                continue;
            }
            let Ok(permit) = handshakes.clone().try_acquire_owned() else {
                incoming.refuse();
                continue;
            };
            let crowded = HANDSHAKES_MAX - handshakes.available_permits() > HANDSHAKES_UNPROVEN_MAX;
            if crowded && !incoming.remote_address_validated() {
                // It can fail only for an address that is proven.
                incoming.retry().ok();
                continue;
            }
            let from = incoming.remote_address();
            let share = Share::take(&shares, from);
            let Some(share) = share else {
                incoming.refuse();
                continue;
            };
            self.spawn(move |plane| async move {
                match timeout(plane.inner.config.greeting_max, plane.answer_one(incoming)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::info!(%from, %error, "connection refused"),
                    Err(_) => tracing::info!(%from, "no greeting in time"),
                }
                drop((permit, share));
            });
        }
    }

    async fn answer_one(&self, incoming: Incoming) -> Result<(), DataError> {
        let unknown = NodeId::default();
        let connecting = incoming.accept().map_err(|error| lost(unknown, &error))?;
        let connection = connecting.await.map_err(|error| lost(unknown, &error))?;
        let Some(peer) = tls::peer_of(&connection) else {
            greeting::close(&connection, Closing::Malformed, "a certificate without an ed25519 key");
            return Err(DataError::Malformed {
                peer: unknown,
                what: "a certificate without an ed25519 key".to_owned(),
            });
        };
        let counter = Arc::new(Counter::default());
        let (send, receive) = connection.accept_bi().await.map_err(|error| lost(peer, &error))?;
        let mut receiver = self.receiver(receive, peer, counter.clone());
        let greeted = greeting::check(&connection, &mut receiver, &*self.inner.gate, peer).await?;
        let class = greeted.greeting.class;
        welcome(&connection, class);
        let mut sender = FrameSender::new(send, peer, counter);
        greeting::show(&mut sender, &*self.inner.gate, self.greeting(peer, class, &connection)).await?;
        sender.finish();
        self.admit(connection, class, greeted);
        Ok(())
    }

    fn receiver(&self, stream: RecvStream, peer: NodeId, counter: Arc<Counter>) -> FrameReceiver {
        FrameReceiver::new(stream, peer, counter, self.inner.config.frame_stall_max)
    }

    fn greeting(&self, peer: NodeId, class: Class, connection: &Connection) -> Greeting {
        Greeting {
            class,
            instance: self.inner.instance.wrapping_add(self.inner.links.moves(peer)),
            you_are: {
                let remote = connection.remote_address();
                SocketAddr::new(remote.ip().to_canonical(), remote.port())
            },
        }
    }

    /// Enters a link whose ends have admitted each other, and answers its streams.
    fn admit(&self, connection: Connection, class: Class, greeted: Greeted) -> Arc<Link> {
        let counter = self.inner.traffic.counter(greeted.admitted.node, class);
        let road = self
            .inner
            .links
            .road(greeted.admitted.node, connection.remote_address());
        let link = Arc::new(Link::new(connection, class, greeted, counter, road));
        self.inner.links.add(link.clone());
        let answered = link.clone();
        self.spawn(move |plane| async move {
            while let Ok((send, receive)) = answered.connection.accept_bi().await {
                let link = answered.clone();
                plane.spawn(move |plane| async move { plane.answer_stream(&link, send, receive).await });
            }
            plane.inner.links.remove(&answered);
            plane.inner.roads.close(answered.remote);
        });
        link
    }

    async fn answer_stream(&self, link: &Arc<Link>, send: SendStream, receive: RecvStream) {
        let peer = link.admitted.node;
        let mut sender = FrameSender::new(send, peer, link.counter.clone());
        let mut receiver = self.receiver(receive, peer, link.counter.clone());
        let opening = timeout(self.inner.config.opening_max, receiver.next_kind(KIND_OPENING, 0)).await;
        let end = match opening {
            Ok(Ok(Some((opening, _)))) => match opening.split_first() {
                Some((number, header)) => {
                    let service = Service::from_number(*number);
                    self.hand_over(link, service, header.to_vec(), sender, receiver).await;
                    return;
                }
                None => StreamEnd::Malformed,
            },
            Ok(Ok(None) | Err(DataError::Malformed { .. })) => StreamEnd::Malformed,
            Ok(Err(_)) => return,
            Err(_) => StreamEnd::Stalled,
        };
        receiver.stop(end);
        sender.break_off(end);
    }

    async fn hand_over(
        &self,
        link: &Arc<Link>,
        service: Option<Service>,
        header: Vec<u8>,
        mut sender: FrameSender,
        mut receiver: FrameReceiver,
    ) {
        let taker = service.and_then(|service| {
            let services = self.inner.services.lock().unwrap_or_else(PoisonError::into_inner);
            services.get(&service).filter(|taker| !taker.is_closed()).cloned()
        });
        let Some(taker) = taker else {
            match service {
                Some(Service::Echo) => self.echo(sender, receiver).await,
                Some(Service::Sink) => self.sink(sender, receiver).await,
                Some(Service::Blob) => blobs::answer(self, link, &header, sender, receiver).await,
                Some(Service::Session | Service::Replica) | None => {
                    receiver.stop(StreamEnd::NotServed);
                    sender.break_off(StreamEnd::NotServed);
                }
            }
            return;
        };
        let stream = IncomingStream {
            peer: link.admitted.clone(),
            class: link.class,
            header,
            sender,
            receiver,
        };
        if let Err(
            mpsc::error::SendTimeoutError::Timeout(mut stream) | mpsc::error::SendTimeoutError::Closed(mut stream),
        ) = taker.send_timeout(stream, self.inner.config.opening_max).await
        {
            stream.receiver.stop(StreamEnd::Busy);
            stream.sender.break_off(StreamEnd::Busy);
        }
    }

    async fn echo(&self, mut sender: FrameSender, mut receiver: FrameReceiver) {
        let Ok(_permit) = self.inner.echoes.try_acquire() else {
            receiver.stop(StreamEnd::Busy);
            sender.break_off(StreamEnd::Busy);
            return;
        };
        while let Ok(Some((header, payload))) = receiver.next_within(ECHO_BYTES_MAX).await {
            if sender.send(&header, payload).await.is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests;
