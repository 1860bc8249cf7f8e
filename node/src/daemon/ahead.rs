//! What works between this machine and a federation before it belongs to one: for `polder doctor` without a node. Nobody
//! is told anything but keys, and nothing changes.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, SystemTime};

use futures::future::join_all;
use polder_protocol::hash::NodeId;
use polder_protocol::invite::Invite;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::doctor::{Finding, Health, clock_difference, disk, graphics, local_clock};
use super::{Config, ConfigError};
use crate::control::{Knocked, Proxy, is_public, knock, source_for};
use crate::data;
use crate::home::random_32;
use crate::mapping;

/// What a name, or a host of the web, gets to answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(5);

/// Addresses of one gateway that are tried.
const ADDRESSES_MAX: usize = 16;

/// The ports that gateways have unless their configuration says otherwise.
const CONTROL_PORT: u16 = 4001;
/// See [`CONTROL_PORT`].
const DATA_PORT: u16 = 4002;

/// A gateway to try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its key, where that is known.
    node: Option<NodeId>,
    /// What a person calls it: its name or its address.
    host: String,
    control: Vec<Address>,
    data: Vec<SocketAddr>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Address {
    text: String,
    /// Whether somebody said that the gateway answers there. The others are usual.
    told: bool,
}

/// How a gateway may be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Quic,
    Tcp,
    WebSocket,
}

impl Way {
    const ALL: [Self; 3] = [Self::Quic, Self::Tcp, Self::WebSocket];

    fn name(self) -> &'static str {
        match self {
            Self::Quic => "QUIC",
            Self::Tcp => "TCP",
            Self::WebSocket => "WebSocket",
        }
    }

    fn of(address: &str) -> Self {
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
        if host.is_empty() || host.contains(char::is_whitespace) {
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

/// Looks at this machine, its network, and the way to `targets`. It takes a few seconds.
///
/// # Errors
///
/// A configuration that cannot be used.
pub async fn examine_ahead(config: &Config, home: &Path, targets: &[Target]) -> Result<Vec<Finding>, ConfigError> {
    let proxy = config.proxy().map_err(|error| ConfigError::Malformed {
        path: home.join("config.toml"),
        reason: error.to_string(),
    })?;
    let roots = config.roots()?;
    let hub = hub();
    let gateways = join_all(targets.iter().map(|target| gateway(target, proxy.clone(), &roots)));
    let (gateways, names, web, router, clock, disk) = tokio::join!(
        gateways,
        names(targets, &hub),
        web(&hub, proxy.as_ref()),
        router(config),
        clock(&hub),
        disk(home),
    );
    let mut findings: Vec<Finding> = gateways.into_iter().flatten().collect();
    if targets.is_empty() {
        let words = "not tried: name one with --gateway ADDR, or your invite with --invite LINE";
        findings.push(Finding::new("gateway", Health::Fair, words));
    }
    findings.extend([
        named_proxy(proxy.as_ref()).await,
        web,
        names,
        router,
        ipv6(),
        clock,
        disk,
        graphics(),
    ]);
    Ok(findings)
}

/// Tries every way to a gateway.
async fn gateway(
    target: &Target,
    proxy: Option<Proxy>,
    roots: &[rustls::pki_types::CertificateDer<'static>],
) -> Vec<Finding> {
    let Ok(seed) = random_32() else {
        return vec![Finding::new(
            "gateway",
            Health::Bad,
            "this system has no random numbers",
        )];
    };
    let tries = target.control.iter().map(|address| {
        let proxy = proxy.clone();
        async move {
            let knocked = knock(seed, proxy, roots, target.node, &address.text).await;
            (address, knocked)
        }
    });
    let tried = join_all(tries).await;
    let answered = tried.iter().find_map(|(_, knocked)| knocked.as_ref().ok());
    let mut findings = vec![verdict(target, &tried)];
    for way in Way::ALL {
        let of_way = tried.iter().filter(|(address, _)| Way::of(&address.text) == way);
        findings.extend(way_found(
            way,
            &of_way.collect::<Vec<_>>(),
            answered.is_some(),
            &target.host,
        ));
    }
    if let Some(known) = target.node.or(answered.map(|knocked| knocked.node)) {
        let mut data = data_found(seed, known, target, answered.is_some()).await;
        // The line for QUIC asks for this port too.
        if let Some(data) = &mut data
            && findings
                .iter()
                .any(|finding| finding.what == Way::Quic.name() && finding.ask.is_some())
        {
            data.ask = None;
        }
        findings.extend(data);
    }
    findings
}

type Tried<'a> = (&'a Address, Result<Knocked, String>);

fn verdict(target: &Target, tried: &[Tried<'_>]) -> Finding {
    let mut ways: Vec<Way> = tried
        .iter()
        .filter(|(_, knocked)| knocked.is_ok())
        .map(|(address, _)| Way::of(&address.text))
        .collect();
    ways.sort();
    ways.dedup();
    let host = &target.host;
    let node = tried.iter().find_map(|(_, knocked)| knocked.as_ref().ok());
    match node {
        Some(knocked) => {
            let ways = ways.iter().map(|way| way.name()).collect::<Vec<_>>().join(", ");
            let words = format!("{host} is node {} and can be reached by {ways}", knocked.node.short());
            Finding::new("gateway", Health::Good, words)
        }
        None => Finding::new("gateway", Health::Bad, format!("{host} cannot be reached in any way")).ask(format!(
            "Please allow outgoing TCP from this machine to {host} port {CONTROL_PORT} or 443, or tell us the address of \
             the HTTP proxy."
        )),
    }
}

fn way_found(way: Way, tried: &[&Tried<'_>], reached: bool, host: &str) -> Option<Finding> {
    let best = tried
        .iter()
        .filter_map(|(address, knocked)| Some((address, knocked.as_ref().ok()?)));
    if let Some((address, knocked)) = best.min_by_key(|(_, knocked)| knocked.after) {
        let words = format!("{} answers after {:.1} ms", address.text, millis(knocked.after));
        return Some(Finding::new(way.name(), Health::Good, words));
    }
    let told = tried.iter().find(|(address, _)| address.told);
    let (address, Err(reason)) = told.or_else(|| tried.first())? else {
        return None;
    };
    let health = if reached { Health::Fair } else { Health::Bad };
    let words = format!("{} does not answer: {reason}", address.text);
    let finding = Finding::new(way.name(), health, words);
    Some(match way {
        Way::Quic => finding.ask(format!(
            "Please allow outgoing UDP from this machine to {host} ports {CONTROL_PORT} and {DATA_PORT}, with answers (a \
             stateful rule)."
        )),
        // Where another way leads there, nothing is missing.
        Way::Tcp | Way::WebSocket => finding,
    })
}

/// Tries the data port, which has UDP alone.
async fn data_found(seed: [u8; 32], node: NodeId, target: &Target, reached: bool) -> Option<Finding> {
    let mut addresses = target.data.clone();
    if addresses.is_empty()
        && let Ok(Ok(found)) = tokio::time::timeout(
            ANSWER_TIME_MAX,
            tokio::net::lookup_host((target.host.as_str(), DATA_PORT)),
        )
        .await
    {
        addresses.extend(found);
    }
    addresses.truncate(ADDRESSES_MAX);
    let tries = addresses
        .iter()
        .map(|address| async move { (address, data::knock(seed, node, *address).await) });
    let tried = join_all(tries).await;
    let best = tried
        .iter()
        .filter_map(|(address, took)| Some((address, took.as_ref().ok()?)));
    if let Some((address, took)) = best.min_by_key(|(_, took)| **took) {
        let words = format!("UDP {address} answers after {:.1} ms", millis(*took));
        return Some(Finding::new("data", Health::Good, words));
    }
    let (address, Err(reason)) = tried.first()? else {
        return None;
    };
    let after = if reached {
        "; data goes inside TCP, which works and is slower"
    } else {
        ""
    };
    let finding = Finding::new(
        "data",
        Health::Fair,
        format!("UDP {address} does not answer: {reason}{after}"),
    );
    Some(finding.ask(format!(
        "Please allow outgoing UDP from this machine to {} port {}, with answers (a stateful rule).",
        address.ip(),
        address.port()
    )))
}

async fn named_proxy(proxy: Option<&Proxy>) -> Finding {
    if let Some(proxy) = proxy {
        return Finding::new(
            "proxy",
            Health::Good,
            format!("{proxy} is used for TCP to public addresses"),
        );
    }
    let others = [
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
        "HTTPS_PROXY",
        "https_proxy",
    ];
    let named = others.iter().find_map(|name| {
        std::env::var(name)
            .ok()
            .filter(|value| !value.is_empty())
            .map(|_| *name)
    });
    match named {
        Some(name) => Finding::new(
            "proxy",
            Health::Fair,
            format!("{name} is set and not used: set HTTPS_PROXY, or `proxy` in config.toml, to http://HOST:PORT"),
        ),
        None => Finding::new(
            "proxy",
            Health::Good,
            "none is named (HTTPS_PROXY, or `proxy` in config.toml)",
        ),
    }
}

/// From where models are pulled, which is also something to try the web with.
fn hub() -> String {
    let endpoint = std::env::var("HF_ENDPOINT").unwrap_or_default();
    let rest = endpoint.split("://").nth(1).unwrap_or_default();
    let host = rest.split(['/', ':']).next().unwrap_or_default();
    if host.is_empty() {
        "huggingface.co".to_owned()
    } else {
        host.to_owned()
    }
}

async fn web(hub: &str, proxy: Option<&Proxy>) -> Finding {
    let tried = async {
        match proxy {
            None => TcpStream::connect((hub, 443)).await.map(drop),
            Some(proxy) => {
                let mut found = tokio::net::lookup_host((hub, 443)).await?;
                let place = found.next().ok_or(std::io::ErrorKind::NotFound)?;
                proxy.connect(place.ip(), 443).await.map(drop)
            }
        }
    };
    let reason = match tokio::time::timeout(ANSWER_TIME_MAX, tried).await {
        Ok(Ok(())) => {
            return Finding::new(
                "TCP 443",
                Health::Good,
                format!("{hub} answers; models are pulled from there"),
            );
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {} s", ANSWER_TIME_MAX.as_secs()),
    };
    let words = format!("{hub} does not answer ({reason}); models cannot be pulled from there");
    Finding::new("TCP 443", Health::Fair, words).ask(
        "Please allow outgoing TCP from this machine to port 443, or tell us the address of the HTTP proxy.".to_owned(),
    )
}

async fn names(targets: &[Target], hub: &str) -> Finding {
    let mut named = targets.iter().map(|target| target.host.as_str());
    let name = named
        .find(|host| host.contains('.') && host.parse::<IpAddr>().is_err())
        .unwrap_or(hub);
    let asked = tokio::time::timeout(ANSWER_TIME_MAX, tokio::net::lookup_host((name, 443))).await;
    let reason = match asked {
        Ok(Ok(mut found)) => match found.next() {
            Some(address) => return Finding::new("DNS", Health::Good, format!("{name} is {}", address.ip())),
            None => "no address".to_owned(),
        },
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {} s", ANSWER_TIME_MAX.as_secs()),
    };
    let words = format!("{name} is not found ({reason}); gateways must be named by numbers");
    Finding::new("DNS", Health::Fair, words).ask("Please tell this machine of a DNS resolver.".to_owned())
}

async fn router(config: &Config) -> Finding {
    let good = |words: String| Finding::new("router", Health::Good, words);
    let Some(place) = mapping::place().await else {
        return Finding::new("router", Health::Fair, "this machine has no way out over IPv4");
    };
    if is_public(place.own.into()) {
        return good(format!("this machine has the public address {}", place.own));
    }
    if !config.map_ports {
        return good("is not asked to open ports (`map_ports` in config.toml)".to_owned());
    }
    match mapping::find(place).await {
        Ok(found) => {
            let (router, language) = (place.router, found.language().name());
            match found.external() {
                Some(external) if !is_public(external.into()) => Finding::new(
                    "router",
                    Health::Fair,
                    format!(
                        "{router} speaks {language}, but its own address outside is {external}: another router stands before it"
                    ),
                ),
                Some(external) => good(format!(
                    "{router} opens ports over {language}; outside it is {external}"
                )),
                None => good(format!("{router} opens ports over {language}")),
            }
        }
        Err(reason) => Finding::new("router", Health::Fair, format!("opens no ports by itself: {reason}")),
    }
}

fn ipv6() -> Finding {
    // An address of the part of IPv6 that is given out; nothing is sent.
    let far = IpAddr::V6(Ipv6Addr::new(0x2600, 0, 0, 0, 0, 0, 0, 1));
    match source_for(far) {
        Some(ip) if is_public(ip) => Finding::new("IPv6", Health::Good, format!("this machine is {ip}")),
        _ => Finding::new(
            "IPv6",
            Health::Fair,
            "no public address; with one, routers stand less in the way",
        )
        .ask("Please give this machine an IPv6 address.".to_owned()),
    }
}

/// Compares the clock with the time that a web server tells.
async fn clock(hub: &str) -> Finding {
    match tokio::time::timeout(ANSWER_TIME_MAX, told_time(hub)).await {
        Ok(Some(told)) => {
            let here = SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since| since.as_secs());
            let here = i64::try_from(here).unwrap_or(i64::MAX);
            clock_difference(told.saturating_sub(here), &format!("that of {hub}"))
        }
        _ => local_clock(),
    }
}

/// The date in the head of a web server's answer, as seconds of Unix time. It is not secured and decides nothing.
async fn told_time(hub: &str) -> Option<i64> {
    let mut stream = TcpStream::connect((hub, 80)).await.ok()?;
    let request = format!("HEAD / HTTP/1.1\r\nHost: {hub}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut head = Vec::new();
    stream.take(8 << 10).read_to_end(&mut head).await.ok()?;
    date_of(&String::from_utf8_lossy(&head))
}

fn date_of(head: &str) -> Option<i64> {
    let line = head
        .lines()
        .find(|line| line.get(..5).is_some_and(|name| name.eq_ignore_ascii_case("date:")))?;
    let date = jiff::fmt::rfc2822::parse(line.get(5..)?.trim()).ok()?;
    Some(date.timestamp().as_second())
}

fn millis(span: Duration) -> f64 {
    span.as_secs_f64() * 1000.0
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

    #[test]
    fn the_date_of_an_answer_is_read() {
        let head = "HTTP/1.1 301 Moved\r\nServer: x\r\ndate: Mon, 23 Nov 2026 16:05:00 GMT\r\n\r\n";
        assert_eq!(date_of(head), Some(1_795_449_900));
        assert_eq!(date_of("HTTP/1.1 200 OK\r\nDate: soon\r\n\r\n"), None);
    }
}
