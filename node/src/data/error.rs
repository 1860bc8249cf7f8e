//! What can go wrong between two nodes.

use std::net::SocketAddr;
use std::time::Duration;

use polder_protocol::hash::NodeId;
use quinn::{ConnectionError, ReadError, VarInt, WriteError};
use thiserror::Error;

use super::settings::Service;

/// Why the data plane could not do what was asked. Every case names the peer that it is about.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
pub enum DataError {
    /// The UDP port is in use or not allowed.
    #[error("cannot listen on UDP {address}: {reason}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        reason: String,
    },
    /// The TLS library refused the node's key.
    #[error("the node's key makes no certificate: {reason}")]
    Certificate {
        /// What it says.
        reason: String,
    },
    /// Nobody said where the peer is.
    #[error("no data address is known for node {}", peer.short())]
    NoAddress {
        /// The peer.
        peer: NodeId,
    },
    /// The peer is this node itself.
    #[error("node {} is this node itself", peer.short())]
    Ourselves {
        /// The peer.
        peer: NodeId,
    },
    /// No address answered.
    #[error("cannot reach node {}: {tried}", peer.short())]
    Unreachable {
        /// The peer.
        peer: NodeId,
        /// Each address, and what happened there.
        tried: String,
    },
    /// The peer turned this node away.
    #[error("node {} refuses this node: {reason}", peer.short())]
    RefusedByPeer {
        /// The peer.
        peer: NodeId,
        /// In its words.
        reason: String,
    },
    /// This node turned the peer away.
    #[error("this node refuses node {}: {reason}", peer.short())]
    RefusedByUs {
        /// The peer.
        peer: NodeId,
        /// In this node's words.
        reason: String,
    },
    /// The connection ended.
    #[error("the connection to node {} ended: {reason}", peer.short())]
    Lost {
        /// The peer.
        peer: NodeId,
        /// Why.
        reason: String,
    },
    /// The peer broke off this stream.
    #[error("node {} broke off the stream: {reason}", peer.short())]
    BrokenOff {
        /// The peer.
        peer: NodeId,
        /// Why.
        reason: StreamEnd,
    },
    /// The peer does not offer the service.
    #[error("node {} does not serve {service:?} now", peer.short())]
    NotServed {
        /// The peer.
        peer: NodeId,
        /// What was asked for.
        service: Service,
    },
    /// The peer sent what is not a frame, or not one that belongs here.
    #[error("node {} sent {what}", peer.short())]
    Malformed {
        /// The peer.
        peer: NodeId,
        /// What it sent.
        what: String,
    },
    /// A frame to be sent is over its limit.
    #[error("a frame with {what} of {bytes} bytes, at most {limit_bytes} are allowed")]
    TooLong {
        /// Header or payload.
        what: &'static str,
        /// Its length.
        bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// Something that must not take long did.
    #[error("node {} took longer than {after:?} {what}", peer.short())]
    Stalled {
        /// The peer.
        peer: NodeId,
        /// What for.
        what: &'static str,
        /// The limit.
        after: Duration,
    },
    /// An earlier send on this stream was dropped halfway, so the stream makes no sense any more.
    #[error("an earlier send to node {} was dropped halfway", peer.short())]
    DroppedHalfway {
        /// The peer.
        peer: NodeId,
    },
    /// The data plane has been shut down.
    #[error("the data plane has been shut down")]
    ShutDown,
}

/// Why a stream was broken off, as its reset code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum StreamEnd {
    /// Nobody serves what was asked for.
    #[error("not served")]
    NotServed,
    /// Too slow.
    #[error("too slow")]
    Stalled,
    /// Not what belongs there.
    #[error("malformed")]
    Malformed,
    /// The sender gave up in the middle of a frame.
    #[error("dropped halfway")]
    DroppedHalfway,
    /// Too much to do.
    #[error("busy")]
    Busy,
    /// No longer wanted.
    #[error("no longer wanted")]
    Unwanted,
    /// A code of a later version.
    #[error("code {0}")]
    Other(u64),
}

impl StreamEnd {
    pub(super) fn code(self) -> VarInt {
        match self {
            // What quinn sends when a receiver is dropped.
            Self::Unwanted => VarInt::from_u32(0),
            Self::NotServed => VarInt::from_u32(1),
            Self::Stalled => VarInt::from_u32(2),
            Self::Malformed => VarInt::from_u32(3),
            Self::DroppedHalfway => VarInt::from_u32(4),
            Self::Busy => VarInt::from_u32(5),
            Self::Other(code) => VarInt::from_u64(code).unwrap_or(VarInt::MAX),
        }
    }

    pub(super) fn from_code(code: VarInt) -> Self {
        match code.into_inner() {
            0 => Self::Unwanted,
            1 => Self::NotServed,
            2 => Self::Stalled,
            3 => Self::Malformed,
            4 => Self::DroppedHalfway,
            5 => Self::Busy,
            other => Self::Other(other),
        }
    }
}

/// The code with which a connection is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Closing {
    /// The node goes away.
    ShutDown,
    /// The peer is not welcome; the reason says why.
    Refused,
    /// Another connection does its work.
    Replaced,
    /// The peer did not keep to the greeting.
    Malformed,
}

impl Closing {
    pub(super) fn code(self) -> VarInt {
        VarInt::from_u32(match self {
            Self::ShutDown => 0,
            Self::Refused => 1,
            Self::Replaced => 2,
            Self::Malformed => 3,
        })
    }
}

/// The longest reason sent with a close: it must fit into the one packet that carries it.
pub(super) const CLOSE_REASON_BYTES_MAX: usize = 600;

/// What the end of a connection means to those who used it.
pub(super) fn lost(peer: NodeId, error: &ConnectionError) -> DataError {
    match error {
        ConnectionError::ApplicationClosed(close) if close.error_code == Closing::Refused.code() => {
            DataError::RefusedByPeer {
                peer,
                reason: words(&close.reason),
            }
        }
        ConnectionError::ApplicationClosed(close) => DataError::Lost {
            peer,
            reason: format!("closed by the peer: {}", words(&close.reason)),
        },
        ConnectionError::LocallyClosed => DataError::Lost {
            peer,
            reason: "closed here".to_owned(),
        },
        other => DataError::Lost {
            peer,
            reason: other.to_string(),
        },
    }
}

/// The reason that a peer gave, made harmless to print.
fn words(reason: &[u8]) -> String {
    let bytes = reason.get(..CLOSE_REASON_BYTES_MAX).unwrap_or(reason);
    let printable = |character: char| if character.is_control() { ' ' } else { character };
    String::from_utf8_lossy(bytes).chars().map(printable).collect()
}

pub(super) fn unreadable(peer: NodeId, error: ReadError) -> DataError {
    match error {
        ReadError::Reset(code) => DataError::BrokenOff {
            peer,
            reason: StreamEnd::from_code(code),
        },
        ReadError::ConnectionLost(error) => lost(peer, &error),
        ReadError::ClosedStream | ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => DataError::Lost {
            peer,
            reason: error.to_string(),
        },
    }
}

pub(super) fn unwritable(peer: NodeId, error: WriteError) -> DataError {
    match error {
        WriteError::Stopped(code) => DataError::BrokenOff {
            peer,
            reason: StreamEnd::from_code(code),
        },
        WriteError::ConnectionLost(error) => lost(peer, &error),
        WriteError::ClosedStream | WriteError::ZeroRttRejected => DataError::Lost {
            peer,
            reason: error.to_string(),
        },
    }
}
