//! The composed machines of one node: every run that it follows, trains in or keeps the log of.
//!
//! A driver owns the clock, the network, the disk and the device. It hands in [`Input`]s with the time and carries out
//! the [`Effect`]s, **in order**: a [`Effect::Persist`] is durable before any effect after it is begun. That order is
//! all that crash safety rests on: what was persisted before it was said cannot be forgotten after it was heard. A crash
//! between two effects is as good as a crash before the step.
//!
//! It must also step with [`Input::Wake`] no later than [`Node::wake_at`] says, and hand in an outcome for every job.

mod io;
mod run;

use alloc::collections::BTreeMap;
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::hash::{NodeId, RunId};
use crate::log::{Log, Round, Seal};
use crate::round::{JobId, RunMessage, earlier};
use crate::run::RunSpec;
use crate::time::Instant;

pub use io::{Command, Effect, Input, Joining, Persist, Report, RestoredRun};
use run::{Run, Step};

/// Runs of one node.
pub const RUNS_MAX: usize = 64;

/// One node.
#[derive(Debug)]
pub struct Node {
    seal: Arc<dyn Seal>,
    incarnation: u64,
    /// At most [`RUNS_MAX`].
    runs: BTreeMap<RunId, Run>,
    next_job: JobId,
}

/// How a node stands in a run, for people.
#[derive(Debug, Clone, Copy)]
pub struct Standing<'a> {
    /// The log as far as this node has it.
    pub log: &'a Log,
    /// Whether this node keeps the log.
    pub is_steward: bool,
    /// How it takes part, if it does.
    pub joining: Option<&'a Joining>,
    /// The round that it is training.
    pub training: Option<Round>,
    /// The round of the state that it holds.
    pub state: Option<Round>,
}

impl Node {
    /// A node that knows of no run. `incarnation` names this life of the node and must be greater than that of any life
    /// before it: the time of its start in microseconds will do.
    pub fn new(seal: Arc<dyn Seal>, incarnation: u64) -> Self {
        Self {
            seal,
            incarnation,
            runs: BTreeMap::new(),
            next_job: JobId(0),
        }
    }

    /// A node that goes on with what it persisted in an earlier life. The effects are carried out as those of a step.
    pub fn restore(
        seal: Arc<dyn Seal>,
        incarnation: u64,
        now: Instant,
        stored: BTreeMap<RunId, RestoredRun>,
        effects: &mut Vec<Effect>,
    ) -> Self {
        let mut node = Self::new(seal, incarnation);
        for (id, run) in stored.into_iter().take(RUNS_MAX) {
            let mut step = Step {
                now,
                seal: &*node.seal,
                next_job: &mut node.next_job,
                effects,
            };
            node.runs.insert(id, Run::restore(run, id, incarnation, &mut step));
        }
        node
    }

    /// This node's id.
    pub fn id(&self) -> NodeId {
        self.seal.node()
    }

    /// The runs that it follows.
    pub fn runs(&self) -> impl Iterator<Item = RunId> {
        self.runs.keys().copied()
    }

    /// How it stands in a run.
    pub fn standing(&self, run: RunId) -> Option<Standing<'_>> {
        let run = self.runs.get(&run)?;
        Some(Standing {
            log: run.log(),
            is_steward: run.is_steward(),
            joining: run.trainer().joining(),
            training: run.trainer().round(),
            state: run.keeper().round(),
        })
    }

    /// The facts of a run, once the first entry of its log is here.
    pub fn spec(&self, run: RunId) -> Option<&Arc<RunSpec>> {
        self.runs.get(&run)?.log().spec()
    }

    /// When to step with [`Input::Wake`], if nothing else happens first.
    pub fn wake_at(&self) -> Option<Instant> {
        self.runs.values().map(Run::wake_at).fold(None, earlier)
    }

    /// Takes one input, and appends what the caller must now do, in order.
    pub fn step(&mut self, now: Instant, input: Input, effects: &mut Vec<Effect>) {
        match input {
            Input::Message { from, message } => self.on_message(now, from, message, effects),
            Input::Local(command) => self.on_command(now, command, effects),
            // Whose job it was, the runs know; of peers that come and go and of passing time, all may want to know.
            Input::Done { .. } | Input::Wake | Input::PeerFound { .. } | Input::PeerLost { .. } => {
                for run in self.runs.values_mut() {
                    let mut step = Step {
                        now,
                        seal: &*self.seal,
                        next_job: &mut self.next_job,
                        effects,
                    };
                    run.step(input.clone(), &mut step);
                }
            }
        }
    }

    fn on_message(&mut self, now: Instant, from: NodeId, message: RunMessage, effects: &mut Vec<Effect>) {
        if message.check().is_err() {
            return;
        }
        let run = message.run();
        if self.runs.contains_key(&run) {
            self.step_run(run, now, Input::Message { from, message }, effects);
        } else if let RunMessage::Head { .. } = message {
            effects.push(Effect::Report(Report::Heard { run, steward: from }));
        }
    }

    fn on_command(&mut self, now: Instant, command: Command, effects: &mut Vec<Effect>) {
        let run = match &command {
            Command::Begin { spec } => spec.id(),
            Command::Follow { run, .. }
            | Command::Join { run, .. }
            | Command::Leave { run }
            | Command::Pause { run }
            | Command::Resume { run }
            | Command::Stop { run } => *run,
        };
        if !self.runs.contains_key(&run) {
            let made = self.make(run, &command, effects);
            match made {
                Ok(made) => {
                    self.runs.insert(run, made);
                }
                Err(reason) => {
                    effects.push(Effect::Report(Report::CommandRefused { run, reason }));
                    return;
                }
            }
        }
        self.step_run(run, now, Input::Local(command), effects);
    }

    /// The run that a command begins or follows.
    fn make(&self, run: RunId, command: &Command, effects: &mut Vec<Effect>) -> Result<Run, alloc::string::String> {
        if self.runs.len() >= RUNS_MAX {
            return Err(alloc::format!("this node follows {RUNS_MAX} runs already"));
        }
        match command {
            Command::Begin { spec } => {
                Run::begin(spec, self.incarnation, &*self.seal, effects).map_err(|error| error.to_string())
            }
            Command::Follow { steward, .. } | Command::Join { steward, .. } => {
                effects.push(Effect::Persist {
                    run,
                    what: Persist::Follow { steward: *steward },
                });
                Ok(Run::follow(run, Some(*steward), self.incarnation))
            }
            Command::Leave { .. } | Command::Pause { .. } | Command::Resume { .. } | Command::Stop { .. } => {
                Err("this node does not follow the run".to_string())
            }
        }
    }

    fn step_run(&mut self, run: RunId, now: Instant, input: Input, effects: &mut Vec<Effect>) {
        let Some(run) = self.runs.get_mut(&run) else { return };
        let mut step = Step {
            now,
            seal: &*self.seal,
            next_job: &mut self.next_job,
            effects,
        };
        run.step(input, &mut step);
    }
}

#[cfg(test)]
mod tests;
