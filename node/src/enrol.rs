//! How a node comes to its certificate: it shows a one-use token, and its institution's gateway certifies it.
//!
//! Both sides are functions from bytes to bytes; the control plane carries them as [`Service::Enrol`], on a connection
//! on which both peers have proved their keys. They read and write files: call them where blocking is allowed.
//!
//! [`Service::Enrol`]: polder_protocol::wire::Service::Enrol

use polder_protocol::charter::{
    CERTIFICATE_SECONDS_MAX, Capabilities, Certificate, CharterError, Charters, Credentials, Membership, Refusal,
    Revocation,
};
use polder_protocol::hash::{FederationId, InstitutionId, NodeId};
use polder_protocol::identity::{KeyPair, Signed, SignedError};
use polder_protocol::invite::Invite;
use polder_protocol::time::UnixSeconds;
use polder_protocol::wire::CONTROL_BYTES_MAX;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::gate::{Admitted, Gate, Refused};
use crate::home::{Home, HomeError, KnownPeer, TokenError, random_32};
use crate::members::{Members, MembersError, unix_now};

/// How long a gateway's certificates hold: 14 days. They are renewed after seven, so a gateway may be away for a week.
pub const CERTIFICATE_SECONDS: u64 = 14 * 24 * 3600;

/// The longest request: a token, or a certificate.
const REQUEST_BYTES_MAX: usize = 1024;

#[derive(Serialize, Deserialize)]
enum Request {
    /// A newcomer's, with the token of its invite.
    Token([u8; 32]),
    /// A member's, which wants its certificate to last.
    Renew(Signed<Certificate>),
}

#[derive(Serialize, Deserialize)]
enum Answer {
    Certified {
        certificate: Signed<Certificate>,
        /// Encoded [`Charters`].
        charters: Vec<u8>,
        revocations: Vec<Signed<Revocation>>,
    },
    Refused {
        reason: String,
    },
}

/// Why there is no certificate.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum EnrolError {
    #[error("the gateway refuses: {0}")]
    Refused(String),
    #[error("the gateway's answer is malformed")]
    Malformed,
    #[error("the gateway belongs to federation {theirs}, the invite is for {invited}")]
    OtherFederation {
        theirs: FederationId,
        invited: FederationId,
    },
    #[error("the certificate is of institution {theirs}, the invite is of {invited}")]
    OtherInstitution {
        theirs: InstitutionId,
        invited: InstitutionId,
    },
    #[error("the gateway's charter does not hold")]
    Charter(#[from] CharterError),
    #[error("the certificate does not hold")]
    Certificate(#[from] Refusal),
    #[error("this node is a member of `{name}` ({ours}) already, and the invite is for {invited}")]
    Member {
        name: String,
        ours: FederationId,
        invited: FederationId,
    },
    #[error("institution {0} is not in the charter")]
    UnknownInstitution(InstitutionId),
    #[error("node {0} has been revoked")]
    Revoked(NodeId),
    #[error("this gateway does not hold the key of institution {0}")]
    NoKey(InstitutionId),
    #[error("the certificate is young: it can be renewed when half of its life is over")]
    TooEarly,
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error(transparent)]
    Home(#[from] HomeError),
    #[error(transparent)]
    Members(#[from] MembersError),
}

/// Certifies `node` with an institution's key: no more capabilities than the charter gives the institution, and for
/// `life_seconds`, at most 30 days.
///
/// # Errors
///
/// [`EnrolError::UnknownInstitution`] for a key that is not in the charter, [`EnrolError::Home`] without random
/// numbers.
pub fn certify(
    institution: &KeyPair,
    charters: &Charters,
    node: NodeId,
    capabilities: Capabilities,
    life_seconds: u64,
) -> Result<Signed<Certificate>, EnrolError> {
    let id = institution.institution();
    let entry = charters.current().institution(id);
    let entry = entry.ok_or(EnrolError::UnknownInstitution(id))?;
    let [a, b, c, d, e, f, g, h, ..] = random_32()?;
    let not_before = unix_now();
    let certificate = Certificate {
        version: 1,
        federation: charters.federation(),
        node,
        institution: id,
        capabilities: capabilities.and(entry.capabilities),
        not_before,
        not_after: UnixSeconds(not_before.0.saturating_add(life_seconds.min(CERTIFICATE_SECONDS_MAX))),
        serial: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
    };
    Ok(Signed::new(institution, &certificate))
}

/// The gateway's side: answers the authenticated peer `peer`. Whatever it sent, there is an answer.
pub fn handle(home: &Home, members: &Members, peer: NodeId, request: &[u8]) -> Vec<u8> {
    let answer = match issue(home, members, peer, request) {
        Ok(certificate) => Answer::Certified {
            certificate,
            charters: members.charters().to_bytes(),
            revocations: members.revocations(),
        },
        Err(error) => {
            tracing::info!(peer = %peer.short(), %error, "a node is not certified");
            Answer::Refused {
                reason: reason_for_peers(&error),
            }
        }
    };
    // An answer holds nothing that postcard cannot write.
    postcard::to_allocvec(&answer).unwrap_or_default()
}

/// A stranger hears which rule it met, and nothing about this machine's files.
fn reason_for_peers(error: &EnrolError) -> String {
    match error {
        EnrolError::Home(_) | EnrolError::Members(_) | EnrolError::Token(TokenError::Home(_)) => {
            "the gateway cannot read or write its own files; its log says which".into()
        }
        error => error.to_string(),
    }
}

fn issue(home: &Home, members: &Members, peer: NodeId, request: &[u8]) -> Result<Signed<Certificate>, EnrolError> {
    if request.len() > REQUEST_BYTES_MAX {
        return Err(EnrolError::Malformed);
    }
    let request: Request = postcard::from_bytes(request).map_err(|_| EnrolError::Malformed)?;
    let (institution, capabilities) = match request {
        Request::Token(token) => {
            let grant = home.use_token(&token, peer, unix_now())?;
            (grant.institution, grant.capabilities)
        }
        Request::Renew(old) => {
            let member = members.check_certificate(peer, &old)?;
            let certificate = old.claim().ok_or(EnrolError::Malformed)?;
            if !certificate.wants_renewal(unix_now()) {
                return Err(EnrolError::TooEarly);
            }
            (member.institution, certificate.capabilities)
        }
    };
    let revoked = |list: &Signed<Revocation>| {
        let list = list.claim();
        list.is_some_and(|list| list.institution == institution && list.nodes.contains(&peer))
    };
    if members.revocations().iter().any(revoked) {
        return Err(EnrolError::Revoked(peer));
    }
    let key = home.institution(institution)?.ok_or(EnrolError::NoKey(institution))?;
    certify(&key.key, &members.charters(), peer, capabilities, CERTIFICATE_SECONDS)
}

/// The newcomer's side: what to send to one of the invite's doors.
pub fn request(invite: &Invite) -> Vec<u8> {
    encode(&Request::Token(invite.token))
}

/// The newcomer's side: checks the answer against the invite, and keeps charters, certificate, revocations and peers.
/// Nothing is kept of an answer that does not hold.
///
/// # Errors
///
/// [`EnrolError`], which says what does not hold.
pub fn accept(home: &Home, invite: &Invite, answer: &[u8]) -> Result<Members, EnrolError> {
    if let Some(known) = home.charters()?
        && known.federation() != invite.federation
    {
        return Err(EnrolError::Member {
            name: known.current().name.clone(),
            ours: known.federation(),
            invited: invite.federation,
        });
    }
    let certified = read_answer(answer)?;
    if certified.1.federation() != invite.federation {
        return Err(EnrolError::OtherFederation {
            theirs: certified.1.federation(),
            invited: invite.federation,
        });
    }
    if certified.0.by() != invite.institution.0 {
        return Err(EnrolError::OtherInstitution {
            theirs: InstitutionId(certified.0.by()),
            invited: invite.institution,
        });
    }
    let peers: Vec<KnownPeer> = invite.doors.iter().map(KnownPeer::from).collect();
    keep(home, certified, &peers)
}

/// What [`accept_packet`] takes: a certificate made by hand, with what the node needs to check others.
pub fn packet(certificate: &Signed<Certificate>, charters: &Charters, revocations: &[Signed<Revocation>]) -> Vec<u8> {
    let answer = Answer::Certified {
        certificate: certificate.clone(),
        charters: charters.to_bytes(),
        revocations: revocations.to_vec(),
    };
    // An answer holds nothing that postcard cannot write.
    postcard::to_allocvec(&answer).unwrap_or_default()
}

/// Takes a certificate that a person brought, with its charter. The person vouches for the federation; a home that is
/// a member already takes none of another.
///
/// # Errors
///
/// [`EnrolError`], which says what does not hold.
pub fn accept_packet(home: &Home, packet: &[u8]) -> Result<Members, EnrolError> {
    let certified = read_answer(packet)?;
    if let Some(known) = home.charters()?
        && known.federation() != certified.1.federation()
    {
        return Err(EnrolError::Member {
            name: known.current().name.clone(),
            ours: known.federation(),
            invited: certified.1.federation(),
        });
    }
    let peers = home.peers()?;
    keep(home, certified, &peers)
}

/// Checks everything, then keeps everything.
fn keep(home: &Home, certified: Certified, peers: &[KnownPeer]) -> Result<Members, EnrolError> {
    let (certificate, charters, revocations) = certified;
    let members = Members::new(home.node_key()?.node(), charters, certificate.clone())?;
    if let Some(known) = home.charters()? {
        // An older charter than the one that is known here is not taken.
        let newest = members.charters();
        if !(newest == known || known.is_continued_by(&newest)) {
            members.update(known);
        }
    }
    for list in revocations.into_iter().chain(home.revocations()?) {
        // A list that does not hold is its bringer's mistake, and no reason to stay outside.
        let _ = members.revoke(list);
    }
    members.check_own()?;
    home.save_revocations(&members.revocations())?;
    home.save_peers(peers)?;
    home.save_charters(&members.charters())?;
    // Last, since a home with a certificate counts as enrolled.
    home.save_certificate(&certificate)?;
    Ok(members)
}

/// A member's side, when [`Members::wants_renewal`]: what to send to a gateway of its institution.
pub fn renewal_request(members: &Members) -> Vec<u8> {
    encode(&Request::Renew(members.certificate()))
}

/// A member's side: checks the answer to [`renewal_request`], takes and keeps the certificate, and newer charters.
///
/// # Errors
///
/// [`EnrolError`]; the old certificate stays.
pub fn accept_renewal(home: &Home, members: &Members, answer: &[u8]) -> Result<(), EnrolError> {
    let (certificate, charters, _) = read_answer(answer)?;
    if members.update(charters) {
        home.save_charters(&members.charters())?;
    }
    members.renew(certificate.clone())?;
    home.save_certificate(&certificate)?;
    Ok(())
}

/// Renews the certificate of a home that holds its institution's key, when half of its life is over, or all of it: a
/// gateway needs nobody else for that. Answers whether it did.
///
/// # Errors
///
/// [`EnrolError`] for a node that its institution has revoked, and for files.
pub fn renew_own(home: &Home) -> Result<bool, EnrolError> {
    let (Some(charters), Some(signed)) = (home.charters()?, home.certificate()?) else {
        return Ok(false);
    };
    let Ok(old) = signed.open() else { return Ok(false) };
    if !old.wants_renewal(unix_now()) {
        return Ok(false);
    }
    let Some(own) = home.institution(old.institution)? else {
        return Ok(false);
    };
    let mut membership = Membership::new(charters);
    for list in home.revocations()? {
        // A list that does not hold revokes nobody.
        let _ = membership.revoke(list);
    }
    let node = home.node_key()?.node();
    let list = membership.revocation(old.institution);
    if list.is_some_and(|list| list.nodes.contains(&node)) {
        return Err(EnrolError::Revoked(node));
    }
    let charters = membership.charters();
    let certificate = certify(&own.key, charters, node, old.capabilities, CERTIFICATE_SECONDS)?;
    home.save_certificate(&certificate)?;
    Ok(true)
}

type Certified = (Signed<Certificate>, Charters, Vec<Signed<Revocation>>);

fn read_answer(answer: &[u8]) -> Result<Certified, EnrolError> {
    if answer.len() > CONTROL_BYTES_MAX {
        return Err(EnrolError::Malformed);
    }
    match postcard::from_bytes(answer).map_err(|_| EnrolError::Malformed)? {
        Answer::Certified {
            certificate,
            charters,
            revocations,
        } => Ok((certificate, Charters::from_bytes(&charters)?, revocations)),
        Answer::Refused { reason } => Err(EnrolError::Refused(printable(&reason))),
    }
}

/// What a gateway reads of newcomers and a newcomer of gateways, as fuzz targets see it.
pub(crate) fn untrusted(bytes: &[u8]) {
    if let Ok(Request::Renew(certificate)) = postcard::from_bytes(bytes) {
        let _ = (certificate.claim(), certificate.open());
    }
    if let Ok((_, charters, _)) = read_answer(bytes) {
        assert_eq!(Charters::from_bytes(&charters.to_bytes()), Ok(charters));
    }
}

/// Where its fuzzing begins.
pub(crate) fn honest() -> Vec<Vec<u8>> {
    let key = KeyPair::from_seed(&[1; 32]);
    let certificate = Certificate {
        version: 1,
        federation: FederationId([2; 32]),
        node: KeyPair::from_seed(&[3; 32]).node(),
        institution: key.institution(),
        capabilities: Capabilities::ORDINARY,
        not_before: UnixSeconds(1_800_000_000),
        not_after: UnixSeconds(1_800_003_600),
        serial: 1,
    };
    let certificate = Signed::new(&key, &certificate);
    let requests = [Request::Token([7; 32]), Request::Renew(certificate.clone())];
    let answers = [
        Answer::Refused {
            reason: "the invite was already used by another node".into(),
        },
        Answer::Certified {
            certificate,
            charters: Vec::new(),
            revocations: Vec::new(),
        },
    ];
    let requests = requests.iter().map(postcard::to_allocvec);
    requests
        .chain(answers.iter().map(postcard::to_allocvec))
        .filter_map(Result::ok)
        .collect()
}

/// A peer's words go to a person's terminal: short, and without control characters.
fn printable(text: &str) -> String {
    text.chars().filter(|letter| !letter.is_control()).take(400).collect()
}

fn encode(request: &Request) -> Vec<u8> {
    // A request holds nothing that postcard cannot write.
    postcard::to_allocvec(request).unwrap_or_default()
}

/// The gate of a node that has an invite and no certificate yet. It admits the gateways of the inviting institution,
/// and shows nothing itself.
#[derive(Debug)]
pub struct Newcomer {
    federation: FederationId,
    institution: InstitutionId,
}

impl Newcomer {
    /// The gate for the time between invite and certificate.
    pub fn new(invite: &Invite) -> Self {
        Self {
            federation: invite.federation,
            institution: invite.institution,
        }
    }

    fn check(&self, peer: NodeId, credentials: &[u8]) -> Result<Certificate, EnrolError> {
        let malformed = |_: SignedError| EnrolError::Malformed;
        let shown = Credentials::from_bytes(credentials).map_err(malformed)?;
        let certificate = shown.certificate.open().map_err(malformed)?;
        if certificate.federation != self.federation {
            return Err(EnrolError::OtherFederation {
                theirs: certificate.federation,
                invited: self.federation,
            });
        }
        if shown.certificate.by() != self.institution.0 || certificate.institution != self.institution {
            return Err(EnrolError::OtherInstitution {
                theirs: certificate.institution,
                invited: self.institution,
            });
        }
        if certificate.node != peer {
            return Err(EnrolError::Certificate(Refusal::WrongKey {
                node: peer,
                certified: certificate.node,
            }));
        }
        Ok(certificate)
    }
}

impl Gate for Newcomer {
    fn credentials(&self) -> Vec<u8> {
        Vec::new()
    }

    fn admit(&self, peer: NodeId, credentials: &[u8]) -> Result<Admitted, Refused> {
        match self.check(peer, credentials) {
            Ok(certificate) => Ok(Admitted {
                node: peer,
                institution: certificate.institution,
                capabilities: certificate.capabilities.0,
            }),
            Err(error) => Err(Refused {
                reason: error.to_string(),
            }),
        }
    }
}

/// Signs the next list of `institution`'s revocations: what was revoked before, and `node`.
///
/// # Errors
///
/// [`EnrolError::UnknownInstitution`] for a key that is not in the charter.
pub fn revoke(institution: &KeyPair, membership: &Membership, node: NodeId) -> Result<Signed<Revocation>, EnrolError> {
    let id = institution.institution();
    if membership.charters().current().institution(id).is_none() {
        return Err(EnrolError::UnknownInstitution(id));
    }
    let mut list = membership.revocation(id).cloned().unwrap_or(Revocation {
        version: 1,
        federation: membership.charters().federation(),
        institution: id,
        epoch: 0,
        nodes: Vec::new(),
        serials: Vec::new(),
    });
    list.epoch = list.epoch.saturating_add(1);
    if !list.nodes.contains(&node) {
        list.nodes.push(node);
    }
    Ok(Signed::new(institution, &list))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::home::TokenGrant;
    use polder_protocol::charter::{Charter, InstitutionEntry, SignedCharter};
    use polder_protocol::invite::Door;

    #[test]
    fn a_newcomer_with_an_invite_becomes_a_member() {
        let gateway = Gateway::new();
        let (_folder, newcomer) = Gateway::home();
        let invite = gateway.invite();
        let peer = newcomer.node_key().unwrap().node();
        let answer = handle(&gateway.home, &gateway.members, peer, &request(&invite));
        let members = accept(&newcomer, &invite, &answer).unwrap();
        assert_eq!(members.capabilities(), Capabilities::ORDINARY);
        assert!(gateway.members.admit(peer, &members.credentials()).is_ok());
        assert!(Members::open(&newcomer).is_ok());
        assert_eq!(newcomer.peers().unwrap().len(), 1);
    }

    #[test]
    fn an_invite_lets_one_node_in() {
        let gateway = Gateway::new();
        let invite = gateway.invite();
        handle(&gateway.home, &gateway.members, NodeId([1; 32]), &request(&invite));
        let (_folder, second) = Gateway::home();
        let answer = handle(
            &gateway.home,
            &gateway.members,
            second.node_key().unwrap().node(),
            &request(&invite),
        );
        let refused = accept(&second, &invite, &answer).unwrap_err();
        assert!(refused.to_string().contains("already used"), "{refused}");
        assert!(second.certificate().unwrap().is_none());
    }

    #[test]
    fn an_answer_of_another_federation_is_not_kept() {
        let (gateway, other) = (Gateway::new(), Gateway::new());
        let (_folder, newcomer) = Gateway::home();
        let peer = newcomer.node_key().unwrap().node();
        let invite = gateway.invite();
        let answer = handle(&other.home, &other.members, peer, &request(&other.invite()));
        let refused = accept(&newcomer, &invite, &answer).unwrap_err();
        assert!(matches!(refused, EnrolError::OtherFederation { .. }), "{refused}");
        assert!(newcomer.charters().unwrap().is_none());
    }

    #[test]
    fn a_newcomer_trusts_no_gateway_but_the_institutions() {
        let (gateway, other) = (Gateway::new(), Gateway::new());
        let gate = Newcomer::new(&gateway.invite());
        assert!(
            gate.admit(gateway.members.node(), &gateway.members.credentials())
                .is_ok()
        );
        assert!(gate.admit(other.members.node(), &other.members.credentials()).is_err());
        assert!(gate.admit(NodeId([1; 32]), &gateway.members.credentials()).is_err());
    }

    #[test]
    fn a_certificate_is_renewed_when_half_of_its_life_is_over_and_not_before() {
        let gateway = Gateway::new();
        let (_folder, home) = Gateway::home();
        let node = home.node_key().unwrap().node();
        let young = gateway.certificate(node, unix_now().0 - 10);
        let members = Members::new(node, gateway.members.charters(), young).unwrap();
        let answer = handle(&gateway.home, &gateway.members, node, &renewal_request(&members));
        assert!(accept_renewal(&home, &members, &answer).is_err());

        let old = gateway.certificate(node, unix_now().0 - CERTIFICATE_SECONDS * 2 / 3);
        let members = Members::new(node, gateway.members.charters(), old).unwrap();
        assert!(members.wants_renewal());
        let answer = handle(&gateway.home, &gateway.members, node, &renewal_request(&members));
        accept_renewal(&home, &members, &answer).unwrap();
        assert!(!members.wants_renewal());
    }

    #[test]
    fn a_gateway_that_was_off_for_a_month_renews_its_own_certificate() {
        let gateway = Gateway::new();
        let old = gateway.certificate(gateway.members.node(), unix_now().0 - 3 * CERTIFICATE_SECONDS);
        gateway.home.save_charters(&gateway.members.charters()).unwrap();
        gateway.home.save_certificate(&old).unwrap();
        let members = Members::open(&gateway.home).unwrap();
        assert!(!members.wants_renewal());
    }

    #[test]
    fn a_revoked_node_gets_no_new_certificate() {
        let gateway = Gateway::new();
        let peer = NodeId([4; 32]);
        let membership = Membership::new(gateway.members.charters());
        gateway
            .members
            .revoke(revoke(&gateway.key, &membership, peer).unwrap())
            .unwrap();
        let invite = gateway.invite();
        let answer = handle(&gateway.home, &gateway.members, peer, &request(&invite));
        assert!(matches!(read_answer(&answer), Err(EnrolError::Refused(reason)) if reason.contains("revoked")));
    }

    #[test]
    fn garbage_gets_an_answer() {
        let gateway = Gateway::new();
        for garbage in [vec![], vec![0; 5], vec![255; 2000], vec![1; 300]] {
            let answer = handle(&gateway.home, &gateway.members, NodeId([4; 32]), &garbage);
            assert!(matches!(read_answer(&answer), Err(EnrolError::Refused(_))));
        }
    }

    struct Gateway {
        _folder: tempfile::TempDir,
        home: Home,
        key: KeyPair,
        members: Members,
    }

    impl Gateway {
        fn home() -> (tempfile::TempDir, Home) {
            let folder = tempfile::tempdir().unwrap();
            let home = Home::open(&folder.path().join("home")).unwrap();
            (folder, home)
        }

        fn new() -> Self {
            let (folder, home) = Self::home();
            let key = home.new_institution("TU Delft").unwrap().key;
            let mut signed = SignedCharter::new(&Charter {
                version: 1,
                name: "Test".into(),
                previous: None,
                founders: vec![key.institution()],
                threshold: 1,
                institutions: vec![InstitutionEntry {
                    key: key.institution(),
                    name: "TU Delft".into(),
                    capabilities: Capabilities::ALL,
                    expires: None,
                }],
                models: String::new(),
                policies: String::new(),
                created: unix_now(),
                doors: Vec::new(),
            });
            signed.sign(&key);
            let charters = Charters::new(vec![signed]).unwrap();
            let node = home.node_key().unwrap().node();
            let certificate = certify(&key, &charters, node, Capabilities::ALL, CERTIFICATE_SECONDS).unwrap();
            let members = Members::new(node, charters, certificate).unwrap();
            Self {
                _folder: folder,
                home,
                key,
                members,
            }
        }

        fn invite(&self) -> Invite {
            let expires = UnixSeconds(unix_now().0 + 3600);
            let grant = TokenGrant {
                institution: self.key.institution(),
                capabilities: Capabilities::ORDINARY,
                expires,
            };
            Invite {
                federation: self.members.federation(),
                federation_name: "Test".into(),
                institution: self.key.institution(),
                doors: vec![Door {
                    node: self.members.node(),
                    control: vec!["/ip4/127.0.0.1/tcp/4001".into()],
                    data: vec![],
                }],
                token: self.home.new_token(&grant, unix_now()).unwrap(),
                expires,
            }
        }

        fn certificate(&self, node: NodeId, not_before: u64) -> Signed<Certificate> {
            let certificate = Certificate {
                version: 1,
                federation: self.members.federation(),
                node,
                institution: self.key.institution(),
                capabilities: Capabilities::ORDINARY,
                not_before: UnixSeconds(not_before),
                not_after: UnixSeconds(not_before + CERTIFICATE_SECONDS),
                serial: 3,
            };
            Signed::new(&self.key, &certificate)
        }
    }
}
