//! A round has one committed set, on all nodes.

use std::collections::{BTreeMap, BTreeSet};

use polder_protocol::log::{Body, Contribution, ReplicaId, Round};
use polder_protocol::node::{Effect, Persist};

use super::{End, Invariant, Seen};

#[derive(Debug, Default)]
pub(crate) struct OneSet {
    sets: BTreeMap<Round, Vec<Contribution>>,
    /// Replicas of several stages.
    chains: BTreeSet<ReplicaId>,
}

impl OneSet {
    /// Rounds that were closed, contributions that came late to them, and those of chains.
    pub(crate) fn rounds(&self) -> (u64, u64, u64) {
        let all = || {
            self.sets
                .iter()
                .flat_map(|(round, set)| set.iter().map(move |one| (round, one)))
        };
        let late = all().filter(|(round, one)| one.base < **round).count();
        let of_chains = all().filter(|(_, one)| self.chains.contains(&one.replica)).count();
        (self.sets.len() as u64, late as u64, of_chains as u64)
    }
}

impl Invariant for OneSet {
    fn name(&self) -> &'static str {
        "a round has one set"
    }

    fn see(&mut self, seen: &Seen<'_>) -> Result<(), String> {
        let Effect::Persist {
            what: Persist::Entry(entry),
            ..
        } = seen.effect
        else {
            return Ok(());
        };
        let (round, set) = match &entry.body {
            Body::Closed { round, set, .. } => (round, set),
            Body::Replica { id, stages, .. } if stages.len() > 1 => {
                self.chains.insert(*id);
                return Ok(());
            }
            _ => return Ok(()),
        };
        let first = self.sets.entry(*round).or_insert_with(|| set.clone());
        if first != set {
            return Err(format!("host {} has another set for round {round}", seen.host));
        }
        Ok(())
    }

    fn end(&self, _end: &End) -> Result<(), String> {
        Ok(())
    }
}
