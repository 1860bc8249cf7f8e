//! What the state must be, from the log alone: a hash stands for the outer step, so that any difference in base, set,
//! order, weight or voice makes another state, as it does with real numbers.

use std::collections::BTreeMap;

use polder_protocol::hash::{BlobId, digest};
use polder_protocol::layout::Part;
use polder_protocol::log::{Body, Contribution, Entry, ReplicaId, Round, Stage, institution_of};
use polder_protocol::run::RunSpec;

use crate::worlds::BLOCKS;

/// The outer step of one part.
pub(crate) fn step_part(
    base: BlobId,
    round: Round,
    part: usize,
    set: &[Contribution],
    makers: &BTreeMap<ReplicaId, Vec<Stage>>,
) -> BlobId {
    let mut bytes = base.0.to_vec();
    for contribution in set {
        if let Some(update) = contribution.parts.get(part) {
            let stages = makers.get(&contribution.replica).map_or(&[][..], Vec::as_slice);
            let voice = institution_of(stages, Part(part as u32), BLOCKS);
            bytes.extend(update.0);
            bytes.extend(contribution.weight(round).to_le_bytes());
            bytes.extend(voice.unwrap_or_default().0);
        }
    }
    BlobId(digest(&bytes).0)
}

/// Replays a run's log.
#[derive(Debug)]
pub(crate) struct Oracle {
    states: BTreeMap<Round, Vec<BlobId>>,
    /// All that ever were.
    replicas: BTreeMap<ReplicaId, Vec<Stage>>,
}

impl Oracle {
    pub(crate) fn new(spec: &RunSpec) -> Self {
        Self {
            states: BTreeMap::from([(Round(0), spec.initial.clone())]),
            replicas: BTreeMap::new(),
        }
    }

    /// The state of `round`, once the set before it is closed.
    pub(crate) fn state(&self, round: Round) -> Option<&[BlobId]> {
        self.states.get(&round).map(Vec::as_slice)
    }

    /// Takes the next entry.
    pub(crate) fn see(&mut self, entry: &Entry) {
        if let Body::Replica { id, stages, .. } = &entry.body {
            self.replicas.insert(*id, stages.clone());
        }
        let Body::Closed { round, set, .. } = &entry.body else {
            return;
        };
        let Some(base) = self.states.get(round) else { return };
        let parts = base.iter().enumerate();
        let next = parts.map(|(part, blob)| step_part(*blob, *round, part, set, &self.replicas));
        let next = next.collect();
        self.states.insert(round.next(), next);
    }
}
