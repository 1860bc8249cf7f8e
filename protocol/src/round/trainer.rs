//! Takes part in a run: asks to be admitted, trains each open round, commits, and says that it lives.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

use crate::hash::{BlobId, Digest};
use crate::layout::{BlockRange, Part};
use crate::log::{Contribution, Ledger, Phase, ReplicaId, Round, tokens_max};
use crate::node::{Joining, Persist, Report};
use crate::time::Instant;

use super::context::{Context, earlier};
use super::keeper::Keeper;
use super::{
    ALIVE_EVERY, Commit, CommitAnswer, FAILURE_RETRY_MAX, Job, JobId, Outcome, RETRY_MAX, Refusal, RunMessage,
    SignedCommit, retry_after,
};

/// Own commits that wait to be in a set. Each cost a round of training; more than these come of a fault only.
const OWN_MAX: usize = 64;

/// Trains in one run.
#[derive(Debug)]
pub(crate) struct Trainer {
    /// Grows with every life of this node, and whenever it forgets a chain's unfinished round.
    incarnation: u64,
    /// `None` for a node that only follows, or that leaves.
    joining: Option<Joining>,
    training: Option<Training>,
    /// The last round trained, whatever became of it: a round is trained once as the same replica.
    trained: Option<(Round, ReplicaId)>,
    /// Commits that are in no set yet, at most [`OWN_MAX`].
    own: BTreeMap<(Round, ReplicaId), Own>,
    /// For [`RunMessage::Join`] and [`RunMessage::Leave`].
    asking: Again,
    alive_at: Instant,
    failures: u32,
    retry_at: Instant,
    wake_at: Option<Instant>,
}

#[derive(Debug)]
struct Training {
    job: JobId,
    round: Round,
    replica: ReplicaId,
    /// Of a replica with several stages.
    is_chain: bool,
    base_hash: Digest,
    base: Vec<(Part, BlobId)>,
}

#[derive(Debug)]
struct Own {
    signed: SignedCommit,
    /// The steward has said that it is safe.
    accepted: bool,
    again: Again,
}

/// Something that is said again until it is answered.
#[derive(Debug, Default)]
struct Again {
    tries: u32,
    at: Instant,
}

impl Again {
    /// Whether to say it now; then the next time is set.
    fn is_due(&mut self, now: Instant) -> bool {
        let due = now >= self.at;
        if due {
            self.at = now + retry_after(self.tries, RETRY_MAX);
            self.tries = self.tries.saturating_add(1);
        }
        due
    }
}

/// This node's place in an active replica.
struct Place {
    replica: ReplicaId,
    from: Round,
    stage: usize,
    range: BlockRange,
    is_chain: bool,
    /// Whether the replica counts on an earlier life of this node, whose part of the round is forgotten.
    is_stale: bool,
}

impl Trainer {
    pub(crate) fn new(incarnation: u64) -> Self {
        Self {
            incarnation,
            joining: None,
            training: None,
            trained: None,
            own: BTreeMap::new(),
            asking: Again::default(),
            alive_at: Instant(0),
            failures: 0,
            retry_at: Instant(0),
            wake_at: None,
        }
    }

    /// Goes on with what was persisted.
    pub(crate) fn restore(&mut self, joining: Option<Joining>, commits: impl Iterator<Item = SignedCommit>) {
        self.joining = joining;
        for signed in commits {
            let key = (signed.commit.round, signed.commit.replica);
            self.trained = self.trained.max(Some(key));
            self.keep(key, signed);
        }
    }

    pub(crate) fn join(&mut self, ctx: &mut Context<'_>, joining: Joining) {
        self.joining = Some(joining);
        self.asking = Again::default();
        ctx.persist(Persist::Joining(self.joining.clone()));
    }

    pub(crate) fn leave(&mut self, ctx: &mut Context<'_>) {
        self.joining = None;
        self.asking = Again::default();
        ctx.persist(Persist::Joining(None));
    }

    pub(crate) fn joining(&self) -> Option<&Joining> {
        self.joining.as_ref()
    }

    /// The round that is being trained, for people.
    pub(crate) fn round(&self) -> Option<Round> {
        self.training.as_ref().map(|training| training.round)
    }

    pub(crate) fn wake_at(&self) -> Option<Instant> {
        self.wake_at
    }

    /// The blocks whose state this node needs in order to train.
    pub(crate) fn wanted(&self, ctx: &Context<'_>) -> Option<BlockRange> {
        let joining = self.joining.as_ref()?;
        let ledger = ctx.ledger()?;
        let blocks = ledger.spec().layout.blocks();
        match self.place(ctx, ledger) {
            Some(place) => Some(place.range),
            // Fetching while it waits saves the first round.
            None => (joining.blocks_max >= blocks).then_some(BlockRange::whole(blocks)),
        }
    }

    /// Adds the blobs that are needed here.
    pub(crate) fn retain(&self, blobs: &mut BTreeSet<BlobId>) {
        let commits = self.own.values().flat_map(|own| &own.signed.commit.parts);
        let bases = self.training.iter().flat_map(|training| &training.base);
        blobs.extend(commits.chain(bases).map(|(_, blob)| *blob));
    }

    /// Looks at the log and does what is due.
    pub(crate) fn advance(&mut self, ctx: &mut Context<'_>, keeper: &Keeper) {
        self.wake_at = None;
        let Some(ledger) = ctx.ledger() else { return };
        let place = self.place(ctx, ledger);
        let is_over = ledger.phase() == Phase::Over;
        self.settle(ctx);
        self.give_up_if_pointless(ctx, place.as_ref());
        if is_over {
            return;
        }
        self.speak(ctx, place.as_ref());
        self.resend(ctx);
        if let Some(place) = &place {
            self.train(ctx, place, keeper);
        }
    }

    /// Takes the outcome of a job, if it is this machine's.
    pub(crate) fn done(&mut self, ctx: &mut Context<'_>, job: JobId, outcome: &Outcome) -> bool {
        let Some(training) = self.training.take_if(|training| training.job == job) else {
            return false;
        };
        match outcome {
            Outcome::Trained {
                parts,
                tokens,
                loss_ppm,
            } if parts
                .iter()
                .map(|(part, _)| part)
                .eq(training.base.iter().map(|(part, _)| part)) =>
            {
                self.failures = 0;
                self.commit(ctx, training, parts.clone(), *tokens, *loss_ppm);
            }
            outcome => {
                let reason = match outcome {
                    Outcome::Failed { reason } | Outcome::Invalid { reason } => reason.clone(),
                    _ => "the job ended with the outcome of another".into(),
                };
                let run = ctx.run();
                ctx.report(Report::JobFailed { run, job, reason });
                self.retry_at = ctx.now + retry_after(self.failures, FAILURE_RETRY_MAX);
                self.failures = self.failures.saturating_add(1);
                if training.is_chain {
                    // The other stages may be done with the round and would not train it again with this one. As
                    // another life, it is paired anew.
                    self.incarnation = self.incarnation.saturating_add(1);
                }
            }
        }
        true
    }

    /// Hears from the steward what comes of a commit.
    pub(crate) fn on_ack(&mut self, ctx: &mut Context<'_>, round: Round, replica: ReplicaId, answer: CommitAnswer) {
        let Some(own) = self.own.get_mut(&(round, replica)) else {
            return;
        };
        if own.accepted {
            return; // Nothing takes that back; a refusal now is an old one that was slow.
        }
        let run = ctx.run();
        match answer {
            CommitAnswer::Waiting => {}
            CommitAnswer::Accepted => {
                own.accepted = true;
                ctx.report(Report::CommitAccepted { run, round, replica });
            }
            CommitAnswer::Refused(refusal) => {
                self.own.remove(&(round, replica));
                ctx.report(Report::CommitRefused {
                    run,
                    round,
                    replica,
                    refusal,
                });
            }
        }
    }

    /// The steward can be reached again: what was said in vain is said at once.
    pub(crate) fn on_steward_found(&mut self) {
        self.asking = Again::default();
        self.alive_at = Instant(0);
        for own in self.own.values_mut() {
            own.again = Again::default();
        }
    }

    /// Finds own commits in a set.
    pub(crate) fn on_closed(&mut self, ctx: &mut Context<'_>, set: &[Contribution]) {
        for contribution in set {
            let key = (contribution.base, contribution.replica);
            let Some(own) = self.own.remove(&key) else { continue };
            let (round, replica) = key;
            let run = ctx.run();
            let is_mine = own.signed.commit.parts.iter().all(|(part, blob)| {
                let index = usize::try_from(part.0).unwrap_or(usize::MAX);
                contribution.parts.get(index) == Some(blob)
            });
            if !is_mine {
                let refusal = Refusal::Different;
                ctx.report(Report::CommitRefused {
                    run,
                    round,
                    replica,
                    refusal,
                });
            } else if !own.accepted {
                ctx.report(Report::CommitAccepted { run, round, replica });
            }
        }
    }

    fn place(&self, ctx: &Context<'_>, ledger: &Ledger) -> Option<Place> {
        let replica = ledger.replica_of(ctx.me())?;
        let index = replica.stage_of(ctx.me())?;
        let stage = replica.stages.get(index)?;
        let is_chain = replica.stages.len() > 1;
        Some(Place {
            replica: replica.id,
            from: replica.from,
            stage: index,
            range: stage.range,
            is_chain,
            is_stale: is_chain && stage.incarnation != self.incarnation,
        })
    }

    /// Gives up own commits that no set can take any more.
    fn settle(&mut self, ctx: &mut Context<'_>) {
        let Some(ledger) = ctx.ledger() else { return };
        let open = ledger.next_round();
        let late_max = u64::from(ledger.spec().closing.late_rounds_max);
        let refusal = if ledger.phase() == Phase::Over || open.0 >= ledger.spec().rounds {
            Some(Refusal::RunOver)
        } else {
            None
        };
        let run = ctx.run();
        self.own.retain(|(round, replica), own| {
            let is_late = open.since(*round) > late_max;
            let Some(refusal) = refusal.or(is_late.then_some(Refusal::TooLate { open })) else {
                return true;
            };
            if !own.accepted {
                ctx.effects.push(crate::node::Effect::Report(Report::CommitRefused {
                    run,
                    round: *round,
                    replica: *replica,
                    refusal,
                }));
            }
            false
        });
    }

    fn give_up_if_pointless(&mut self, ctx: &mut Context<'_>, place: Option<&Place>) {
        let Some(training) = &self.training else { return };
        let Some(ledger) = ctx.ledger() else { return };
        let late_max = u64::from(ledger.spec().closing.late_rounds_max);
        let is_over = ledger.phase() == Phase::Over || ledger.next_round().0 >= ledger.spec().rounds;
        let is_late = ledger.next_round().since(training.round) > late_max;
        // A whole replica that ended may still commit the round that it is in; a chain's other stages have stopped.
        let is_broken = training.is_chain && place.is_none_or(|place| place.replica != training.replica);
        if is_over || is_late || is_broken || self.joining.is_none() {
            let job = training.job;
            ctx.cancel(job);
            self.training = None;
        }
    }

    /// Joins, leaves, lives.
    fn speak(&mut self, ctx: &mut Context<'_>, place: Option<&Place>) {
        let Some(steward) = ctx.ledger().map(|ledger| ledger.spec().steward) else {
            return;
        };
        let run = ctx.run();
        let (incarnation, entries) = (self.incarnation, ctx.log.len());
        let is_in = place.is_some_and(|place| !place.is_stale);
        let message = match (&self.joining, place) {
            (Some(_), Some(_)) if is_in => None,
            (None, None) => None,
            (Some(joining), _) => Some(RunMessage::Join {
                run,
                institution: joining.institution,
                blocks_max: joining.blocks_max,
                languages: joining.languages.clone(),
                incarnation,
                entries,
            }),
            (None, Some(_)) => Some(RunMessage::Leave { run }),
        };
        match message {
            None => self.asking = Again::default(),
            Some(message) => {
                let is_backing_off = self.joining.is_some() && ctx.now < self.retry_at;
                if is_backing_off {
                    self.wake_at = earlier(self.wake_at, Some(self.retry_at));
                } else {
                    if self.asking.is_due(ctx.now) {
                        ctx.send(steward, message);
                    }
                    self.wake_at = earlier(self.wake_at, Some(self.asking.at));
                }
            }
        }
        if self.joining.is_some() {
            if ctx.now >= self.alive_at {
                self.alive_at = ctx.now + ALIVE_EVERY;
                ctx.send(
                    steward,
                    RunMessage::Alive {
                        run,
                        incarnation,
                        entries,
                    },
                );
            }
            self.wake_at = earlier(self.wake_at, Some(self.alive_at));
        }
    }

    fn resend(&mut self, ctx: &mut Context<'_>) {
        let Some(steward) = ctx.ledger().map(|ledger| ledger.spec().steward) else {
            return;
        };
        for own in self.own.values_mut().filter(|own| !own.accepted) {
            if own.again.is_due(ctx.now) {
                ctx.send(steward, RunMessage::Commit(own.signed.clone()));
            }
            self.wake_at = earlier(self.wake_at, Some(own.again.at));
        }
    }

    fn train(&mut self, ctx: &mut Context<'_>, place: &Place, keeper: &Keeper) {
        let Some(ledger) = ctx.log.ledger() else { return };
        let Phase::Open(round) = ledger.phase() else { return };
        let key = (round, place.replica);
        // A chain's commit may wait for ever for a stage that is gone, and is then trained anew by another chain.
        let is_done = self.trained == Some(key)
            || self.own.iter().any(|((of, _), own)| {
                *of == round && (own.accepted || own.signed.commit.parts.len() == ledger.spec().initial.len())
            });
        if self.training.is_some() || self.joining.is_none() || place.is_stale || place.from > round || is_done {
            return;
        }
        let blocks = ledger.spec().layout.blocks();
        let Some(base) = keeper.state(round, place.range, blocks) else {
            return;
        };
        let Some((_, base_hash)) = ledger.state_of(round) else {
            return;
        };
        if ctx.now < self.retry_at {
            self.wake_at = earlier(self.wake_at, Some(self.retry_at));
            return;
        }
        let Some(replica) = ledger.replica(place.replica) else {
            return;
        };
        let work = Job::Train {
            run: ctx.run(),
            spec: ledger.spec().clone(),
            round,
            replica: place.replica,
            stages: replica.stages.clone(),
            stage: place.stage,
            base: base.clone(),
        };
        let job = ctx.start(work);
        self.training = Some(Training {
            job,
            round,
            replica: place.replica,
            is_chain: place.is_chain,
            base_hash,
            base,
        });
    }

    fn commit(
        &mut self,
        ctx: &mut Context<'_>,
        training: Training,
        parts: Vec<(Part, BlobId)>,
        tokens: u64,
        loss_ppm: u64,
    ) {
        let Some(tokens_max) = ctx.ledger().map(|ledger| tokens_max(ledger.spec())) else {
            return;
        };
        let commit = Commit {
            run: ctx.run(),
            round: training.round,
            replica: training.replica,
            base: training.base_hash,
            parts,
            tokens: tokens.clamp(1, tokens_max),
            loss_ppm,
            node: ctx.me(),
        };
        let signed = SignedCommit::new(commit, ctx.seal);
        ctx.persist(Persist::Commit(signed.clone()));
        let key = (training.round, training.replica);
        self.trained = Some(key);
        self.keep(key, signed);
    }

    fn keep(&mut self, key: (Round, ReplicaId), signed: SignedCommit) {
        let own = Own {
            signed,
            accepted: false,
            again: Again::default(),
        };
        self.own.insert(key, own);
        while self.own.len() > OWN_MAX {
            self.own.pop_first();
        }
    }
}
