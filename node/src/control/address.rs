//! Between node ids and libp2p's peer ids, and what can be told from an address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use libp2p::identity::{Keypair, PublicKey, ed25519};
use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId};
use polder_protocol::hash::NodeId;
use polder_protocol::wire::ADDRESSES_MAX;
use socket2::{Domain, Socket, Type};

use super::ControlError;
use crate::mapping::{Carries, Opened, Port};

/// The node's key as libp2p holds it.
pub(super) fn keypair(seed: [u8; 32]) -> Result<Keypair, ControlError> {
    Keypair::ed25519_from_bytes(seed).map_err(|error| ControlError::Seed {
        reason: error.to_string(),
    })
}

/// The node whose key a peer id holds; `None` for other kinds of keys.
pub(super) fn node_of(peer: &PeerId) -> Option<NodeId> {
    // An ed25519 peer id is an identity multihash: the encoded public key itself.
    let key = PublicKey::try_decode_protobuf(peer.as_ref().digest()).ok()?;
    Some(NodeId(key.try_into_ed25519().ok()?.to_bytes()))
}

/// The peer id of a node; `None` where its id is not the encoding of a point.
pub(super) fn peer_of(node: NodeId) -> Option<PeerId> {
    let key = ed25519::PublicKey::try_from_bytes(&node.0).ok()?;
    Some(PublicKey::from(key).to_peer_id())
}

/// Reads addresses that a person or this program wrote.
pub(super) fn multiaddresses(texts: &[String]) -> Result<Vec<Multiaddr>, ControlError> {
    let parse = |text: &String| {
        text.parse()
            .map_err(|error: libp2p::multiaddr::Error| ControlError::Address {
                address: text.clone(),
                reason: error.to_string(),
            })
    };
    texts.iter().map(parse).collect()
}

/// Whether a text is an address.
pub fn is_multiaddress(text: &str) -> bool {
    text.parse::<Multiaddr>().is_ok()
}

/// Reads addresses that a peer wrote, leaving out what is none.
pub(super) fn readable(texts: &[String]) -> Vec<Multiaddr> {
    texts
        .iter()
        .filter_map(|text| text.parse().ok())
        .take(ADDRESSES_MAX)
        .collect()
}

/// Whether an address goes through a relay.
pub(super) fn is_relayed(address: &Multiaddr) -> bool {
    address.iter().any(|part| part == Protocol::P2pCircuit)
}

/// Whether an address may be reached from other networks. Documentation addresses count: laboratories use them.
pub(crate) fn is_public(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => {
            let [first, second, ..] = ip.octets();
            let shared = first == 100 && (64..128).contains(&second);
            !(ip.is_private() || ip.is_loopback() || ip.is_link_local() || ip.is_unspecified() || shared)
        }
        IpAddr::V6(ip) => {
            !(ip.is_loopback() || ip.is_unspecified() || ip.is_unique_local() || ip.is_unicast_link_local())
        }
    }
}

/// Whether an address means nothing to any other machine.
pub(super) fn is_of_this_machine_alone(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local() || ip.is_unspecified(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local() || ip.is_unspecified(),
    }
}

/// Which of this machine's addresses packets to `remote` bear. Nothing is sent.
pub(crate) fn source_for(remote: IpAddr) -> Option<IpAddr> {
    let any: SocketAddr = match remote {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect((remote, 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// The first IP address in an address that does not go through a relay.
pub(super) fn ip_of(address: &Multiaddr) -> Option<IpAddr> {
    if is_relayed(address) {
        return None;
    }
    address.iter().find_map(|part| match part {
        Protocol::Ip4(ip) => Some(IpAddr::V4(ip)),
        Protocol::Ip6(ip) => Some(IpAddr::V6(ip)),
        _ => None,
    })
}

/// The port of a plain TCP or QUIC listener over IPv4 that others than this machine may reach.
pub(super) fn port_of(address: &Multiaddr) -> Option<Port> {
    let mut parts = address.iter();
    match parts.next()? {
        Protocol::Ip4(ip) if !ip.is_loopback() => {}
        _ => return None,
    }
    let (carries, number) = match (parts.next()?, parts.next()) {
        (Protocol::Tcp(number), None) => (Carries::Tcp, number),
        (Protocol::Udp(number), Some(Protocol::QuicV1)) => (Carries::Udp, number),
        _ => return None,
    };
    Some(Port { carries, number })
}

/// Where a port of the control plane is found that a router has opened.
pub(super) fn mapped_address(opened: &Opened) -> Multiaddr {
    let (ip, number) = (opened.external.ip(), opened.external.port());
    match opened.port.carries {
        Carries::Tcp => Multiaddr::from(ip).with(Protocol::Tcp(number)),
        Carries::Udp => Multiaddr::from(ip).with(Protocol::Udp(number)).with(Protocol::QuicV1),
    }
}

/// Where a peer's data plane may answer: what it said, an unspecified address completed with the one it is seen at,
/// addresses on the seen host first, and the seen host with each port last, in case it told only private addresses.
pub(super) fn data_addresses(told: &[SocketAddr], seen: Option<IpAddr>) -> Vec<SocketAddr> {
    let complete = |address: &SocketAddr| match seen {
        _ if !address.ip().is_unspecified() => Some(*address),
        Some(ip) => Some(SocketAddr::new(ip, address.port())),
        None => None,
    };
    let mut addresses: Vec<_> = told
        .iter()
        .filter_map(complete)
        .filter(|address| address.port() != 0)
        .collect();
    addresses.sort_by_key(|address| Some(address.ip()) != seen);
    if let Some(ip) = seen {
        addresses.extend(
            told.iter()
                .map(|address| SocketAddr::new(ip, address.port()))
                .filter(|address| address.port() != 0),
        );
    }
    let mut unique = Vec::with_capacity(addresses.len());
    for address in addresses {
        if !unique.contains(&address) {
            unique.push(address);
        }
    }
    unique.truncate(ADDRESSES_MAX);
    unique
}

/// Binds the port of a listening address once and lets it go. libp2p's TCP sockets share ports, so two nodes of one
/// user would otherwise both start and each hear half of their peers.
pub(super) fn probe_port(address: &Multiaddr) -> Result<(), ControlError> {
    let mut parts = address.iter();
    let ip = match parts.next() {
        Some(Protocol::Ip4(ip)) => IpAddr::V4(ip),
        Some(Protocol::Ip6(ip)) => IpAddr::V6(ip),
        _ => return Ok(()),
    };
    let (kind, port) = match parts.next() {
        Some(Protocol::Tcp(port)) if port != 0 => (Type::STREAM, port),
        Some(Protocol::Udp(port)) if port != 0 => (Type::DGRAM, port),
        _ => return Ok(()),
    };
    let place = SocketAddr::new(ip, port);
    let bind = || {
        let socket = Socket::new(Domain::for_address(place), kind, None)?;
        if ip.is_ipv6() {
            // As libp2p does: IPv4 has a listener of its own on the same port.
            socket.set_only_v6(true)?;
        }
        if kind == Type::STREAM {
            socket.set_reuse_address(true)?;
        }
        socket.bind(&place.into())?;
        if kind == Type::STREAM { socket.listen(1) } else { Ok(()) }
    };
    bind().map_err(|error| listen_error(address, &error))
}

/// Says why an address cannot be listened on, and what to try.
pub(super) fn listen_error(address: &Multiaddr, error: &std::io::Error) -> ControlError {
    let hint = match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            "another program, perhaps another node, has this port; stop it or choose another port"
        }
        std::io::ErrorKind::PermissionDenied => "ports below 1024 need a privilege; choose a higher one",
        std::io::ErrorKind::AddrNotAvailable => {
            "this machine has no such address; listen on 0.0.0.0 or on one that it has"
        }
        _ => "check the address; `/ip4/0.0.0.0/tcp/4001` listens on every interface",
    };
    ControlError::Listen {
        address: address.to_string(),
        reason: error.to_string(),
        hint,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_id_survives_its_peer_id() {
        let peer = keypair([7; 32]).expect("any seed is a key").public().to_peer_id();
        let node = node_of(&peer).expect("ed25519");
        assert_eq!(peer_of(node), Some(peer));
    }

    #[test]
    fn an_unspecified_data_address_is_completed_with_the_one_seen() {
        let told = [
            SocketAddr::from(([0, 0, 0, 0], 4002)),
            SocketAddr::from(([10, 0, 0, 7], 4002)),
        ];
        let seen = IpAddr::from([192, 0, 2, 1]);
        let expected = [SocketAddr::new(seen, 4002), SocketAddr::from(([10, 0, 0, 7], 4002))];
        assert_eq!(data_addresses(&told, Some(seen)), expected);
    }

    #[test]
    fn a_private_data_address_is_followed_by_the_one_seen() {
        let told = [SocketAddr::from(([10, 0, 0, 7], 4002))];
        let seen = IpAddr::from([192, 0, 2, 1]);
        assert_eq!(
            data_addresses(&told, Some(seen)),
            [told[0], SocketAddr::new(seen, 4002)]
        );
    }

    #[test]
    fn a_circuit_hides_the_address_of_the_peer() {
        let circuit = "/ip4/192.0.2.1/tcp/4001/p2p-circuit".parse().expect("address");
        assert_eq!(ip_of(&circuit), None);
    }
}
