//! What works between this node and the others and what does not, in plain words, with the line to ask of whoever runs the
//! network: for `polder doctor`.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use polder_protocol::charter::{CLOCK_SKEW_SECONDS, Capabilities};
use polder_protocol::wire::Standing;
use serde::{Deserialize, Serialize};

use super::Shared;
use crate::control::{Path as Way, PeerRecord, is_public};
use crate::mapping::{Carries, Mapping};

/// What `df` may take: a network drive that hangs must not hang the answer.
const DISK_TIME_MAX: Duration = Duration::from_secs(3);

/// Below this, a model of a few billion parameters does not fit: 20 GiB.
const DISK_BYTES_WANTED: u64 = 20 << 30;

/// A clock so far off is no reason to do something. Announcements travel for a second or two.
const CLOCK_FAIR_SECONDS: u64 = 30;

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// It works.
    Good,
    /// It works less well than it could.
    Fair,
    /// It does not work.
    Bad,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What.
    pub what: String,
    /// How it is.
    pub health: Health,
    /// In words.
    pub words: String,
    /// What to ask of whoever can change it, word for word.
    pub ask: Option<String>,
}

impl Finding {
    pub(super) fn new(what: &str, health: Health, words: impl Into<String>) -> Self {
        Self {
            what: what.to_owned(),
            health,
            words: words.into(),
            ask: None,
        }
    }

    pub(super) fn ask(self, line: String) -> Self {
        Self {
            ask: Some(line),
            ..self
        }
    }
}

impl Shared {
    /// Looks at everything. It changes nothing and takes a few seconds at most.
    pub(super) async fn examine(&self) -> Vec<Finding> {
        let present = self.control.present();
        let relays = |peer: &&PeerRecord| Capabilities(peer.capabilities).has(Capabilities::RELAY);
        let gateways: Vec<PeerRecord> = present.iter().filter(relays).cloned().collect();
        let mut findings = vec![
            self.tcp(&gateways),
            self.udp(&gateways),
            self.relay(&gateways),
            self.address(),
            self.router(),
        ];
        findings.extend([
            self.ipv6(),
            self.clock(),
            self.mdns(),
            disk(self.home.root()).await,
            self.device_driver(),
        ]);
        findings
    }

    fn is_gateway(&self) -> bool {
        self.members.capabilities().has(Capabilities::RELAY)
    }

    fn tcp(&self, gateways: &[PeerRecord]) -> Finding {
        let proxy = self.config.proxy().ok().flatten();
        let through = proxy.map_or_else(String::new, |proxy| format!(", TCP through {proxy}"));
        let direct = gateways.iter().filter(|peer| peer.path == Way::Direct).count();
        match (direct, self.is_gateway()) {
            (0, true) => Finding::new(
                "gateways",
                Health::Fair,
                "this is a gateway, and no other one is connected",
            ),
            (0, false) => {
                let line = format!(
                    "Please allow outgoing TCP to {}, or tell us the address of the HTTP proxy.",
                    self.known_gateways()
                );
                Finding::new("gateways", Health::Bad, "no gateway of the federation answers").ask(line)
            }
            (count, _) => Finding::new("gateways", Health::Good, format!("connected to {count}{through}")),
        }
    }

    fn udp(&self, gateways: &[PeerRecord]) -> Finding {
        let seen = self.data.seen_as();
        if !seen.is_empty() {
            return Finding::new(
                "UDP",
                Health::Good,
                format!("goes out and comes back, with {} connections", seen.len()),
            );
        }
        if gateways.is_empty() {
            return Finding::new("UDP", Health::Fair, "cannot be told without a gateway");
        }
        let mut targets: Vec<String> = gateways
            .iter()
            .flat_map(|gateway| &gateway.data_addresses)
            .filter(|address| is_public(address.ip()))
            .map(|address| format!("{} port {}", address.ip(), address.port()))
            .collect();
        targets.dedup();
        let line = format!(
            "Please allow outgoing UDP from this machine to {}, with answers (a stateful rule).",
            if targets.is_empty() {
                "any address, port 4002".to_owned()
            } else {
                targets.join(" and ")
            }
        );
        let words = "does not reach any gateway; data goes inside TCP, which works and is slower";
        Finding::new("UDP", Health::Bad, words).ask(line)
    }

    fn relay(&self, gateways: &[PeerRecord]) -> Finding {
        if self.is_gateway() {
            return Finding::new("relay", Health::Good, "this node relays for others");
        }
        let own = self.control.listen_addresses();
        match own.iter().filter(|address| address.contains("/p2p-circuit")).count() {
            0 if gateways.is_empty() => Finding::new("relay", Health::Bad, "no gateway keeps this node reachable"),
            0 => Finding::new("relay", Health::Fair, "no gateway keeps this node reachable yet"),
            count => Finding::new(
                "relay",
                Health::Good,
                format!("reachable through gateways at {count} addresses"),
            ),
        }
    }

    fn address(&self) -> Finding {
        let own = self.puncher.own();
        let seen = own
            .seen
            .iter()
            .map(SocketAddr::to_string)
            .collect::<Vec<_>>()
            .join(", ");
        let port = self.data.local_address().port();
        let inside = self.control.own_ips().into_iter().find(|ip| !ip.is_loopback());
        let inside = inside.map_or_else(|| "this machine".to_owned(), |ip| ip.to_string());
        let mapping = self.mapper.mapping();
        let opened = mapping
            .opened()
            .iter()
            .find(|one| one.port.carries == Carries::Udp && one.port.number == port);
        if let Some(opened) = opened {
            let words = format!("behind a router that has opened {} for it", opened.external);
            return Finding::new("address", Health::Good, words);
        }
        match own.standing {
            _ if own.seen.is_empty() => Finding::new("address", Health::Fair, "nobody has told how this node is seen from outside"),
            Standing::Public => Finding::new("address", Health::Good, format!("public: {seen}")),
            Standing::Punchable => Finding::new(
                "address",
                Health::Good,
                format!("behind a router that keeps one port ({seen}); straight ways can be made to most others"),
            ),
            Standing::Symmetric => Finding::new(
                "address",
                Health::Fair,
                format!("behind a router that takes another port for every peer ({seen}); others are reached through gateways"),
            )
            .ask(format!(
                "Please forward UDP port {port} to {inside} port {port}, or let the router keep source ports for it \
                 (endpoint-independent mapping)."
            )),
        }
    }

    fn router(&self) -> Finding {
        let good = |words: String| Finding::new("router", Health::Good, words);
        match self.mapper.mapping() {
            Mapping::Off => good("is not asked to open ports (`map_ports` in config.toml)".to_owned()),
            Mapping::NotNeeded => good("none stands before this machine that could be asked to open ports".to_owned()),
            Mapping::Asking => Finding::new("router", Health::Fair, "is being asked to open ports"),
            Mapping::Open {
                language,
                router,
                opened,
            } => {
                let opened = opened.iter().map(|one| match one.port.carries {
                    Carries::Tcp => format!("TCP {}", one.external.port()),
                    Carries::Udp => format!("UDP {}", one.external.port()),
                });
                let opened = opened.collect::<Vec<_>>().join(", ");
                good(format!("{router} has opened {opened} over {}", language.name()))
            }
            Mapping::Closed { reason } => {
                Finding::new("router", Health::Fair, format!("opens no ports by itself: {reason}"))
            }
        }
    }

    fn ipv6(&self) -> Finding {
        match self
            .control
            .own_ips()
            .into_iter()
            .find(|ip| ip.is_ipv6() && is_public(*ip))
        {
            Some(ip) => Finding::new("IPv6", Health::Good, format!("this machine is {ip}")),
            None => Finding::new(
                "IPv6",
                Health::Fair,
                "no public address; with one, routers stand less in the way",
            )
            .ask("Please give this machine an IPv6 address.".to_owned()),
        }
    }

    /// The middle of the members' clocks: one of them may be wrong itself.
    fn clock(&self) -> Finding {
        let mut differences = self.directory.clock_differences();
        differences.sort_unstable();
        match differences.get(differences.len() / 2) {
            Some(middle) => {
                let members = match differences.len() {
                    1 => "that of the one member heard".to_owned(),
                    count => format!("the middle of {count} members'"),
                };
                clock_difference(*middle, &members)
            }
            None => local_clock(),
        }
    }

    fn mdns(&self) -> Finding {
        if !self.config.mdns {
            return Finding::new("mDNS", Health::Good, "switched off in config.toml");
        }
        let joined = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))
            .and_then(|socket| socket.join_multicast_v4(&Ipv4Addr::new(224, 0, 0, 251), &Ipv4Addr::UNSPECIFIED));
        match joined {
            Ok(()) => Finding::new("mDNS", Health::Good, "members on this network are looked for"),
            Err(error) => Finding::new("mDNS", Health::Fair, format!("this network has no multicast ({error})")),
        }
    }

    fn device_driver(&self) -> Finding {
        let described = self.device.description();
        let name = described
            .as_ref()
            .map_or("nothing yet", |described| described.name.as_str());
        let (_, driver) = driver();
        match described.as_ref().and_then(|described| described.fell_back.as_ref()) {
            Some(reason) => Finding::new(
                "device",
                Health::Fair,
                format!("computes on {name}, not what was asked for: {reason} ({driver})"),
            ),
            None => Finding::new("device", Health::Good, format!("computes on {name} ({driver})")),
        }
    }

    fn known_gateways(&self) -> String {
        let doors = self.home.peers().unwrap_or_default();
        let mut known: Vec<String> = doors
            .into_iter()
            .flat_map(|door| door.control)
            .filter(|address| address.contains("/tcp/"))
            .collect();
        known.retain(|address| !address.starts_with("/ip4/127.") && !address.starts_with("/ip6/::1/"));
        known.truncate(4);
        if known.is_empty() {
            "the gateways of the federation".to_owned()
        } else {
            known.join(", ")
        }
    }
}

/// How far the clock is from another. Certificates allow five minutes; a clock that is a minute off goes on to be more so.
pub(super) fn clock_difference(ahead_seconds: i64, whose: &str) -> Finding {
    let line = "Please set this machine's clock (`timedatectl set-ntp true`).".to_owned();
    let (off, side) = match ahead_seconds {
        ..0 => (ahead_seconds.unsigned_abs(), "ahead of"),
        0.. => (ahead_seconds.unsigned_abs(), "behind"),
    };
    let words = format!("it is {off} s {side} {whose}; certificates allow {CLOCK_SKEW_SECONDS} s");
    match off {
        0..=CLOCK_FAIR_SECONDS => Finding::new("clock", Health::Good, words),
        _ if off < CLOCK_SKEW_SECONDS => Finding::new("clock", Health::Fair, words).ask(line),
        _ => Finding::new("clock", Health::Bad, words).ask(line),
    }
}

/// What can be told of the clock where nobody tells another time.
pub(super) fn local_clock() -> Finding {
    match SystemTime::now().duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) if since.as_secs() > 1_750_000_000 => {
            let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
            let time =
                jiff::Timestamp::from_second(seconds).map_or_else(|_| "far away".to_owned(), |time| time.to_string());
            let words =
                format!("it is {time}; nobody to compare it with. Certificates allow {CLOCK_SKEW_SECONDS} s of error");
            Finding::new("clock", Health::Good, words)
        }
        _ => Finding::new(
            "clock",
            Health::Bad,
            "this machine's clock is years behind; certificates cannot be checked",
        )
        .ask("Please set this machine's clock (`timedatectl set-ntp true`).".to_owned()),
    }
}

/// The driver of a GPU, in words.
fn driver() -> (bool, String) {
    match nvml_wrapper::Nvml::init().and_then(|nvml| nvml.sys_driver_version()) {
        Ok(version) => (true, format!("NVIDIA driver {version}")),
        Err(_) if Path::new("/dev/dri").exists() => (true, "no NVIDIA driver; /dev/dri is there".to_owned()),
        Err(_) => (false, "no GPU driver".to_owned()),
    }
}

/// What there is to compute on, before anything has been started on it.
pub(super) fn graphics() -> Finding {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let words = match driver() {
        (true, words) => words,
        (false, words) => format!("{words}; this node would compute on the CPU, with {threads} threads"),
    };
    Finding::new("device", Health::Good, words)
}

pub(super) async fn disk(home: &Path) -> Finding {
    // Before the first start the folder is not there yet; its disk is.
    let home = home
        .ancestors()
        .find(|folder| folder.exists())
        .unwrap_or(home)
        .to_owned();
    let asked = tokio::task::spawn_blocking(move || Command::new("df").arg("-Pk").arg(home).output());
    let free = match tokio::time::timeout(DISK_TIME_MAX, asked).await {
        Ok(Ok(Ok(output))) => free_bytes(&String::from_utf8_lossy(&output.stdout)),
        _ => None,
    };
    match free {
        Some(free) if free >= DISK_BYTES_WANTED => {
            Finding::new("disk", Health::Good, format!("{} GiB free", free >> 30))
        }
        Some(free) => Finding::new(
            "disk",
            Health::Fair,
            format!("{} GiB free; a model takes that much by itself", free >> 30),
        ),
        None => Finding::new("disk", Health::Fair, "cannot tell how much is free"),
    }
}

/// The fourth column of the second line of `df -Pk`, in KiB.
fn free_bytes(text: &str) -> Option<u64> {
    let kibibytes: u64 = text.lines().nth(1)?.split_whitespace().nth(3)?.parse().ok()?;
    kibibytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_space_is_read_from_what_df_prints() {
        let text = "Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/sda1 100 40 60 40% /\n";
        assert_eq!(free_bytes(text), Some(60 * 1024));
        assert_eq!(free_bytes("df: no such file"), None);
    }
}
