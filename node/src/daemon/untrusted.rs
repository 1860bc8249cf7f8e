//! What is read from the home's files while a node starts, as fuzz targets see it.

use polder_protocol::charter::{Capabilities, Charter, Charters, InstitutionEntry, Revocation, SignedCharter};
use polder_protocol::identity::{KeyPair, Signed};
use polder_protocol::time::UnixSeconds;

use super::acquaintances::Met;
use super::caps::Schedule;
use super::config::Config;
use super::local::LocalApi;
use super::membership;
use crate::contribute;

pub(crate) fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(config) = toml::from_str::<Config>(text) else {
        return;
    };
    let _ = (
        config.bootstrap(),
        config.proxy(),
        contribute::policy(&config.contribute),
    );
    if let Ok(schedule) = Schedule::new(&config) {
        assert_eq!(Schedule::new(&config), Ok(schedule));
    }
    let again = toml::to_string(&config).expect("a configuration is text");
    // Compared as text: the parts may hold what is no number, which is not even itself.
    let read: Config = toml::from_str(&again).expect("what was written is read");
    assert_eq!(toml::to_string(&read).ok(), Some(again));
}

/// What members tell each other of the membership.
pub(crate) fn news(bytes: &[u8]) {
    membership::untrusted_news(bytes);
}

pub(crate) fn honest_news() -> Vec<u8> {
    let institution = KeyPair::from_seed(&[1; 32]);
    let charter = Charter {
        version: 1,
        name: "Fuzz".into(),
        previous: None,
        founders: vec![institution.institution()],
        threshold: 1,
        institutions: vec![InstitutionEntry {
            key: institution.institution(),
            name: "Leiden".into(),
            capabilities: Capabilities::ALL,
            expires: None,
        }],
        models: "one".into(),
        policies: "be kind".into(),
        created: UnixSeconds(1_800_000_000),
        doors: Vec::new(),
    };
    let mut charter = SignedCharter::new(&charter);
    charter.sign(&institution);
    let charters = Charters::new(vec![charter]).expect("the charter holds");
    let list = Revocation {
        version: 1,
        federation: charters.federation(),
        institution: institution.institution(),
        epoch: 1,
        nodes: vec![KeyPair::from_seed(&[9; 32]).node()],
        serials: vec![8],
    };
    let lists = vec![Signed::new(&institution, &list)];
    postcard::to_allocvec(&(charters.to_bytes(), lists)).expect("bytes and lists of bytes")
}

/// What an earlier start has kept.
pub(crate) fn kept(bytes: &[u8]) {
    let _ = serde_json::from_slice::<Met>(bytes);
    let _ = serde_json::from_slice::<LocalApi>(bytes);
}
