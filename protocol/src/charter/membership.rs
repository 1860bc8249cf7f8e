//! Whether a peer belongs: the charter, the revocations, and what the peer shows.

use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{
    CERTIFICATE_SECONDS_MAX, CLOCK_SKEW_SECONDS, Capabilities, Certificate, Charters, NAME_BYTES_MAX, REVOKED_MAX,
    Revocation,
};
use crate::hash::{Digest, FederationId, InstitutionId, NodeId};
use crate::identity::{Signed, SignedError, whole};
use crate::time::UnixSeconds;
use crate::wire::CREDENTIALS_BYTES_MAX;

/// What a node shows of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Its federation.
    pub federation: FederationId,
    /// What its federation is called, to name it when it is not ours.
    pub federation_name: String,
    /// The charter that it holds to be in force.
    pub charter: Digest,
    /// Its institution's word.
    pub certificate: Signed<Certificate>,
}

impl Credentials {
    /// The encoding for wires.
    pub fn to_bytes(&self) -> Vec<u8> {
        // Credentials hold nothing that postcard cannot write.
        postcard::to_allocvec(self).unwrap_or_default()
    }

    /// Reads [`Self::to_bytes`]; the certificate is not checked yet.
    ///
    /// # Errors
    ///
    /// [`SignedError`] for bytes that are too long or malformed.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SignedError> {
        if bytes.len() > CREDENTIALS_BYTES_MAX {
            return Err(SignedError::TooLong {
                length_bytes: bytes.len(),
                limit_bytes: CREDENTIALS_BYTES_MAX,
            });
        }
        whole(bytes)
    }
}

/// A peer that belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The node.
    pub node: NodeId,
    /// Its institution.
    pub institution: InstitutionId,
    /// What the charter calls the institution.
    pub institution_name: String,
    /// What it may do: no more than certificate and charter both allow.
    pub capabilities: Capabilities,
    /// Until when.
    pub not_after: UnixSeconds,
}

/// Why a peer does not belong.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum Refusal {
    #[error("node {node} is a stranger: it shows no certificate")]
    Stranger { node: NodeId },
    #[error("node {node} belongs to the federation `{name}` ({theirs}), this is {ours}")]
    OtherFederation {
        node: NodeId,
        name: String,
        theirs: FederationId,
        ours: FederationId,
    },
    #[error("institution {institution}, which certified node {node}, is not in the charter")]
    UnknownInstitution { node: NodeId, institution: InstitutionId },
    #[error("institution `{name}` left the federation at {expired} (unix seconds); it is now {now}")]
    InstitutionExpired { name: String, expired: u64, now: u64 },
    #[error("certificate of node {node} expired at {expired} (unix seconds); it is now {now}")]
    Expired { node: NodeId, expired: u64, now: u64 },
    #[error("certificate of node {node} begins at {begins} (unix seconds); it is now {now}")]
    NotYetValid { node: NodeId, begins: u64, now: u64 },
    #[error("certificate of node {node} is for {life_seconds} seconds, over the limit of {CERTIFICATE_SECONDS_MAX}")]
    TooLong { node: NodeId, life_seconds: u64 },
    #[error("institution `{name}` has revoked node {node}")]
    Revoked { node: NodeId, name: String },
    #[error("certificate that node {node} shows has a bad signature: {why}")]
    BadSignature { node: NodeId, why: SignedError },
    #[error("node {node} shows a certificate that is for {certified}")]
    WrongKey { node: NodeId, certified: NodeId },
    #[error("what node {node} shows is malformed: {why}")]
    Malformed { node: NodeId, why: SignedError },
    #[error("certificate of node {node} has format version {version}, this program reads 1")]
    Version { node: NodeId, version: u16 },
}

/// Why a list of revocations is not taken.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum RevocationError {
    #[error("revocation is malformed: {0}")]
    Signed(#[from] SignedError),
    #[error("revocation is of the federation {0}")]
    OtherFederation(FederationId),
    #[error("institution {0}, which revokes, is not in the charter")]
    UnknownInstitution(InstitutionId),
    #[error("revocation of {institution} is signed by another key")]
    WrongKey { institution: InstitutionId },
    #[error("{count} entries are over the limit of {REVOKED_MAX}")]
    TooMany { count: usize },
}

/// Who belongs, as far as this node knows.
///
/// It holds at most one list of revocations for each institution of the charter.
#[derive(Debug, Clone)]
pub struct Membership {
    charters: Charters,
    revocations: BTreeMap<InstitutionId, (Revocation, Signed<Revocation>)>,
}

impl Membership {
    /// Nobody is revoked yet.
    pub fn new(charters: Charters) -> Self {
        Self {
            charters,
            revocations: BTreeMap::new(),
        }
    }

    /// The charters.
    pub fn charters(&self) -> &Charters {
        &self.charters
    }

    /// Takes a longer chain; answers whether it was one.
    pub fn update(&mut self, charters: Charters) -> bool {
        let newer = self.charters.is_continued_by(&charters);
        if newer {
            self.charters = charters;
            let current = self.charters.current();
            self.revocations.retain(|key, _| current.institution(*key).is_some());
        }
        newer
    }

    /// Takes a list of revocations; answers whether it is newer than what was known.
    ///
    /// # Errors
    ///
    /// [`RevocationError`] for a list that is not the institution's.
    pub fn revoke(&mut self, signed: Signed<Revocation>) -> Result<bool, RevocationError> {
        let revocation = signed.open()?;
        if revocation.federation != self.charters.federation() {
            return Err(RevocationError::OtherFederation(revocation.federation));
        }
        let institution = revocation.institution;
        if signed.by() != institution.0 {
            return Err(RevocationError::WrongKey { institution });
        }
        if self.charters.current().institution(institution).is_none() {
            return Err(RevocationError::UnknownInstitution(institution));
        }
        let count = revocation.nodes.len().max(revocation.serials.len());
        if count > REVOKED_MAX {
            return Err(RevocationError::TooMany { count });
        }
        let newer = match self.revocations.get(&institution) {
            Some((known, _)) => revocation.epoch > known.epoch,
            None => true,
        };
        if newer {
            self.revocations.insert(institution, (revocation, signed));
        }
        Ok(newer)
    }

    /// The newest list of every institution that has one, to be passed on.
    pub fn revocations(&self) -> impl Iterator<Item = &Signed<Revocation>> {
        self.revocations.values().map(|(_, signed)| signed)
    }

    /// What `institution` has revoked.
    pub fn revocation(&self, institution: InstitutionId) -> Option<&Revocation> {
        self.revocations.get(&institution).map(|(revocation, _)| revocation)
    }

    /// Checks what the authenticated peer `presented_by` shows, as received.
    ///
    /// # Errors
    ///
    /// [`Refusal`], which says which rule and about whom.
    pub fn admit(&self, credentials: &[u8], presented_by: NodeId, now: UnixSeconds) -> Result<Member, Refusal> {
        let node = presented_by;
        if credentials.is_empty() {
            return Err(Refusal::Stranger { node });
        }
        let shown = Credentials::from_bytes(credentials).map_err(|why| Refusal::Malformed { node, why })?;
        if shown.federation != self.charters.federation() {
            return Err(self.other_federation(node, shown.federation, &shown.federation_name));
        }
        self.check(&shown.certificate, node, now)
    }

    /// Checks a certificate that the authenticated peer `presented_by` shows.
    ///
    /// # Errors
    ///
    /// [`Refusal`], which says which rule and about whom.
    pub fn check(
        &self,
        certificate: &Signed<Certificate>,
        presented_by: NodeId,
        now: UnixSeconds,
    ) -> Result<Member, Refusal> {
        let node = presented_by;
        let certificate = {
            let opened = certificate.open().map_err(|why| match why {
                SignedError::Signature { .. } => Refusal::BadSignature { node, why },
                SignedError::TooLong { .. } | SignedError::Malformed(_) | SignedError::Trailing { .. } => {
                    Refusal::Malformed { node, why }
                }
            })?;
            if certificate.by() != opened.institution.0 {
                let why = SignedError::Signature {
                    by: opened.institution.0,
                };
                return Err(Refusal::BadSignature { node, why });
            }
            opened
        };
        if certificate.version != 1 {
            let version = certificate.version;
            return Err(Refusal::Version { node, version });
        }
        if certificate.federation != self.charters.federation() {
            return Err(self.other_federation(node, certificate.federation, "?"));
        }
        if certificate.node != node {
            let certified = certificate.node;
            return Err(Refusal::WrongKey { node, certified });
        }
        self.check_institution(&certificate, now)?;
        check_time(&certificate, now)?;
        self.member(&certificate)
    }

    fn other_federation(&self, node: NodeId, theirs: FederationId, name: &str) -> Refusal {
        Refusal::OtherFederation {
            node,
            // A name from a stranger goes to people's terminals: short, and without control characters.
            name: name
                .chars()
                .filter(|letter| !letter.is_control())
                .take(NAME_BYTES_MAX)
                .collect(),
            theirs,
            ours: self.charters.federation(),
        }
    }

    fn check_institution(&self, certificate: &Certificate, now: UnixSeconds) -> Result<(), Refusal> {
        let institution = certificate.institution;
        let node = certificate.node;
        let Some(entry) = self.charters.current().institution(institution) else {
            return Err(Refusal::UnknownInstitution { node, institution });
        };
        if let Some(expires) = entry.expires
            && now.0 > expires.0.saturating_add(CLOCK_SKEW_SECONDS)
        {
            return Err(Refusal::InstitutionExpired {
                name: entry.name.clone(),
                expired: expires.0,
                now: now.0,
            });
        }
        let revoked = self.revocation(institution).is_some_and(|revocation| {
            revocation.nodes.contains(&node) || revocation.serials.contains(&certificate.serial)
        });
        if revoked {
            let name = entry.name.to_string();
            return Err(Refusal::Revoked { node, name });
        }
        Ok(())
    }

    fn member(&self, certificate: &Certificate) -> Result<Member, Refusal> {
        let institution = certificate.institution;
        let node = certificate.node;
        let entry = self.charters.current().institution(institution);
        let entry = entry.ok_or(Refusal::UnknownInstitution { node, institution })?;
        Ok(Member {
            node,
            institution,
            institution_name: entry.name.clone(),
            capabilities: certificate.capabilities.and(entry.capabilities),
            not_after: certificate.not_after,
        })
    }
}

fn check_time(certificate: &Certificate, now: UnixSeconds) -> Result<(), Refusal> {
    let node = certificate.node;
    let (begins, expired) = (certificate.not_before.0, certificate.not_after.0);
    let life_seconds = expired.saturating_sub(begins);
    if life_seconds > CERTIFICATE_SECONDS_MAX {
        return Err(Refusal::TooLong { node, life_seconds });
    }
    if now.0 > expired.saturating_add(CLOCK_SKEW_SECONDS) {
        let now = now.0;
        return Err(Refusal::Expired { node, expired, now });
    }
    if now.0.saturating_add(CLOCK_SKEW_SECONDS) < begins {
        let now = now.0;
        return Err(Refusal::NotYetValid { node, begins, now });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::charter::{Charter, InstitutionEntry, SignedCharter};
    use crate::identity::KeyPair;
    use alloc::vec;
    use proptest::prelude::*;

    const NOW: UnixSeconds = UnixSeconds(1_800_000_000);
    const DAY: u64 = 24 * 3600;

    #[test]
    fn a_certified_node_belongs_with_no_more_than_its_institution_may() {
        let member = membership().check(&sign(&certificate()), node(), NOW).unwrap();
        assert_eq!(member.institution_name, "TU Delft");
        assert_eq!(member.capabilities, Capabilities::ORDINARY);
    }

    #[test]
    fn every_refusal_says_which_and_why() {
        type Expected = fn(&Refusal) -> bool;
        let other = KeyPair::from_seed(&[5; 32]);
        let cases: [(Signed<Certificate>, Expected); 8] = [
            (
                sign(&Certificate {
                    federation: FederationId([1; 32]),
                    ..certificate()
                }),
                |refusal| matches!(refusal, Refusal::OtherFederation { .. }),
            ),
            (
                sign(&Certificate {
                    node: other.node(),
                    ..certificate()
                }),
                |refusal| matches!(refusal, Refusal::WrongKey { .. }),
            ),
            (
                sign(&Certificate {
                    not_after: UnixSeconds(NOW.0 - DAY),
                    not_before: UnixSeconds(NOW.0 - 9 * DAY),
                    ..certificate()
                }),
                |refusal| matches!(refusal, Refusal::Expired { .. }),
            ),
            (
                sign(&Certificate {
                    not_before: UnixSeconds(NOW.0 + DAY),
                    ..certificate()
                }),
                |refusal| matches!(refusal, Refusal::NotYetValid { .. }),
            ),
            (
                sign(&Certificate {
                    not_after: UnixSeconds(NOW.0 + 90 * DAY),
                    ..certificate()
                }),
                |refusal| matches!(refusal, Refusal::TooLong { .. }),
            ),
            (Signed::new(&other, &certificate()), |refusal| {
                matches!(refusal, Refusal::BadSignature { .. })
            }),
            (
                Signed::new(
                    &other,
                    &Certificate {
                        institution: other.institution(),
                        ..certificate()
                    },
                ),
                |refusal| matches!(refusal, Refusal::UnknownInstitution { .. }),
            ),
            (
                sign(&Certificate {
                    version: 2,
                    ..certificate()
                }),
                |refusal| matches!(refusal, Refusal::Version { .. }),
            ),
        ];
        for (certificate, expected) in cases {
            let refusal = membership().check(&certificate, node(), NOW).unwrap_err();
            assert!(expected(&refusal), "{refusal}");
        }
    }

    #[test]
    fn a_stranger_and_a_member_of_another_federation_are_named() {
        assert_eq!(
            membership().admit(&[], node(), NOW),
            Err(Refusal::Stranger { node: node() })
        );
        let elsewhere = Credentials {
            federation: FederationId([1; 32]),
            federation_name: "Elsewhere\u{1b}[31m".to_string(),
            ..credentials()
        };
        let refusal = membership().admit(&elsewhere.to_bytes(), node(), NOW).unwrap_err();
        assert!(matches!(&refusal, Refusal::OtherFederation { name, .. } if name == "Elsewhere[31m"));
    }

    #[test]
    fn clocks_may_differ_by_five_minutes() {
        let begins_soon = Certificate {
            not_before: UnixSeconds(NOW.0 + CLOCK_SKEW_SECONDS),
            ..certificate()
        };
        assert!(membership().check(&sign(&begins_soon), node(), NOW).is_ok());
    }

    #[test]
    fn a_revoked_node_is_out_and_an_older_list_does_not_bring_it_back() {
        let mut membership = membership();
        let list = |epoch, nodes| {
            let revocation = Revocation {
                version: 1,
                federation: membership_id(),
                institution: institution().institution(),
                epoch,
                nodes,
                serials: vec![],
            };
            Signed::new(&institution(), &revocation)
        };
        assert_eq!(membership.revoke(list(2, vec![node()])), Ok(true));
        assert_eq!(membership.revoke(list(1, vec![])), Ok(false));
        let refusal = membership.check(&sign(&certificate()), node(), NOW);
        assert!(matches!(refusal, Err(Refusal::Revoked { .. })));
    }

    #[test]
    fn nobody_revokes_for_another_institution() {
        let stranger = KeyPair::from_seed(&[6; 32]);
        let revocation = Revocation {
            version: 1,
            federation: membership_id(),
            institution: institution().institution(),
            epoch: 9,
            nodes: vec![node()],
            serials: vec![],
        };
        let refused = membership().revoke(Signed::new(&stranger, &revocation));
        assert!(matches!(refused, Err(RevocationError::WrongKey { .. })));
    }

    proptest! {
        #[test]
        fn changed_credentials_are_refused(place: usize, bit in 0u8..8) {
            let mut bytes = credentials().to_bytes();
            // Name and charter hash are not signed: they inform people and prompt a fetch.
            let signed = Signed::to_bytes(&credentials().certificate).len();
            let place = bytes.len() - 1 - place % signed;
            bytes[place] ^= 1 << bit;
            prop_assert!(membership().admit(&bytes, node(), NOW).is_err());
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(membership().admit(&bytes, node(), NOW).is_err());
        }
    }

    fn institution() -> KeyPair {
        KeyPair::from_seed(&[1; 32])
    }

    fn node() -> NodeId {
        KeyPair::from_seed(&[2; 32]).node()
    }

    fn membership() -> Membership {
        let charter = Charter {
            version: 1,
            name: "Test".to_string(),
            previous: None,
            founders: vec![institution().institution()],
            threshold: 1,
            institutions: vec![InstitutionEntry {
                key: institution().institution(),
                name: "TU Delft".to_string(),
                capabilities: Capabilities::ORDINARY,
                expires: None,
            }],
            models: String::new(),
            policies: String::new(),
            created: UnixSeconds(1),
            doors: Vec::new(),
        };
        let mut signed = SignedCharter::new(&charter);
        signed.sign(&institution());
        Membership::new(Charters::new(vec![signed]).unwrap())
    }

    fn membership_id() -> FederationId {
        membership().charters().federation()
    }

    fn certificate() -> Certificate {
        Certificate {
            version: 1,
            federation: membership_id(),
            node: node(),
            institution: institution().institution(),
            capabilities: Capabilities::ALL,
            not_before: NOW,
            not_after: UnixSeconds(NOW.0 + 10 * DAY),
            serial: 7,
        }
    }

    fn sign(certificate: &Certificate) -> Signed<Certificate> {
        Signed::new(&institution(), certificate)
    }

    fn credentials() -> Credentials {
        Credentials {
            federation: membership_id(),
            federation_name: "Test".to_string(),
            charter: membership().charters().hash(),
            certificate: sign(&certificate()),
        }
    }
}
