//! The data plane's settings, each with the reason for its value.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use polder_protocol::blob;
use quinn::{IdleTimeout, TransportConfig, VarInt};
use serde::{Deserialize, Serialize};

use super::caps::UploadCaps;
use super::congestion::{DeliveredConfig, Room, keep_room};

/// Which of the two connections of a pair of peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Class {
    /// What somebody waits for: activations, tokens. Never anything large that can wait.
    Act,
    /// What is large: blobs.
    Bulk,
}

/// What a stream is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Service {
    /// A generation through a chain.
    Session = 1,
    /// A replica that trains.
    Replica = 2,
    /// Blobs; answered by the data plane itself.
    Blob = 3,
    /// Sends back every frame; answered by the data plane itself.
    Echo = 4,
    /// Throws away what comes, and says how much it was; answered by the data plane itself.
    Sink = 5,
}

impl Service {
    pub(super) fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Session),
            2 => Some(Self::Replica),
            3 => Some(Self::Blob),
            4 => Some(Self::Echo),
            5 => Some(Self::Sink),
            _ => None,
        }
    }
}

/// How a data plane is set up.
#[derive(Debug, Clone)]
pub struct DataConfig {
    /// The node's ed25519 seed.
    pub seed: [u8; 32],
    /// The UDP address to listen on; port 0 takes any free one.
    pub listen: SocketAddr,
    /// Connections held at once. Two per peer, so 2,048 serve a federation of a thousand gateways.
    pub connections_max: usize,
    /// A silent connection is given up after so long: four lost keep-alives. Somebody may be waiting for an answer.
    pub idle: Duration,
    /// A byte is sent at least so often: home routers forget a UDP flow after 30 s.
    pub keep_alive: Duration,
    /// Handshake and greeting together. Five round trips between antipodes and a lost packet take two seconds.
    pub greeting_max: Duration,
    /// From the first byte of a stream to the end of its opening.
    pub opening_max: Duration,
    /// How long one frame may take beyond its size at 8 KiB/s: a phone's handover, twice.
    pub frame_stall_max: Duration,
    /// Hand the kernel many packets at once: three times as fast where it works, broken with some network cards.
    pub segmentation_offload: bool,
    /// Caps of what goes out as blobs.
    pub upload: UploadCaps,
    /// Bounds of each fetch.
    pub fetch: blob::Limits,
    /// A fetch ends when no source has sent or promised anything for so long.
    pub fetch_patience: Duration,
}

impl DataConfig {
    /// The defaults for a key and an address.
    pub fn new(seed: [u8; 32], listen: SocketAddr) -> Self {
        Self {
            seed,
            listen,
            connections_max: 2_048,
            idle: Duration::from_secs(10),
            keep_alive: Duration::from_millis(2_500),
            greeting_max: Duration::from_secs(10),
            opening_max: Duration::from_secs(10),
            frame_stall_max: Duration::from_secs(30),
            segmentation_offload: true,
            upload: UploadCaps::default(),
            fetch: blob::Limits {
                // With 8 fetches at once and 1 MiB chunks, at most 512 MiB are in flight.
                sources_max: 16,
                in_flight_all_max: 64,
                ..blob::Limits::default()
            },
            fetch_patience: Duration::from_secs(15),
        }
    }
}

/// How the application protocol is named in the TLS handshake; a node of another version is turned away there.
pub(super) const ALPN: &[u8] = b"polder-data/1";

/// The slowest useful sender.
pub(super) const FRAME_BYTES_PER_SECOND_MIN: u64 = 8 << 10;

/// Payload of one frame on this plane. Larger things are blobs.
pub(super) const PAYLOAD_BYTES_MAX: u64 = 64 << 20;

/// Credentials that a peer shows: what the control plane allows for the same thing.
pub(super) const CREDENTIALS_BYTES_MAX: u64 = polder_protocol::wire::CREDENTIALS_BYTES_MAX as u64;

/// Handshakes at once; more are refused.
pub(super) const HANDSHAKES_MAX: usize = 128;

/// Those of one /24 or /48, so that no network takes all.
pub(super) const HANDSHAKES_SHARE_MAX: usize = 48;

/// With so many handshakes under way, a newcomer must first prove that its address is its own.
pub(super) const HANDSHAKES_UNPROVEN_MAX: usize = 32;

/// Connections of one class with one peer. Two when both dial at once, and as many again while they are replaced.
pub(super) const LINKS_PER_PEER_MAX: usize = 4;

/// Streams that one peer may have open towards this node on one connection.
pub(super) const STREAMS_MAX: u32 = 256;

/// Incoming streams of one service that wait to be taken.
pub(super) const INCOMING_MAX: usize = 64;

/// Addresses of one peer that are tried.
pub(super) const ADDRESSES_MAX: usize = 8;

/// The head start of a better address over the next.
pub(super) const ADDRESS_STAGGER: Duration = Duration::from_millis(250);

/// How often members are asked for again at the gate: certificates expire and are revoked.
pub(super) const RECHECK_EVERY: Duration = Duration::from_secs(60);

/// The kernel's buffers for the socket: 4 MiB are 32 ms at 1 Gbit/s, longer than any pause of the runtime.
pub(super) const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// 5 Gbit/s at 100 ms; what one peer can make this node hold.
pub(super) const WINDOW_BYTES_MAX: u64 = 64 << 20;

/// What all streams of one connection may have under way, before it is seen how fast it is.
pub(super) fn window_bytes(class: Class) -> u32 {
    match class {
        // Several activations of a long prefill. More would only queue, and the last in the queue waits longest.
        Class::Act => 6 << 20,
        // 1 Gbit/s at 80 ms for the three round trips that a loss and its repetition hold up what has come behind it.
        Class::Bulk => 32 << 20,
    }
}

/// What this node may have sent and not yet seen acknowledged. quinn counts in it all that was acknowledged behind a hole, so
/// that it has to hold as much as the peer's window, which is then the limit.
fn unacknowledged_bytes(class: Class) -> u64 {
    match class {
        Class::Act => window_bytes(Class::Act).into(),
        Class::Bulk => WINDOW_BYTES_MAX,
    }
}

/// What is allowed although no such rate was seen, as long as nothing is lost.
fn room(class: Class) -> Room {
    match class {
        Class::Act => Room {
            // A prefill's activations begin at 100 Mbit/s on a path of 80 ms.
            floor: 1 << 20,
            // An activation of a few positions, 64 KiB and its headers, goes out as it is; 10 ms at 100 Mbit/s.
            burst: 128 << 10,
        },
        Class::Bulk => Room {
            floor: 32 << 10,
            burst: 0,
        },
    }
}

/// What a stranger may have under way before its greeting has been checked: the greeting.
const STRANGER_WINDOW_BYTES: u32 = 256 << 10;

/// Echoes at once, over all peers, and the largest frame that is sent back: 64 MiB in all.
pub(super) const ECHOES_MAX: usize = 16;
/// See [`ECHOES_MAX`].
pub(super) const ECHO_BYTES_MAX: u64 = 4 << 20;

/// The transport of a connection of one class; of one that a stranger has dialled where there is no class yet.
/// [`welcome`] widens it.
pub(super) fn transport(config: &DataConfig, class: Option<Class>) -> Arc<TransportConfig> {
    let (stream_window, window, streams) = match class {
        Some(Class::Act) => (4 << 20, window_bytes(Class::Act), STREAMS_MAX),
        Some(Class::Bulk) => (8 << 20, window_bytes(Class::Bulk), STREAMS_MAX),
        // The window of a stream cannot change later; that of the connection can, and bounds it.
        None => (8 << 20, STRANGER_WINDOW_BYTES, 1),
    };
    let congestion = DeliveredConfig {
        // More would overflow a home's uplink; the floor of a connection for activations is higher.
        initial_bytes: 256 << 10,
        room: room(class.unwrap_or(Class::Bulk)),
    };
    let mut transport = TransportConfig::default();
    transport
        .stream_receive_window(VarInt::from_u32(stream_window))
        .receive_window(VarInt::from_u32(window))
        // A stranger is answered, and asks for nothing large.
        .send_window(unacknowledged_bytes(class.unwrap_or(Class::Act)))
        .congestion_controller_factory(Arc::new(congestion))
        // The default of 333 ms makes the first lost packet cost a second.
        .initial_rtt(Duration::from_millis(100))
        .keep_alive_interval(Some(config.keep_alive))
        .max_idle_timeout(IdleTimeout::try_from(config.idle).ok())
        .datagram_receive_buffer_size(None)
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .max_concurrent_bidi_streams(VarInt::from_u32(streams))
        .enable_segmentation_offload(config.segmentation_offload);
    Arc::new(transport)
}

/// Gives an admitted peer the room of its class.
pub(super) fn welcome(connection: &quinn::Connection, class: Class) {
    connection.set_receive_window(VarInt::from_u32(window_bytes(class)));
    connection.set_send_window(unacknowledged_bytes(class));
    connection.set_max_concurrent_bi_streams(VarInt::from_u32(STREAMS_MAX));
    keep_room(connection, room(class));
}
