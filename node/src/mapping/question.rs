//! Asks a router in NAT-PMP or PCP: one packet there, one back, again after a pause that doubles.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use tokio::net::UdpSocket;

use super::packet::{
    Answer, Lease, PACKET_BYTES_MAX, address_question, map_question, pcp_greeting, pcp_question, read_address,
    read_map, read_pcp, speaks_pcp,
};
use super::{LEASE, Language, Opened, Port};

/// Where routers listen, as both RFCs say.
const ROUTER_PORT: u16 = 5351;

/// The first pause, as RFC 6886 has it. A router is near, so after three tries (1.75 s) there is none.
const PAUSE_FIRST: Duration = Duration::from_millis(250);

/// See [`PAUSE_FIRST`].
const TRIES: u32 = 3;

/// A router that speaks one of the two.
#[derive(Debug)]
pub(crate) struct Speaker {
    router: SocketAddr,
    own: Ipv4Addr,
    nonce: [u8; 12],
    pub(super) language: Language,
    /// The address outside, where it has been told.
    pub(super) external: Option<Ipv4Addr>,
}

impl Speaker {
    /// Finds out what `router` speaks; the error is for people.
    pub(super) async fn find(own: Ipv4Addr, router: Ipv4Addr) -> Result<Self, String> {
        Self::find_at(own, SocketAddrV4::new(router, ROUTER_PORT).into()).await
    }

    async fn find_at(own: Ipv4Addr, router: SocketAddr) -> Result<Self, String> {
        let mut nonce = [0; 12];
        getrandom::fill(&mut nonce).map_err(|error| error.to_string())?;
        let speaker = |language, external| Self {
            router,
            own,
            nonce,
            language,
            external,
        };
        let questions: [&[u8]; 2] = [&address_question(), &pcp_greeting(own)];
        let read = |packet: &[u8]| match read_address(packet) {
            Some(Answer::Given(ip)) => Some(Ok(speaker(Language::NatPmp, Some(ip)))),
            // A router that knows no address yet still says which language it speaks.
            Some(Answer::Refused(reason)) => Some(Err(refusal(Language::NatPmp, reason))),
            None if speaks_pcp(packet) => Some(Ok(speaker(Language::Pcp, None))),
            None => None,
        };
        ask(router, own, &questions, read).await?
    }

    /// Asks for a port, or for more time with it.
    pub(super) async fn open(&self, port: Port) -> Result<Opened, String> {
        let seconds = u32::try_from(LEASE.as_secs()).unwrap_or(u32::MAX);
        let lease = self.map(port, port.number, seconds).await?;
        if lease.external_port == 0 || lease.seconds == 0 {
            return Err("the router opened nothing".to_owned());
        }
        let ip = lease.external_ip.or(self.external);
        let ip = ip.ok_or("the router does not tell its address outside")?;
        Ok(Opened {
            port,
            external: SocketAddrV4::new(ip, lease.external_port).into(),
        })
    }

    /// Gives a port back.
    pub(super) async fn close(&self, port: Port) -> Result<(), String> {
        self.map(port, 0, 0).await.map(drop)
    }

    async fn map(&self, port: Port, external_port: u16, seconds: u32) -> Result<Lease, String> {
        let answer = match self.language {
            Language::Pcp => {
                let suggested = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, external_port);
                let question = pcp_question(self.own, self.nonce, port, suggested, seconds);
                let read = |packet: &[u8]| read_pcp(packet, self.nonce, port);
                ask(self.router, self.own, &[&question], read).await?
            }
            Language::NatPmp | Language::Upnp => {
                let question = map_question(port, external_port, seconds);
                ask(self.router, self.own, &[&question], |packet| read_map(packet, port)).await?
            }
        };
        match answer {
            Answer::Given(lease) => Ok(lease),
            Answer::Refused(reason) => Err(refusal(self.language, reason)),
        }
    }
}

/// Sends the questions until something comes that `read` takes for an answer.
async fn ask<T>(
    router: SocketAddr,
    own: Ipv4Addr,
    questions: &[&[u8]],
    read: impl Fn(&[u8]) -> Option<T>,
) -> Result<T, String> {
    let failed = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::ConnectionRefused => format!("{} speaks neither NAT-PMP nor PCP", router.ip()),
        _ => format!("{}: {error}", router.ip()),
    };
    let socket = UdpSocket::bind((own, 0)).await.map_err(failed)?;
    // Packets of others do not come through.
    socket.connect(router).await.map_err(failed)?;
    let mut packet = [0; PACKET_BYTES_MAX];
    for attempt in 0..TRIES {
        for question in questions {
            socket.send(question).await.map_err(failed)?;
        }
        let heard = async {
            loop {
                let length = socket.recv(&mut packet).await?;
                if let Some(answer) = read(packet.get(..length).unwrap_or_default()) {
                    return Ok(answer);
                }
            }
        };
        match tokio::time::timeout(PAUSE_FIRST * (1 << attempt), heard).await {
            Ok(answer) => return answer.map_err(failed),
            Err(_) => continue,
        }
    }
    Err(format!("{} does not answer NAT-PMP or PCP", router.ip()))
}

fn refusal(language: Language, reason: u16) -> String {
    let words = match (language, reason) {
        (Language::NatPmp | Language::Pcp, 2) => "it is switched off, or not allowed to this machine",
        (Language::NatPmp, 3) | (Language::Pcp, 7) => "it has no address outside",
        (Language::NatPmp, 4) | (Language::Pcp, 8) => "it has no more ports",
        (Language::Pcp, 11) => "the port is another's",
        _ => return format!("the router refuses with {} code {reason}", language.name()),
    };
    format!("the router refuses: {words} ({} code {reason})", language.name())
}

#[cfg(test)]
mod tests {
    use super::super::Carries;
    use super::*;

    const PORT: Port = Port {
        carries: Carries::Tcp,
        number: 4001,
    };

    /// A router that answers each packet with what `answer` makes of it.
    async fn router(answer: impl Fn(&[u8]) -> Option<Vec<u8>> + Send + 'static) -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("bound");
        let address = socket.local_addr().expect("bound");
        tokio::spawn(async move {
            let mut packet = [0; PACKET_BYTES_MAX];
            while let Ok((length, from)) = socket.recv_from(&mut packet).await {
                if let Some(answer) = answer(packet.get(..length).unwrap_or_default()) {
                    socket.send_to(&answer, from).await.expect("sent");
                }
            }
        });
        address
    }

    #[tokio::test]
    async fn a_router_that_speaks_pcp_alone_opens_the_port_that_it_chooses() {
        let address = router(|packet| {
            let mut answer = packet.to_vec();
            match (packet.first()?, packet.get(1)?) {
                (2, 0) => answer[1] = 128,
                (2, 1) => {
                    answer[1] = 129;
                    answer[42..44].copy_from_slice(&50_000_u16.to_be_bytes());
                    answer[44..].copy_from_slice(&Ipv4Addr::new(198, 51, 100, 7).to_ipv6_mapped().octets());
                }
                _ => return None,
            }
            Some(answer)
        })
        .await;
        let speaker = Speaker::find_at(Ipv4Addr::LOCALHOST, address).await.expect("it speaks");
        assert_eq!(speaker.language, Language::Pcp);
        let opened = speaker.open(PORT).await.expect("opened");
        assert_eq!(opened.external, "198.51.100.7:50000".parse().expect("an address"));
        speaker.close(PORT).await.expect("closed");
    }

    #[tokio::test]
    async fn a_refusal_is_told_in_words() {
        let address = router(|packet| match packet {
            [0, 0] => Some(vec![0, 128, 0, 0, 0, 0, 0, 1, 198, 51, 100, 7]),
            [0, 2, ..] => Some(vec![0, 130, 0, 2]),
            _ => None,
        })
        .await;
        let speaker = Speaker::find_at(Ipv4Addr::LOCALHOST, address).await.expect("it speaks");
        let error = speaker.open(PORT).await.expect_err("refused");
        assert!(error.contains("switched off"), "{error}");
    }

    #[tokio::test]
    async fn garbage_is_no_answer() {
        let address = router(|_| Some(vec![9; 30])).await;
        let error = Speaker::find_at(Ipv4Addr::LOCALHOST, address).await.expect_err("none");
        assert!(error.contains("does not answer"), "{error}");
    }
}
