//! One run, as one node sees it: its log, and the machines that act on it.

use alloc::collections::{BTreeSet, VecDeque};
use alloc::string::ToString;
use alloc::vec::Vec;

use crate::hash::{NodeId, RunId};
use crate::layout::BlockRange;
use crate::log::{Body, Entry, Log, LogError, Received, Round, Seal, Stewards};
use crate::round::{
    Context, ENTRIES_PER_MESSAGE_MAX, JobId, Keeper, MESSAGE_BYTES_MAX, Outcome, RETRY_FIRST, RunMessage, Steward,
    Trainer, earlier,
};
use crate::run::RunSpec;
use crate::time::Instant;

use super::{Command, Effect, Input, Joining, Persist, Report, RestoredRun};

/// Bytes of entries in one answer: what fits a message beside its wrapping.
const ANSWER_BYTES_MAX: usize = MESSAGE_BYTES_MAX - (64 << 10);
/// Times that the machines look at what the others did in one step. Each look writes an entry or answers a message, and
/// few of either follow from one input; what is left over is done at the next step, at once.
const PASSES_MAX: u32 = 32;

/// One run, as one node sees it.
#[derive(Debug)]
pub(crate) struct Run {
    log: Log,
    /// Whom to ask for the first entry; `None` where nobody said.
    steward_hint: Option<NodeId>,
    keeper: Keeper,
    trainer: Trainer,
    /// At the run's steward.
    steward: Option<Steward>,
    /// When the log may be asked for again.
    ask_at: Instant,
    /// Whether a fork was reported: the first proof is enough.
    is_forked: bool,
    /// The last round for which the store was told what is needed.
    retained: Option<Round>,
    wake_at: Option<Instant>,
    to_self: VecDeque<RunMessage>,
}

impl Run {
    pub(crate) fn follow(run: RunId, steward_hint: Option<NodeId>, incarnation: u64) -> Self {
        Self {
            log: Log::new(run),
            steward_hint,
            keeper: Keeper::default(),
            trainer: Trainer::new(incarnation),
            steward: None,
            ask_at: Instant(0),
            is_forked: false,
            retained: None,
            wake_at: None,
            to_self: VecDeque::new(),
        }
    }

    /// Begins a run as its steward.
    ///
    /// # Errors
    ///
    /// [`LogError`] where the facts are out of bounds, or name another steward.
    pub(crate) fn begin(
        spec: &RunSpec,
        incarnation: u64,
        seal: &dyn Seal,
        effects: &mut Vec<Effect>,
    ) -> Result<Self, LogError> {
        let mut begun = Self::follow(spec.id(), None, incarnation);
        let genesis = Body::Genesis { spec: spec.to_bytes() };
        let entry = begun.log.write(genesis, seal)?;
        effects.push(Effect::Persist {
            run: begun.log.run(),
            what: Persist::Entry(entry.clone()),
        });
        effects.push(Effect::Report(Report::Logged { entry }));
        begun.steward = Some(Steward::new());
        Ok(begun)
    }

    /// Goes on with what was persisted.
    pub(crate) fn restore(stored: RestoredRun, id: RunId, incarnation: u64, step: &mut Step<'_>) -> Self {
        let me = step.seal.node();
        let hint = (stored.steward != NodeId::default()).then_some(stored.steward);
        let mut run = Self::follow(id, hint, incarnation);
        let mut is_damaged = false;
        for entry in stored.entries {
            let received = run.log.receive(entry, step.seal);
            if received != Received::Appended {
                is_damaged = true;
                step.effects.push(Effect::Report(Report::LogDamaged {
                    run: id,
                    entries: run.log.len(),
                    reason: alloc::format!("{received:?}").chars().take(512).collect(),
                }));
                break;
            }
        }
        if let Some((round, parts)) = stored.state {
            run.keeper.restore(round, parts);
        }
        let own = stored.commits.iter().filter(|signed| signed.commit.node == me).cloned();
        run.trainer.restore(stored.joining, own);
        let writes = run.log.spec().is_some_and(|spec| Stewards::of(spec).accept(me));
        // A steward that lost a part of its log may have said something that it does not know, so it says nothing more.
        if writes && !is_damaged {
            let mut steward = Steward::new();
            run.with(step, |_, ctx| steward.restore(ctx, stored.commits));
            run.steward = Some(steward);
        }
        run.settle(step);
        run
    }

    pub(crate) const fn log(&self) -> &Log {
        &self.log
    }

    pub(crate) const fn keeper(&self) -> &Keeper {
        &self.keeper
    }

    pub(crate) const fn trainer(&self) -> &Trainer {
        &self.trainer
    }

    pub(crate) const fn is_steward(&self) -> bool {
        self.steward.is_some()
    }

    pub(crate) const fn wake_at(&self) -> Option<Instant> {
        self.wake_at
    }

    /// Takes one input that is meant for this run, or for all.
    pub(crate) fn step(&mut self, input: Input, step: &mut Step<'_>) {
        match input {
            Input::Message { from, message } => self.with(step, |run, ctx| run.on_message(ctx, from, message)),
            Input::Done { job, outcome } => self.with(step, |run, ctx| run.on_done(ctx, job, &outcome)),
            Input::Local(command) => self.with(step, |run, ctx| run.on_command(ctx, command)),
            Input::PeerFound { node } => self.with(step, |run, ctx| run.on_found(ctx, node)),
            Input::PeerLost { node } => {
                if let Some(steward) = &mut self.steward {
                    steward.on_lost(step.now, node);
                }
            }
            Input::Wake => {}
        }
        self.settle(step);
    }

    /// Lets the machines act until none has anything to do.
    pub(crate) fn settle(&mut self, step: &mut Step<'_>) {
        for pass in 0.. {
            if pass == PASSES_MAX {
                self.wake_at = Some(step.now);
                return;
            }
            let entries_before = self.log.len();
            self.with(step, Self::advance);
            while let Some(message) = self.to_self.pop_front() {
                let me = step.seal.node();
                self.with(step, |run, ctx| run.on_message(ctx, me, message));
            }
            let is_settled = self.log.len() == entries_before && self.to_self.is_empty();
            if is_settled && pass > 0 {
                break;
            }
        }
        self.retain(step);
        let machines = [self.keeper.wake_at(), self.trainer.wake_at()];
        let steward = self.steward.as_ref().and_then(Steward::wake_at);
        let ask = self.steward_hint.filter(|_| self.log.is_empty()).map(|_| self.ask_at);
        self.wake_at = machines.into_iter().fold(earlier(steward, ask), earlier);
    }

    fn advance(&mut self, ctx: &mut Context<'_>) {
        if self.log_is_empty(ctx) {
            return;
        }
        let appended_from = ctx.log.len();
        if let Some(steward) = &mut self.steward {
            steward.advance(ctx, &self.keeper);
        }
        self.on_appended(ctx, appended_from);
        let wanted = if self.steward.is_some() {
            let blocks = ctx.log.spec().map_or(0, |spec| spec.layout.blocks());
            Some(BlockRange::whole(blocks))
        } else {
            self.trainer.wanted(ctx)
        };
        self.keeper.advance(ctx, wanted);
        self.trainer.advance(ctx, &self.keeper);
    }

    /// Asks for the first entry, as long as there is none.
    fn log_is_empty(&mut self, ctx: &mut Context<'_>) -> bool {
        if ctx.log.is_empty()
            && let Some(steward) = self.steward_hint
        {
            self.ask(ctx, steward, 0);
        }
        ctx.log.is_empty()
    }

    /// A steward tells a node that came of its run, and whoever waits for the steward says again what it wants: waiting
    /// for the next head or try would cost rounds.
    fn on_found(&mut self, ctx: &mut Context<'_>, node: NodeId) {
        if self.steward.is_some() {
            let head = ctx.head();
            ctx.send(node, head);
        }
        if ctx.log.spec().is_some_and(|spec| spec.steward == node) {
            self.trainer.on_steward_found();
        }
    }

    fn on_message(&mut self, ctx: &mut Context<'_>, from: NodeId, message: RunMessage) {
        let appended_from = ctx.log.len();
        if let Some(steward) = &mut self.steward {
            steward.on_heard(ctx, from);
        }
        let is_from_steward = ctx.log.spec().is_some_and(|spec| spec.steward == from);
        match message {
            RunMessage::Entries { entries, .. } => self.on_entries(ctx, from, entries),
            RunMessage::Head { entries, head, .. } => {
                if entries > ctx.log.len() {
                    self.ask(ctx, from, ctx.log.len());
                } else if entries == ctx.log.len() && head != ctx.log.head() && !self.is_forked {
                    self.ask(ctx, from, entries.saturating_sub(1)); // The entry is the proof, if there is one.
                }
            }
            RunMessage::Ask { from: index, .. } => Self::answer(ctx, from, index),
            RunMessage::Join {
                institution,
                blocks_max,
                languages,
                incarnation,
                entries,
                ..
            } => {
                if let Some(steward) = &mut self.steward {
                    let joining = Joining {
                        institution,
                        blocks_max,
                        languages,
                    };
                    steward.on_join(ctx, from, joining, incarnation);
                    self.catch_up(ctx, from, entries);
                }
            }
            RunMessage::Alive { entries, .. } => self.catch_up(ctx, from, entries),
            RunMessage::Leave { .. } => {
                if let Some(steward) = &mut self.steward {
                    steward.on_leave(ctx, from);
                }
            }
            RunMessage::Commit(signed) => {
                if let Some(steward) = &mut self.steward {
                    steward.on_commit(ctx, from, signed);
                }
            }
            RunMessage::Ack {
                round, replica, answer, ..
            } if is_from_steward => self.trainer.on_ack(ctx, round, replica, answer),
            RunMessage::JoinAnswer { run, answer } if is_from_steward => {
                ctx.report(Report::JoinAnswered { run, answer });
            }
            RunMessage::Ack { .. } | RunMessage::JoinAnswer { .. } => {} // Only the steward may say so.
        }
        self.on_appended(ctx, appended_from);
    }

    fn on_entries(&mut self, ctx: &mut Context<'_>, from: NodeId, entries: Vec<Entry>) {
        let is_answer = entries.len() > 1;
        let before = ctx.log.len();
        for entry in entries.into_iter().take(ENTRIES_PER_MESSAGE_MAX) {
            let stored = entry.clone();
            match ctx.log.receive(entry, ctx.seal) {
                Received::Appended => {
                    ctx.persist(Persist::Entry(stored.clone()));
                    ctx.report(Report::Logged { entry: stored.clone() });
                    self.find_own(ctx, &stored);
                }
                Received::Known => {}
                Received::Gap => {
                    self.ask(ctx, from, ctx.log.len());
                    break;
                }
                Received::Forked(fork) => {
                    if !self.is_forked {
                        self.is_forked = true;
                        let (ours, theirs) = (fork.ours, fork.theirs);
                        ctx.report(Report::Equivocation { ours, theirs });
                    }
                    break;
                }
                Received::Refused(_) => break, // A peer's doing, and of no consequence.
            }
        }
        if is_answer && ctx.log.len() > before {
            // There may be more than one message holds. Nothing is lost by asking at once.
            self.ask_at = ctx.now;
            self.ask(ctx, from, ctx.log.len());
        }
    }

    /// Lets the trainer find its commits in sets that this node wrote itself.
    fn on_appended(&mut self, ctx: &mut Context<'_>, from: u64) {
        if self.steward.is_none() {
            return; // Entries of others are looked at one by one.
        }
        let start = usize::try_from(from).unwrap_or(usize::MAX);
        let appended: Vec<Entry> = ctx.log.entries().iter().skip(start).cloned().collect();
        for entry in appended {
            self.find_own(ctx, &entry);
        }
    }

    fn find_own(&mut self, ctx: &mut Context<'_>, entry: &Entry) {
        if let Body::Closed { round, set, .. } = &entry.body {
            self.trainer.on_closed(ctx, set);
            let late_max = ctx.log.spec().map_or(0, |spec| u64::from(spec.closing.late_rounds_max));
            let before = Round((round.0 + 1).saturating_sub(late_max));
            ctx.persist(Persist::DropCommits { before });
        }
    }

    fn on_done(&mut self, ctx: &mut Context<'_>, job: JobId, outcome: &Outcome) {
        let mine = self.keeper.done(ctx, job, outcome) || self.trainer.done(ctx, job, outcome);
        if !mine && let Some(steward) = &mut self.steward {
            steward.done(ctx, job, outcome);
        }
    }

    fn on_command(&mut self, ctx: &mut Context<'_>, command: Command) {
        if let Command::Follow { steward, .. } | Command::Join { steward, .. } = &command {
            self.steward_hint = Some(*steward);
        }
        match (command, &mut self.steward) {
            (Command::Join { joining, .. }, _) => self.trainer.join(ctx, joining),
            (Command::Leave { .. }, _) => self.trainer.leave(ctx),
            (Command::Pause { .. }, Some(steward)) => steward.pause(ctx),
            (Command::Resume { .. }, Some(steward)) => steward.resume(ctx),
            (Command::Stop { .. }, Some(steward)) => steward.stop(ctx),
            (Command::Pause { run } | Command::Resume { run } | Command::Stop { run }, None) => {
                let reason = "only the run's steward can do that".to_string();
                ctx.report(Report::CommandRefused { run, reason });
            }
            (Command::Begin { .. } | Command::Follow { .. }, _) => {} // The node's own.
        }
    }

    /// Asks for entries, not more often than every [`RETRY_FIRST`].
    fn ask(&mut self, ctx: &mut Context<'_>, whom: NodeId, from: u64) {
        if ctx.now < self.ask_at || whom == ctx.me() {
            return;
        }
        self.ask_at = ctx.now + RETRY_FIRST;
        let run = ctx.run();
        ctx.send(whom, RunMessage::Ask { run, from });
    }

    /// Answers with entries, or with how far the log goes.
    fn answer(ctx: &mut Context<'_>, to: NodeId, from: u64) {
        if ctx.log.is_empty() {
            return;
        }
        let entries = ctx.log.range(from, ENTRIES_PER_MESSAGE_MAX, ANSWER_BYTES_MAX);
        let message = if entries.is_empty() {
            ctx.head()
        } else {
            let run = ctx.run();
            RunMessage::Entries { run, entries }
        };
        ctx.send(to, message);
    }

    /// Sends a participant what it lacks. Where it has more than this node, this node asks.
    fn catch_up(&mut self, ctx: &mut Context<'_>, from: NodeId, entries: u64) {
        if entries < ctx.log.len() {
            Self::answer(ctx, from, entries);
        } else if entries > ctx.log.len() {
            self.ask(ctx, from, ctx.log.len());
        }
    }

    /// Tells the store what is needed, once for every new state of this node.
    fn retain(&mut self, step: &mut Step<'_>) {
        let Some(ledger) = self.log.ledger() else { return };
        let newest = ledger.state().0;
        if self.retained == Some(newest) || self.keeper.round().is_none_or(|round| round < newest) {
            return;
        }
        self.retained = Some(newest);
        let mut blobs = BTreeSet::new();
        blobs.extend(ledger.state().1);
        blobs.extend(ledger.spec().adapters.iter().flat_map(|adapters| &adapters.base));
        let closed: Vec<_> = ledger.recent().collect();
        // Whoever is a round behind still steps from the state before.
        blobs.extend(closed.iter().rev().take(2).flat_map(|record| &record.base));
        blobs.extend(closed.iter().flat_map(|record| &record.set).flat_map(|one| &one.parts));
        self.keeper.retain(&mut blobs);
        self.trainer.retain(&mut blobs);
        if let Some(steward) = &self.steward {
            steward.retain(&mut blobs);
        }
        let run = self.log.run();
        step.effects.push(Effect::Retain { run, blobs });
    }

    /// Lends the log and the way out to a part of this run.
    fn with<T>(&mut self, step: &mut Step<'_>, act: impl FnOnce(&mut Self, &mut Context<'_>) -> T) -> T {
        let mut log = core::mem::replace(&mut self.log, Log::new(RunId::default()));
        let mut to_self = core::mem::take(&mut self.to_self);
        let mut ctx = Context {
            now: step.now,
            seal: step.seal,
            log: &mut log,
            next_job: step.next_job,
            effects: step.effects,
            to_self: &mut to_self,
        };
        let result = act(self, &mut ctx);
        self.log = log;
        self.to_self = to_self;
        result
    }
}

/// What a node lends its runs for one step.
#[derive(Debug)]
pub(crate) struct Step<'a> {
    pub(crate) now: Instant,
    pub(crate) seal: &'a dyn Seal,
    pub(crate) next_job: &'a mut JobId,
    pub(crate) effects: &'a mut Vec<Effect>,
}
