//! Frames and control messages.

use polder_protocol::wire::{
    self, Envelope, FRAME_BYTES, Farewell, FrameHeader, Greeting, Hello, Message, Punch, Reply, Request,
};
use polder_protocol::work;

use super::byte;

pub(crate) fn frame_header(bytes: &[u8]) {
    let Some((first, _)) = bytes.split_first_chunk::<FRAME_BYTES>() else {
        return;
    };
    if let Ok(header) = FrameHeader::from_bytes(first) {
        assert_eq!(&header.to_bytes(), first);
    }
}

/// The kind of message, then its bytes.
pub(crate) fn control_messages(bytes: &[u8]) {
    let (kind, bytes) = byte(bytes);
    match kind % 7 {
        0 => reads_what_it_writes::<Request>(bytes),
        1 => reads_what_it_writes::<Reply>(bytes),
        2 => reads_what_it_writes::<Hello>(bytes),
        3 => reads_what_it_writes::<Greeting>(bytes),
        4 => reads_what_it_writes::<Farewell>(bytes),
        5 => reads_what_it_writes::<Envelope>(bytes),
        _ => reads_what_it_writes::<Punch>(bytes),
    }
}

fn reads_what_it_writes<M: Message + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    if let Ok(message) = wire::decode::<M>(bytes) {
        assert_eq!(wire::decode::<M>(&wire::encode(&message)), Ok(message));
    }
}

/// A worker has a device's driver in it, so what it writes may be anything.
pub(crate) fn worker_frames(bytes: &[u8]) {
    if let Some((prefix, _)) = bytes.split_first_chunk::<4>() {
        let _ = work::frame::head_bytes(*prefix);
    }
    if let Some((prefix, _)) = bytes.split_first_chunk::<8>() {
        let _ = work::frame::payload_bytes(*prefix);
    }
    let (kind, bytes) = byte(bytes);
    if kind % 2 == 0 {
        let _ = work::frame::decode_head::<work::Order>(bytes);
    } else {
        let _ = work::frame::decode_head::<work::Reply>(bytes);
    }
}
