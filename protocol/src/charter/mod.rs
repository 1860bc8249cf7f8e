//! The federation's founding document, and who belongs to it.
//!
//! A charter names the institutions. It is signed by at least `threshold` of its founders; the next charter names the
//! hash of the one before it and is signed by enough founders of both. The hash of the first names the federation.
//!
//! A charter may name doors: gateways with their addresses, where whoever has only this document begins. They are
//! amended as everything else in it. A charter without doors is written in format version 1, as it always was.

mod certificate;
mod doors;
mod membership;

use alloc::collections::BTreeSet;
use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::hash::{Digest, FederationId, InstitutionId, NodeId, digest};
use crate::identity::{KeyPair, Signature, SignedError, verify, whole};
use crate::invite::Door;
use crate::time::UnixSeconds;

pub use certificate::{
    CERTIFICATE_SECONDS_MAX, CLOCK_SKEW_SECONDS, Capabilities, CapabilityError, Certificate, REVOKED_MAX, Revocation,
};
pub use doors::{CHARTER_DOORS_MAX, DOOR_ADDRESS_BYTES_MAX};
pub use membership::{Credentials, Member, Membership, Refusal, RevocationError};

/// The longest encoding of one charter: some hundred institutions.
pub const CHARTER_BYTES_MAX: usize = 256 << 10;
/// The longest encoding of a whole chain: it travels in one control message, with room beside it.
pub const CHARTERS_BYTES_MAX: usize = 512 << 10;
/// The most charters of one chain. One a month is enough for twenty years.
pub const CHARTERS_MAX: usize = 256;
/// The most founders of one charter, hence signatures to check.
pub const FOUNDERS_MAX: usize = 64;
/// The most institutions of one charter.
pub const INSTITUTIONS_MAX: usize = 1024;
/// The longest name of a federation or an institution.
pub const NAME_BYTES_MAX: usize = 128;

/// One institution of a charter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstitutionEntry {
    /// Its public key.
    pub key: InstitutionId,
    /// What people call it.
    pub name: String,
    /// The most that it may let its nodes do.
    pub capabilities: Capabilities,
    /// When it stops being a member, where that is agreed.
    pub expires: Option<UnixSeconds>,
}

/// What the founders agree on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Charter {
    /// Format version: 1, or 2 for a charter with doors.
    pub version: u16,
    /// What people call the federation.
    pub name: String,
    /// The hash of the charter before this one; `None` in the first.
    pub previous: Option<Digest>,
    /// Whose signatures count.
    pub founders: Vec<InstitutionId>,
    /// How many of them are needed.
    pub threshold: u16,
    /// The members.
    pub institutions: Vec<InstitutionEntry>,
    /// Which models the federation trains and serves, for people.
    pub models: String,
    /// What it asks of its members, for people.
    pub policies: String,
    /// When it was written.
    pub created: UnixSeconds,
    /// Where to begin, in the order in which to try. Written in format version 2 only.
    #[serde(skip)]
    pub doors: Vec<Door>,
}

/// Why a charter, or a chain of them, does not hold.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum CharterError {
    #[error("charter is malformed: {0}")]
    Malformed(#[from] SignedError),
    #[error("charter has format version {0}, this program reads 1 and 2")]
    Version(u16),
    #[error("charter has {count} {what}, at most {limit} are allowed")]
    TooMany {
        what: &'static str,
        count: usize,
        limit: usize,
    },
    #[error("charter needs {threshold} signatures of {founders} founders, which cannot be")]
    Threshold { threshold: u16, founders: usize },
    #[error("charter names institution {0} twice")]
    Twice(InstitutionId),
    #[error("charter names the door {0} twice, or without an address")]
    Door(NodeId),
    #[error("charter has {valid} valid signatures of its {whose} founders, it needs {threshold}")]
    Unsigned {
        valid: usize,
        threshold: u16,
        whose: &'static str,
    },
    #[error("charter {number} does not follow the one before it")]
    Chain { number: usize },
    #[error("there is no charter")]
    Empty,
}

impl Charter {
    /// The signature domain.
    pub const DOMAIN: &'static str = "polder charter 1";

    /// The bytes that are hashed and signed.
    pub fn to_bytes(&self) -> Vec<u8> {
        // A charter holds nothing that postcard cannot write.
        match self.version {
            1 => postcard::to_allocvec(self).unwrap_or_default(),
            _ => postcard::to_allocvec(&(self, &self.doors)).unwrap_or_default(),
        }
    }

    /// Reads [`Self::to_bytes`], whatever it says.
    fn from_bytes(bytes: &[u8]) -> Result<Self, CharterError> {
        // Every version begins with its number.
        let number = postcard::take_from_bytes::<u16>(bytes).map_err(SignedError::Malformed)?;
        match number.0 {
            1 => Ok(whole(bytes)?),
            2 => {
                let (charter, doors): (Self, Vec<Door>) = whole(bytes)?;
                Ok(Self { doors, ..charter })
            }
            other => Err(CharterError::Version(other)),
        }
    }

    /// The oldest format version that has words for these doors, so that older programs read what they can.
    pub fn version_for(doors: &[Door]) -> u16 {
        if doors.is_empty() { 1 } else { 2 }
    }

    /// The entry of an institution.
    pub fn institution(&self, key: InstitutionId) -> Option<&InstitutionEntry> {
        self.institutions.iter().find(|entry| entry.key == key)
    }

    fn check(&self) -> Result<(), CharterError> {
        let at_most = |what, count, limit| match count > limit {
            true => Err(CharterError::TooMany { what, count, limit }),
            false => Ok(()),
        };
        if !(1..=2).contains(&self.version) {
            return Err(CharterError::Version(self.version));
        }
        doors::check(&self.doors)?;
        at_most("founders", self.founders.len(), FOUNDERS_MAX)?;
        at_most("institutions", self.institutions.len(), INSTITUTIONS_MAX)?;
        at_most("bytes of name", self.name.len(), NAME_BYTES_MAX)?;
        let founders: BTreeSet<_> = self.founders.iter().collect();
        if self.threshold == 0 || usize::from(self.threshold) > founders.len() || founders.len() < self.founders.len() {
            return Err(CharterError::Threshold {
                threshold: self.threshold,
                founders: founders.len(),
            });
        }
        let mut seen = BTreeSet::new();
        for entry in &self.institutions {
            at_most("bytes of name", entry.name.len(), NAME_BYTES_MAX)?;
            if !seen.insert(entry.key) {
                return Err(CharterError::Twice(entry.key));
            }
        }
        Ok(())
    }
}

/// A charter's bytes and the signatures that it has so far.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedCharter {
    body: Vec<u8>,
    signatures: Vec<(InstitutionId, Signature)>,
}

impl SignedCharter {
    /// A charter that nobody has signed.
    pub fn new(charter: &Charter) -> Self {
        Self {
            body: charter.to_bytes(),
            signatures: Vec::new(),
        }
    }

    /// Adds, or replaces, the signature of `founder`.
    pub fn sign(&mut self, founder: &KeyPair) {
        let by = founder.institution();
        self.signatures.retain(|(signer, _)| *signer != by);
        self.signatures.push((by, founder.sign(Charter::DOMAIN, &self.body)));
    }

    /// Takes over the signatures of another copy of the same charter. They are checked when the chain is.
    pub fn merge(&mut self, other: &Self) {
        for (by, signature) in &other.signatures {
            let known = self.signatures.iter().any(|(signer, _)| signer == by);
            if other.body == self.body && !known && self.signatures.len() < FOUNDERS_MAX {
                self.signatures.push((*by, *signature));
            }
        }
    }

    /// The hash of the charter's bytes.
    pub fn hash(&self) -> Digest {
        digest(&self.body)
    }

    /// The charter, whoever has signed it.
    ///
    /// # Errors
    ///
    /// [`CharterError`] for bytes that are no charter.
    pub fn charter(&self) -> Result<Charter, CharterError> {
        if self.body.len() > CHARTER_BYTES_MAX {
            return Err(CharterError::TooMany {
                what: "bytes",
                count: self.body.len(),
                limit: CHARTER_BYTES_MAX,
            });
        }
        let charter = Charter::from_bytes(&self.body)?;
        charter.check()?;
        Ok(charter)
    }

    /// The founders among `founders` whose signatures hold.
    pub fn signers(&self, founders: &[InstitutionId]) -> BTreeSet<InstitutionId> {
        self.signatures
            .iter()
            .take(FOUNDERS_MAX)
            .filter(|(by, signature)| founders.contains(by) && verify(&by.0, Charter::DOMAIN, &self.body, signature))
            .map(|(by, _)| *by)
            .collect()
    }

    fn signed_by(&self, charter: &Charter, whose: &'static str) -> Result<(), CharterError> {
        let valid = self.signers(&charter.founders).len();
        if valid < usize::from(charter.threshold) {
            return Err(CharterError::Unsigned {
                valid,
                threshold: charter.threshold,
                whose,
            });
        }
        Ok(())
    }
}

/// A chain of charters, each checked against the one before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Charters {
    chain: Vec<SignedCharter>, // Never empty.
    federation: FederationId,
    current: Charter,
    hash: Digest,
}

impl Charters {
    /// Checks a whole chain, the first charter first.
    ///
    /// # Errors
    ///
    /// [`CharterError`] for a chain that is empty, broken, malformed or not signed by enough founders.
    pub fn new(chain: Vec<SignedCharter>) -> Result<Self, CharterError> {
        let count = chain.len();
        if count > CHARTERS_MAX {
            return Err(CharterError::TooMany {
                what: "charters",
                count,
                limit: CHARTERS_MAX,
            });
        }
        let mut rest = chain.into_iter();
        let first = rest.next().ok_or(CharterError::Empty)?;
        let current = first.charter()?;
        if current.previous.is_some() {
            return Err(CharterError::Chain { number: 1 });
        }
        first.signed_by(&current, "own")?;
        let mut charters = Self {
            federation: FederationId(first.hash().0),
            hash: first.hash(),
            current,
            chain: alloc::vec![first],
        };
        rest.try_for_each(|next| charters.extend(next))?;
        Ok(charters)
    }

    /// Adds the next charter.
    ///
    /// # Errors
    ///
    /// [`CharterError`] where it does not follow, or lacks signatures of the founders of either charter.
    pub fn extend(&mut self, next: SignedCharter) -> Result<(), CharterError> {
        let charter = next.charter()?;
        if charter.previous != Some(self.hash) {
            return Err(CharterError::Chain {
                number: self.chain.len().saturating_add(1),
            });
        }
        next.signed_by(&self.current, "previous")?;
        next.signed_by(&charter, "own")?;
        self.hash = next.hash();
        self.current = charter;
        self.chain.push(next);
        Ok(())
    }

    /// The federation: the hash of the first charter.
    pub fn federation(&self) -> FederationId {
        self.federation
    }

    /// The charter in force.
    pub fn current(&self) -> &Charter {
        &self.current
    }

    /// The hash of the charter in force.
    pub fn hash(&self) -> Digest {
        self.hash
    }

    /// How many charters there have been.
    pub fn count(&self) -> usize {
        self.chain.len()
    }

    /// The chain, the first charter first.
    pub fn chain(&self) -> &[SignedCharter] {
        &self.chain
    }

    /// Whether `other` is this chain with more charters at its end.
    pub fn is_continued_by(&self, other: &Self) -> bool {
        let hashes = |charters: &Self, count| -> Vec<Digest> {
            charters.chain.iter().take(count).map(SignedCharter::hash).collect()
        };
        other.count() > self.count() && hashes(self, self.count()) == hashes(other, self.count())
    }

    /// The encoding for files and wires.
    pub fn to_bytes(&self) -> Vec<u8> {
        chain_to_bytes(&self.chain)
    }

    /// Reads and checks [`Self::to_bytes`].
    ///
    /// # Errors
    ///
    /// As [`Self::new`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, CharterError> {
        Self::new(chain_from_bytes(bytes)?)
    }
}

/// Encodes a chain that may still lack signatures.
pub fn chain_to_bytes(chain: &[SignedCharter]) -> Vec<u8> {
    // A chain holds nothing that postcard cannot write.
    postcard::to_allocvec(chain).unwrap_or_default()
}

/// Reads a chain without checking signatures.
///
/// # Errors
///
/// [`CharterError`] for bytes that are too long or malformed.
pub fn chain_from_bytes(bytes: &[u8]) -> Result<Vec<SignedCharter>, CharterError> {
    if bytes.len() > CHARTERS_BYTES_MAX {
        return Err(CharterError::TooMany {
            what: "bytes",
            count: bytes.len(),
            limit: CHARTERS_BYTES_MAX,
        });
    }
    Ok(whole(bytes)?)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use alloc::string::ToString;
    use alloc::vec;
    use proptest::prelude::*;

    #[test]
    fn the_first_charter_names_the_federation() {
        let charters = founded();
        assert_eq!(charters.federation().0, charters.hash().0);
        assert_eq!(Charters::from_bytes(&charters.to_bytes()), Ok(charters));
    }

    #[test]
    fn the_next_charter_needs_the_founders_of_the_one_before() {
        let mut charters = founded();
        let usurper = key(9);
        let next = Charter {
            previous: Some(charters.hash()),
            founders: vec![usurper.institution()],
            ..charters.current().clone()
        };
        let mut signed = SignedCharter::new(&next);
        signed.sign(&usurper);
        let refused = CharterError::Unsigned {
            valid: 0,
            threshold: 1,
            whose: "previous",
        };
        assert_eq!(charters.extend(signed.clone()), Err(refused));
        signed.sign(&key(1));
        let before = charters.clone();
        assert_eq!(charters.extend(signed), Ok(()));
        assert!(before.is_continued_by(&charters));
        assert_eq!(before.federation(), charters.federation());
    }

    #[test]
    fn two_of_three_founders_suffice_and_one_twice_does_not() {
        let keys = [key(1), key(2), key(3)];
        let charter = Charter {
            founders: keys.iter().map(KeyPair::institution).collect(),
            threshold: 2,
            ..charter()
        };
        let mut signed = SignedCharter::new(&charter);
        signed.sign(&keys[0]);
        signed.sign(&keys[0]);
        assert!(matches!(
            Charters::new(vec![signed.clone()]),
            Err(CharterError::Unsigned { valid: 1, .. })
        ));
        let mut copy = SignedCharter::new(&charter);
        copy.sign(&keys[2]);
        signed.merge(&copy);
        assert!(Charters::new(vec![signed]).is_ok());
    }

    #[test]
    fn a_threshold_that_cannot_be_met_is_refused() {
        let charter = Charter {
            threshold: 2,
            ..charter()
        };
        assert!(matches!(
            SignedCharter::new(&charter).charter(),
            Err(CharterError::Threshold {
                threshold: 2,
                founders: 1
            })
        ));
    }

    proptest! {
        #[test]
        fn a_changed_bit_never_keeps_the_federation(place: usize, bit in 0u8..8) {
            let charters = founded();
            let mut bytes = charters.to_bytes();
            let place = place % bytes.len();
            bytes[place] ^= 1 << bit;
            let read = Charters::from_bytes(&bytes);
            prop_assert!(read.is_err() || read.is_ok_and(|other| other.federation() != charters.federation()));
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Charters::from_bytes(&bytes);
        }
    }

    pub(in crate::charter) fn key(seed: u8) -> KeyPair {
        KeyPair::from_seed(&[seed; 32])
    }

    pub(in crate::charter) fn charter() -> Charter {
        Charter {
            version: 1,
            name: "Test".to_string(),
            previous: None,
            founders: vec![key(1).institution()],
            threshold: 1,
            institutions: vec![],
            models: String::new(),
            policies: String::new(),
            created: UnixSeconds(1_000),
            doors: Vec::new(),
        }
    }

    fn founded() -> Charters {
        let mut signed = SignedCharter::new(&charter());
        signed.sign(&key(1));
        Charters::new(vec![signed]).unwrap()
    }
}
