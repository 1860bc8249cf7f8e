//! How TCP connections leave: straight, or through the HTTP proxy of a campus whose firewall lets nothing else out.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::str::FromStr;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Ready};
use libp2p::core::transport::{DialOpts, ListenerId, TransportError, TransportEvent};
use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, Transport, tcp};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::address::is_public;

/// The longest answer of a proxy that is read; its head says whether the way is open, and nothing else matters.
const PROXY_ANSWER_BYTES_MAX: usize = 8 << 10;

/// What a proxy may take to answer: it waits for its own connection to the target.
const PROXY_TIME_MAX: Duration = Duration::from_secs(10);

/// An HTTP proxy that opens tunnels with CONNECT, as `http://[user:password@]host:port`.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    host: String,
    port: u16,
    /// The value of `Proxy-Authorization`.
    authorization: Option<String>,
}

/// A proxy that was not understood.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{0}` is not a proxy; write `http://proxy.example.org:3128`, or `http://user:password@…`")]
pub struct ProxyError(String);

// The password stays out of logs.
impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Proxy({self})")
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}:{}", self.host, self.port)
    }
}

impl FromStr for Proxy {
    type Err = ProxyError;

    fn from_str(text: &str) -> Result<Self, ProxyError> {
        let wrong = || ProxyError(text.to_owned());
        let rest = text.trim().strip_prefix("http://").ok_or_else(wrong)?;
        let rest = rest.split('/').next().unwrap_or_default();
        let (login, place) = match rest.rsplit_once('@') {
            Some((login, place)) => (Some(login), place),
            None => (None, rest),
        };
        let (host, port) = place.rsplit_once(':').ok_or_else(wrong)?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err(wrong());
        }
        Ok(Self {
            host: host.to_owned(),
            port: port.parse().map_err(|_| wrong())?,
            authorization: login.map(|login| format!("Basic {}", base64(login.as_bytes()))),
        })
    }
}

impl Proxy {
    /// The proxy that the environment names, as other programs read it; `None` without one, or for one that is not
    /// understood.
    pub fn of_the_environment() -> Option<Self> {
        let named = ["HTTPS_PROXY", "https_proxy"];
        let value = named.iter().find_map(|name| std::env::var(name).ok())?;
        match value.parse() {
            Ok(proxy) => Some(proxy),
            Err(error) => {
                tracing::warn!(%error, "HTTPS_PROXY is not used");
                None
            }
        }
    }

    /// Asks the proxy for a way to `ip` and `port`.
    ///
    /// # Errors
    ///
    /// What the network says, or the proxy's refusal.
    pub async fn connect(&self, ip: IpAddr, port: u16) -> io::Result<TcpStream> {
        let asked = tokio::time::timeout(PROXY_TIME_MAX, self.ask(ip, port)).await;
        asked.unwrap_or_else(|_| {
            Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("{self} does not answer"),
            ))
        })
    }

    async fn ask(&self, ip: IpAddr, port: u16) -> io::Result<TcpStream> {
        let mut stream = TcpStream::connect((self.host.as_str(), self.port)).await?;
        stream.set_nodelay(true)?;
        let target = std::net::SocketAddr::new(ip, port);
        let mut request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n");
        if let Some(authorization) = &self.authorization {
            request.push_str(&format!("Proxy-Authorization: {authorization}\r\n"));
        }
        request.push_str("\r\n");
        stream.write_all(request.as_bytes()).await?;
        match self.answer(&mut stream).await? {
            200..=299 => Ok(stream),
            code => Err(io::Error::new(
                io::ErrorKind::ConnectionRefused,
                format!("{self} refuses {target} with status {code}"),
            )),
        }
    }

    /// The status of the proxy's answer. What follows its head is left in the stream.
    async fn answer(&self, stream: &mut (impl AsyncRead + Unpin)) -> io::Result<u16> {
        let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("{self} {what}"));
        // Byte by byte: what follows the head already belongs to the peer behind the proxy.
        let mut head = Vec::with_capacity(128);
        while !head.ends_with(b"\r\n\r\n") {
            if head.len() >= PROXY_ANSWER_BYTES_MAX {
                return Err(wrong("answers at length"));
            }
            head.push(stream.read_u8().await?);
        }
        status(&head).ok_or_else(|| wrong("does not speak HTTP"))
    }
}

/// The name of a proxy, then what it answers, with the end of a line between; as fuzz targets see them.
pub(super) fn untrusted_proxy(bytes: &[u8]) {
    let (name, mut answer) = match bytes.iter().position(|byte| *byte == b'\n') {
        Some(end) => (
            bytes.get(..end).unwrap_or_default(),
            bytes.get(end + 1..).unwrap_or_default(),
        ),
        None => (bytes, &[][..]),
    };
    let named = std::str::from_utf8(name).ok().and_then(|name| name.parse().ok());
    let proxy: Proxy = named.unwrap_or_else(|| Proxy {
        host: "proxy.example.org".to_owned(),
        port: 3128,
        authorization: None,
    });
    assert_eq!(
        proxy.to_string().parse::<Proxy>().map(|again| again.port),
        Ok(proxy.port)
    );
    let whole = answer;
    if futures::executor::block_on(proxy.answer(&mut answer)).is_ok() {
        let head = whole.len() - answer.len();
        assert!(head <= PROXY_ANSWER_BYTES_MAX, "a head has an end");
    }
}

/// The status code in the first line of an HTTP answer.
fn status(head: &[u8]) -> Option<u16> {
    let text = std::str::from_utf8(head).ok()?;
    let mut words = text.lines().next()?.split(' ');
    words.next().filter(|word| word.starts_with("HTTP/1."))?;
    words.next()?.parse().ok()
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let index = (word >> (18 - 6 * place)) & 63;
            let letter = LETTERS
                .get(usize::try_from(index).unwrap_or_default())
                .copied()
                .unwrap_or(b'=');
            text.push(if place > chunk.len() { '=' } else { char::from(letter) });
        }
    }
    text
}

/// TCP whose dials go through a proxy where there is one and the target is not of this network.
pub(super) struct Ways {
    tcp: tcp::tokio::Transport,
    proxy: Option<Proxy>,
}

impl Ways {
    pub(super) fn new(proxy: Option<Proxy>) -> Self {
        Self {
            tcp: tcp::tokio::Transport::new(tcp::Config::default().nodelay(true)),
            proxy,
        }
    }
}

impl Transport for Ways {
    type Output = tcp::tokio::TcpStream;
    type Error = io::Error;
    type ListenerUpgrade = Ready<Result<Self::Output, io::Error>>;
    type Dial = BoxFuture<'static, Result<Self::Output, io::Error>>;

    fn listen_on(&mut self, id: ListenerId, address: Multiaddr) -> Result<(), TransportError<io::Error>> {
        self.tcp.listen_on(id, address)
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        self.tcp.remove_listener(id)
    }

    fn dial(&mut self, address: Multiaddr, options: DialOpts) -> Result<Self::Dial, TransportError<io::Error>> {
        match (&self.proxy, target(&address)) {
            (Some(proxy), Some((ip, port))) if is_public(ip) => {
                let proxy = proxy.clone();
                Ok(async move { Ok(tcp::tokio::TcpStream(proxy.connect(ip, port).await?)) }.boxed())
            }
            _ => Ok(self.tcp.dial(address, options)?.boxed()),
        }
    }

    fn poll(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, Self::Error>> {
        Pin::new(&mut self.tcp).poll(context)
    }
}

/// Where a plain TCP address leads.
fn target(address: &Multiaddr) -> Option<(IpAddr, u16)> {
    let mut parts = address.iter();
    let ip = match parts.next()? {
        Protocol::Ip4(ip) => IpAddr::V4(ip),
        Protocol::Ip6(ip) => IpAddr::V6(ip),
        _ => return None,
    };
    let Protocol::Tcp(port) = parts.next()? else {
        return None;
    };
    parts.all(|part| matches!(part, Protocol::P2p(_))).then_some((ip, port))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn a_proxy_is_a_host_and_a_port() {
        let proxy: Proxy = "http://proxy.example.org:3128/".parse().expect("a proxy");
        assert_eq!(proxy.to_string(), "http://proxy.example.org:3128");
        let known: Proxy = "http://ada:secret@[::1]:8080".parse().expect("a proxy");
        assert_eq!((known.host.as_str(), known.port), ("::1", 8080));
        assert_eq!(known.authorization.as_deref(), Some("Basic YWRhOnNlY3JldA=="));
        assert!(!format!("{known:?}").contains("secret"));
        for wrong in ["socks5://a:1", "http://a", "http://:80", "a:80"] {
            assert!(wrong.parse::<Proxy>().is_err(), "{wrong}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_answer_has_a_status_or_none(head: Vec<u8>, code: u16, words in "[ -~]{0,40}") {
            // Whatever it says, it says so without a panic.
            let _ = status(&head);
            let answer = format!("HTTP/1.1 {code} {words}\r\n\r\n");
            proptest::prop_assert_eq!(status(answer.as_bytes()), Some(code));
        }

        #[test]
        fn any_text_is_a_proxy_or_none(text in ".{0,60}") {
            if let Ok(proxy) = text.parse::<Proxy>() {
                proptest::prop_assert!(!proxy.host.is_empty());
            }
        }
    }

    #[test]
    fn base64_pads_as_the_standard_says() {
        assert_eq!(
            ["", "f", "fo", "foo", "foob"].map(|text| base64(text.as_bytes())),
            ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg=="]
        );
    }

    #[tokio::test]
    async fn what_follows_the_proxys_answer_is_left_for_the_peer() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let proxy = Proxy {
            host: "127.0.0.1".into(),
            port: listener.local_addr().expect("bound").port(),
            authorization: None,
        };
        for (answer, way) in [
            ("HTTP/1.1 200 OK\r\n\r\nhello", true),
            ("HTTP/1.1 403 No\r\n\r\n", false),
            ("SSH-2.0\r\n\r\n", false),
        ] {
            let serve = async {
                let (mut stream, _) = listener.accept().await.expect("asked");
                let mut request = [0; 512];
                let length = stream.read(&mut request).await.expect("read");
                let request = String::from_utf8_lossy(request.get(..length).unwrap_or_default()).into_owned();
                assert!(request.starts_with("CONNECT 192.0.2.1:443 HTTP/1.1\r\n"), "{request}");
                stream.write_all(answer.as_bytes()).await.expect("written");
            };
            let (asked, ()) = tokio::join!(proxy.connect(IpAddr::from([192, 0, 2, 1]), 443), serve);
            assert_eq!(asked.is_ok(), way, "{answer}");
            if let Ok(mut stream) = asked {
                let mut words = [0; 5];
                stream.read_exact(&mut words).await.expect("the peer's words");
                assert_eq!(&words, b"hello");
            }
        }
    }
}
