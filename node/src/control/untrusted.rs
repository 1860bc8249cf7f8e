//! What strangers say before they are known, and what stands between: as fuzz targets and their corpora see them.

use super::{address, codec, ways};

/// A line with a proxy's name, then its answer.
pub(crate) fn proxy_answer(bytes: &[u8]) {
    ways::untrusted_proxy(bytes);
}

pub(crate) fn control_stream(bytes: &[u8]) {
    codec::untrusted(bytes);
}

/// Addresses that peers tell of themselves and of others: one a line.
pub(crate) fn addresses(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let texts: Vec<String> = text.lines().map(str::to_owned).collect();
    let readable = address::readable(&texts);
    assert!(readable.len() <= texts.len());
    for address in &readable {
        assert!(address::is_multiaddress(&address.to_string()));
        let _ = (address::is_relayed(address), address::port_of(address));
        let _ = address::ip_of(address).map(|ip| (address::is_public(ip), address::is_of_this_machine_alone(ip)));
    }
    let _ = address::multiaddresses(&texts);
    let told: Vec<_> = text.lines().filter_map(|line| line.parse().ok()).collect();
    let seen = readable.iter().find_map(address::ip_of);
    let _ = address::data_addresses(&told, seen);
}

pub(crate) fn honest_proxy_answers() -> Vec<Vec<u8>> {
    let open = "http://student:secret@proxy.example.org:3128\nHTTP/1.1 200 Connection established\r\n\r\nrest";
    let shut = "http://[2001:db8::1]:3128/\nHTTP/1.0 403 Forbidden\r\nContent-Length: 0\r\n\r\n";
    vec![open.into(), shut.into()]
}

pub(crate) fn honest_control_streams() -> Vec<Vec<u8>> {
    codec::honest()
}

pub(crate) fn honest_addresses() -> Vec<Vec<u8>> {
    let peer = "12D3KooWPjceQrSwdWXPyLLeABRXmuqt69Rg3sBYbU1Nft9HyQ6X";
    let control = format!(
        "/ip4/192.0.2.1/tcp/4001/p2p/{peer}\n/ip6/2001:db8::1/udp/4001/quic-v1\n/dns4/gateway.example.org/tcp/443/wss\n\
         /ip4/192.0.2.1/tcp/4001/p2p/{peer}/p2p-circuit\n"
    );
    vec![
        control.into(),
        "192.0.2.1:4002\n0.0.0.0:4002\n[2001:db8::1]:4002\n".into(),
    ]
}
