//! The packets of NAT-PMP (RFC 6886) and PCP (RFC 6887). Whatever comes is a stranger's until its length, its version and
//! what it repeats of the question have been compared.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4};

use super::{Carries, Port};

/// The longest packet of either that is read, as RFC 6887 allows.
pub(super) const PACKET_BYTES_MAX: usize = 1100;

/// The version that each puts first.
const NAT_PMP: u8 = 0;
/// See [`NAT_PMP`].
const PCP: u8 = 2;

/// The bit that answers have.
const ANSWER: u8 = 128;

/// PCP's operation that opens a port.
const MAP: u8 = 1;

/// A router that speaks PCP alone says so in its own version.
const UNSUPPORTED_VERSION: u8 = 1;

/// What a router told of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lease {
    /// The port outside.
    pub(super) external_port: u16,
    /// The address outside; NAT-PMP tells it in an answer of its own.
    pub(super) external_ip: Option<Ipv4Addr>,
    /// For how many seconds.
    pub(super) seconds: u32,
}

/// What a router says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer<T> {
    /// What was asked for.
    Given(T),
    /// No, by the number of the protocol's reason.
    Refused(u16),
}

/// Asks for the address outside, in NAT-PMP.
pub(super) fn address_question() -> [u8; 2] {
    [NAT_PMP, 0]
}

/// Reads the answer to [`address_question`]; `None` for what is none.
pub(super) fn read_address(packet: &[u8]) -> Option<Answer<Ipv4Addr>> {
    let (&[NAT_PMP, ANSWER, high, low], rest) = packet.split_first_chunk()? else {
        return None;
    };
    match (u16::from_be_bytes([high, low]), rest) {
        (0, &[_, _, _, _, a, b, c, d]) => Some(Answer::Given(Ipv4Addr::new(a, b, c, d))),
        (0, _) => None,
        (reason, _) => Some(Answer::Refused(reason)),
    }
}

/// Asks for a port outside, in NAT-PMP; 0 seconds give it back.
pub(super) fn map_question(port: Port, external_port: u16, seconds: u32) -> [u8; 12] {
    let operation = match port.carries {
        Carries::Udp => 1,
        Carries::Tcp => 2,
    };
    let mut packet = [0; 12];
    packet[1] = operation;
    packet[4..6].copy_from_slice(&port.number.to_be_bytes());
    packet[6..8].copy_from_slice(&external_port.to_be_bytes());
    packet[8..].copy_from_slice(&seconds.to_be_bytes());
    packet
}

/// Reads the answer to [`map_question`]; `None` for what is none.
pub(super) fn read_map(packet: &[u8], port: Port) -> Option<Answer<Lease>> {
    let (&[NAT_PMP, operation, high, low], rest) = packet.split_first_chunk()? else {
        return None;
    };
    let expected = map_question(port, 0, 0)[1] | ANSWER;
    if operation != expected {
        return None;
    }
    match (u16::from_be_bytes([high, low]), rest) {
        (0, &[_, _, _, _, i, n, e, x, s0, s1, s2, s3]) => {
            let lease = Lease {
                external_port: u16::from_be_bytes([e, x]),
                external_ip: None,
                seconds: u32::from_be_bytes([s0, s1, s2, s3]),
            };
            (u16::from_be_bytes([i, n]) == port.number).then_some(Answer::Given(lease))
        }
        (0, _) => None,
        (reason, _) => Some(Answer::Refused(reason)),
    }
}

/// Asks whether PCP is spoken, with the operation ANNOUNCE.
pub(super) fn pcp_greeting(own: Ipv4Addr) -> [u8; 24] {
    let mut packet = [0; 24];
    packet[0] = PCP;
    packet[8..].copy_from_slice(&own.to_ipv6_mapped().octets());
    packet
}

/// Whether a packet shows that PCP is spoken: the answer to [`pcp_greeting`], or a refusal of NAT-PMP by one who speaks
/// PCP alone.
pub(super) fn speaks_pcp(packet: &[u8]) -> bool {
    match packet.first_chunk() {
        Some(&[PCP, operation, _, result]) if packet.len() >= 24 && operation & ANSWER != 0 => {
            matches!(result, 0 | UNSUPPORTED_VERSION)
        }
        _ => false,
    }
}

/// Asks for a port outside, in PCP; 0 seconds give it back. The nonce tells its owner.
pub(super) fn pcp_question(
    own: Ipv4Addr,
    nonce: [u8; 12],
    port: Port,
    suggested: SocketAddrV4,
    seconds: u32,
) -> [u8; 60] {
    let mut packet = [0; 60];
    packet[0] = PCP;
    packet[1] = MAP;
    packet[4..8].copy_from_slice(&seconds.to_be_bytes());
    packet[8..24].copy_from_slice(&own.to_ipv6_mapped().octets());
    packet[24..36].copy_from_slice(&nonce);
    packet[36] = protocol(port);
    packet[40..42].copy_from_slice(&port.number.to_be_bytes());
    packet[42..44].copy_from_slice(&suggested.port().to_be_bytes());
    packet[44..].copy_from_slice(&suggested.ip().to_ipv6_mapped().octets());
    packet
}

/// Reads the answer to [`pcp_question`]; `None` for what is none.
pub(super) fn read_pcp(packet: &[u8], nonce: [u8; 12], port: Port) -> Option<Answer<Lease>> {
    let packet: &[u8; 60] = packet.first_chunk()?;
    let [number_high, number_low] = port.number.to_be_bytes();
    let is_ours = packet[0] == PCP
        && packet[1] == MAP | ANSWER
        && packet[24..36] == nonce
        && packet[36] == protocol(port)
        && packet[40..42] == [number_high, number_low];
    if !is_ours {
        return None;
    }
    if packet[3] != 0 {
        return Some(Answer::Refused(u16::from(packet[3])));
    }
    let seconds = u32::from_be_bytes(*packet[4..].first_chunk()?);
    let external_port = u16::from_be_bytes(*packet[42..].first_chunk()?);
    let ip = Ipv6Addr::from(*packet[44..].first_chunk::<16>()?);
    Some(Answer::Given(Lease {
        external_port,
        external_ip: ip.to_ipv4_mapped(),
        seconds,
    }))
}

/// The protocol's number as IANA gives it.
fn protocol(port: Port) -> u8 {
    match port.carries {
        Carries::Tcp => 6,
        Carries::Udp => 17,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PORT: Port = Port {
        carries: Carries::Udp,
        number: 4002,
    };

    #[test]
    fn nat_pmp_is_the_twelve_bytes_of_its_rfc() {
        let expected = [0, 1, 0, 0, 0x0f, 0xa2, 0x0f, 0xa2, 0, 0, 0x0e, 0x10];
        assert_eq!(map_question(PORT, 4002, 3600), expected);
    }

    // Recorded from miniupnpd 2.3.1.
    #[test]
    fn what_a_router_answers_is_read() {
        let address = b"\x00\x80\x00\x00\x00\x01\x05\xc2,\x80\x00\x05";
        assert_eq!(read_address(address), Some(Answer::Given(Ipv4Addr::new(44, 128, 0, 5))));
        let map = b"\x00\x81\x00\x00\x00\x01\x05\xc2\x0f\xa2\x0f\xa2\x00\x00\x0e\x10";
        let lease = Lease {
            external_port: 4002,
            external_ip: None,
            seconds: 3600,
        };
        assert_eq!(read_map(map, PORT), Some(Answer::Given(lease)));
        let tcp = Port {
            carries: Carries::Tcp,
            ..PORT
        };
        assert_eq!(read_map(map, tcp), None, "an answer to another question");
        assert_eq!(read_map(&[0, 129, 0, 2], PORT), Some(Answer::Refused(2)));
    }

    #[test]
    fn an_answer_of_pcp_repeats_the_question() {
        let own = Ipv4Addr::new(192, 168, 0, 2);
        let outside = SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 7), 40_000);
        let mut packet = pcp_question(own, [7; 12], PORT, outside, 3600);
        packet[1] |= ANSWER;
        let lease = Lease {
            external_port: 40_000,
            external_ip: Some(*outside.ip()),
            seconds: 3600,
        };
        assert_eq!(read_pcp(&packet, [7; 12], PORT), Some(Answer::Given(lease)));
        assert_eq!(read_pcp(&packet, [8; 12], PORT), None);
        packet[3] = 11;
        assert_eq!(read_pcp(&packet, [7; 12], PORT), Some(Answer::Refused(11)));
    }

    proptest! {
        #[test]
        fn any_packet_is_an_answer_or_none(packet in prop::collection::vec(any::<u8>(), 0..80)) {
            // Whatever it says, it says so without a panic.
            let _ = (read_address(&packet), read_map(&packet, PORT), read_pcp(&packet, [0; 12], PORT), speaks_pcp(&packet));
        }
    }
}
