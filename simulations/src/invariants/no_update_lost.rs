//! An update that the steward acknowledged is in exactly one set, while there are sets to come.

use std::collections::BTreeSet;

use polder_protocol::log::{Body, ReplicaId, Round};
use polder_protocol::node::{Effect, Persist, Report};
use polder_protocol::round::{CommitAnswer, RunMessage};
use polder_protocol::run::RunSpec;

use super::{End, Invariant, Seen};

#[derive(Debug)]
pub(crate) struct NoUpdateLost {
    late_rounds_max: u64,
    accepted: BTreeSet<(ReplicaId, Round)>,
    included: BTreeSet<(ReplicaId, Round)>,
    /// Places of the log that were looked at.
    entries: u64,
}

impl NoUpdateLost {
    pub(crate) fn new(spec: &RunSpec) -> Self {
        Self {
            late_rounds_max: u64::from(spec.closing.late_rounds_max),
            accepted: BTreeSet::new(),
            included: BTreeSet::new(),
            entries: 0,
        }
    }

    fn lost(&self, closed: Option<Round>) -> Result<(), String> {
        let is_due = |round: Round| closed.is_none_or(|closed| closed.next().since(round) > self.late_rounds_max);
        match self
            .accepted
            .difference(&self.included)
            .find(|(_, round)| is_due(*round))
        {
            Some((replica, round)) => Err(format!("replica {replica}'s update of round {round} is in no set")),
            None => Ok(()),
        }
    }
}

impl Invariant for NoUpdateLost {
    fn name(&self) -> &'static str {
        "no acknowledged update is lost"
    }

    fn see(&mut self, seen: &Seen<'_>) -> Result<(), String> {
        match seen.effect {
            Effect::Send {
                message:
                    RunMessage::Ack {
                        round,
                        replica,
                        answer: CommitAnswer::Accepted,
                        ..
                    },
                ..
            }
            | Effect::Report(Report::CommitAccepted { round, replica, .. }) => {
                self.accepted.insert((*replica, *round));
            }
            Effect::Persist {
                what: Persist::Entry(entry),
                ..
            } if entry.index == self.entries => {
                self.entries += 1;
                match &entry.body {
                    Body::Closed { round, set, .. } => {
                        for one in set {
                            if !self.included.insert((one.replica, one.base)) {
                                return Err(format!(
                                    "replica {}'s update of round {} counts twice",
                                    one.replica, one.base
                                ));
                            }
                        }
                        return self.lost(Some(*round));
                    }
                    Body::Finished => return self.lost(None),
                    _ => {}
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn end(&self, _end: &End) -> Result<(), String> {
        Ok(())
    }
}
