//! Asks a router over UPnP.

use std::net::Ipv4Addr;

use axum::http::Uri;

use super::upnp::{Failure, Service, element, search, service};
use super::{Carries, LEASE, Opened, Port};

/// How a router's own list of ports names ours.
const DESCRIPTION: &str = "polder";

/// Ports that are tried where the one that is wanted is taken, and the router does not choose by itself.
const OTHERS_TRIED: usize = 8;

/// The router wants leases that never end.
const ONLY_PERMANENT_LEASES: u16 = 725;

/// The port is another's.
const CONFLICT: u16 = 718;

/// A router that speaks UPnP.
#[derive(Debug)]
pub(crate) struct Device {
    service: Service,
    own: Ipv4Addr,
    pub(super) external: Ipv4Addr,
}

impl Device {
    /// Looks for the router at `router`; the error is for people.
    pub(super) async fn find(own: Ipv4Addr, router: Ipv4Addr) -> Result<Self, String> {
        let place = search(own, router).await?;
        Self::find_at(own, router, &place).await
    }

    async fn find_at(own: Ipv4Addr, router: Ipv4Addr, place: &Uri) -> Result<Self, String> {
        let service = service(place, router).await?;
        let told = service.ask("GetExternalIPAddress", &[]).await.map_err(refused)?;
        let external = element(&told, "NewExternalIPAddress").and_then(|ip| ip.parse().ok());
        let external = external.ok_or("the router tells no address outside over UPnP")?;
        Ok(Self { service, own, external })
    }

    /// Asks for a port, or for more time with it: the same number outside, else any.
    pub(super) async fn open(&self, port: Port) -> Result<Opened, String> {
        let seconds = u32::try_from(LEASE.as_secs()).unwrap_or(u32::MAX);
        let number = match self.add(port, port.number, seconds).await {
            Ok(()) => port.number,
            // Such a router keeps it until it is taken back or starts anew.
            Err(Failure::Refused { code, .. }) if code == ONLY_PERMANENT_LEASES => {
                self.add(port, port.number, 0).await.map_err(refused)?;
                port.number
            }
            Err(Failure::Refused { code, .. }) if code == CONFLICT => self.open_any(port, seconds).await?,
            Err(failure) => return Err(refused(failure)),
        };
        Ok(Opened {
            port,
            external: (self.external, number).into(),
        })
    }

    /// Gives a port back.
    pub(super) async fn close(&self, opened: Opened) -> Result<(), String> {
        let arguments = [
            ("NewRemoteHost", String::new()),
            ("NewExternalPort", opened.external.port().to_string()),
            ("NewProtocol", protocol(opened.port).to_owned()),
        ];
        let removed = self.service.ask("DeletePortMapping", &arguments).await;
        removed.map(drop).map_err(refused)
    }

    async fn open_any(&self, port: Port, seconds: u32) -> Result<u16, String> {
        if self.service.kind.ends_with(":2") {
            let arguments = self.mapping(port, port.number, seconds);
            if let Ok(told) = self.service.ask("AddAnyPortMapping", &arguments).await
                && let Some(number) = element(&told, "NewReservedPort").and_then(|number| number.parse().ok())
            {
                return Ok(number);
            }
        }
        let mut last = String::new();
        for _ in 0..OTHERS_TRIED {
            let mut bytes = [0; 2];
            getrandom::fill(&mut bytes).map_err(|error| error.to_string())?;
            // The upper half, where nobody expects a certain service.
            let number = u16::from_le_bytes(bytes) | 0x8000;
            match self.add(port, number, seconds).await {
                Ok(()) => return Ok(number),
                Err(failure) => last = refused(failure),
            }
        }
        Err(last)
    }

    async fn add(&self, port: Port, number: u16, seconds: u32) -> Result<(), Failure> {
        let arguments = self.mapping(port, number, seconds);
        self.service.ask("AddPortMapping", &arguments).await.map(drop)
    }

    fn mapping(&self, port: Port, number: u16, seconds: u32) -> [(&'static str, String); 8] {
        [
            ("NewRemoteHost", String::new()),
            ("NewExternalPort", number.to_string()),
            ("NewProtocol", protocol(port).to_owned()),
            ("NewInternalPort", port.number.to_string()),
            ("NewInternalClient", self.own.to_string()),
            ("NewEnabled", "1".to_owned()),
            ("NewPortMappingDescription", DESCRIPTION.to_owned()),
            ("NewLeaseDuration", seconds.to_string()),
        ]
    }
}

fn refused(failure: Failure) -> String {
    match failure {
        Failure::Refused { .. } => format!("the router refuses over UPnP: {failure}"),
        Failure::Silent(words) => words,
    }
}

fn protocol(port: Port) -> &'static str {
    match port.carries {
        Carries::Tcp => "TCP",
        Carries::Udp => "UDP",
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::super::upnp::ANSWER_BYTES_MAX;
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    const PORT: Port = Port {
        carries: Carries::Tcp,
        number: 4001,
    };

    const DESCRIPTION: &str = "<root><device><serviceList><service><serviceType>urn:x</serviceType></service></serviceList>\
        <deviceList><device><serviceList><service><serviceType>urn:schemas-upnp-org:service:WANIPConnection:1</serviceType>\
        <controlURL>/ctl</controlURL></service></serviceList></device></deviceList></device></root>";

    #[tokio::test]
    async fn a_router_opens_the_port_or_another_where_it_is_taken() {
        let address = router(|request| {
            let told = |text: &str| ("200 OK", text.to_owned());
            if request.starts_with("GET /root.xml") {
                told(DESCRIPTION)
            } else if request.contains("#GetExternalIPAddress\"") {
                told("<s:Envelope><s:Body><u:R><NewExternalIPAddress>198.51.100.7</NewExternalIPAddress></u:R></s:Body></s:Envelope>")
            } else if request.contains("<NewExternalPort>4001<") {
                ("500 No", "<UPnPError><errorCode>718</errorCode><errorDescription>taken</errorDescription></UPnPError>".into())
            } else if request.contains("#AddPortMapping\"") && request.contains("<NewInternalClient>127.0.0.1<") {
                told("<u:AddPortMappingResponse/>")
            } else {
                ("500 No", "<errorCode>401</errorCode><errorDescription>what?</errorDescription>".into())
            }
        })
        .await;
        let place: Uri = format!("http://{address}/root.xml").parse().expect("an address");
        let device = Device::find_at(Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST, &place).await;
        let device = device.expect("found");
        let opened = device.open(PORT).await.expect("opened");
        assert_eq!(opened.external.ip(), Ipv4Addr::new(198, 51, 100, 7));
        assert!(opened.external.port() >= 0x8000, "{opened:?}");
        let error = device.close(opened).await.expect_err("refused");
        assert!(error.contains("what? (error 401)"), "{error}");
    }

    #[tokio::test]
    async fn a_router_that_answers_without_end_is_left_after_a_limit() {
        let said = Arc::new(AtomicU64::new(0));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound");
        let counted = Arc::clone(&said);
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("asked");
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.expect("asked");
            // Each as deep as it is long, too.
            while stream.write_all(b"<a><b>".repeat(1000).as_slice()).await.is_ok() {
                counted.fetch_add(6000, Ordering::Relaxed);
            }
        });
        let place: Uri = format!("http://{address}/").parse().expect("an address");
        let found = Device::find_at(Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST, &place).await;
        let error = found.expect_err("no end");
        assert!(error.contains("the router's UPnP"), "{error}");
        // What the system's own buffers hold is sent as well.
        let said = said.load(Ordering::Relaxed);
        assert!(said < ANSWER_BYTES_MAX + (32 << 20), "{said} bytes were taken");
    }

    /// A router that answers each request with what `answer` makes of it.
    async fn router(answer: impl Fn(&str) -> (&'static str, String) + Send + 'static) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound");
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let request = request(&mut stream).await;
                let (status, text) = answer(&request);
                let length = text.len();
                let answer =
                    format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{text}");
                stream.write_all(answer.as_bytes()).await.expect("heard");
            }
        });
        address
    }

    async fn request(stream: &mut TcpStream) -> String {
        let mut bytes = Vec::new();
        let mut piece = [0; 4096];
        loop {
            let length = stream.read(&mut piece).await.expect("asked");
            bytes.extend_from_slice(&piece[..length]);
            let text = String::from_utf8_lossy(&bytes).replace("soapaction", "SOAPAction");
            let whole = text.starts_with("GET") || text.contains("</s:Envelope>");
            if whole && text.contains("\r\n\r\n") || length == 0 {
                return text;
            }
        }
    }
}
