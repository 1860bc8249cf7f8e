//! Who may be here: the membership as both planes ask it, with this node's own certificate.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use polder_protocol::charter::{
    Capabilities, Certificate, Charters, Credentials, Member, Membership, Refusal, Revocation, RevocationError,
};
use polder_protocol::hash::{Digest, FederationId, InstitutionId, NodeId, digest};
use polder_protocol::identity::Signed;
use polder_protocol::time::UnixSeconds;
use thiserror::Error;

use crate::enrol::renew_own;
use crate::gate::{Admitted, Gate, Refused};
use crate::home::{Home, HomeError};

/// For how many seconds a check of credentials holds, unless a charter or a revocation arrives: everybody's are seen again
/// and again, and each costs a signature. Certificates allow five minutes for clocks.
const CHECK_HOLDS_SECONDS: u64 = 60;

/// Checks that are remembered; beyond, they begin anew.
const CHECKS_MAX: usize = 4_096;

/// This node's membership and everybody's.
///
/// It is shared between tasks; every method takes its lock for a moment and never across another call.
#[derive(Debug)]
pub struct Members {
    node: NodeId,
    inner: RwLock<Inner>,
}

#[derive(Debug)]
struct Inner {
    membership: Membership,
    certificate: Signed<Certificate>,
    own: Member,
    /// By peer and credentials: who was admitted, and when.
    checked: Mutex<BTreeMap<Digest, (UnixSeconds, Member)>>,
}

/// Why this node is no member.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum MembersError {
    #[error("this home belongs to no federation yet: join with an invite, or write a charter")]
    NotEnrolled,
    #[error("this node's own certificate is refused")]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Home(#[from] HomeError),
}

impl Members {
    /// Reads charters, certificate and revocations of a home.
    ///
    /// # Errors
    ///
    /// [`MembersError::NotEnrolled`] without charter or certificate, [`MembersError::Refused`] for a certificate that
    /// is expired, revoked or of another node.
    pub fn open(home: &Home) -> Result<Self, MembersError> {
        if let Err(error) = renew_own(home) {
            tracing::warn!(%error, "this gateway cannot renew its own certificate");
        }
        let node = home.node_key()?.node();
        let charters = home.charters()?.ok_or(MembersError::NotEnrolled)?;
        let certificate = home.certificate()?.ok_or(MembersError::NotEnrolled)?;
        let members = Self::new(node, charters, certificate)?;
        for list in home.revocations()? {
            if let Err(error) = members.revoke(list) {
                tracing::warn!(%error, "a kept list of revocations is not used");
            }
        }
        members.check_own()?;
        Ok(members)
    }

    /// A membership with nothing revoked.
    ///
    /// # Errors
    ///
    /// [`Refusal`] for a certificate that is not this node's or does not hold.
    pub fn new(node: NodeId, charters: Charters, certificate: Signed<Certificate>) -> Result<Self, Refusal> {
        let membership = Membership::new(charters);
        let own = membership.check(&certificate, node, unix_now())?;
        Ok(Self {
            node,
            inner: RwLock::new(Inner {
                membership,
                certificate,
                own,
                checked: Mutex::default(),
            }),
        })
    }

    /// Brings this value and the home's files together: each takes what is newer in the other, charters and revocations
    /// alike, and this value takes a renewed certificate. A gateway renews its own certificate when it is time. Answers
    /// whether anything is new here.
    ///
    /// # Errors
    ///
    /// [`MembersError`] for files that cannot be read or written, or a certificate on disk that does not hold.
    pub fn reload(&self, home: &Home) -> Result<bool, MembersError> {
        if let Err(error) = renew_own(home) {
            tracing::warn!(%error, "this gateway cannot renew its own certificate");
        }
        let _held = home.lock_membership()?;
        let (charters, kept) = (home.charters()?, home.revocations()?);
        let hash = charters.as_ref().map(Charters::hash);
        let mut changed = charters.is_some_and(|charters| self.update(charters));
        for list in &kept {
            changed |= self.revoke(list.clone()).unwrap_or(false);
        }
        let newest = self.charters();
        if hash != Some(newest.hash()) {
            home.save_charters(&newest)?;
        }
        let lists = self.revocations();
        if lists != kept {
            home.save_revocations(&lists)?;
        }
        if let Some(certificate) = home.certificate()?
            && certificate != self.certificate()
        {
            self.renew(certificate)?;
            changed = true;
        }
        Ok(changed)
    }

    /// Takes a longer chain of charters; answers whether it was one.
    pub fn update(&self, charters: Charters) -> bool {
        self.write(|inner| inner.membership.update(charters))
    }

    /// Takes a list of revocations; answers whether it is newer than what was known.
    ///
    /// # Errors
    ///
    /// [`RevocationError`] for a list that is not its institution's.
    pub fn revoke(&self, list: Signed<Revocation>) -> Result<bool, RevocationError> {
        self.write(|inner| inner.membership.revoke(list))
    }

    /// Takes a new certificate for this node.
    ///
    /// # Errors
    ///
    /// [`Refusal`] for one that does not hold; the old one stays.
    pub fn renew(&self, certificate: Signed<Certificate>) -> Result<(), Refusal> {
        self.write(|inner| {
            inner.own = inner.membership.check(&certificate, self.node, unix_now())?;
            inner.certificate = certificate;
            Ok(())
        })
    }

    /// Whether this node's own certificate still holds.
    ///
    /// # Errors
    ///
    /// [`Refusal`], such as expired or revoked.
    pub fn check_own(&self) -> Result<Member, Refusal> {
        self.read(|inner| inner.membership.check(&inner.certificate, self.node, unix_now()))
    }

    /// Whether more than half of the certificate's life is over.
    pub fn wants_renewal(&self) -> bool {
        self.read(|inner| {
            inner
                .certificate
                .claim()
                .is_some_and(|certificate| certificate.wants_renewal(unix_now()))
        })
    }

    /// This node.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// The federation.
    pub fn federation(&self) -> FederationId {
        self.read(|inner| inner.membership.charters().federation())
    }

    /// What people call the federation.
    pub fn federation_name(&self) -> String {
        self.read(|inner| inner.membership.charters().current().name.clone())
    }

    /// This node's institution.
    pub fn institution(&self) -> InstitutionId {
        self.read(|inner| inner.own.institution)
    }

    /// What the charter calls this node's institution.
    pub fn institution_name(&self) -> String {
        self.read(|inner| inner.own.institution_name.clone())
    }

    /// What the charter calls an institution.
    pub fn name_of(&self, institution: InstitutionId) -> Option<String> {
        self.read(|inner| {
            let charter = inner.membership.charters().current();
            charter.institution(institution).map(|entry| entry.name.clone())
        })
    }

    /// What this node may do.
    pub fn capabilities(&self) -> Capabilities {
        self.read(|inner| inner.own.capabilities)
    }

    /// This node's certificate.
    pub fn certificate(&self) -> Signed<Certificate> {
        self.read(|inner| inner.certificate.clone())
    }

    /// The charters.
    pub fn charters(&self) -> Charters {
        self.read(|inner| inner.membership.charters().clone())
    }

    /// The newest list of every institution that has revoked something.
    pub fn revocations(&self) -> Vec<Signed<Revocation>> {
        self.read(|inner| inner.membership.revocations().cloned().collect())
    }

    /// Checks what a peer showed; as [`Gate::admit`], with the rule as a value.
    ///
    /// # Errors
    ///
    /// [`Refusal`], which says which rule and about whom.
    pub fn check(&self, peer: NodeId, credentials: &[u8]) -> Result<Member, Refusal> {
        let (hash, now) = (digest(&[&peer.0[..], credentials].concat()), unix_now());
        // What changes the membership waits until this is done, and then forgets it.
        self.read(|inner| {
            let remembered = || inner.checked.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((at, member)) = remembered().get(&hash)
                && now.0.abs_diff(at.0) < CHECK_HOLDS_SECONDS
            {
                return Ok(member.clone());
            }
            let member = inner.membership.admit(credentials, peer, now)?;
            let mut checked = remembered();
            if checked.len() >= CHECKS_MAX {
                checked.clear();
            }
            checked.insert(hash, (now, member.clone()));
            Ok(member)
        })
    }

    /// Checks a certificate that the authenticated peer `peer` showed.
    ///
    /// # Errors
    ///
    /// [`Refusal`], which says which rule and about whom.
    pub fn check_certificate(&self, peer: NodeId, certificate: &Signed<Certificate>) -> Result<Member, Refusal> {
        self.read(|inner| inner.membership.check(certificate, peer, unix_now()))
    }

    // Nothing panics while the lock is held, and every state between two statements is a valid one.
    fn read<T>(&self, look: impl FnOnce(&Inner) -> T) -> T {
        look(&self.inner.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        inner.checked = Mutex::default();
        change(&mut inner)
    }
}

impl Gate for Members {
    fn credentials(&self) -> Vec<u8> {
        self.read(|inner| {
            let charters = inner.membership.charters();
            let credentials = Credentials {
                federation: charters.federation(),
                federation_name: charters.current().name.clone(),
                charter: charters.hash(),
                certificate: inner.certificate.clone(),
            };
            credentials.to_bytes()
        })
    }

    fn admit(&self, peer: NodeId, credentials: &[u8]) -> Result<Admitted, Refused> {
        match self.check(peer, credentials) {
            Ok(member) => Ok(Admitted {
                node: member.node,
                institution: member.institution,
                capabilities: member.capabilities.0,
            }),
            Err(refusal) => Err(Refused {
                reason: refusal.to_string(),
            }),
        }
    }
}

/// The time of day, for certificates.
pub fn unix_now() -> UnixSeconds {
    // A clock before 1970 finds every certificate not yet valid, which is what such a clock deserves.
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixSeconds(since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use polder_protocol::charter::{Charter, InstitutionEntry, SignedCharter};
    use polder_protocol::identity::KeyPair;

    #[test]
    fn members_admit_each_other_and_no_stranger() {
        let (first, second) = (members(11), members(12));
        let admitted = first.admit(second.node(), &second.credentials()).unwrap();
        assert_eq!(admitted.institution, institution().institution());
        let refused = first.admit(NodeId([9; 32]), &second.credentials()).unwrap_err();
        assert!(refused.reason.contains("certificate that is for"), "{refused}");
        assert!(first.admit(second.node(), &[]).unwrap_err().reason.contains("stranger"));
    }

    #[test]
    fn a_node_revoked_at_run_time_is_refused_from_then_on() {
        let (first, second) = (members(11), members(12));
        first.admit(second.node(), &second.credentials()).unwrap();
        let revocation = Revocation {
            version: 1,
            federation: first.federation(),
            institution: institution().institution(),
            epoch: 1,
            nodes: vec![second.node()],
            serials: vec![],
        };
        assert_eq!(first.revoke(Signed::new(&institution(), &revocation)), Ok(true));
        let refused = first.admit(second.node(), &second.credentials()).unwrap_err();
        assert!(refused.reason.contains("has revoked"), "{refused}");
    }

    #[test]
    fn a_home_without_charter_is_not_enrolled() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::open(folder.path()).unwrap();
        assert!(matches!(Members::open(&home), Err(MembersError::NotEnrolled)));
    }

    #[test]
    fn a_member_is_itself_again_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::open(folder.path()).unwrap();
        home.save_charters(&charters()).unwrap();
        home.save_certificate(&certify(home.node_key().unwrap().node()))
            .unwrap();
        let members = Members::open(&home).unwrap();
        assert_eq!(members.institution_name(), "TU Delft");
        assert!(!members.reload(&home).unwrap());
    }

    #[test]
    fn what_peers_told_is_kept_on_disk_and_what_was_kept_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::open(folder.path()).unwrap();
        home.save_charters(&charters()).unwrap();
        home.save_certificate(&certify(home.node_key().unwrap().node()))
            .unwrap();
        let members = Members::open(&home).unwrap();
        let list = |epoch| Revocation {
            version: 1,
            federation: charters().federation(),
            institution: institution().institution(),
            epoch,
            nodes: vec![],
            serials: vec![],
        };
        members.revoke(Signed::new(&institution(), &list(1))).unwrap();
        assert!(!members.reload(&home).unwrap());
        assert_eq!(home.revocations().unwrap(), members.revocations());
        home.save_revocations(&[Signed::new(&institution(), &list(2))]).unwrap();
        assert!(members.reload(&home).unwrap());
        assert_eq!(home.revocations().unwrap(), members.revocations());
    }

    fn members(seed: u8) -> Members {
        let node = KeyPair::from_seed(&[seed; 32]).node();
        Members::new(node, charters(), certify(node)).unwrap()
    }

    fn institution() -> KeyPair {
        KeyPair::from_seed(&[1; 32])
    }

    fn charters() -> Charters {
        let key = institution().institution();
        let mut signed = SignedCharter::new(&Charter {
            version: 1,
            name: "Test".into(),
            previous: None,
            founders: vec![key],
            threshold: 1,
            institutions: vec![InstitutionEntry {
                key,
                name: "TU Delft".into(),
                capabilities: Capabilities::ALL,
                expires: None,
            }],
            models: String::new(),
            policies: String::new(),
            // Not now: made a second later it would found another federation.
            created: UnixSeconds(1_700_000_000),
            doors: Vec::new(),
        });
        signed.sign(&institution());
        Charters::new(vec![signed]).unwrap()
    }

    fn certify(node: NodeId) -> Signed<Certificate> {
        let now = unix_now();
        let certificate = Certificate {
            version: 1,
            federation: charters().federation(),
            node,
            institution: institution().institution(),
            capabilities: Capabilities::ALL,
            not_before: now,
            not_after: UnixSeconds(now.0 + 3600),
            serial: 1,
        };
        Signed::new(&institution(), &certificate)
    }
}
