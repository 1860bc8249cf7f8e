//! What peers say to each other, byte by byte: limits, versions, messages.
//!
//! A control message is a protocol version (u16, little-endian) and a postcard body. Every decoder checks the length
//! first, then the version, then the body, then the counts inside it; none of them panics or takes more memory than a
//! small multiple of the bytes it was given.

mod byte_string;
mod control;
mod frame;
mod punch;

use alloc::vec::Vec;
use core::ops::RangeInclusive;

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

pub use control::{Envelope, Farewell, Greeting, Hello, PeerHint, Refusal, Reply, Request, Service};
pub use frame::{FRAME_BYTES, FRAME_HEADER_BYTES_MAX, FRAME_PAYLOAD_BYTES_MAX, FrameHeader};
pub use punch::{Offer, Punch, Standing};

/// The version that this node writes.
pub const VERSION: u16 = 1;

/// The versions that this node reads.
pub const VERSIONS: RangeInclusive<u16> = 1..=1;

/// The longest request or answer on the control plane: a directory snapshot of some thousand announcements.
pub const CONTROL_BYTES_MAX: usize = 1 << 20;

/// The longest gossip message, signature and envelope included. It is forwarded by everybody, so it stays small.
pub const GOSSIP_BYTES_MAX: usize = 64 << 10;

/// The longest credentials: a charter of some hundred institutions and a certificate.
pub const CREDENTIALS_BYTES_MAX: usize = 48 << 10;

/// The most addresses of one kind that a node tells of itself or of others.
pub const ADDRESSES_MAX: usize = 16;

/// The longest address as text.
pub const ADDRESS_BYTES_MAX: usize = 512;

/// The most other peers that one greeting names.
pub const HINTS_MAX: usize = 32;

/// The longest text for people: a reason, an agent's name.
pub const TEXT_BYTES_MAX: usize = 1024;

/// Why a peer's bytes are not a message.
///
/// Every case is the peer's doing, so none of them may stop the node.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum DecodeError {
    #[error("message is {len_bytes} bytes long, over the limit of {limit_bytes}")]
    TooLong { len_bytes: u64, limit_bytes: u64 },
    #[error("message ends after {len_bytes} bytes, before its {need_bytes}th")]
    TooShort { len_bytes: usize, need_bytes: usize },
    #[error("first bytes are {theirs:02x?}, not those of a frame")]
    Magic { theirs: [u8; 2] },
    #[error("protocol version {theirs} is not one of {ours:?}")]
    Version { theirs: u16, ours: RangeInclusive<u16> },
    #[error("body is malformed: {0}")]
    Body(postcard::Error),
    #[error("{count} {what}, over the limit of {limit}")]
    TooMany {
        what: &'static str,
        count: usize,
        limit: usize,
    },
    #[error("the signature is not the sender's")]
    Signature,
}

/// A control message: what its bytes may be at most, and what its counts may be at most.
pub trait Message: Serialize + DeserializeOwned {
    /// The longest message of this type in bytes.
    const BYTES_MAX: usize;

    /// Checks what the types alone do not.
    ///
    /// # Errors
    ///
    /// [`DecodeError::TooMany`] for the first count over its limit.
    fn check(&self) -> Result<(), DecodeError>;
}

/// Writes `message` with its version.
pub fn encode<M: Message>(message: &M) -> Vec<u8> {
    let bytes = VERSION.to_le_bytes().to_vec();
    // Messages hold only what postcard can write; the fallback is a message that every reader refuses.
    postcard::to_extend(message, bytes).unwrap_or_default()
}

/// Reads a message.
///
/// # Errors
///
/// [`DecodeError`] for bytes that are too long, of another version, or malformed.
pub fn decode<M: Message>(bytes: &[u8]) -> Result<M, DecodeError> {
    within(bytes.len(), M::BYTES_MAX)?;
    let Some((version, body)) = bytes.split_first_chunk::<2>() else {
        return Err(DecodeError::TooShort {
            len_bytes: bytes.len(),
            need_bytes: 2,
        });
    };
    let theirs = u16::from_le_bytes(*version);
    if !VERSIONS.contains(&theirs) {
        return Err(DecodeError::Version { theirs, ours: VERSIONS });
    }
    let message: M = postcard::from_bytes(body).map_err(DecodeError::Body)?;
    message.check()?;
    Ok(message)
}

fn within(len: usize, limit: usize) -> Result<(), DecodeError> {
    if len <= limit {
        return Ok(());
    }
    Err(DecodeError::TooLong {
        len_bytes: u64::try_from(len).unwrap_or(u64::MAX),
        limit_bytes: u64::try_from(limit).unwrap_or(u64::MAX),
    })
}

fn at_most(what: &'static str, count: usize, limit: usize) -> Result<(), DecodeError> {
    if count <= limit {
        Ok(())
    } else {
        Err(DecodeError::TooMany { what, count, limit })
    }
}
