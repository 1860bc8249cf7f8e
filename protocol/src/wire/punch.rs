//! How two nodes behind routers agree to open a straight way between their data planes.

use alloc::vec::Vec;
use core::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::{ADDRESSES_MAX, DecodeError, Message, at_most};

/// How a node's data port is seen from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Standing {
    /// At an address that the machine itself has: worth a plain dial, unless a firewall stands before it.
    Public,
    /// Behind a router that keeps one port for all peers, or may: worth a punch.
    Punchable,
    /// Behind a router that takes another port for every peer, so that nobody can tell which: not worth a try.
    Symmetric,
}

/// Where a node's data plane may be reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Names the attempt; drawn by the initiator, repeated by the responder.
    pub nonce: u64,
    /// Its own addresses and those at which others see it.
    pub candidates: Vec<SocketAddr>,
    /// Whether they are worth a try.
    pub standing: Standing,
}

/// What is said about it, as requests of the service `Punch`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Punch {
    /// Asks for the other's offer, which is the answer.
    Offer(Offer),
    /// Both send from now on: the responder at once, the initiator half a round trip later.
    Go {
        /// That of the offers.
        nonce: u64,
    },
}

impl Message for Punch {
    const BYTES_MAX: usize = 1024;

    fn check(&self) -> Result<(), DecodeError> {
        match self {
            Self::Offer(offer) => at_most("candidates", offer.candidates.len(), ADDRESSES_MAX),
            Self::Go { .. } => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use proptest::prelude::*;

    use super::*;
    use crate::wire::{decode, encode};

    #[test]
    fn an_offer_has_these_bytes_for_ever() {
        let offer = Punch::Offer(Offer {
            nonce: 7,
            candidates: vec![SocketAddr::from(([10, 0, 0, 1], 4002))],
            standing: Standing::Punchable,
        });
        let bytes = [1, 0, 0, 7, 1, 0, 10, 0, 0, 1, 0xa2, 0x1f, 1];
        assert_eq!(encode(&offer), bytes);
        assert_eq!(decode(&bytes), Ok(offer));
        assert_eq!(encode(&Punch::Go { nonce: 7 }), [1, 0, 1, 7]);
    }

    #[test]
    fn too_many_candidates_are_refused() {
        let crowd = Punch::Offer(Offer {
            nonce: 0,
            candidates: vec![SocketAddr::from(([10, 0, 0, 1], 1)); ADDRESSES_MAX + 1],
            standing: Standing::Public,
        });
        assert!(matches!(
            decode::<Punch>(&encode(&crowd)),
            Err(DecodeError::TooMany { .. })
        ));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
            if let Some((first, _)) = bytes.split_first_chunk_mut::<2>() {
                *first = [1, 0];
            }
            let _ = decode::<Punch>(&bytes);
        }
    }
}
