//! The small headers of this plane, as fuzz targets and their corpora see them.

use std::net::SocketAddr;

use bytes::Bytes;
use futures::executor::block_on;
use futures::io::Cursor;
use polder_protocol::hash::BlobId;

use super::blobs::message::{Ask, Tell};
use super::greeting::{self, Greeting};
use super::roads::{append, read_packet};
use super::settings::{Class, Service};

/// The opening of a stream: a service, then what it asks; and the header of an answer.
pub(crate) fn blob_headers(bytes: &[u8]) {
    if let Some((service, header)) = bytes.split_first() {
        let _ = Service::from_number(*service);
        if let Ok(ask) = postcard::from_bytes::<Ask>(header) {
            assert_eq!(postcard::from_bytes(&ask.to_bytes()), Ok(ask));
        }
    }
    if let Ok(tell) = postcard::from_bytes::<Tell>(bytes) {
        assert_eq!(postcard::from_bytes(&tell.to_bytes()), Ok(tell));
    }
}

pub(crate) fn greeting(bytes: &[u8]) {
    let (header, credentials) = bytes.split_at(bytes.len().min(64));
    let frame = (header.to_vec(), Bytes::copy_from_slice(credentials));
    if let Some((greeting, shown)) = greeting::parse(frame) {
        assert_eq!(shown, credentials);
        let again = postcard::to_allocvec(&greeting).expect("three integers and an address");
        let read = greeting::parse((again, shown)).map(|(greeting, _)| greeting);
        assert_eq!(read, Some(greeting));
    }
}

/// What comes out of a tunnel.
pub(crate) fn packets(bytes: &[u8]) {
    let mut reader = Cursor::new(bytes);
    let mut again = Vec::new();
    while let Ok(packet) = block_on(read_packet(&mut reader)) {
        append(&mut again, &packet);
    }
    assert!(bytes.starts_with(&again));
}

pub(crate) fn honest_blob_headers() -> Vec<Vec<u8>> {
    let blob = BlobId([7; 32]);
    let asks = [Ask::Has { blob }, Ask::Chunk { blob, chunk: 300 }];
    let asks = asks.map(|ask| [&[Service::Blob as u8], ask.to_bytes().as_slice()].concat());
    let tells = [Tell::Unknown, Tell::Manifest, Tell::Has, Tell::Chunk].map(Tell::to_bytes);
    asks.into_iter().chain(tells).collect()
}

pub(crate) fn honest_greetings() -> Vec<Vec<u8>> {
    let addresses = [
        SocketAddr::from(([192, 0, 2, 1], 4002)),
        SocketAddr::from(([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1], 4002)),
    ];
    let greetings = addresses.map(|you_are| Greeting {
        class: Class::Bulk,
        instance: 0x0123_4567_89ab_cdef,
        you_are,
    });
    let bytes = greetings.iter().map(postcard::to_allocvec);
    bytes.filter_map(Result::ok).collect()
}

pub(crate) fn honest_packets() -> Vec<Vec<u8>> {
    let mut burst = Vec::new();
    append(&mut burst, b"first");
    append(&mut burst, b"");
    append(&mut burst, &[7; 40]);
    vec![burst]
}
