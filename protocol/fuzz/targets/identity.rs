//! Who is who: charters, certificates, invites, and the words of configuration files.

use polder_protocol::charter::{
    Capabilities, Certificate, Charters, Credentials, Membership, Revocation, chain_from_bytes,
};
use polder_protocol::hash::NodeId;
use polder_protocol::identity::Signed;
use polder_protocol::invite::Invite;
use polder_protocol::policy::Window;
use polder_protocol::time::UnixSeconds;

pub(crate) fn invite(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(invite) = text.parse::<Invite>() {
        assert_eq!(invite.to_string().parse(), Ok(invite));
    }
}

pub(crate) fn capabilities(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(capabilities) = text.parse::<Capabilities>() {
        assert_eq!(capabilities.to_string().parse(), Ok(capabilities));
    }
}

pub(crate) fn policy_window(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = text.parse::<Window>();
    }
}

pub(crate) fn charters(bytes: &[u8]) {
    let _ = chain_from_bytes(bytes);
    if let Ok(charters) = Charters::from_bytes(bytes) {
        assert_eq!(Charters::from_bytes(&charters.to_bytes()), Ok(charters));
    }
}

/// A chain of charters, then what a stranger shows, then a list of revocations: each with its length before it.
pub(crate) fn credentials(bytes: &[u8]) {
    let Ok((parts, _)) = postcard::take_from_bytes::<[Vec<u8>; 3]>(bytes) else {
        return;
    };
    let [charters, shown, revocations] = parts;
    let now = UnixSeconds(1_800_000_000);
    let read = Credentials::from_bytes(&shown);
    if let Ok(read) = &read {
        assert_eq!(Credentials::from_bytes(&read.to_bytes()).as_ref(), Ok(read));
        let _ = read.certificate.open();
    }
    if let Ok(certificate) = Signed::<Certificate>::from_bytes(&shown) {
        let _ = certificate.open();
    }
    let Ok(charters) = Charters::from_bytes(&charters) else {
        return;
    };
    let mut membership = Membership::new(charters);
    if let Ok(list) = Signed::<Revocation>::from_bytes(&revocations) {
        let _ = membership.revoke(list);
    }
    let node = read
        .ok()
        .and_then(|read| read.certificate.claim())
        .map_or(NodeId([1; 32]), |claim| claim.node);
    let _ = membership.admit(&shown, node, now);
}
