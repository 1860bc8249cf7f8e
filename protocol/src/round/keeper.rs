//! Keeps the state's parts of one node, and keeps them up with the log: by outer steps, or by fetching.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

use crate::hash::{BlobId, NodeId};
use crate::layout::{BlockRange, Part};
use crate::log::{Ledger, Phase, Round, parts_of};
use crate::node::{Persist, Report};
use crate::time::Instant;

use super::context::Context;
use super::{APPLY_BEHIND_MAX, FAILURE_RETRY_MAX, Job, JobId, Outcome, retry_after};

/// Outer steps that may fail in a row before a node that is behind fetches the newest state instead.
const APPLY_FAILURES_MAX: u32 = 3;

/// Holds the state's parts of one node.
#[derive(Debug, Default)]
pub(crate) struct Keeper {
    held: Option<Held>,
    job: Option<Working>,
    failures: u32,
    retry_at: Instant,
    wake_at: Option<Instant>,
}

#[derive(Debug)]
struct Held {
    /// The state of this round.
    round: Round,
    parts: BTreeMap<Part, BlobId>,
    /// Whether these are the log's bits. Nothing is built on a state before they are.
    agreed: bool,
    /// Whether this node took the outer step in this life: a restored state may have been fetched.
    stepped: bool,
}

#[derive(Debug)]
struct Working {
    job: JobId,
    work: Work,
    /// What is fetched, or the base that is stepped from.
    parts: Vec<(Part, BlobId)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    /// Fetch the state of this round.
    Fetch(Round),
    /// Step from the state of this round to the next.
    Apply(Round),
}

impl Keeper {
    /// Goes on with what was persisted. Whether it is the log's is looked at in the next [`Keeper::advance`].
    pub(crate) fn restore(&mut self, round: Round, parts: Vec<(Part, BlobId)>) {
        self.held = Some(Held {
            round,
            parts: parts.into_iter().collect(),
            agreed: false,
            stepped: false,
        });
    }

    pub(crate) fn wake_at(&self) -> Option<Instant> {
        self.wake_at
    }

    /// The parts of `range` of the state of `round`, if this node has them and the log agrees.
    pub(crate) fn state(&self, round: Round, range: BlockRange, blocks: u32) -> Option<Vec<(Part, BlobId)>> {
        let held = self.held.as_ref().filter(|held| held.round == round && held.agreed)?;
        covered(held, range, blocks)
    }

    /// What this node made of closed round `round` before the log says what came of it.
    pub(crate) fn applied(&self, round: Round, blocks: u32) -> Option<Vec<BlobId>> {
        let held = self.held.as_ref().filter(|held| held.round == round.next())?;
        let parts = covered(held, BlockRange::whole(blocks), blocks)?;
        Some(parts.into_iter().map(|(_, blob)| blob).collect())
    }

    /// The round of the state that is held, for people.
    pub(crate) fn round(&self) -> Option<Round> {
        self.held.as_ref().map(|held| held.round)
    }

    /// Adds the blobs that are needed here.
    pub(crate) fn retain(&self, blobs: &mut BTreeSet<BlobId>) {
        blobs.extend(self.held.iter().flat_map(|held| held.parts.values()));
        blobs.extend(self.job.iter().flat_map(|job| &job.parts).map(|(_, blob)| *blob));
    }

    /// Looks at the log and does the next thing that brings the parts of `wanted` up to it.
    pub(crate) fn advance(&mut self, ctx: &mut Context<'_>, wanted: Option<BlockRange>) {
        self.wake_at = None;
        self.compare(ctx);
        let Some(ledger) = ctx.log.ledger() else { return };
        let blocks = ledger.spec().layout.blocks();
        let Some(range) = wanted else {
            self.give_up(ctx);
            return;
        };
        if let Some(working) = &self.job {
            if working.parts.iter().map(|(part, _)| part.0).eq(range.parts(blocks)) {
                return;
            }
            self.give_up(ctx); // Its parts are of an earlier role of this node.
        }
        let Some(ledger) = ctx.log.ledger() else { return };
        let Some(work) = self.next_work(ledger, range, blocks) else {
            return;
        };
        if ctx.now < self.retry_at {
            self.wake_at = Some(self.retry_at);
            return;
        }
        self.begin(ctx, work, range, blocks);
    }

    /// Takes the outcome of a job, if it is this machine's.
    pub(crate) fn done(&mut self, ctx: &mut Context<'_>, job: JobId, outcome: &Outcome) -> bool {
        let Some(working) = self.job.take_if(|working| working.job == job) else {
            return false;
        };
        let same_parts = |parts: &[(Part, BlobId)]| {
            let keys = |parts: &[(Part, BlobId)]| parts.iter().map(|(part, _)| *part).collect::<Vec<_>>();
            keys(parts) == keys(&working.parts)
        };
        match (working.work, outcome) {
            (Work::Fetch(round), Outcome::Fetched) => self.hold(ctx, round, working.parts, true),
            (Work::Apply(round), Outcome::Applied { parts }) if same_parts(parts) => {
                self.hold(ctx, round.next(), parts.clone(), false);
            }
            (_, outcome) => {
                let reason = match outcome {
                    Outcome::Failed { reason } | Outcome::Invalid { reason } => reason.clone(),
                    _ => "the job ended with the outcome of another".into(),
                };
                let run = ctx.run();
                ctx.report(Report::JobFailed { run, job, reason });
                self.failures = self.failures.saturating_add(1);
                self.retry_at = ctx.now + retry_after(self.failures, FAILURE_RETRY_MAX);
            }
        }
        true
    }

    fn hold(&mut self, ctx: &mut Context<'_>, round: Round, parts: Vec<(Part, BlobId)>, agreed: bool) {
        self.failures = 0;
        self.retry_at = Instant(0);
        self.held = Some(Held {
            round,
            parts: parts.iter().copied().collect(),
            agreed,
            stepped: !agreed,
        });
        ctx.persist(Persist::State { round, parts });
    }

    fn give_up(&mut self, ctx: &mut Context<'_>) {
        if let Some(working) = self.job.take() {
            ctx.cancel(working.job);
        }
    }

    /// Compares what is held with the log, once the log has that round's state.
    fn compare(&mut self, ctx: &mut Context<'_>) {
        let Some(held) = self.held.as_mut().filter(|held| !held.agreed) else {
            return;
        };
        let Some((state, _)) = ctx.log.ledger().and_then(|ledger| ledger.state_of(held.round)) else {
            return;
        };
        let in_log = |part: &Part| usize::try_from(part.0).ok().and_then(|index| state.get(index));
        let differing: Vec<Part> = held
            .parts
            .iter()
            .filter(|(part, blob)| in_log(part) != Some(blob))
            .map(|(part, _)| *part)
            .collect();
        let round = Round(held.round.0.saturating_sub(1));
        let run = ctx.run();
        if differing.is_empty() {
            held.agreed = true;
            if held.stepped {
                ctx.report(Report::Agreed { run, round });
            }
        } else {
            self.held = None;
            let parts = differing;
            ctx.report(Report::Diverged { run, round, parts });
        }
    }

    fn next_work(&self, ledger: &Ledger, range: BlockRange, blocks: u32) -> Option<Work> {
        let newest = ledger.state().0;
        let held = self.held.as_ref().filter(|held| covered(held, range, blocks).is_some());
        let Some(held) = held else {
            return Some(Work::Fetch(newest));
        };
        if held.round > newest {
            return None; // The log will say whether it is right.
        }
        let behind = newest.since(held.round);
        if held.agreed && behind == 0 {
            return (ledger.phase() == Phase::Applying(newest)).then_some(Work::Apply(newest));
        }
        let can_apply = held.agreed
            && behind <= APPLY_BEHIND_MAX
            && self.failures < APPLY_FAILURES_MAX
            && ledger.record(held.round).is_some();
        Some(if can_apply {
            Work::Apply(held.round)
        } else {
            Work::Fetch(newest)
        })
    }

    fn begin(&mut self, ctx: &mut Context<'_>, work: Work, range: BlockRange, blocks: u32) {
        let Some(ledger) = ctx.log.ledger() else { return };
        let run = ctx.run();
        let spec = ledger.spec().clone();
        let sources = sources(ledger, ctx.me());
        let (parts, job) = match work {
            Work::Fetch(round) => {
                let parts = parts_of(ledger.state().1, range, blocks);
                let job = Job::FetchState {
                    run,
                    spec,
                    round,
                    parts: parts.clone(),
                    sources,
                };
                (parts, job)
            }
            Work::Apply(round) => {
                let Some(base) = self.state(round, range, blocks) else {
                    return;
                };
                let Some(record) = ledger.record(round) else { return };
                let job = Job::Apply {
                    run,
                    spec,
                    round,
                    base: base.clone(),
                    set: record.set.clone(),
                    makers: record.makers.clone(),
                    sources,
                };
                (base, job)
            }
        };
        let job = ctx.start(job);
        self.job = Some(Working { job, work, parts });
    }
}

/// Who may have a run's blobs: the steward, which holds every set and every state, then whoever trains.
fn sources(ledger: &Ledger, me: NodeId) -> Vec<NodeId> {
    let steward = ledger.spec().steward;
    let stages = ledger.active().flat_map(|replica| &replica.stages);
    let others = stages.map(|stage| stage.node).filter(|node| *node != steward);
    core::iter::once(steward)
        .chain(others)
        .filter(|node| *node != me)
        .collect()
}

fn covered(held: &Held, range: BlockRange, blocks: u32) -> Option<Vec<(Part, BlobId)>> {
    range
        .parts(blocks)
        .map(|part| Some((Part(part), *held.parts.get(&Part(part))?)))
        .collect()
}
