//! The router before this machine: where it is, and what it speaks.

use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::time::Duration;

use super::igd::Device;
use super::question::Speaker;
use super::{Language, Opened, Port};
use crate::control::source_for;

/// What the system's own command may take to tell the way out.
const COMMAND_TIME_MAX: Duration = Duration::from_secs(3);

/// Where this machine stands in its network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// This machine's address towards the router.
    pub(crate) own: Ipv4Addr,
    /// The router's address on this side.
    pub(crate) router: Ipv4Addr,
}

/// A router that takes requests.
#[derive(Debug)]
pub(crate) enum Router {
    Speaker(Speaker),
    Device(Device),
}

/// Finds out where the router is; `None` without a way out over IPv4.
pub(crate) async fn place() -> Option<Place> {
    let asked = tokio::task::spawn_blocking(default_router);
    let router = tokio::time::timeout(COMMAND_TIME_MAX, asked).await.ok()?.ok()??;
    match source_for(IpAddr::V4(router))? {
        IpAddr::V4(own) => Some(Place { own, router }),
        IpAddr::V6(_) => None,
    }
}

/// Finds out what the router speaks; the error says what was tried.
pub(crate) async fn find(place: Place) -> Result<Router, String> {
    let near = match Speaker::find(place.own, place.router).await {
        Ok(speaker) => return Ok(Router::Speaker(speaker)),
        Err(reason) => reason,
    };
    let device = Device::find(place.own, place.router).await;
    device.map(Router::Device).map_err(|reason| format!("{near}; {reason}"))
}

impl Router {
    pub(crate) fn language(&self) -> Language {
        match self {
            Self::Speaker(speaker) => speaker.language,
            Self::Device(_) => Language::Upnp,
        }
    }

    /// The address outside, where it has been told.
    pub(crate) fn external(&self) -> Option<Ipv4Addr> {
        match self {
            Self::Speaker(speaker) => speaker.external,
            Self::Device(device) => Some(device.external),
        }
    }

    /// Asks for a port, or for more time with it.
    pub(super) async fn open(&self, port: Port) -> Result<Opened, String> {
        match self {
            Self::Speaker(speaker) => speaker.open(port).await,
            Self::Device(device) => device.open(port).await,
        }
    }

    /// Gives a port back.
    pub(super) async fn close(&self, opened: Opened) -> Result<(), String> {
        match self {
            Self::Speaker(speaker) => speaker.close(opened.port).await,
            Self::Device(device) => device.close(opened).await,
        }
    }
}

/// The next hop of the default route.
fn default_router() -> Option<Ipv4Addr> {
    if cfg!(target_os = "linux") {
        return of_linux(&std::fs::read_to_string("/proc/net/route").ok()?);
    }
    let (program, arguments): (_, &[&str]) = if cfg!(windows) {
        ("route", &["print", "-4", "0.0.0.0"])
    } else {
        ("route", &["-n", "get", "default"])
    };
    let output = Command::new(program).args(arguments).output().ok()?;
    of_a_command(&String::from_utf8_lossy(&output.stdout))
}

/// Of `/proc/net/route`: interface, destination, router, flags, …, metric, with addresses as the machine holds them.
pub(super) fn of_linux(table: &str) -> Option<Ipv4Addr> {
    const UP_WITH_ROUTER: u32 = 3;
    let routes = table.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let hexadecimal = |place: usize| u32::from_str_radix(fields.get(place)?, 16).ok();
        let everywhere = hexadecimal(1)? == 0 && hexadecimal(7)? == 0;
        let usable = everywhere && hexadecimal(3)? & UP_WITH_ROUTER == UP_WITH_ROUTER;
        let metric: u32 = fields.get(6)?.parse().ok()?;
        let router = Ipv4Addr::from(hexadecimal(2)?.to_ne_bytes());
        usable.then_some((metric, router))
    });
    routes.min_by_key(|(metric, _)| *metric).map(|(_, router)| router)
}

/// Of `route -n get default` on the BSDs and macOS, or of `route print` on Windows.
pub(super) fn of_a_command(text: &str) -> Option<Ipv4Addr> {
    text.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["gateway:", router, ..] | ["0.0.0.0", "0.0.0.0", router, ..] => router.parse().ok(),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_out_with_the_lowest_metric_is_the_router() {
        let table = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n\
            wlan0\t00000000\t0105A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n\
            eth0\t00000000\t0100A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n\
            eth0\t0000A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        if cfg!(target_endian = "little") {
            assert_eq!(of_linux(table), Some(Ipv4Addr::new(192, 168, 0, 1)));
        }
        assert_eq!(of_linux("Iface\nnonsense\n"), None);
    }

    #[test]
    fn other_systems_commands_are_read() {
        let mac = "   route to: default\ndestination: default\n    gateway: 192.168.1.1\n  interface: en0\n";
        assert_eq!(of_a_command(mac), Some(Ipv4Addr::new(192, 168, 1, 1)));
        let windows = "          0.0.0.0          0.0.0.0      10.0.0.138       10.0.0.7     25\n";
        assert_eq!(of_a_command(windows), Some(Ipv4Addr::new(10, 0, 0, 138)));
        assert_eq!(of_a_command("route: not in table"), None);
    }
}
