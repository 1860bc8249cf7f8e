//! What must hold, looked at after every effect of every node, and at the end.

mod equal_states;
mod no_update_lost;
mod one_log;
mod one_set;
mod progress;

use polder_protocol::hash::{BlobId, Digest};
use polder_protocol::layout::Part;
use polder_protocol::log::Round;
use polder_protocol::node::Effect;
use polder_protocol::run::RunSpec;

/// Something that must never be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Violation {
    pub(crate) invariant: &'static str,
    pub(crate) what: String,
}

impl Violation {
    pub(crate) fn new(invariant: &'static str, what: String) -> Self {
        Self { invariant, what }
    }
}

/// An effect that a host is about to carry out.
#[derive(Debug)]
pub(crate) struct Seen<'a> {
    pub(crate) host: usize,
    pub(crate) effect: &'a Effect,
}

/// How a live host stands at the end.
#[derive(Debug)]
pub(crate) struct Standing {
    pub(crate) host: usize,
    pub(crate) entries: u64,
    pub(crate) head: Digest,
    pub(crate) is_over: bool,
    /// Whether it must have the last state, or its stage's parts of it.
    pub(crate) keeps_state: bool,
    pub(crate) state: Option<(Round, Vec<(Part, BlobId)>)>,
}

/// How all live hosts stand at the end.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) hosts: Vec<Standing>,
    /// Rounds of the run.
    pub(crate) rounds: Round,
}

/// One thing that must hold.
trait Invariant: std::fmt::Debug {
    fn name(&self) -> &'static str;

    /// Looks at an effect.
    fn see(&mut self, seen: &Seen<'_>) -> Result<(), String>;

    /// Looks at the end.
    fn end(&self, end: &End) -> Result<(), String>;
}

/// All invariants together.
#[derive(Debug)]
pub(crate) struct Watch {
    one_set: one_set::OneSet,
    others: Vec<Box<dyn Invariant>>,
}

impl Watch {
    pub(crate) fn new(spec: &RunSpec) -> Self {
        Self {
            one_set: one_set::OneSet::default(),
            others: vec![
                Box::new(progress::Progress),
                Box::new(one_log::OneLog::default()),
                Box::new(no_update_lost::NoUpdateLost::new(spec)),
                Box::new(equal_states::EqualStates::new(spec)),
            ],
        }
    }

    pub(crate) fn see(&mut self, seen: &Seen<'_>) -> Result<(), Violation> {
        for invariant in self.all_mut() {
            let name = invariant.name();
            invariant.see(seen).map_err(|what| Violation::new(name, what))?;
        }
        Ok(())
    }

    pub(crate) fn end(&self, end: &End) -> Result<(), Violation> {
        for invariant in &self.others {
            invariant
                .end(end)
                .map_err(|what| Violation::new(invariant.name(), what))?;
        }
        Ok(())
    }

    /// Rounds that were closed, contributions that came late to them, and those of chains.
    pub(crate) fn rounds(&self) -> (u64, u64, u64) {
        self.one_set.rounds()
    }

    fn all_mut(&mut self) -> impl Iterator<Item = &mut dyn Invariant> {
        let first: &mut dyn Invariant = &mut self.one_set;
        core::iter::once(first).chain(
            self.others
                .iter_mut()
                .map(|boxed| -> &mut dyn Invariant { &mut **boxed }),
        )
    }
}
