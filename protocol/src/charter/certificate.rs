//! What an institution says of a node: that it belongs, what it may do, until when, and that it no longer does.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::hash::{FederationId, InstitutionId, NodeId};
use crate::identity::Statement;
use crate::time::UnixSeconds;

/// The longest life of a certificate: 30 days. What is forgotten ends by itself.
pub const CERTIFICATE_SECONDS_MAX: u64 = 30 * 24 * 3600;

/// How far two clocks may differ: 5 minutes, which a machine without time synchronisation drifts in some months.
pub const CLOCK_SKEW_SECONDS: u64 = 300;

/// The most nodes, and the most serials, of one revocation. Certificates end by themselves after
/// [`CERTIFICATE_SECONDS_MAX`], so a list that is full can be pruned.
pub const REVOKED_MAX: usize = 4096;

/// What a node may do, as a set of bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
pub struct Capabilities(pub u16);

impl Capabilities {
    /// Hold stages and answer with them.
    pub const SERVE: Self = Self(1);
    /// Contribute to training runs.
    pub const TRAIN: Self = Self(2);
    /// Carry other nodes' traffic.
    pub const RELAY: Self = Self(4);
    /// Keep the directory.
    pub const DIRECTORY: Self = Self(8);
    /// Start runs and publish epochs.
    pub const PUBLISH: Self = Self(16);
    /// Ask questions.
    pub const QUERY: Self = Self(32);
    /// Everything.
    pub const ALL: Self = Self(63);
    /// What an ordinary node gets: serve, train and query.
    pub const ORDINARY: Self = Self(1 | 2 | 32);

    const NAMES: [(Self, &'static str); 6] = [
        (Self::SERVE, "serve"),
        (Self::TRAIN, "train"),
        (Self::RELAY, "relay"),
        (Self::DIRECTORY, "directory"),
        (Self::PUBLISH, "publish"),
        (Self::QUERY, "query"),
    ];

    /// Whether all of `other` is in this set.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// What is in both sets.
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What is in either set.
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (capability, name) in Self::NAMES {
            if self.has(capability) {
                write!(f, "{separator}{name}")?;
                separator = ",";
            }
        }
        Ok(())
    }
}

/// A word that is no capability.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[error("`{word}` is no capability: there are serve, train, relay, directory, publish, query, and all")]
pub struct CapabilityError {
    /// The word.
    pub word: String,
}

impl FromStr for Capabilities {
    type Err = CapabilityError;
    /// Reads names with commas between them.
    fn from_str(text: &str) -> Result<Self, CapabilityError> {
        let words = text.split(',').map(str::trim).filter(|word| !word.is_empty());
        words.into_iter().try_fold(Self::default(), |all, word| {
            if word == "all" {
                return Ok(Self::ALL);
            }
            let known = Self::NAMES.iter().find(|(_, name)| *name == word);
            known
                .map(|(capability, _)| all.or(*capability))
                .ok_or_else(|| CapabilityError { word: word.to_string() })
        })
    }
}

/// An institution's word for a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// Format version, 1.
    pub version: u16,
    /// In which federation.
    pub federation: FederationId,
    /// For whom.
    pub node: NodeId,
    /// By whom: the key that signs.
    pub institution: InstitutionId,
    /// What the node may do. The charter bounds it again.
    pub capabilities: Capabilities,
    /// From when.
    pub not_before: UnixSeconds,
    /// Until when: at most [`CERTIFICATE_SECONDS_MAX`] after `not_before`.
    pub not_after: UnixSeconds,
    /// Drawn at random, so that one certificate can be revoked and the node certified anew.
    pub serial: u64,
}

impl Certificate {
    /// Whether more than half of its life is over, so that it is time for a new one.
    pub fn wants_renewal(&self, now: UnixSeconds) -> bool {
        let life = self.not_after.0.saturating_sub(self.not_before.0);
        now.0.saturating_sub(self.not_before.0) > life / 2
    }
}

impl Statement for Certificate {
    const DOMAIN: &'static str = "polder certificate 1";
    const BYTES_MAX: usize = 256;
}

/// All that an institution has revoked. A later list replaces an earlier one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    /// Format version, 1.
    pub version: u16,
    /// In which federation.
    pub federation: FederationId,
    /// Whose nodes: the key that signs.
    pub institution: InstitutionId,
    /// Counts the institution's lists, from 1.
    pub epoch: u64,
    /// Nodes that are out, whatever certificate they hold.
    pub nodes: Vec<NodeId>,
    /// Certificates that are void.
    pub serials: Vec<u64>,
}

impl Statement for Revocation {
    const DOMAIN: &'static str = "polder revocation 1";
    const BYTES_MAX: usize = REVOKED_MAX * (32 + 10) + 256;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_survive_their_text() {
        assert_eq!(Capabilities::ORDINARY.to_string(), "serve,train,query");
        assert_eq!("query, serve,train".parse(), Ok(Capabilities::ORDINARY));
        assert_eq!("all".parse(), Ok(Capabilities::ALL));
        assert!("rule".parse::<Capabilities>().is_err());
    }
}
