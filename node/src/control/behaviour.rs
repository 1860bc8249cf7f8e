//! The swarm: which libp2p protocols run, and their limits.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::upgrade::Version;
use libp2p::identity::Keypair;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::swarm::{self, NetworkBehaviour};
use libp2p::{
    Multiaddr, PeerId, StreamProtocol, Swarm, Transport, autonat, connection_limits, dcutr, gossipsub, identify, kad,
    mdns, memory_connection_limits, noise, ping, relay, request_response,
};
use polder_protocol::hash::digest;
use polder_protocol::wire::GOSSIP_BYTES_MAX;

use super::address::node_of;
use super::codec::{Codec, PROTOCOL};
use super::crowd::Crowd;
use super::door::Door;
use super::shared::Shared;
use super::turnstile::Turnstile;
use super::{ControlConfig, ControlError, transport};

/// What a node tells of its program.
pub(super) const AGENT: &str = concat!("polder/", env!("CARGO_PKG_VERSION"));

/// Connections to one peer: TCP, QUIC and a relayed one in either direction while they race.
const CONNECTIONS_PER_PEER_MAX: u32 = 4;

/// The driver closes connections to strangers and to peers that no longer answer pings; members may be silent for long.
const IDLE: Duration = Duration::from_secs(24 * 3600);

/// The share of the machine's memory above which no further connection is made.
const MEMORY_SHARE_MAX: f64 = 0.9;

/// Streams of a peer that have not said yet what they are for. On TCP each may hold 256 KiB until then.
const NEGOTIATING_MAX: usize = 32;

/// Bytes that one relayed connection may carry. The default of 128 KiB would end the transfer of a single part.
const CIRCUIT_BYTES_MAX: u64 = 4 << 30;

/// How long one relayed connection may last.
const CIRCUIT_LASTS_MAX: Duration = Duration::from_secs(3600);

/// Members that one gateway keeps reachable, each by one reservation and perhaps a second one while it changes networks.
const RESERVATIONS_MAX: usize = 1024;

/// Relayed connections at a time, in all and of one member. Each may fill the gateway's uplink, and shares it.
const CIRCUITS_MAX: usize = 256;
/// See [`CIRCUITS_MAX`].
const CIRCUITS_PER_PEER_MAX: usize = 16;

/// Partners over which gossip passes on what comes, at best, at least and at most. Each message arrives about once from each,
/// and each copy costs a signature's check. libp2p's default of six (up to twelve) is for what must arrive within a
/// second; announcements repeat, and what the partners lose is told to others at the next heartbeat.
const MESH: usize = 4;
/// See [`MESH`].
const MESH_LEAST: usize = 3;
/// See [`MESH`].
const MESH_MOST: usize = 6;

/// How often gossip looks after its partners, and tells a few others what it has heard.
const HEARTBEAT: Duration = Duration::from_secs(2);

/// To how many it tells that, however many are connected: libp2p's default is a quarter of them, which is most of what an
/// idle node sends.
const TOLD_AT_HEARTBEAT: usize = 4;

/// What names a message in what is told: libp2p's default writes 70 characters.
const MESSAGE_ID_BYTES: usize = 16;

/// How often each end of a connection asks whether the other is there: three quarters of what idle neighbours say to each
/// other. One that is gone without a word is noticed within this and libp2p's 20 s for an answer; a network that changes is
/// noticed by its addresses, at once.
const PING_EVERY: Duration = Duration::from_secs(20);

/// What a search in the routing tables of others may take.
pub(super) const SEARCH_TIME_MAX: Duration = Duration::from_secs(10);

/// All protocols of the control plane.
#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    pub(super) crowd: Crowd,
    pub(super) limits: connection_limits::Behaviour,
    pub(super) memory: memory_connection_limits::Behaviour,
    pub(super) identify: identify::Behaviour,
    pub(super) ping: ping::Behaviour,
    pub(super) requests: request_response::Behaviour<Codec>,
    pub(super) gossip: Door<gossipsub::Behaviour>,
    pub(super) kad: Door<kad::Behaviour<kad::store::MemoryStore>>,
    pub(super) mdns: Toggle<mdns::tokio::Behaviour>,
    pub(super) relay_client: relay::client::Behaviour,
    pub(super) relay_server: Toggle<relay::Behaviour>,
    pub(super) dcutr: dcutr::Behaviour,
    pub(super) reachable: autonat::v2::client::Behaviour,
    pub(super) prober: Door<autonat::v2::server::Behaviour>,
    pub(super) streams: libp2p_stream::Behaviour,
}

/// Builds the swarm on the present tokio runtime. Nothing listens yet.
pub(super) fn build(
    keypair: Keypair,
    config: &ControlConfig,
    shared: &Arc<Shared>,
) -> Result<Swarm<Behaviour>, ControlError> {
    let failed = |error: &dyn std::fmt::Display| ControlError::Transport {
        reason: error.to_string(),
    };
    let meters = config.relay_server.then(|| Arc::clone(shared));
    let peer = keypair.public().to_peer_id();
    let straight =
        transport::build(&keypair, config.proxy.clone(), &config.roots, meters).map_err(|error| failed(&error))?;
    let (circuits, relay_client) = relay::client::new(peer);
    let circuits = circuits
        .upgrade(Version::V1Lazy)
        .authenticate(noise::Config::new(&keypair).map_err(|error| failed(&error))?)
        .multiplex(transport::multiplexer())
        .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)));
    let all = circuits
        .or_transport(straight)
        .map(|either, _| either.into_inner())
        .boxed();
    let behaviour = behaviour(&keypair, relay_client, config, shared).map_err(|error| failed(&error))?;
    let settings = swarm::Config::with_tokio_executor()
        .with_idle_connection_timeout(IDLE)
        .with_max_negotiating_inbound_streams(NEGOTIATING_MAX);
    Ok(Swarm::new(all, behaviour, peer, settings))
}

fn behaviour(
    key: &Keypair,
    relay_client: relay::client::Behaviour,
    config: &ControlConfig,
    shared: &Arc<Shared>,
) -> Result<Behaviour, Box<dyn std::error::Error + Send + Sync>> {
    let peer = key.public().to_peer_id();
    let most = config.connections_max.max(8);
    let limits = connection_limits::ConnectionLimits::default()
        .with_max_pending_incoming(Some(most / 2))
        .with_max_pending_outgoing(Some(most / 8))
        .with_max_established_incoming(Some(most - most / 8))
        .with_max_established(Some(most))
        .with_max_established_per_peer(Some(CONNECTIONS_PER_PEER_MAX));
    let requests = request_response::Config::default()
        .with_request_timeout(Duration::from_secs(60))
        .with_max_concurrent_streams(32);
    let mdns = match config.mdns {
        true => Some(mdns::tokio::Behaviour::new(mdns::Config::default(), peer)?),
        false => None,
    };
    Ok(Behaviour {
        crowd: Crowd(Turnstile::new((most / 2) as usize)),
        limits: connection_limits::Behaviour::new(limits),
        memory: memory_connection_limits::Behaviour::with_max_percentage(MEMORY_SHARE_MAX),
        identify: identify::Behaviour::new(
            identify::Config::new("/polder/1".into(), key.public()).with_agent_version(AGENT.into()),
        ),
        ping: ping::Behaviour::new(ping::Config::new().with_interval(PING_EVERY)),
        requests: request_response::Behaviour::with_codec(
            Codec,
            [(PROTOCOL, request_response::ProtocolSupport::Full)],
            requests,
        ),
        gossip: Door::before(gossip(key)?),
        kad: {
            let mut table = Door::before(kademlia(peer, config));
            // To fill its table it would meet the whole federation. It has the members that are met anyway.
            table.let_dial(false);
            table
        },
        mdns: mdns.into(),
        relay_client,
        relay_server: config.relay_server.then(|| relay_server(peer, shared)).into(),
        dcutr: dcutr::Behaviour::new(peer),
        reachable: autonat::v2::client::Behaviour::default(),
        prober: Door::before(autonat::v2::server::Behaviour::default()),
        streams: libp2p_stream::Behaviour::new(),
    })
}

fn gossip(key: &Keypair) -> Result<gossipsub::Behaviour, Box<dyn std::error::Error + Send + Sync>> {
    let config = gossipsub::ConfigBuilder::default()
        .validation_mode(gossipsub::ValidationMode::Strict)
        .validate_messages()
        .max_transmit_size(GOSSIP_BYTES_MAX)
        .mesh_n(MESH)
        .mesh_n_low(MESH_LEAST)
        .mesh_n_high(MESH_MOST)
        .mesh_outbound_min(1)
        .heartbeat_interval(HEARTBEAT)
        .gossip_lazy(TOLD_AT_HEARTBEAT)
        .gossip_factor(0.0)
        .message_id_fn(message_id)
        .build()?;
    let mut gossip = gossipsub::Behaviour::new(gossipsub::MessageAuthenticity::Signed(key.clone()), config)?;
    // Many members of one institution, and all nodes of a test, share an address: that alone is no offence.
    let params = gossipsub::PeerScoreParams {
        ip_colocation_factor_weight: 0.0,
        ..Default::default()
    };
    gossip.with_peer_score(params, gossipsub::PeerScoreThresholds::default())?;
    Ok(gossip)
}

/// Author and number, as gossipsub has it, in fewer bytes: two messages of one name would be two of one author, who harms
/// nobody else by it.
fn message_id(message: &gossipsub::Message) -> gossipsub::MessageId {
    let mut told = message.source.map_or_else(Vec::new, PeerId::to_bytes);
    told.extend_from_slice(&message.sequence_number.unwrap_or_default().to_le_bytes());
    let hash = digest(&told);
    gossipsub::MessageId::new(hash.0.get(..MESSAGE_ID_BYTES).unwrap_or_default())
}

/// A topic's score counts invalid messages only: a quiet peer is not a bad one.
pub(super) fn topic_score() -> gossipsub::TopicScoreParams {
    gossipsub::TopicScoreParams {
        mesh_message_deliveries_weight: 0.0,
        mesh_failure_penalty_weight: 0.0,
        ..Default::default()
    }
}

fn kademlia(peer: PeerId, config: &ControlConfig) -> kad::Behaviour<kad::store::MemoryStore> {
    let mut settings = kad::Config::new(StreamProtocol::new("/polder/kad/1"));
    settings
        .set_kbucket_inserts(kad::BucketInserts::Manual)
        // Records are handed to us and dropped: this table finds peers and holds nothing.
        .set_record_filtering(kad::StoreInserts::FilterBoth)
        .disjoint_query_paths(true)
        .set_parallelism(const { NonZeroUsize::new(3).expect("not zero") })
        .set_query_timeout(SEARCH_TIME_MAX);
    let mut kad = kad::Behaviour::with_config(peer, kad::store::MemoryStore::new(peer), settings);
    if config.relay_server || !config.external.is_empty() {
        kad.set_mode(Some(kad::Mode::Server));
    }
    kad
}

fn relay_server(peer: PeerId, shared: &Arc<Shared>) -> relay::Behaviour {
    let mut config = relay::Config {
        max_reservations: RESERVATIONS_MAX,
        max_circuits: CIRCUITS_MAX,
        max_circuits_per_peer: CIRCUITS_PER_PEER_MAX,
        max_circuit_bytes: CIRCUIT_BYTES_MAX,
        max_circuit_duration: CIRCUIT_LASTS_MAX,
        ..Default::default()
    };
    // Members only, beside libp2p's own rates.
    for limiters in [
        &mut config.reservation_rate_limiters,
        &mut config.circuit_src_rate_limiters,
    ] {
        let shared = Arc::clone(shared);
        limiters.push(Box::new(move |peer: PeerId, _: &Multiaddr, _| {
            node_of(&peer).is_some_and(|node| shared.is_present(node))
        }));
    }
    relay::Behaviour::new(peer, config)
}
