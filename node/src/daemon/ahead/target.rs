//! A gateway to try: its addresses as an invite names them, or as one host usually has them.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use polder_protocol::hash::NodeId;
use polder_protocol::invite::Invite;

/// Addresses of one gateway that are tried.
pub(super) const ADDRESSES_MAX: usize = 16;

/// The ports that gateways have unless their configuration says otherwise.
pub(super) const CONTROL_PORT: u16 = 4001;
/// See [`CONTROL_PORT`].
pub(super) const DATA_PORT: u16 = 4002;

/// A gateway to try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its key, where that is known.
    pub(super) node: Option<NodeId>,
    /// What a person calls it: its name or its address.
    pub(super) host: String,
    pub(super) control: Vec<Address>,
    pub(super) data: Vec<SocketAddr>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) text: String,
    /// Whether somebody said that the gateway answers there. The others are usual.
    pub(super) told: bool,
}

/// How a gateway may be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Way {
    Quic,
    Tcp,
    WebSocket,
}

impl Way {
    pub(super) const ALL: [Self; 3] = [Self::Quic, Self::Tcp, Self::WebSocket];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Quic => "QUIC",
            Self::Tcp => "TCP",
            Self::WebSocket => "WebSocket",
        }
    }

    pub(super) fn of(address: &str) -> Self {
        let has = |part: &str| address.split('/').any(|word| word == part);
        if has("ws") || has("wss") {
            Self::WebSocket
        } else if has("udp") {
            Self::Quic
        } else {
            Self::Tcp
        }
    }
}

impl Target {
    /// The gateways that an invite names.
    pub fn of_invite(invite: &Invite) -> Vec<Self> {
        let targets = invite.doors.iter().map(|door| {
            let told = |text: &String| Address {
                text: text.clone(),
                told: true,
            };
            // What only the gateway itself can reach is left out, unless there is nothing else.
            let beyond = |text: &&String| !text.starts_with("/ip4/127.") && !text.starts_with("/ip6/::1/");
            let mut control: Vec<Address> = door.control.iter().filter(beyond).map(told).collect();
            if control.is_empty() {
                control = door.control.iter().map(told).collect();
            }
            control.truncate(ADDRESSES_MAX);
            // People read IPv4 and names more easily.
            control.sort_by_key(|address| address.text.starts_with("/ip6/"));
            let host = control.first().and_then(|first| host_of(&first.text));
            let ips: BTreeSet<IpAddr> = control
                .iter()
                .filter_map(|address| host_of(&address.text)?.parse().ok())
                .collect();
            // An unspecified address means: any at which the gateway is found, with this port.
            let complete = |told: &SocketAddr| match told.ip().is_unspecified() {
                true => ips.iter().map(|ip| SocketAddr::new(*ip, told.port())).collect(),
                false => vec![*told],
            };
            let mut data: Vec<SocketAddr> = door.data.iter().flat_map(complete).collect();
            data.truncate(ADDRESSES_MAX);
            Self {
                node: Some(door.node),
                host: host.unwrap_or_else(|| door.node.short()),
                control,
                data,
            }
        });
        targets.collect()
    }

    /// The gateway at a host, `HOST:PORT` or a multiaddress.
    ///
    /// # Errors
    ///
    /// That it is none of these.
    pub fn of_address(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no address; write a host, HOST:PORT, or /ip4/192.0.2.1/tcp/4001");
        let mut control = Vec::new();
        let mut add = |text: String, told| {
            if control.iter().all(|known: &Address| known.text != text) {
                control.push(Address { text, told });
            }
        };
        let host = if text.starts_with('/') {
            if !crate::control::is_multiaddress(text) {
                return Err(wrong());
            }
            add(text.to_owned(), true);
            host_of(text).ok_or_else(wrong)?
        } else {
            let (host, port) = match text.parse::<SocketAddr>() {
                Ok(address) => (address.ip().to_string(), Some(address.port())),
                Err(_) if text.parse::<IpAddr>().is_ok() => (text.to_owned(), None),
                Err(_) => match text.split_once(':') {
                    Some((host, port)) => (host.to_owned(), Some(port.parse().map_err(|_| wrong())?)),
                    None => (text.to_owned(), None),
                },
            };
            if let Some(port) = port {
                add(format!("{}/tcp/{port}", prefix(&host)), true);
            }
            host
        };
        let of_host = |c: char| c.is_alphanumeric() || matches!(c, '-' | '.' | '_' | ':' | '%');
        if host.is_empty() || !host.chars().all(of_host) {
            return Err(wrong());
        }
        let prefix = prefix(&host);
        add(format!("{prefix}/udp/{CONTROL_PORT}/quic-v1"), false);
        add(format!("{prefix}/tcp/{CONTROL_PORT}"), false);
        add(format!("{prefix}/tcp/443/ws"), false);
        add(format!("{prefix}/tcp/443/wss"), false);
        Ok(Self {
            node: None,
            data: host
                .parse()
                .map(|ip| SocketAddr::new(ip, DATA_PORT))
                .into_iter()
                .collect(),
            host,
            control,
        })
    }
}

/// The part of a multiaddress that names a host.
fn prefix(host: &str) -> String {
    match host.parse() {
        Ok(IpAddr::V4(ip)) => format!("/ip4/{ip}"),
        Ok(IpAddr::V6(ip)) => format!("/ip6/{ip}"),
        Err(_) => format!("/dns/{host}"),
    }
}

fn host_of(address: &str) -> Option<String> {
    address.split('/').nth(2).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_tried_at_the_usual_ports() {
        let target = Target::of_address("gateway.example.org:9000").expect("an address");
        let tried: Vec<&str> = target.control.iter().map(|address| address.text.as_str()).collect();
        let expected = [
            "/dns/gateway.example.org/tcp/9000",
            "/dns/gateway.example.org/udp/4001/quic-v1",
            "/dns/gateway.example.org/tcp/4001",
            "/dns/gateway.example.org/tcp/443/ws",
            "/dns/gateway.example.org/tcp/443/wss",
        ];
        assert_eq!(tried, expected);
        let numeric = Target::of_address("2001:db8::7").expect("an address");
        assert_eq!(numeric.data, ["[2001:db8::7]:4002".parse().expect("an address")]);
        for wrong in ["", "/nonsense", "gateway:port", "a b"] {
            assert!(Target::of_address(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_address_tells_its_way() {
        for (address, way) in [
            ("/ip4/192.0.2.1/tcp/4001", Way::Tcp),
            ("/ip4/192.0.2.1/udp/4001/quic-v1", Way::Quic),
            ("/dns4/example.org/tcp/443/tls/ws", Way::WebSocket),
        ] {
            assert_eq!(Way::of(address), way, "{address}");
        }
    }
}
