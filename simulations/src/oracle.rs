//! What the state must be, from the log alone: a hash stands for the outer step, so that any difference in base, set,
//! order or weight makes another state, as it does with real numbers.

use std::collections::BTreeMap;

use polder_protocol::hash::{BlobId, digest};
use polder_protocol::log::{Body, Contribution, Entry, Round};
use polder_protocol::run::RunSpec;

/// The outer step of one part.
pub(crate) fn step_part(base: BlobId, round: Round, part: usize, set: &[Contribution]) -> BlobId {
    let mut bytes = base.0.to_vec();
    for contribution in set {
        if let Some(update) = contribution.parts.get(part) {
            bytes.extend(update.0);
            bytes.extend(contribution.weight(round).to_le_bytes());
        }
    }
    BlobId(digest(&bytes).0)
}

/// Replays a run's log.
#[derive(Debug)]
pub(crate) struct Oracle {
    states: BTreeMap<Round, Vec<BlobId>>,
}

impl Oracle {
    pub(crate) fn new(spec: &RunSpec) -> Self {
        Self {
            states: BTreeMap::from([(Round(0), spec.initial.clone())]),
        }
    }

    /// The state of `round`, once the set before it is closed.
    pub(crate) fn state(&self, round: Round) -> Option<&[BlobId]> {
        self.states.get(&round).map(Vec::as_slice)
    }

    /// Takes the next entry.
    pub(crate) fn see(&mut self, entry: &Entry) {
        let Body::Closed { round, set, .. } = &entry.body else {
            return;
        };
        let Some(base) = self.states.get(round) else { return };
        let parts = base.iter().enumerate();
        let next = parts.map(|(part, blob)| step_part(*blob, *round, part, set)).collect();
        self.states.insert(round.next(), next);
    }
}
