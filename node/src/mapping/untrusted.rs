//! What routers answer, and what this machine says of its routes: as fuzz targets and their corpora see them.

use std::net::{Ipv4Addr, SocketAddrV4};

use super::packet::{self, Answer, Lease};
use super::{Carries, Port, router};

const PORT: Port = Port {
    carries: Carries::Udp,
    number: 4002,
};
const NONCE: [u8; 12] = [7; 12];

/// A packet that came from the address of the router, and a table of routes.
pub(crate) fn router_answers(bytes: &[u8]) {
    let _ = (packet::read_address(bytes), packet::speaks_pcp(bytes));
    let tcp = Port {
        carries: Carries::Tcp,
        ..PORT
    };
    for port in [PORT, tcp] {
        for answer in [packet::read_map(bytes, port), packet::read_pcp(bytes, NONCE, port)] {
            if let Some(Answer::Given(Lease { external_ip, .. })) = answer {
                assert!(bytes.len() >= 16, "a lease stands in the packet");
                assert!(external_ip.is_none() || bytes.len() >= 60);
            }
        }
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = (router::of_linux(text), router::of_a_command(text));
    }
}

pub(crate) fn honest_router_answers() -> Vec<Vec<u8>> {
    let own = Ipv4Addr::new(192, 168, 0, 2);
    let outside = SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 7), 40_000);
    let mut mapped = packet::pcp_question(own, NONCE, PORT, outside, 3_600);
    mapped[1] |= 128;
    let mut speaks = packet::pcp_greeting(own);
    speaks[1] |= 128;
    let table = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n\
                 eth0\t00000000\t0100A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n";
    let command = "    gateway: 192.168.1.1\n 0.0.0.0 0.0.0.0 10.0.0.138 10.0.0.7 25\n";
    vec![
        // Recorded from miniupnpd 2.3.1.
        b"\x00\x80\x00\x00\x00\x01\x05\xc2,\x80\x00\x05".to_vec(),
        b"\x00\x81\x00\x00\x00\x01\x05\xc2\x0f\xa2\x0f\xa2\x00\x00\x0e\x10".to_vec(),
        mapped.to_vec(),
        speaks.to_vec(),
        table.into(),
        command.into(),
    ]
}
