//! What a node says of itself to `polder status`.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use polder_protocol::charter::Capabilities;
use serde::{Deserialize, Serialize};

use super::caps::CapsStatus;
use super::{Shared, Working};
use crate::control::Path;
use crate::device::Life;
use crate::train::RunStatus;

/// Everything that `polder status --json` prints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The node's id.
    pub node: String,
    /// Its folder.
    pub home: String,
    /// The program's version.
    pub version: String,
    /// The daemon's process.
    pub process: u32,
    /// Since the daemon started.
    pub uptime_seconds: u64,
    /// To which federation it belongs, and by whose word.
    pub federation: FederationStatus,
    /// Where the control plane listens, as multiaddrs.
    pub control: Vec<String>,
    /// Where the data plane listens.
    pub data: String,
    /// Whether it may work now.
    pub works: bool,
    /// Why not.
    pub idle_because: Option<String>,
    /// The worker.
    pub device: DeviceStatus,
    /// Members that it has met.
    pub peers: Vec<PeerStatus>,
    /// How many members it has heard of lately, met or not, itself among them.
    pub known: usize,
    /// Why this node's own certificate holds no longer, where that is so.
    pub shut_out_because: Option<String>,
    /// Members that turned this node away.
    pub refused_by: Vec<RefusalStatus>,
    /// Models that it knows.
    pub models: Vec<ModelStatus>,
    /// Sessions that its stages hold now.
    pub sessions: usize,
    /// Training runs that it follows.
    pub runs: Vec<RunStatus>,
    /// Bytes on the data plane since the daemon started.
    pub traffic: TrafficStatus,
    /// Which caps are in force, and when others are.
    pub caps: CapsStatus,
}

/// Of which federation a node is a member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FederationStatus {
    /// Its id.
    pub id: String,
    /// What it is called.
    pub name: String,
    /// The institution that certifies the node.
    pub institution: String,
    /// What the node may do.
    pub capabilities: String,
}

/// The process that owns the device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Whether it runs.
    pub running: bool,
    /// Why it does not.
    pub reason: Option<String>,
    /// What it computes on, such as `cpu (AVX-512, 2 threads)`; none until it has told.
    pub name: Option<String>,
    /// Why that is not the device that was asked for, where it is another.
    pub fell_back: Option<String>,
}

/// A member that the node has met.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its id.
    pub node: String,
    /// Its institution's name.
    pub institution: String,
    /// `direct`, `relayed` or `lost`.
    pub path: String,
    /// The last measured round trip in microseconds.
    pub rtt_micros: Option<u64>,
    /// Its program and version.
    pub agent: String,
    /// Where its data plane answers.
    pub data: Vec<String>,
    /// What it may do.
    pub capabilities: String,
    /// The connection that carries its data, where one stands.
    pub data_path: Option<DataPathStatus>,
    /// Bytes of the data plane sent to it over the last seconds, per second.
    pub sent_bytes_per_second: u64,
    /// Bytes of the data plane received from it over the last seconds, per second.
    pub received_bytes_per_second: u64,
    /// What its gossip was worth: 0 is neutral, below that it sent what it should not have.
    pub score: i32,
}

/// A connection of the data plane.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataPathStatus {
    /// `direct`, `punched`, or inside a stream of the control plane: `tcp` straight, `relayed` through a gateway.
    pub road: String,
    /// Where the peer is; none inside a stream.
    pub address: Option<String>,
    /// The smoothed round trip in microseconds.
    pub rtt_micros: u64,
    /// Lost packets of a million that were sent.
    pub loss_ppm: u64,
    /// What may be under way, as the congestion control sees it.
    pub window_bytes: u64,
}

/// A member that turned the node away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusalStatus {
    /// Its id.
    pub node: String,
    /// In its words.
    pub reason: String,
}

/// A model that the node knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelStatus {
    /// What it is called.
    pub name: String,
    /// Its id.
    pub epoch: String,
    /// Blocks of the whole.
    pub blocks: u32,
    /// The blocks that this node has loaded, `[first, end)`.
    pub held: Option<[u32; 2]>,
    /// The measured time of this node's stage for one token, in microseconds.
    pub token_micros: Option<u32>,
    /// By how many nodes the least held block is held; the model can be asked from one on.
    pub holders_min: usize,
}

/// Bytes on the data plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficStatus {
    /// Sent.
    pub sent_bytes: u64,
    /// Received.
    pub received_bytes: u64,
}

impl Shared {
    pub(super) fn status(&self) -> Status {
        let idle_because = match &*self.working.borrow() {
            Working::Yes => None,
            Working::No(reason) => Some(reason.clone()),
        };
        let reason = match &*self.device.life().borrow() {
            Life::Running(_) => None,
            Life::Down(reason) => Some(reason.clone()),
        };
        let (name, fell_back) = match self.device.description() {
            Some(described) => (Some(described.name), described.fell_back),
            None => (None, None),
        };
        let device = DeviceStatus {
            running: reason.is_none(),
            reason,
            name,
            fell_back,
        };
        Status {
            node: self.control.node().to_string(),
            home: self.home.root().display().to_string(),
            version: env!("CARGO_PKG_VERSION").into(),
            process: std::process::id(),
            uptime_seconds: self.began.elapsed().as_secs(),
            federation: FederationStatus {
                id: self.members.federation().to_string(),
                name: self.members.federation_name(),
                institution: self.members.institution_name(),
                capabilities: self.members.capabilities().to_string(),
            },
            control: self.control.listen_addresses(),
            data: self.data.local_address().to_string(),
            works: idle_because.is_none(),
            idle_because,
            device,
            peers: self.peers(),
            known: self.directory.known(),
            shut_out_because: self.members.check_own().err().map(|refusal| refusal.to_string()),
            refused_by: self.refused_by(),
            models: self.models(),
            sessions: self.serve.sessions(),
            runs: self.train.status(),
            traffic: TrafficStatus {
                sent_bytes: self.data.bytes_sent(None),
                received_bytes: self.data.bytes_received(None),
            },
            caps: self.caps.status(self.control.relayed_bytes()),
        }
    }

    fn refused_by(&self) -> Vec<RefusalStatus> {
        let refusals = self.refusals.list().into_iter().map(|(node, reason)| RefusalStatus {
            node: node.to_string(),
            // A peer's words: nothing that a terminal would obey.
            reason: reason.chars().filter(|letter| !letter.is_control()).collect(),
        });
        refusals.collect()
    }

    fn models(&self) -> Vec<ModelStatus> {
        let held = self.serve.held();
        let models = self.serve.models().into_iter().map(|(id, epoch, _)| {
            let own = held.iter().find(|held| held.epoch == id);
            ModelStatus {
                name: epoch.name.clone(),
                epoch: id.to_string(),
                blocks: epoch.blocks(),
                held: own.map(|held| [held.range.first, held.range.end]),
                token_micros: own.map(|held| held.token_micros),
                holders_min: self.serve.holders_min(id, epoch.blocks()),
            }
        });
        models.collect()
    }

    pub(crate) fn peers(&self) -> Vec<PeerStatus> {
        // Activations tell more of a path than what waits in line; of several links the one in use comes last.
        let mut paths: BTreeMap<_, DataPathStatus> = BTreeMap::new();
        let mut links = self.data.links();
        links.sort_by_key(|link| Reverse(link.class));
        for link in links {
            let loss = link
                .lost_packets
                .saturating_mul(1_000_000)
                .checked_div(link.sent_packets);
            let path = DataPathStatus {
                road: link.road.name().into(),
                address: link.remote.map(|address| address.to_string()),
                rtt_micros: u64::try_from(link.rtt.as_micros()).unwrap_or(u64::MAX),
                loss_ppm: loss.unwrap_or_default(),
                window_bytes: link.window_bytes,
            };
            paths.insert(link.peer, path);
        }
        let rates = self.rates.all();
        let path = |path| match path {
            Path::Direct => "direct",
            Path::Relayed => "relayed",
            Path::Lost => "lost",
        };
        self.control
            .peers()
            .into_iter()
            .map(|peer| PeerStatus {
                node: peer.node.to_string(),
                institution: self
                    .members
                    .name_of(peer.institution)
                    .unwrap_or_else(|| peer.institution.short()),
                path: path(peer.path).into(),
                rtt_micros: peer.rtt.and_then(|rtt| u64::try_from(rtt.as_micros()).ok()),
                agent: peer.agent.chars().filter(|letter| !letter.is_control()).collect(),
                data: peer.data_addresses.iter().map(ToString::to_string).collect(),
                capabilities: Capabilities(peer.capabilities).to_string(),
                data_path: paths.remove(&peer.node),
                sent_bytes_per_second: rates.get(&peer.node).map_or(0, |rate| rate.sent_per_second),
                received_bytes_per_second: rates.get(&peer.node).map_or(0, |rate| rate.received_per_second),
                score: peer.score,
            })
            .collect()
    }
}
