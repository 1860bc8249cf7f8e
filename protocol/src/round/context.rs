//! What the machines of one run share while they step: the time, the log, and where effects go.

use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;

use crate::hash::{NodeId, RunId};
use crate::log::{Body, Ledger, Log, LogError, Seal};
use crate::node::{Effect, Persist, Report};
use crate::time::Instant;

use super::message::GOSSIP_BYTES_MAX;
use super::{Job, JobId, RunMessage};

/// One step of one run.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    pub(crate) now: Instant,
    pub(crate) seal: &'a dyn Seal,
    pub(crate) log: &'a mut Log,
    /// The next job's name.
    pub(crate) next_job: &'a mut JobId,
    pub(crate) effects: &'a mut Vec<Effect>,
    /// Messages from this node to itself, which no network carries.
    pub(crate) to_self: &'a mut VecDeque<RunMessage>,
}

impl Context<'_> {
    pub(crate) fn me(&self) -> NodeId {
        self.seal.node()
    }

    pub(crate) fn run(&self) -> RunId {
        self.log.run()
    }

    pub(crate) fn ledger(&self) -> Option<&Ledger> {
        self.log.ledger()
    }

    pub(crate) fn send(&mut self, to: NodeId, message: RunMessage) {
        if to == self.me() {
            self.to_self.push_back(message);
        } else {
            self.effects.push(Effect::Send { to, message });
        }
    }

    pub(crate) fn persist(&mut self, what: Persist) {
        let run = self.run();
        self.effects.push(Effect::Persist { run, what });
    }

    pub(crate) fn report(&mut self, report: Report) {
        self.effects.push(Effect::Report(report));
    }

    pub(crate) fn start(&mut self, work: Job) -> JobId {
        let job = *self.next_job;
        *self.next_job = JobId(job.0.saturating_add(1));
        self.effects.push(Effect::Start { job, work });
        job
    }

    pub(crate) fn cancel(&mut self, job: JobId) {
        self.effects.push(Effect::Cancel { job });
    }

    /// Writes an entry as steward: durable first, then said to all.
    pub(crate) fn write(&mut self, body: Body) -> Result<(), LogError> {
        let entry = self.log.write(body, self.seal)?;
        let run = self.run();
        self.persist(Persist::Entry(entry.clone()));
        let message = if entry.bytes() <= GOSSIP_BYTES_MAX {
            RunMessage::Entries {
                run,
                entries: vec![entry.clone()],
            }
        } else {
            self.head()
        };
        self.effects.push(Effect::Broadcast { message });
        self.report(Report::Logged { entry });
        Ok(())
    }

    /// How far this node's log goes.
    pub(crate) fn head(&self) -> RunMessage {
        RunMessage::Head {
            run: self.run(),
            entries: self.log.len(),
            head: self.log.head(),
        }
    }
}

/// The earlier of two times, either of which may be never.
pub(crate) fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, None) => one,
        (None, other) => other,
    }
}
