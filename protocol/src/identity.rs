//! Keys, and what is signed with them.
//!
//! Everything has an ed25519 key: a node, an institution, a founder. What is signed is always a domain, then the bytes:
//! a signature for one purpose is none for another. Bytes are checked as they were received and never encoded anew, so
//! two versions of this program cannot disagree about what was signed.

use alloc::vec::Vec;
use core::fmt;
use core::marker::PhantomData;

use ed25519_dalek::{Signer, SigningKey, VerifyingKey};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::hash::{InstitutionId, NodeId};
use crate::log::Seal;

pub use crate::log::Signature;

/// An ed25519 key pair. It is wiped from memory when dropped and never printed.
#[derive(Clone)]
pub struct KeyPair {
    signing: SigningKey,
}

impl KeyPair {
    /// The key pair of a secret seed, which must come from the operating system's random numbers.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self {
            signing: SigningKey::from_bytes(seed),
        }
    }

    /// The secret seed, to be written to a key file and handed to the two planes.
    pub fn seed(&self) -> [u8; 32] {
        self.signing.to_bytes()
    }

    /// The public key.
    pub fn public(&self) -> [u8; 32] {
        self.signing.verifying_key().to_bytes()
    }

    /// The public key as a node's id.
    pub fn node(&self) -> NodeId {
        NodeId(self.public())
    }

    /// The public key as an institution's id.
    pub fn institution(&self) -> InstitutionId {
        InstitutionId(self.public())
    }

    /// Signs `bytes` under the heading `domain`.
    pub fn sign(&self, domain: &str, bytes: &[u8]) -> Signature {
        Signature::from_bytes(&self.signing.sign(&headed(domain, bytes)).to_bytes())
    }
}

impl fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyPair({}, secret)", self.node().short())
    }
}

impl Seal for KeyPair {
    fn node(&self) -> NodeId {
        Self::node(self)
    }

    fn sign(&self, domain: &'static str, bytes: &[u8]) -> Signature {
        Self::sign(self, domain, bytes)
    }

    fn verify(&self, node: NodeId, domain: &'static str, bytes: &[u8], signature: &Signature) -> bool {
        verify(&node.0, domain, bytes, signature)
    }
}

/// Whether `signature` is the one of `key` over `bytes` under the heading `domain`. Weak keys and second forms of one
/// signature are refused.
pub fn verify(key: &[u8; 32], domain: &str, bytes: &[u8], signature: &Signature) -> bool {
    let Ok(key) = VerifyingKey::from_bytes(key) else {
        return false;
    };
    let signature = ed25519_dalek::Signature::from_bytes(&signature.to_bytes());
    key.verify_strict(&headed(domain, bytes), &signature).is_ok()
}

/// The domain's length comes first, so that no domain and bytes are another domain and other bytes.
fn headed(domain: &str, bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(domain.len()).unwrap_or(u32::MAX);
    [&length.to_le_bytes(), domain.as_bytes(), bytes].concat()
}

/// Something that is signed.
pub trait Statement: Serialize + DeserializeOwned {
    /// The heading under which it is signed: what it is, and the version of its form.
    const DOMAIN: &'static str;
    /// The longest encoding that is read.
    const BYTES_MAX: usize;
}

/// Why a signed statement says nothing.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum SignedError {
    #[error("{length_bytes} bytes are over the limit of {limit_bytes}")]
    TooLong { length_bytes: usize, limit_bytes: usize },
    #[error("bytes are malformed: {0}")]
    Malformed(postcard::Error),
    #[error("{extra_bytes} bytes follow the end")]
    Trailing { extra_bytes: usize },
    #[error("the signature is not that of {}", NodeId(*.by))]
    Signature { by: [u8; 32] },
}

/// A statement, who made it, and the signature over the statement's bytes.
#[derive(Serialize, Deserialize)]
#[serde(bound = "")]
pub struct Signed<T> {
    by: [u8; 32],
    body: Vec<u8>,
    signature: Signature,
    #[serde(skip)]
    statement: PhantomData<fn() -> T>,
}

/// Bytes that an envelope adds to its statement, at most.
const ENVELOPE_BYTES_MAX: usize = 32 + 64 + 10;

impl<T: Statement> Signed<T> {
    /// Makes `statement` with `key`.
    pub fn new(key: &KeyPair, statement: &T) -> Self {
        // Statements hold nothing that postcard cannot write.
        let body = postcard::to_allocvec(statement).unwrap_or_default();
        Self {
            by: key.public(),
            signature: key.sign(T::DOMAIN, &body),
            body,
            statement: PhantomData,
        }
    }

    /// The public key that claims to have made it.
    pub fn by(&self) -> [u8; 32] {
        self.by
    }

    /// The statement, if the signature holds. Whether [`Self::by`] may make it is for the caller to ask.
    ///
    /// # Errors
    ///
    /// [`SignedError`] for a statement that is too long, not signed by [`Self::by`], or malformed.
    pub fn open(&self) -> Result<T, SignedError> {
        within::<T>(self.body.len(), 0)?;
        if !verify(&self.by, T::DOMAIN, &self.body, &self.signature) {
            return Err(SignedError::Signature { by: self.by });
        }
        whole(&self.body)
    }

    /// The statement as claimed, before its signature is checked: only to say why it is refused.
    pub fn claim(&self) -> Option<T> {
        within::<T>(self.body.len(), 0).ok()?;
        whole(&self.body).ok()
    }

    /// The encoding for files and wires.
    pub fn to_bytes(&self) -> Vec<u8> {
        // An envelope holds nothing that postcard cannot write.
        postcard::to_allocvec(self).unwrap_or_default()
    }

    /// Reads [`Self::to_bytes`]. The signature is not checked yet.
    ///
    /// # Errors
    ///
    /// [`SignedError`] for bytes that are too long or malformed.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SignedError> {
        within::<T>(bytes.len(), ENVELOPE_BYTES_MAX)?;
        whole(bytes)
    }
}

fn within<T: Statement>(length_bytes: usize, more: usize) -> Result<(), SignedError> {
    let limit_bytes = T::BYTES_MAX.saturating_add(more);
    if length_bytes > limit_bytes {
        return Err(SignedError::TooLong {
            length_bytes,
            limit_bytes,
        });
    }
    Ok(())
}

/// Decodes all of `bytes`.
pub(crate) fn whole<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, SignedError> {
    let (value, rest) = postcard::take_from_bytes(bytes).map_err(SignedError::Malformed)?;
    if !rest.is_empty() {
        return Err(SignedError::Trailing {
            extra_bytes: rest.len(),
        });
    }
    Ok(value)
}

impl<T> Clone for Signed<T> {
    fn clone(&self) -> Self {
        Self {
            by: self.by,
            body: self.body.clone(),
            signature: self.signature,
            statement: PhantomData,
        }
    }
}

impl<T> PartialEq for Signed<T> {
    fn eq(&self, other: &Self) -> bool {
        self.by == other.by && self.body == other.body && self.signature == other.signature
    }
}

impl<T> Eq for Signed<T> {}

impl<T> fmt::Debug for Signed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by = NodeId(self.by).short();
        write!(f, "Signed({} bytes, by {by})", self.body.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;
    use alloc::string::String;
    use alloc::string::ToString;
    use proptest::prelude::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Note {
        text: String,
    }
    impl Statement for Note {
        const DOMAIN: &'static str = "polder test note 1";
        const BYTES_MAX: usize = 64;
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct OtherNote {
        text: String,
    }
    impl Statement for OtherNote {
        const DOMAIN: &'static str = "polder test other note 1";
        const BYTES_MAX: usize = 64;
    }

    #[test]
    fn what_was_signed_can_be_read() {
        let signed = signed();
        assert_eq!(
            Signed::from_bytes(&signed.to_bytes()).and_then(|again| again.open()),
            Ok(note())
        );
    }

    #[test]
    fn a_signature_for_one_purpose_is_none_for_another() {
        let other = Signed::<OtherNote>::from_bytes(&signed().to_bytes()).unwrap();
        assert_eq!(other.open(), Err(SignedError::Signature { by: key().public() }));
    }

    #[test]
    fn the_secret_is_never_printed() {
        let text = format!("{:?}", key());
        assert!(!text.contains(&crate::hash::hex(&[7; 4])), "{text}");
    }

    #[test]
    fn a_long_statement_is_refused_before_it_is_read() {
        let bytes = alloc::vec![0; 1000];
        assert!(matches!(
            Signed::<Note>::from_bytes(&bytes),
            Err(SignedError::TooLong { .. })
        ));
    }

    proptest! {
        #[test]
        fn a_changed_bit_never_verifies(place: usize, bit in 0u8..8) {
            let mut bytes = signed().to_bytes();
            let place = place % bytes.len();
            bytes[place] ^= 1 << bit;
            prop_assert!(Signed::<Note>::from_bytes(&bytes).and_then(|signed| signed.open()).is_err());
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Signed::<Note>::from_bytes(&bytes).map(|signed| (signed.open(), signed.claim()));
        }
    }

    fn key() -> KeyPair {
        KeyPair::from_seed(&[7; 32])
    }

    fn note() -> Note {
        Note {
            text: "the pumps run".to_string(),
        }
    }

    fn signed() -> Signed<Note> {
        Signed::new(&key(), &note())
    }
}
