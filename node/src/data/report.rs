//! What the connections that stand tell of themselves, for people and for metrics.

use std::net::SocketAddr;
use std::time::Duration;

use polder_protocol::hash::NodeId;

use super::links::Road;
use super::plane::DataPlane;
use super::roads::is_tunnel;
use super::settings::Class;

/// One connection that stands.
#[derive(Debug, Clone, PartialEq)]
pub struct LinkReport {
    /// The peer.
    pub peer: NodeId,
    /// What it is for.
    pub class: Class,
    /// Which way it goes.
    pub road: Road,
    /// Where the peer is; `None` inside a tunnel.
    pub remote: Option<SocketAddr>,
    /// The smoothed round trip.
    pub rtt: Duration,
    /// Packets sent so far.
    pub sent_packets: u64,
    /// Those of them that were lost.
    pub lost_packets: u64,
    /// What may be under way, as the congestion control sees it.
    pub window_bytes: u64,
    /// The largest packet that the path takes.
    pub packet_bytes_max: u16,
}

impl DataPlane {
    /// The connections that stand, by peer and class; of several, those in use come last.
    pub fn links(&self) -> Vec<LinkReport> {
        let mut links = self.inner.links.all();
        links.sort_by_key(|link| std::cmp::Reverse(link.road));
        links.sort_by_key(|link| (link.admitted.node, link.class));
        let report = |link: std::sync::Arc<super::links::Link>| {
            let path = link.connection.stats().path;
            let remote = link.connection.remote_address();
            LinkReport {
                peer: link.admitted.node,
                class: link.class,
                road: link.road,
                remote: (!is_tunnel(remote)).then(|| SocketAddr::new(remote.ip().to_canonical(), remote.port())),
                rtt: link.connection.rtt(),
                sent_packets: path.sent_packets,
                lost_packets: path.lost_packets,
                window_bytes: path.cwnd,
                packet_bytes_max: path.current_mtu,
            }
        };
        links.into_iter().map(report).collect()
    }
}
