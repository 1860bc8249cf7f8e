//! Signing, as the machines need it.

use core::fmt;

use serde::{Deserialize, Serialize};

use crate::hash::NodeId;

/// A signature by a node's key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Signature {
    /// The first half. In halves, since serde has no arrays of 64.
    first: [u8; 32],
    /// The second half.
    second: [u8; 32],
}

impl Signature {
    /// Wraps the 64 bytes of an ed25519 signature.
    pub fn from_bytes(bytes: &[u8; 64]) -> Self {
        let mut signature = Self {
            first: [0; 32],
            second: [0; 32],
        };
        for (index, byte) in bytes.iter().enumerate() {
            let half = if index < 32 {
                &mut signature.first
            } else {
                &mut signature.second
            };
            if let Some(slot) = half.get_mut(index % 32) {
                *slot = *byte;
            }
        }
        signature
    }

    /// The 64 bytes of an ed25519 signature.
    pub fn to_bytes(&self) -> [u8; 64] {
        let mut bytes = [0; 64];
        for (slot, byte) in bytes.iter_mut().zip(self.first.iter().chain(&self.second)) {
            *slot = *byte;
        }
        bytes
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signature({})", crate::hash::hex(&self.first[..4]))
    }
}

/// A node's key, as the machines use it: the daemon hands in ed25519, the simulator something cheaper.
///
/// `domain` is mixed into what is signed, so a signature under one heading says nothing under another.
pub trait Seal: fmt::Debug + Send + Sync {
    /// The node whose key this is.
    fn node(&self) -> NodeId;

    /// Signs `bytes` with this node's key.
    fn sign(&self, domain: &'static str, bytes: &[u8]) -> Signature;

    /// Whether `signature` is `node`'s, over `bytes`.
    fn verify(&self, node: NodeId, domain: &'static str, bytes: &[u8], signature: &Signature) -> bool;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_keeps_its_bytes() {
        let bytes = core::array::from_fn(|index| u8::try_from(index).unwrap_or(0));
        assert_eq!(Signature::from_bytes(&bytes).to_bytes(), bytes);
    }
}
