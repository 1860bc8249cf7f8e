//! What surrounds this machine: the proxy, the web, names, the router, IPv6 and other clocks.

use std::net::{IpAddr, Ipv6Addr};
use std::time::SystemTime;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::super::Config;
use super::super::doctor::{Finding, Health, clock_difference, local_clock};
use super::ANSWER_TIME_MAX;
use super::target::Target;
use crate::control::{Proxy, is_public, source_for};
use crate::mapping;

pub(super) async fn named_proxy(proxy: Option<&Proxy>) -> Finding {
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
pub(super) fn hub() -> String {
    let endpoint = std::env::var("HF_ENDPOINT").unwrap_or_default();
    let rest = endpoint.split("://").nth(1).unwrap_or_default();
    let host = rest.split(['/', ':']).next().unwrap_or_default();
    if host.is_empty() {
        "huggingface.co".to_owned()
    } else {
        host.to_owned()
    }
}

pub(super) async fn web(hub: &str, proxy: Option<&Proxy>) -> Finding {
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

pub(super) async fn names(targets: &[Target], hub: &str) -> Finding {
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

pub(super) async fn router(config: &Config) -> Finding {
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

pub(super) fn ipv6() -> Finding {
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
pub(super) async fn clock(hub: &str) -> Finding {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_date_of_an_answer_is_read() {
        let head = "HTTP/1.1 301 Moved\r\nServer: x\r\ndate: Mon, 23 Nov 2026 16:05:00 GMT\r\n\r\n";
        assert_eq!(date_of(head), Some(1_795_449_900));
        assert_eq!(date_of("HTTP/1.1 200 OK\r\nDate: soon\r\n\r\n"), None);
    }
}
