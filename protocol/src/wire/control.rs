//! Requests, answers and gossip of the control plane.

use alloc::string::String;
use alloc::vec::Vec;
use core::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::{
    ADDRESS_BYTES_MAX, ADDRESSES_MAX, CONTROL_BYTES_MAX, CREDENTIALS_BYTES_MAX, DecodeError, GOSSIP_BYTES_MAX,
    HINTS_MAX, Message, TEXT_BYTES_MAX, at_most, byte_string,
};
use crate::hash::NodeId;

/// What a request is for. New services are appended, since the number is on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Service {
    /// The first words of every connection: a [`Hello`].
    Hello,
    /// A newcomer asks its institution's gateway for a certificate. Answered before membership.
    Enrol,
    /// Announcements: who serves what.
    Directory,
    /// Training runs: rounds, logs, commitments.
    Run,
    /// Generations: reserve, release, fail over.
    Session,
    /// Who holds which blobs.
    Blobs,
    /// The last words: a [`Farewell`].
    Goodbye,
    /// Signed lists of what institutions have revoked.
    Revocations,
    /// The federation's charter and epochs.
    Federation,
    /// A straight way between two data planes: a [`super::Punch`].
    Punch,
}

impl Service {
    /// Whether a peer may ask for it before it has shown valid credentials.
    pub const fn before_membership(self) -> bool {
        matches!(self, Self::Hello | Self::Enrol | Self::Goodbye)
    }
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// What for.
    pub service: Service,
    /// What the service defines.
    #[serde(with = "byte_string")]
    pub body: Vec<u8>,
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// What the service answered.
    Done(#[serde(with = "byte_string")] Vec<u8>),
    /// Not answered, and why.
    Refused(Refusal),
}

/// Why a request was not answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// The asker's credentials were refused, or it showed none.
    NotAdmitted {
        /// Which rule, for people.
        reason: String,
    },
    /// This node does not offer the service.
    NoSuchService,
    /// The service has too much to do; try again or ask another.
    Busy,
    /// The request is malformed.
    Malformed {
        /// How, for people.
        reason: String,
    },
}

/// What a node shows of itself, on every new connection and whenever something changes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Hello {
    /// The program and its version.
    pub agent: String,
    /// Chosen when the program starts, so that a restart is noticed while old connections still seem alive.
    pub instance: u64,
    /// Federation, charter and certificate, encoded.
    #[serde(with = "byte_string")]
    pub credentials: Vec<u8>,
    /// Where its control plane answers, as multiaddresses.
    pub control_addresses: Vec<String>,
    /// Where its data plane answers. An unspecified address means: the one you see me at, with this port.
    pub data_addresses: Vec<SocketAddr>,
}

/// The answer to a [`Hello`] that was accepted: the answerer's own, and others whom the newcomer may meet.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Greeting {
    /// The answerer's own.
    pub hello: Hello,
    /// Admitted peers of the answerer.
    pub peers: Vec<PeerHint>,
}

/// Where another peer may be found. It proves itself when it is met, so a lie costs one dial.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerHint {
    /// Who.
    pub node: NodeId,
    /// Its control addresses.
    pub control_addresses: Vec<String>,
}

/// Why the sender closes the connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Farewell {
    /// For people.
    pub reason: String,
    /// Whether the receiver is turned away, rather than the sender leaving.
    pub refused: bool,
}

/// What travels in a gossip message: the author's credentials, since it may be far from any peer that has met it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope {
    /// As in [`Hello::credentials`].
    #[serde(with = "byte_string")]
    pub credentials: Vec<u8>,
    /// What the topic defines.
    #[serde(with = "byte_string")]
    pub body: Vec<u8>,
}

impl Message for Request {
    const BYTES_MAX: usize = CONTROL_BYTES_MAX;
    fn check(&self) -> Result<(), DecodeError> {
        Ok(())
    }
}

impl Message for Reply {
    const BYTES_MAX: usize = CONTROL_BYTES_MAX;
    fn check(&self) -> Result<(), DecodeError> {
        match self {
            Self::Refused(Refusal::NotAdmitted { reason } | Refusal::Malformed { reason }) => text(reason),
            Self::Refused(Refusal::NoSuchService | Refusal::Busy) | Self::Done(_) => Ok(()),
        }
    }
}

impl Message for Hello {
    const BYTES_MAX: usize = GOSSIP_BYTES_MAX;
    fn check(&self) -> Result<(), DecodeError> {
        text(&self.agent)?;
        at_most("bytes of credentials", self.credentials.len(), CREDENTIALS_BYTES_MAX)?;
        addresses(&self.control_addresses)?;
        at_most("data addresses", self.data_addresses.len(), ADDRESSES_MAX)
    }
}

impl Message for Greeting {
    const BYTES_MAX: usize = CONTROL_BYTES_MAX;
    fn check(&self) -> Result<(), DecodeError> {
        self.hello.check()?;
        at_most("peers", self.peers.len(), HINTS_MAX)?;
        self.peers
            .iter()
            .try_for_each(|hint| addresses(&hint.control_addresses))
    }
}

impl Message for Farewell {
    const BYTES_MAX: usize = 2 * TEXT_BYTES_MAX;
    fn check(&self) -> Result<(), DecodeError> {
        text(&self.reason)
    }
}

impl Message for Envelope {
    const BYTES_MAX: usize = GOSSIP_BYTES_MAX;
    fn check(&self) -> Result<(), DecodeError> {
        at_most("bytes of credentials", self.credentials.len(), CREDENTIALS_BYTES_MAX)
    }
}

fn text(text: &str) -> Result<(), DecodeError> {
    at_most("bytes of text", text.len(), TEXT_BYTES_MAX)
}

fn addresses(list: &[String]) -> Result<(), DecodeError> {
    at_most("addresses", list.len(), ADDRESSES_MAX)?;
    list.iter()
        .try_for_each(|address| at_most("bytes of an address", address.len(), ADDRESS_BYTES_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{VERSIONS, decode, encode};
    use alloc::string::ToString;
    use alloc::vec;
    use proptest::prelude::*;

    #[test]
    fn a_request_has_these_bytes_for_ever() {
        let request = Request {
            service: Service::Directory,
            body: vec![9, 8, 7],
        };
        assert_eq!(encode(&request), [1, 0, 2, 3, 9, 8, 7]);
        assert_eq!(decode(&[1, 0, 2, 3, 9, 8, 7]), Ok(request));
    }

    #[test]
    fn a_reply_has_these_bytes_for_ever() {
        assert_eq!(encode(&Reply::Done(vec![5])), [1, 0, 0, 1, 5]);
        let refused = Reply::Refused(Refusal::NotAdmitted {
            reason: "no".to_string(),
        });
        assert_eq!(encode(&refused), [1, 0, 1, 0, 2, b'n', b'o']);
        assert_eq!(encode(&Reply::Refused(Refusal::Busy)), [1, 0, 1, 2]);
    }

    #[test]
    fn a_hello_has_these_bytes_for_ever() {
        let bytes = [1, 0, 1, b'p', 3, 2, 4, 2, 1, 1, b'/', 1, 0, 10, 0, 0, 1, 0xa2, 0x1f];
        assert_eq!(encode(&hello()), bytes);
        assert_eq!(decode(&bytes), Ok(hello()));
    }

    #[test]
    fn another_version_is_named() {
        let refused = decode::<Request>(&[2, 0, 2, 0]);
        assert_eq!(
            refused,
            Err(DecodeError::Version {
                theirs: 2,
                ours: VERSIONS
            })
        );
    }

    #[test]
    fn a_length_that_lies_takes_no_memory() {
        let lie = [1, 0, 2, 0xff, 0xff, 0xff, 0xff, 0x0f, 1, 2];
        assert!(matches!(decode::<Request>(&lie), Err(DecodeError::Body(_))));
    }

    #[test]
    fn too_many_addresses_are_refused() {
        let crowd = Hello {
            control_addresses: vec![String::new(); ADDRESSES_MAX + 1],
            ..hello()
        };
        assert!(matches!(
            decode::<Hello>(&encode(&crowd)),
            Err(DecodeError::TooMany { count: 17, .. })
        ));
    }

    #[test]
    fn a_message_over_its_limit_is_refused_before_it_is_read() {
        let long = vec![1; Farewell::BYTES_MAX + 1];
        assert!(matches!(decode::<Farewell>(&long), Err(DecodeError::TooLong { .. })));
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_decoder_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..512), versioned: bool) {
            if let (true, Some((first, _))) = (versioned, bytes.split_first_chunk_mut::<2>()) {
                *first = [1, 0];
            }
            let _ = decode::<Request>(&bytes);
            let _ = decode::<Reply>(&bytes);
            let _ = decode::<Hello>(&bytes);
            let _ = decode::<Greeting>(&bytes);
            let _ = decode::<Farewell>(&bytes);
            let _ = decode::<Envelope>(&bytes);
        }

        #[test]
        fn a_greeting_survives_its_bytes(agent in ".{0,64}", credentials: Vec<u8>, node: [u8; 32], port: u16) {
            let greeting = Greeting {
                hello: Hello {
                    agent,
                    instance: u64::from(port),
                    credentials,
                    control_addresses: vec!["/ip4/10.0.0.1/tcp/4001".to_string()],
                    data_addresses: vec![SocketAddr::from(([0, 0, 0, 0], port))],
                },
                peers: vec![PeerHint { node: NodeId(node), control_addresses: vec![] }],
            };
            prop_assert_eq!(decode(&encode(&greeting)), Ok(greeting));
        }

        #[test]
        fn a_cut_message_is_an_error(cut in 0usize..19) {
            let bytes = encode(&hello());
            let part = bytes.get(..cut).unwrap_or_default();
            prop_assert!(decode::<Hello>(part).is_err());
        }
    }

    fn hello() -> Hello {
        Hello {
            agent: "p".to_string(),
            instance: 3,
            credentials: vec![4, 2],
            control_addresses: vec!["/".to_string()],
            data_addresses: vec![SocketAddr::from(([10, 0, 0, 1], 4002))],
        }
    }
}
