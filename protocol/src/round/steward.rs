//! Keeps a run's log: admits replicas, gathers their updates, closes rounds, writes down what came of them.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

use crate::hash::{BlobId, NodeId};
use crate::layout::{BlockRange, Part};
use crate::log::{Body, EndReason, Phase, ReplicaId, Round, parts_of};
use crate::node::{Effect, Joining, Persist, Report};
use crate::run::state_hash;
use crate::time::Instant;

use super::admission::{Candidate, blocks_missing, next_replica};
use super::context::{Context, earlier};
use super::gathering::{Gathering, Judged, Key};
use super::keeper::Keeper;
use super::{
    ALIVE_EVERY, CommitAnswer, Job, JobId, JoinAnswer, LEASE, LEASE_AFTER_LOSS, Outcome, Refusal, RunMessage,
    SignedCommit, WAITING_MAX,
};

/// Tries to score a state before the run goes on without.
const EVALUATE_TRIES_MAX: u32 = 3;

/// Keeps the log of one run.
#[derive(Debug)]
pub(crate) struct Steward {
    /// Nodes that wait for a place, at most [`WAITING_MAX`].
    waiting: BTreeMap<NodeId, Candidate>,
    /// When the lease of each node that trains or waits runs out.
    leases: BTreeMap<NodeId, Instant>,
    gathering: Gathering,
    /// Since when the open round has somebody to wait for.
    opened: Option<(Round, Instant)>,
    /// Since when it has its quorum.
    quorum_at: Option<Instant>,
    scoring: Option<Scoring>,
    /// The last round whose scoring was begun, and how often it failed.
    scored: Option<(Round, u32)>,
    /// Told to stop, once no outer step is under way.
    is_stopping: bool,
    head_at: Instant,
    wake_at: Option<Instant>,
}

#[derive(Debug)]
struct Scoring {
    job: JobId,
    round: Round,
    /// The state that is scored, which may take longer than the rounds after it.
    parts: Vec<(Part, BlobId)>,
}

impl Steward {
    pub(crate) fn new() -> Self {
        Self {
            waiting: BTreeMap::new(),
            leases: BTreeMap::new(),
            gathering: Gathering::default(),
            opened: None,
            quorum_at: None,
            scoring: None,
            scored: None,
            is_stopping: false,
            head_at: Instant(0),
            wake_at: None,
        }
    }

    /// Goes on with the commits that were held: what was acknowledged before the crash is in the next set after it.
    pub(crate) fn restore(&mut self, ctx: &mut Context<'_>, commits: Vec<SignedCommit>) {
        for signed in commits {
            let Some(ledger) = ctx.ledger() else { return };
            if let Judged::New { stage, stages_total } = self.gathering.judge(ledger, &signed.commit) {
                let key = self.gathering.keep(signed, stage, stages_total, None);
                self.accept(ctx, key);
            }
        }
    }

    pub(crate) fn wake_at(&self) -> Option<Instant> {
        self.wake_at
    }

    /// Adds the blobs that are needed here.
    pub(crate) fn retain(&self, blobs: &mut BTreeSet<BlobId>) {
        self.gathering.retain(blobs);
        blobs.extend(
            self.scoring
                .iter()
                .flat_map(|scoring| &scoring.parts)
                .map(|(_, blob)| *blob),
        );
    }

    /// Does what is due.
    pub(crate) fn advance(&mut self, ctx: &mut Context<'_>, keeper: &Keeper) {
        self.wake_at = None;
        self.say_head(ctx);
        if self.phase(ctx) == Phase::Over {
            self.prune(ctx);
            if let Some(scoring) = self.scoring.take() {
                ctx.cancel(scoring.job); // The log takes no more scores.
            }
            return;
        }
        self.end_silent(ctx);
        self.admit(ctx);
        self.write_applied(ctx, keeper);
        self.prune(ctx);
        self.close(ctx);
        self.score(ctx, keeper);
        self.finish(ctx);
    }

    /// Takes the outcome of a job, if it is this machine's.
    pub(crate) fn done(&mut self, ctx: &mut Context<'_>, job: JobId, outcome: &Outcome) -> bool {
        if let Some(scoring) = self.scoring.take_if(|scoring| scoring.job == job) {
            self.on_scored(ctx, job, scoring.round, outcome);
            return true;
        }
        match outcome {
            Outcome::Fetched => {
                let Some((key, signed)) = self.gathering.fetched(job) else {
                    return false;
                };
                let (node, signed) = (signed.commit.node, signed.clone());
                ctx.persist(Persist::Commit(signed));
                if !self.accept(ctx, key) {
                    Self::answer(ctx, node, key, CommitAnswer::Waiting);
                }
                true
            }
            outcome => {
                let Some(signed) = self.gathering.fetch_failed(job) else {
                    return false;
                };
                let key = (signed.commit.replica, signed.commit.round);
                let run = ctx.run();
                let reason = match outcome {
                    Outcome::Invalid { reason } => {
                        Self::answer(ctx, signed.commit.node, key, CommitAnswer::Refused(Refusal::Invalid));
                        reason.clone()
                    }
                    Outcome::Failed { reason } => reason.clone(),
                    _ => "the job ended with the outcome of another".into(),
                };
                ctx.report(Report::JobFailed { run, job, reason });
                true
            }
        }
    }

    /// A node wants to train.
    pub(crate) fn on_join(&mut self, ctx: &mut Context<'_>, from: NodeId, joining: Joining, incarnation: u64) {
        let run = ctx.run();
        let Some(ledger) = ctx.log.ledger() else { return };
        let refuse = |reason: &str| JoinAnswer::Refused { reason: reason.into() };
        if ledger.phase() == Phase::Over {
            return Self::answer_join(ctx, from, refuse("the run is over"));
        }
        if joining.blocks_max == 0 {
            return Self::answer_join(ctx, from, refuse("the node has room for no block"));
        }
        if let Some(replica) = ledger.replica_of(from) {
            let (id, first) = (replica.id, replica.from);
            let stage = replica.stages.iter().find(|stage| stage.node == from);
            let is_restarted = replica.stages.len() > 1 && stage.is_some_and(|stage| stage.incarnation < incarnation);
            let is_too_small = stage.is_some_and(|stage| stage.range.end - stage.range.first > joining.blocks_max);
            if !is_restarted && !is_too_small {
                return Self::answer_join(
                    ctx,
                    from,
                    JoinAnswer::Admitted {
                        replica: id,
                        from: first,
                    },
                );
            }
            let reason = EndReason::Restarted(from);
            if ctx.write(Body::ReplicaEnded { id, reason }).is_err() {
                return;
            }
        }
        if !self.waiting.contains_key(&from) {
            if self.waiting.len() >= WAITING_MAX {
                let reason = format!("{WAITING_MAX} nodes wait already");
                return Self::answer_join(ctx, from, refuse(&reason));
            }
            let joining = joining.clone();
            ctx.report(Report::Joined {
                run,
                node: from,
                joining,
            });
        }
        let candidate = Candidate {
            node: from,
            institution: joining.institution,
            blocks_max: joining.blocks_max,
            incarnation,
        };
        self.waiting.insert(from, candidate);
        self.leases.insert(from, ctx.now + LEASE);
        self.admit(ctx);
        let Some(ledger) = ctx.log.ledger() else { return };
        let answer = match ledger.replica_of(from) {
            Some(replica) => JoinAnswer::Admitted {
                replica: replica.id,
                from: replica.from,
            },
            None => JoinAnswer::Waiting {
                blocks_missing: blocks_missing(&self.candidates(), ledger.spec().layout.blocks()),
            },
        };
        Self::answer_join(ctx, from, answer);
    }

    /// A node trains no more.
    pub(crate) fn on_leave(&mut self, ctx: &mut Context<'_>, from: NodeId) {
        self.waiting.remove(&from);
        let replica = ctx.ledger().and_then(|ledger| ledger.replica_of(from));
        if let Some(id) = replica.map(|replica| replica.id) {
            let reason = EndReason::Left(from);
            // Refused only after the run is over, when nobody trains anyway.
            let _ = ctx.write(Body::ReplicaEnded { id, reason });
        }
    }

    /// A node was heard of.
    pub(crate) fn on_heard(&mut self, ctx: &Context<'_>, from: NodeId) {
        if let Some(until) = self.leases.get_mut(&from) {
            *until = ctx.now + LEASE;
        }
    }

    /// The connection to a node broke.
    pub(crate) fn on_lost(&mut self, now: Instant, node: NodeId) {
        if let Some(until) = self.leases.get_mut(&node) {
            *until = (*until).min(now + LEASE_AFTER_LOSS);
        }
    }

    /// A node promises an update.
    pub(crate) fn on_commit(&mut self, ctx: &mut Context<'_>, from: NodeId, signed: SignedCommit) {
        let Some(ledger) = ctx.log.ledger() else { return };
        let key = (signed.commit.replica, signed.commit.round);
        let (stage, stages_total) = match self.gathering.judge(ledger, &signed.commit) {
            Judged::Answer(answer) => return Self::answer(ctx, from, key, answer),
            Judged::New { stage, stages_total } => (stage, stages_total),
        };
        if !signed.is_signed(ctx.seal) {
            return Self::answer(ctx, from, key, CommitAnswer::Refused(Refusal::Signature));
        }
        let node = signed.commit.node;
        if node == ctx.me() {
            // Its blobs are here, and it was persisted before it was sent.
            self.gathering.keep(signed, stage, stages_total, None);
            if !self.accept(ctx, key) {
                Self::answer(ctx, node, key, CommitAnswer::Waiting);
            }
            return;
        }
        let spec = ledger.spec().clone();
        let job = ctx.start(Job::Fetch {
            run: signed.commit.run,
            spec,
            round: signed.commit.round,
            parts: signed.commit.parts.clone(),
            sources: vec![node],
        });
        self.gathering.keep(signed, stage, stages_total, Some(job));
        Self::answer(ctx, from, key, CommitAnswer::Waiting);
    }

    /// The owner wants the run to pause.
    pub(crate) fn pause(&mut self, ctx: &mut Context<'_>) {
        Self::write_for_owner(ctx, Body::Paused);
    }

    /// The owner wants the run to go on.
    pub(crate) fn resume(&mut self, ctx: &mut Context<'_>) {
        Self::write_for_owner(ctx, Body::Resumed);
    }

    /// The owner wants the run to end.
    pub(crate) fn stop(&mut self, ctx: &mut Context<'_>) {
        match self.phase(ctx) {
            Phase::Applying(_) => self.is_stopping = true,
            _ => Self::write_for_owner(ctx, Body::Stopped),
        }
    }

    fn write_for_owner(ctx: &mut Context<'_>, body: Body) {
        let run = ctx.run();
        if let Err(error) = ctx.write(body) {
            let reason = format!("{error}");
            ctx.report(Report::CommandRefused { run, reason });
        }
    }

    fn phase(&self, ctx: &Context<'_>) -> Phase {
        ctx.ledger().map_or(Phase::Over, |ledger| ledger.phase())
    }

    fn answer(ctx: &mut Context<'_>, to: NodeId, (replica, round): Key, answer: CommitAnswer) {
        let run = ctx.run();
        ctx.send(
            to,
            RunMessage::Ack {
                run,
                round,
                replica,
                answer,
            },
        );
    }

    fn answer_join(ctx: &mut Context<'_>, to: NodeId, answer: JoinAnswer) {
        let run = ctx.run();
        ctx.send(to, RunMessage::JoinAnswer { run, answer });
    }

    /// Says how far the log goes, from time to time; more seldom once nothing is added.
    fn say_head(&mut self, ctx: &mut Context<'_>) {
        if ctx.now >= self.head_at {
            let pause = match self.phase(ctx) {
                Phase::Over => LEASE,
                _ => ALIVE_EVERY,
            };
            self.head_at = ctx.now + pause;
            let message = ctx.head();
            ctx.effects.push(Effect::Broadcast { message });
        }
        self.wake_at = earlier(self.wake_at, Some(self.head_at));
    }

    /// Ends the replicas of nodes whose lease ran out, and forgets those that waited.
    fn end_silent(&mut self, ctx: &mut Context<'_>) {
        let now = ctx.now;
        let Some(ledger) = ctx.ledger() else { return };
        let members: BTreeMap<NodeId, ReplicaId> = ledger
            .active()
            .flat_map(|replica| replica.stages.iter().map(|stage| (stage.node, replica.id)))
            .collect();
        for node in members.keys() {
            // After a restart of the steward, everybody's lease begins anew.
            self.leases.entry(*node).or_insert(now + LEASE);
        }
        let mut ended = BTreeMap::new();
        for (node, until) in &self.leases {
            if now >= *until {
                self.waiting.remove(node);
                if let Some(replica) = members.get(node) {
                    ended.entry(*replica).or_insert(EndReason::Silent(*node));
                }
            }
        }
        for (id, reason) in ended {
            // The replica is active, so no rule forbids it; a full log ends everything.
            let _ = ctx.write(Body::ReplicaEnded { id, reason });
        }
        let waiting = &self.waiting;
        self.leases
            .retain(|node, until| now < *until && (waiting.contains_key(node) || members.contains_key(node)));
        let next = self.leases.values().min().copied();
        self.wake_at = earlier(self.wake_at, next);
    }

    fn candidates(&self) -> Vec<Candidate> {
        self.waiting.values().copied().collect()
    }

    /// Makes replicas of those that wait, as long as it can.
    fn admit(&mut self, ctx: &mut Context<'_>) {
        loop {
            let Some(ledger) = ctx.ledger() else { return };
            let blocks = ledger.spec().layout.blocks();
            let Some(stages) = next_replica(&self.candidates(), blocks) else {
                return;
            };
            let id = ledger.next_replica();
            let from = self.first_round(ctx);
            let nodes: Vec<NodeId> = stages.iter().map(|stage| stage.node).collect();
            if ctx.write(Body::Replica { id, stages, from }).is_err() {
                return; // Full for now: they go on waiting.
            }
            for node in nodes {
                self.waiting.remove(&node);
            }
        }
    }

    /// The first round of a replica that is admitted now: the next, so that nobody waits for it; the open one where it
    /// lacks a quorum without it or has only begun.
    fn first_round(&self, ctx: &Context<'_>) -> Round {
        let Some(ledger) = ctx.ledger() else {
            return Round(0);
        };
        let next = ledger.next_round();
        let closing = &ledger.spec().closing;
        match ledger.phase() {
            Phase::Open(open) => {
                let training = ledger.active().filter(|replica| replica.from <= open).count();
                let is_short = u32::try_from(training).unwrap_or(u32::MAX) < closing.quorum;
                let has_begun = self
                    .opened
                    .is_some_and(|(round, at)| round == open && ctx.now < at + closing.grace);
                if is_short || has_begun { open } else { open.next() }
            }
            Phase::Applying(_) | Phase::Paused(_) | Phase::Done | Phase::Over => next,
        }
    }

    /// Writes what this node's outer step made.
    fn write_applied(&mut self, ctx: &mut Context<'_>, keeper: &Keeper) {
        let Phase::Applying(round) = self.phase(ctx) else {
            return;
        };
        let Some(ledger) = ctx.ledger() else { return };
        let Some(parts) = keeper.applied(round, ledger.spec().layout.blocks()) else {
            return;
        };
        let state = state_hash(&parts);
        let _ = ctx.write(Body::Applied { round, parts, state }); // As above.
        if self.is_stopping {
            self.is_stopping = false;
            Self::write_for_owner(ctx, Body::Stopped);
        }
    }

    /// Tells the nodes of updates that nobody will fold in.
    fn prune(&mut self, ctx: &mut Context<'_>) {
        let Some(ledger) = ctx.log.ledger() else { return };
        let open = ledger.next_round();
        let is_over = ledger.phase() == Phase::Over || open.0 >= ledger.spec().rounds;
        let refusal = if is_over {
            Refusal::RunOver
        } else {
            Refusal::TooLate { open }
        };
        for (key, nodes, jobs) in self.gathering.prune(ledger) {
            for job in jobs {
                ctx.cancel(job);
            }
            for node in nodes {
                Self::answer(ctx, node, key, CommitAnswer::Refused(refusal));
            }
        }
    }

    /// Accepts an update if all of it is here.
    fn accept(&mut self, ctx: &mut Context<'_>, key: Key) -> bool {
        let Some(nodes) = self.gathering.accept(key) else {
            return false;
        };
        for node in nodes {
            Self::answer(ctx, node, key, CommitAnswer::Accepted);
        }
        true
    }

    /// Closes the open round if it is time.
    fn close(&mut self, ctx: &mut Context<'_>) {
        let Some(ledger) = ctx.ledger() else { return };
        let Phase::Open(round) = ledger.phase() else {
            self.opened = None;
            self.quorum_at = None;
            return;
        };
        let closing = ledger.spec().closing;
        let present: BTreeSet<ReplicaId> = self.gathering.accepted_of(round).collect();
        let active = ledger.active().filter(|replica| replica.from <= round);
        let expected: Vec<ReplicaId> = active.map(|replica| replica.id).collect();
        let nobody = expected.is_empty() && !self.gathering.has_accepted();
        if self.opened.is_none_or(|(open, _)| open != round) || nobody {
            self.opened = Some((round, ctx.now));
            self.quorum_at = None;
        }
        let all_here = expected.iter().all(|replica| present.contains(replica));
        let has_quorum = u32::try_from(present.len()).unwrap_or(u32::MAX) >= closing.quorum;
        if has_quorum && self.quorum_at.is_none() {
            self.quorum_at = Some(ctx.now);
        }
        let grace_end = self.quorum_at.map(|at| at + closing.grace);
        let deadline = self
            .opened
            .map(|(_, at)| at + closing.deadline)
            .filter(|_| self.gathering.has_accepted());
        let is_past = |time: Option<Instant>| time.is_some_and(|time| ctx.now >= time);
        if !(has_quorum && all_here || is_past(grace_end) || is_past(deadline)) {
            self.wake_at = earlier(self.wake_at, earlier(grace_end, deadline));
            return;
        }
        let base = state_hash(ledger.state().1);
        let set = self.gathering.set();
        let _ = ctx.write(Body::Closed { round, base, set }); // Every rule was kept when its updates were accepted.
        self.opened = None;
        self.quorum_at = None;
    }

    /// Asks for the scores of the newest state where they are due.
    fn score(&mut self, ctx: &mut Context<'_>, keeper: &Keeper) {
        let Some(round) = self.unscored(ctx).filter(|_| self.scoring.is_none()) else {
            return;
        };
        let Some(ledger) = ctx.log.ledger() else { return };
        let blocks = ledger.spec().layout.blocks();
        let whole = BlockRange::whole(blocks);
        if keeper.state(round.next(), whole, blocks).is_none() {
            return; // It is on its way.
        }
        let parts = parts_of(ledger.state().1, whole, blocks);
        let work = Job::Evaluate {
            run: ctx.run(),
            spec: ledger.spec().clone(),
            round,
            parts: parts.clone(),
        };
        let job = ctx.start(work);
        self.scoring = Some(Scoring { job, round, parts });
        if self.scored.is_none_or(|(scored, _)| scored != round) {
            self.scored = Some((round, 0));
        }
    }

    /// The round after which the newest state came, where it is to be scored and was not.
    fn unscored(&self, ctx: &Context<'_>) -> Option<Round> {
        let ledger = ctx.ledger()?;
        let spec = ledger.spec();
        let done = ledger.state().0;
        let round = Round(done.0.checked_sub(1)?);
        let is_asked = spec.evaluation.is_some() && spec.evaluate_every_rounds > 0;
        let is_due = is_asked && (done.0.checked_rem(spec.evaluate_every_rounds) == Some(0) || done.0 == spec.rounds);
        let is_known = ledger.evaluated().is_some_and(|evaluated| evaluated >= round);
        let is_given_up = self
            .scored
            .is_some_and(|(scored, failed)| scored == round && failed >= EVALUATE_TRIES_MAX);
        (is_due && !is_known && !is_given_up).then_some(round)
    }

    fn on_scored(&mut self, ctx: &mut Context<'_>, job: JobId, round: Round, outcome: &Outcome) {
        if let Outcome::Evaluated { bits_per_byte_ppm } = outcome {
            let bits_per_byte_ppm = bits_per_byte_ppm.clone();
            let scores = Body::Evaluated {
                round,
                bits_per_byte_ppm,
            };
            if ctx.write(scores).is_ok() {
                return;
            }
        }
        let reason = match outcome {
            Outcome::Failed { reason } | Outcome::Invalid { reason } => reason.clone(),
            _ => "the job ended with the outcome of another".into(),
        };
        let run = ctx.run();
        ctx.report(Report::JobFailed { run, job, reason });
        if let Some((_, failed)) = self.scored.as_mut().filter(|(scored, _)| *scored == round) {
            *failed = failed.saturating_add(1);
        }
    }

    /// Writes the end, once all rounds are done and the last state is scored.
    fn finish(&mut self, ctx: &mut Context<'_>) {
        if self.phase(ctx) == Phase::Done && self.scoring.is_none() && self.unscored(ctx).is_none() {
            let _ = ctx.write(Body::Finished); // All rounds are done, which is its only rule.
        }
    }
}
