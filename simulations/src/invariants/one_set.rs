//! A round has one committed set, on all nodes.

use std::collections::BTreeMap;

use polder_protocol::log::{Body, Contribution, Round};
use polder_protocol::node::{Effect, Persist};

use super::{End, Invariant, Seen};

#[derive(Debug, Default)]
pub(crate) struct OneSet {
    sets: BTreeMap<Round, Vec<Contribution>>,
}

impl OneSet {
    /// Rounds that were closed, and contributions that came late to them.
    pub(crate) fn rounds(&self) -> (u64, u64) {
        let late = |(round, set): (&Round, &Vec<Contribution>)| set.iter().filter(|one| one.base < *round).count();
        (self.sets.len() as u64, self.sets.iter().map(late).sum::<usize>() as u64)
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
        let Body::Closed { round, set, .. } = &entry.body else {
            return Ok(());
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
