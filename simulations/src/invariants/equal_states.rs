//! Every state in the log is what its set makes of the state before; nobody trains from another; and once the faults
//! stop, all live nodes end with the last.

use polder_protocol::hash::BlobId;
use polder_protocol::layout::Part;
use polder_protocol::log::{Body, Round};
use polder_protocol::node::{Effect, Persist};
use polder_protocol::round::Job;
use polder_protocol::run::RunSpec;

use crate::oracle::Oracle;

use super::{End, Invariant, Seen};

#[derive(Debug)]
pub(crate) struct EqualStates {
    oracle: Oracle,
    /// Places of the log that were looked at.
    entries: u64,
}

impl EqualStates {
    pub(crate) fn new(spec: &RunSpec) -> Self {
        Self {
            oracle: Oracle::new(spec),
            entries: 0,
        }
    }

    fn compare(&self, host: usize, round: Round, parts: &[(Part, BlobId)]) -> Result<(), String> {
        let state = self.oracle.state(round).unwrap_or_default();
        let wrong = parts
            .iter()
            .find(|(part, blob)| state.get(part.0 as usize) != Some(blob));
        match wrong {
            Some((part, _)) => Err(format!("host {host} has another state of round {round}, {part:?}")),
            None => Ok(()),
        }
    }
}

impl Invariant for EqualStates {
    fn name(&self) -> &'static str {
        "states are equal"
    }

    fn see(&mut self, seen: &Seen<'_>) -> Result<(), String> {
        match seen.effect {
            Effect::Persist {
                what: Persist::Entry(entry),
                ..
            } if entry.index == self.entries => {
                self.entries += 1;
                self.oracle.see(entry);
                if let Body::Applied { round, parts, .. } = &entry.body
                    && self.oracle.state(round.next()) != Some(parts)
                {
                    return Err(format!(
                        "the log's state after round {round} does not follow from its set"
                    ));
                }
                Ok(())
            }
            Effect::Start {
                work: Job::Train { round, base, .. },
                ..
            } => self.compare(seen.host, *round, base),
            _ => Ok(()),
        }
    }

    fn end(&self, end: &End) -> Result<(), String> {
        for host in end.hosts.iter().filter(|host| host.keeps_state) {
            match &host.state {
                Some((round, parts)) if *round == end.rounds => self.compare(host.host, *round, parts)?,
                other => {
                    let round = other.as_ref().map(|(round, _)| *round);
                    return Err(format!("host {} holds the state of {round:?} at the end", host.host));
                }
            }
        }
        Ok(())
    }
}
