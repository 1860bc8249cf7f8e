//! What is said to a router over UPnP, and how its answers are read.
//!
//! Anybody on the network may play the router. So an answer is read up to a size and a time, and never as a tree, which
//! an attacker can make as deep as he likes: a few elements are looked for in its text.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use axum::http::Uri;
use thiserror::Error;
use tokio::net::UdpSocket;
use tokio::time::Instant;

/// Where routers listen for searches.
const SEARCHED: (Ipv4Addr, u16) = (Ipv4Addr::new(239, 255, 255, 250), 1900);

/// What routers get to answer the search. They may wait for up to three seconds before they do.
const SEARCH_TIME_MAX: Duration = Duration::from_secs(5);

/// What one request may take, to the last byte of its answer.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(5);

/// The longest answer. Descriptions of real routers have up to some 20 KiB.
pub(super) const ANSWER_BYTES_MAX: u64 = 128 << 10;

/// The longest answer to a search: one packet.
const PACKET_BYTES_MAX: usize = 1500;

/// What is kept of a router's own words.
const WORDS_MAX: usize = 120;

/// The services that open ports, the better first.
const SERVICES: [&str; 3] = [
    "urn:schemas-upnp-org:service:WANIPConnection:2",
    "urn:schemas-upnp-org:service:WANIPConnection:1",
    "urn:schemas-upnp-org:service:WANPPPConnection:1",
];

const SEARCH: &str = "M-SEARCH * HTTP/1.1\r\nHost:239.255.255.250:1900\r\n\
    ST:urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\nMan:\"ssdp:discover\"\r\nMX:3\r\n\r\n";

/// The part of a router that opens ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Service {
    /// One of [`SERVICES`].
    pub(super) kind: &'static str,
    url: String,
}

/// Why a router did not do what it was asked for.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum Failure {
    /// It says so.
    #[error("{words} (error {code})")]
    Refused {
        /// As UPnP numbers them.
        code: u16,
        /// The router's.
        words: String,
    },
    /// It does not answer, or not as UPnP has it.
    #[error("{0}")]
    Silent(String),
}

/// Where the router describes itself. Others that answer, or name another machine, are not heard.
pub(super) async fn search(own: Ipv4Addr, router: Ipv4Addr) -> Result<Uri, String> {
    let failed = |error: std::io::Error| format!("the network cannot be searched for UPnP: {error}");
    let socket = UdpSocket::bind((own, 0)).await.map_err(failed)?;
    socket.send_to(SEARCH.as_bytes(), SEARCHED).await.map_err(failed)?;
    let deadline = Instant::now() + SEARCH_TIME_MAX;
    let mut packet = [0; PACKET_BYTES_MAX];
    loop {
        let heard = tokio::time::timeout_at(deadline, socket.recv_from(&mut packet)).await;
        let (length, from) = heard.map_err(|_| "no router answers UPnP")?.map_err(failed)?;
        let place = location(&String::from_utf8_lossy(packet.get(..length).unwrap_or_default()));
        if let Some(place) = place.filter(|place| from.ip() == router && is_at(place, router)) {
            return Ok(place);
        }
    }
}

/// Asks the router at `router` to describe itself, and finds the service that opens ports.
pub(super) async fn service(place: &Uri, router: Ipv4Addr) -> Result<Service, String> {
    let description = fetch(Request::Description(place.to_string())).await?.text;
    let port = place.port_u16().unwrap_or(80);
    let found = SERVICES.into_iter().find_map(|kind| {
        let mut blocks = description.split("<service>").skip(1);
        let block = blocks.find(|block| element(block, "serviceType") == Some(kind))?;
        let url = control_url(element(block, "controlURL")?, SocketAddr::from((router, port)))?;
        Some(Service { kind, url })
    });
    found.ok_or_else(|| "the router describes no service that opens ports over UPnP".to_owned())
}

impl Service {
    /// Asks for `action`, with arguments in UPnP's order. They are numbers and names of our own, which need no escapes.
    pub(super) async fn ask(&self, action: &str, arguments: &[(&str, String)]) -> Result<String, Failure> {
        let told: String = arguments
            .iter()
            .map(|(name, value)| format!("<{name}>{value}</{name}>"))
            .collect();
        let kind = self.kind;
        let body = format!(
            "<?xml version=\"1.0\"?>\r\n<s:Envelope xmlns:s=\"http://schemas.xmlsoap.org/soap/envelope/\" \
             s:encodingStyle=\"http://schemas.xmlsoap.org/soap/encoding/\"><s:Body><u:{action} xmlns:u=\"{kind}\">{told}\
             </u:{action}></s:Body></s:Envelope>\r\n"
        );
        let asked = Request::Action {
            url: self.url.clone(),
            action: format!("\"{kind}#{action}\""),
            body,
        };
        let answer = fetch(asked).await.map_err(Failure::Silent)?;
        if answer.good {
            return Ok(answer.text);
        }
        match element(&answer.text, "errorCode").and_then(|code| code.parse().ok()) {
            Some(code) => {
                let words = element(&answer.text, "errorDescription").unwrap_or("it does not say why");
                let words = words.chars().filter(|letter| !letter.is_control()).take(WORDS_MAX);
                Err(Failure::Refused {
                    code,
                    words: words.collect(),
                })
            }
            None => Err(Failure::Silent("its answer is not one of UPnP".to_owned())),
        }
    }
}

/// The text of the first element `name`, whatever stands before its colon.
pub(super) fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.split('<').skip(1).find_map(|tag| {
        let (head, content) = tag.split_once('>')?;
        let full = head.split_whitespace().next()?;
        let local = full.rsplit(':').next()?;
        // What follows is the next tag's: the split has ended it.
        (local == name && !head.ends_with('/')).then(|| content.trim())
    })
}

enum Request {
    Description(String),
    Action { url: String, action: String, body: String },
}

struct Answer {
    good: bool,
    text: String,
}

/// Asks over HTTP, within [`REQUEST_TIME_MAX`] and [`ANSWER_BYTES_MAX`].
async fn fetch(request: Request) -> Result<Answer, String> {
    let asked = tokio::task::spawn_blocking(move || {
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(REQUEST_TIME_MAX))
            .http_status_as_error(false)
            // Neither a proxy nor another machine that the router names.
            .proxy(None)
            .max_redirects(0)
            .build()
            .new_agent();
        let mut answer = match request {
            Request::Description(url) => agent.get(url).call(),
            Request::Action { url, action, body } => agent
                .post(url)
                .header("SOAPAction", action)
                .content_type("text/xml; charset=\"utf-8\"")
                .send(body),
        }?;
        let good = answer.status().is_success();
        let limited = answer.body_mut().with_config().limit(ANSWER_BYTES_MAX);
        let text = String::from_utf8_lossy(&limited.read_to_vec()?).into_owned();
        Ok(Answer { good, text })
    });
    match asked.await {
        Ok(answered) => answered.map_err(|error: ureq::Error| format!("the router's UPnP: {error}")),
        Err(error) => Err(error.to_string()),
    }
}

/// Where an answer to a search says that the description is.
fn location(answer: &str) -> Option<Uri> {
    let mut lines = answer.lines().filter_map(|line| line.split_once(':'));
    let (_, place) = lines.find(|(name, _)| name.trim().eq_ignore_ascii_case("location"))?;
    place.trim().parse().ok()
}

fn is_at(place: &Uri, router: Ipv4Addr) -> bool {
    let host = place.host().and_then(|host| host.parse::<IpAddr>().ok());
    place.scheme_str() == Some("http") && host == Some(router.into())
}

/// A path at the place of the description, or a whole address of the same machine.
fn control_url(told: &str, router: SocketAddr) -> Option<String> {
    let url = if told.starts_with("http") {
        told.to_owned()
    } else {
        format!("http://{router}/{}", told.trim_start_matches('/'))
    };
    let parsed: Uri = url.parse().ok()?;
    let IpAddr::V4(ip) = router.ip() else { return None };
    is_at(&parsed, ip).then_some(url)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);

    #[test]
    fn an_element_is_found_whatever_stands_around_it() {
        let text = "<a><u:b c=\"1\"> x </u:b><empty/><d></d><b>y</b></a>";
        assert_eq!(element(text, "b"), Some("x"));
        assert_eq!(element(text, "d"), Some(""));
        assert_eq!(element(text, "empty"), None);
        assert_eq!(element(text, "c"), None);
    }

    #[test]
    fn only_the_router_itself_is_asked_for_its_description_and_for_ports() {
        let answer = "HTTP/1.1 200 OK\r\nST: x\r\nLOCATION: http://192.168.1.1:5000/root.xml\r\n\r\n";
        let place = location(answer).expect("a place");
        assert!(is_at(&place, ROUTER));
        assert!(!is_at(&place, Ipv4Addr::new(192, 168, 1, 2)));
        let router = SocketAddr::from((ROUTER, 5000));
        let url = |told| control_url(told, router);
        assert_eq!(url("/ctl"), Some("http://192.168.1.1:5000/ctl".to_owned()));
        assert_eq!(url("ctl"), Some("http://192.168.1.1:5000/ctl".to_owned()));
        assert_eq!(
            url("http://192.168.1.1:80/ctl"),
            Some("http://192.168.1.1:80/ctl".to_owned())
        );
        assert_eq!(url("http://10.0.0.1/ctl"), None);
        assert_eq!(url("https://192.168.1.1/ctl"), None);
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_harm(text: String, name in "[a-z]{0,4}") {
            let _ = element(&text, &name);
            let _ = location(&text);
            let _ = control_url(&text, SocketAddr::from((ROUTER, 80)));
        }
    }
}
