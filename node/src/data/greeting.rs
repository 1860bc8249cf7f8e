//! The first stream of every connection: both ends show their credentials, and either may turn the other away.

use std::net::SocketAddr;

use bytes::Bytes;
use polder_protocol::hash::NodeId;
use serde::{Deserialize, Serialize};

use super::error::{CLOSE_REASON_BYTES_MAX, Closing, DataError};
use super::frames::{Frame, FrameReceiver, FrameSender, KIND_GREETING};
use super::settings::{CREDENTIALS_BYTES_MAX, Class};
use crate::gate::{Admitted, Gate};

/// What is said beside the credentials, which are the payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Greeting {
    /// What the connection is for; the dialler decides.
    pub(super) class: Class,
    /// Drawn at every start of a node: a new one means that the old process is gone.
    pub(super) instance: u64,
    /// Where the sender sees the receiver, for nodes behind a router.
    pub(super) you_are: SocketAddr,
}

/// A peer that was let in.
#[derive(Debug)]
pub(super) struct Greeted {
    pub(super) admitted: Admitted,
    pub(super) greeting: Greeting,
    pub(super) credentials: Bytes,
}

/// Shows this node's credentials.
pub(super) async fn show(sender: &mut FrameSender, gate: &dyn Gate, greeting: Greeting) -> Result<(), DataError> {
    // Three integers and an address always encode.
    let header = postcard::to_allocvec(&greeting).unwrap_or_default();
    sender
        .send_kind(KIND_GREETING, &header, Bytes::from(gate.credentials()))
        .await
}

/// Reads what the peer shows, and asks the gate. A refused peer's connection is closed with the reason.
pub(super) async fn check(
    connection: &quinn::Connection,
    receiver: &mut FrameReceiver,
    gate: &dyn Gate,
    peer: NodeId,
) -> Result<Greeted, DataError> {
    let frame = match receiver.next_kind(KIND_GREETING, CREDENTIALS_BYTES_MAX).await {
        Ok(frame) => frame,
        Err(error) => {
            if matches!(error, DataError::Malformed { .. } | DataError::Stalled { .. }) {
                close(connection, Closing::Malformed, &error.to_string());
            }
            return Err(error);
        }
    };
    let Some((greeting, credentials)) = frame.and_then(parse) else {
        let error = DataError::Malformed {
            peer,
            what: "no greeting".to_owned(),
        };
        close(connection, Closing::Malformed, &error.to_string());
        return Err(error);
    };
    match gate.admit(peer, &credentials) {
        Ok(admitted) => Ok(Greeted {
            admitted,
            greeting,
            credentials,
        }),
        Err(refused) => {
            close(connection, Closing::Refused, &refused.reason);
            Err(DataError::RefusedByUs {
                peer,
                reason: refused.reason,
            })
        }
    }
}

/// Closes a connection with words for the other side.
pub(super) fn close(connection: &quinn::Connection, closing: Closing, reason: &str) {
    let end = reason.floor_char_boundary(CLOSE_REASON_BYTES_MAX);
    connection.close(closing.code(), reason.get(..end).unwrap_or_default().as_bytes());
}

pub(super) fn parse((header, credentials): Frame) -> Option<(Greeting, Bytes)> {
    Some((postcard::from_bytes(&header).ok()?, credentials))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_a_greeting_or_none(header: Vec<u8>, credentials: Vec<u8>) {
            if let Some((greeting, shown)) = parse((header, credentials.clone().into())) {
                prop_assert_eq!(shown.as_ref(), credentials.as_slice());
                let again = postcard::to_allocvec(&greeting).unwrap();
                prop_assert_eq!(parse((again, shown)).map(|(greeting, _)| greeting), Some(greeting));
            }
        }

        #[test]
        fn a_greeting_survives_its_header(instance: u64, port: u16, bulk: bool) {
            let class = if bulk { Class::Bulk } else { Class::Act };
            let greeting = Greeting { class, instance, you_are: SocketAddr::from(([192, 0, 2, 1], port)) };
            let header = postcard::to_allocvec(&greeting).unwrap();
            prop_assert_eq!(parse((header, Bytes::new())).map(|(greeting, _)| greeting), Some(greeting));
        }
    }
}
