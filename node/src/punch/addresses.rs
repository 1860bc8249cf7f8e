//! How this node's data port is seen from outside.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use polder_protocol::wire::Standing;

use crate::control::{ControlHandle, is_public};
use crate::data::DataPlane;

/// Candidates that one node names, as many as another tries.
const CANDIDATES_MAX: usize = 8;

/// What a node knows of its own addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Own {
    /// Where peers might reach the data port, the likeliest first.
    pub candidates: Vec<SocketAddr>,
    /// At which of them others have seen it.
    pub seen: Vec<SocketAddr>,
    /// What that means for a punch.
    pub standing: Standing,
}

impl Default for Own {
    fn default() -> Self {
        Self {
            candidates: Vec::new(),
            seen: Vec::new(),
            standing: Standing::Punchable,
        }
    }
}

impl Own {
    pub(super) fn find(control: &ControlHandle, data: &DataPlane, told: &[SocketAddr]) -> Self {
        let seen: BTreeSet<SocketAddr> = data.seen_as().into_iter().map(|(_, address)| address).collect();
        Self::of(&control.own_ips(), data.local_address(), &seen, told)
    }

    fn of(ips: &[IpAddr], bound: SocketAddr, seen: &BTreeSet<SocketAddr>, told: &[SocketAddr]) -> Self {
        let seen: Vec<SocketAddr> = seen.iter().copied().filter(|address| is_public(address.ip())).collect();
        let own = |ip: IpAddr| ips.contains(&ip);
        let public = !told.is_empty() || seen.iter().any(|address| own(address.ip()));
        // One machine with two ways out looks the same as a router that changes ports; both cannot be punched.
        let ports = |family: fn(&SocketAddr) -> bool| seen.iter().filter(|address| family(address)).count();
        let one_port = ports(SocketAddr::is_ipv4) <= 1 && ports(SocketAddr::is_ipv6) <= 1;
        let standing = match (public, one_port) {
            (true, _) => Standing::Public,
            (false, true) => Standing::Punchable,
            (false, false) => Standing::Symmetric,
        };
        let mut candidates = told.to_vec();
        if bound.ip().is_unspecified() {
            // Public ones first: a neighbour finds the others soon enough.
            let reachable = ips
                .iter()
                .filter(|ip| (ip.is_ipv4() || bound.is_ipv6()) && !is_link_local(**ip));
            let mut local: Vec<SocketAddr> = reachable.map(|ip| SocketAddr::new(*ip, bound.port())).collect();
            local.sort_by_key(|address| (address.ip().is_loopback(), !is_public(address.ip())));
            local.retain(|address| !address.ip().is_loopback());
            let (first, last): (Vec<_>, Vec<_>) = local.into_iter().partition(|address| is_public(address.ip()));
            candidates.extend(first.into_iter().chain(seen.iter().copied()).chain(last));
        } else {
            candidates.extend(std::iter::once(bound).chain(seen.iter().copied()));
        }
        let mut unique = Vec::with_capacity(CANDIDATES_MAX);
        for candidate in candidates {
            if !unique.contains(&candidate) && unique.len() < CANDIDATES_MAX {
                unique.push(candidate);
            }
        }
        if unique.is_empty() {
            // As at the start: each peer completes it with the address that it sees.
            unique.push(bound);
        }
        Self {
            candidates: unique,
            seen,
            standing,
        }
    }
}

/// Means nothing without the name of an interface.
fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_with_the_address_that_others_see_is_public() {
        let seen = address("192.0.2.1:4002");
        let own = Own::of(&[seen.ip()], address("0.0.0.0:4002"), &BTreeSet::from([seen]), &[]);
        assert_eq!((own.standing, own.candidates), (Standing::Public, vec![seen]));
    }

    #[test]
    fn a_router_that_keeps_one_port_can_be_punched_and_one_that_does_not_cannot() {
        let (inside, bound) = (IpAddr::from([192, 168, 1, 2]), address("[::]:4002"));
        let one = BTreeSet::from([address("192.0.2.1:4002")]);
        let own = Own::of(&[inside], bound, &one, &[]);
        assert_eq!(own.standing, Standing::Punchable);
        assert_eq!(own.candidates, [address("192.0.2.1:4002"), address("192.168.1.2:4002")]);
        let two = BTreeSet::from([address("192.0.2.1:50001"), address("192.0.2.1:60002")]);
        assert_eq!(Own::of(&[inside], bound, &two, &[]).standing, Standing::Symmetric);
    }

    #[test]
    fn one_port_of_each_family_is_one_port() {
        let seen = BTreeSet::from([address("192.0.2.1:4002"), address("[2001:db8::1]:4002")]);
        let own = Own::of(&[], address("[::]:4002"), &seen, &[]);
        assert_eq!(own.standing, Standing::Punchable);
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }
}
