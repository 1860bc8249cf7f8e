//! Ports of this node opened in the router before it, where the router takes such requests: by NAT-PMP or PCP, which
//! answer at once where they are spoken, else by UPnP. What is open is renewed, told to the members as an address of this
//! node, and closed when the node stops; what a node that was killed leaves behind ends with its lease.

mod igd;
mod keep;
mod packet;
mod question;
mod router;
pub(crate) mod untrusted;
mod upnp;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

pub use keep::{Mapper, start};
pub(crate) use router::{find, place};

/// How long a port is asked for. A node that was killed leaves it open for so long, and no router forgets it earlier.
const LEASE: Duration = Duration::from_secs(3600);

/// What a port carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Carries {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Port {
    /// What it carries.
    pub carries: Carries,
    /// Its number.
    pub number: u16,
}

/// A port that the router has opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened {
    /// The port of this machine that it leads to.
    pub port: Port,
    /// Where others find it.
    pub external: SocketAddr,
}

/// How a router is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Language {
    /// RFC 6886.
    NatPmp,
    /// RFC 6887.
    Pcp,
    /// UPnP's Internet Gateway Device.
    Upnp,
}

impl Language {
    /// The word for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::NatPmp => "NAT-PMP",
            Self::Pcp => "PCP",
            Self::Upnp => "UPnP",
        }
    }
}

/// What has become of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mapping {
    /// The configuration does not want it.
    Off,
    /// This machine has a public address, or listens to itself alone: there is no router to ask.
    NotNeeded,
    /// The router is being asked.
    Asking,
    /// Ports are open.
    Open {
        /// How the router was asked.
        language: Language,
        /// The router's address on this side.
        router: Ipv4Addr,
        /// The ports.
        opened: Vec<Opened>,
    },
    /// Nothing is open; why, for people.
    Closed {
        /// Why.
        reason: String,
    },
}

impl Mapping {
    /// The ports that are open now.
    pub fn opened(&self) -> &[Opened] {
        match self {
            Self::Open { opened, .. } => opened,
            _ => &[],
        }
    }
}
