//! One node at a time, by its effects.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::hash::{BlobId, Digest, InstitutionId, RunId};
use crate::layout::Part;
use crate::log::{Body, Contribution, EndReason, Entry, Ledger, ReplicaId, Seal, Signature};
use crate::round::{Commit, CommitAnswer, Job, LEASE, Outcome, Refusal, SignedCommit};
use crate::run::{RunSpec, state_hash};
use crate::testing::{BLOCKS, Key, blob, node, spec, state};
use crate::time::Span;

#[test]
fn a_steward_admits_whole_nodes_alone_and_pairs_halves() {
    let mut steward = Desk::steward(spec());
    steward.join(2, BLOCKS, 1);
    steward.join(3, 2, 1);
    assert_eq!(steward.ledger().active().count(), 1);
    steward.join(4, 2, 1);
    let chain = steward.ledger().replica_of(node(4)).unwrap();
    assert_eq!(chain.stages.len(), 2);
    assert_eq!(steward.ledger().replica_of(node(3)).unwrap().id, chain.id);
}

#[test]
fn joining_twice_makes_one_replica() {
    let mut steward = Desk::steward(spec());
    steward.join(2, BLOCKS, 1);
    let entries = steward.log().len();
    let effects = steward.join(2, BLOCKS, 2);
    assert_eq!(steward.log().len(), entries);
    assert!(sent(&effects).any(|message| matches!(message, RunMessage::JoinAnswer { .. })));
}

#[test]
fn a_restarted_stage_is_paired_anew() {
    let mut steward = Desk::steward(spec());
    steward.join(3, 2, 1);
    steward.join(4, 2, 1);
    steward.join(3, 2, 2);
    let ended = Body::ReplicaEnded {
        id: ReplicaId(0),
        reason: EndReason::Restarted(node(3)),
    };
    assert!(steward.log().entries().iter().any(|entry| entry.body == ended));
    steward.join(4, 2, 1);
    assert_eq!(steward.ledger().replica_of(node(3)).unwrap().id, ReplicaId(1));
}

#[test]
fn acknowledges_an_update_once_its_bytes_are_held_and_the_commit_is_durable() {
    let mut steward = Desk::steward(spec());
    steward.join(2, BLOCKS, 1);
    let effects = steward.tell(2, RunMessage::Commit(commit(2, 0, 0)));
    let fetch = started(&effects, |work| matches!(work, Job::Fetch { .. }));
    assert_eq!(answers(&effects), [CommitAnswer::Waiting]);
    let effects = steward.done(fetch, Outcome::Fetched);
    let persisted = place(&effects, |effect| {
        matches!(
            effect,
            Effect::Persist {
                what: Persist::Commit(_),
                ..
            }
        )
    });
    let accepted = place(&effects, |effect| {
        matches!(
            effect,
            Effect::Send {
                message: RunMessage::Ack {
                    answer: CommitAnswer::Accepted,
                    ..
                },
                ..
            }
        )
    });
    assert!(persisted < accepted);
}

#[test]
fn closes_when_all_are_here() {
    let mut steward = Desk::steward(spec());
    steward.join(2, BLOCKS, 1);
    steward.join(3, BLOCKS, 1);
    steward.commit(2, 0, 0);
    assert_eq!(steward.closed(), None);
    steward.commit(3, 1, 0);
    assert_eq!(steward.closed(), Some(vec![(0, 0), (1, 0)]));
}

#[test]
fn closes_after_the_grace_with_a_quorum() {
    let mut steward = Desk::steward(spec());
    for n in 2..=4 {
        steward.join(n, BLOCKS, 1);
    }
    steward.commit(2, 0, 0);
    steward.commit(3, 1, 0);
    steward.wait(Span::seconds(9));
    assert_eq!(steward.closed(), None);
    steward.wait(Span::seconds(1));
    assert_eq!(steward.closed(), Some(vec![(0, 0), (1, 0)]));
}

#[test]
fn closes_at_the_deadline_without_a_quorum() {
    let mut steward = Desk::steward(spec());
    steward.join(2, BLOCKS, 1);
    steward.commit(2, 0, 0);
    for _ in 0..5 {
        steward.wait(Span::seconds(10));
        steward.join(2, BLOCKS, 1); // It lives.
    }
    assert_eq!(steward.closed(), None);
    steward.wait(Span::seconds(10));
    assert_eq!(steward.closed(), Some(vec![(0, 0)]));
}

#[test]
fn folds_a_late_update_into_the_next_set_and_refuses_a_later_one() {
    let mut steward = Desk::steward(spec_of_one());
    steward.join(2, BLOCKS, 1);
    steward.join(3, BLOCKS, 1);
    steward.round(2, 0, 0);
    steward.commit(3, 1, 0);
    steward.round(2, 0, 1);
    let late = steward.log().entries().iter().find_map(|entry| match &entry.body {
        Body::Closed {
            round: Round(1), set, ..
        } => set.iter().find(|one| one.replica == ReplicaId(1)),
        _ => None,
    });
    assert_eq!(late.map(|one| one.base), Some(Round(0)));
    steward.round(2, 0, 2);
    steward.round(2, 0, 3);
    let effects = steward.tell(3, RunMessage::Commit(commit_to(steward.run, 3, 1, 1)));
    let refusal = Refusal::TooLate { open: Round(4) };
    assert_eq!(answers(&effects), [CommitAnswer::Refused(refusal)]);
}

#[test]
fn a_steward_goes_on_with_what_it_accepted_before_a_crash() {
    let mut steward = Desk::steward(spec());
    steward.join(2, BLOCKS, 1);
    steward.join(3, BLOCKS, 1);
    let effects = steward.tell(2, RunMessage::Commit(commit(2, 0, 0)));
    let fetch = started(&effects, |work| matches!(work, Job::Fetch { .. }));
    steward.done(fetch, Outcome::Fetched);
    let mut again = steward.restarted();
    again.wait(Span::seconds(1));
    again.commit(3, 1, 0);
    assert_eq!(again.closed(), Some(vec![(0, 0), (1, 0)]));
}

#[test]
fn ends_the_replica_of_a_silent_node() {
    let mut steward = Desk::steward(spec());
    steward.join(2, BLOCKS, 1);
    steward.wait(LEASE);
    assert_eq!(steward.ledger().active().count(), 0);
}

#[test]
fn refuses_a_commit_that_another_node_signed() {
    let mut steward = Desk::steward(spec());
    steward.join(2, BLOCKS, 1);
    let mut forged = commit(2, 0, 0);
    forged.signature = Key(3).sign(SignedCommit::SIGNATURE_DOMAIN, b"");
    let effects = steward.tell(2, RunMessage::Commit(forged));
    assert_eq!(answers(&effects), [CommitAnswer::Refused(Refusal::Signature)]);
}

#[test]
fn a_participant_trains_commits_durably_and_says_it_again_until_it_is_answered() {
    let (mut steward, mut participant) = pair();
    let train = participant.train(&mut steward);
    let effects = participant.done(train, trained(2));
    let persisted = place(&effects, |effect| {
        matches!(
            effect,
            Effect::Persist {
                what: Persist::Commit(_),
                ..
            }
        )
    });
    let is_commit = |effect: &Effect| {
        matches!(
            effect,
            Effect::Send {
                message: RunMessage::Commit(_),
                ..
            }
        )
    };
    assert!(persisted < place(&effects, is_commit));
    let again = participant.wait(Span::seconds(1));
    assert!(again.iter().any(is_commit));
    participant.tell(1, ack(CommitAnswer::Accepted));
    let quiet = participant.wait(Span::seconds(30));
    assert!(!quiet.iter().any(is_commit));
}

#[test]
fn a_restarted_participant_offers_its_commit_and_does_not_train_the_round_again() {
    let (mut steward, mut participant) = pair();
    let train = participant.train(&mut steward);
    participant.done(train, trained(2));
    let mut again = participant.restarted();
    let effects = again.wait(Span::seconds(1));
    assert!(sent(&effects).any(|message| matches!(message, RunMessage::Commit(_))));
    assert!(!effects.iter().any(|effect| matches!(
        effect,
        Effect::Start {
            work: Job::Train { .. },
            ..
        }
    )));
}

#[test]
fn only_the_steward_acknowledges() {
    let (mut steward, mut participant) = pair();
    let train = participant.train(&mut steward);
    participant.done(train, trained(2));
    let effects = participant.tell(9, ack(CommitAnswer::Accepted));
    assert!(
        !effects
            .iter()
            .any(|effect| matches!(effect, Effect::Report(Report::CommitAccepted { .. })))
    );
}

#[test]
fn a_node_whose_outer_step_differs_fetches_the_state_in_the_log() {
    let (mut steward, mut participant) = pair();
    let train = participant.train(&mut steward);
    participant.done(train, trained(2));
    steward.wait(Span::seconds(1));
    let before = steward.log().len();
    steward.commit(2, 0, 0);
    participant.hear(&steward, before);
    let apply = participant.running(|work| matches!(work, Job::Apply { .. }));
    let mut wrong = parts(&state(1));
    wrong[0].1 = blob("wrong", 0, 0);
    participant.done(apply, Outcome::Applied { parts: wrong });
    steward.apply(0);
    let effects = participant.hear(&steward, before);
    let diverged = Report::Diverged {
        run: spec_of_one().id(),
        round: Round(0),
        parts: vec![Part(0)],
    };
    assert!(effects.contains(&Effect::Report(diverged)));
    let fetched = effects.iter().any(|effect| match effect {
        Effect::Start {
            work: Job::FetchState { parts: wanted, .. },
            ..
        } => *wanted == parts(&state(1)),
        _ => false,
    });
    assert!(fetched);
}

#[test]
fn a_failed_stage_begins_another_life_and_joins_again() {
    let mut steward = Desk::steward(spec_of_one());
    steward.join(3, 2, 1);
    let mut stage = Desk::new(2);
    stage.local(Command::Join {
        run: spec_of_one().id(),
        steward: node(1),
        joining: joining(2),
    });
    stage.hear(&steward, 0);
    steward.join(2, 2, 1);
    stage.hear(&steward, 0);
    let fetch = stage.running(|work| matches!(work, Job::FetchState { .. }));
    stage.done(fetch, Outcome::Fetched);
    let train = stage.running(|work| matches!(work, Job::Train { .. }));
    let reason = alloc::string::String::from("a neighbour is gone");
    stage.done(train, Outcome::Failed { reason });
    let effects = stage.wait(Span::seconds(1));
    assert!(sent(&effects).any(|message| matches!(message, RunMessage::Join { incarnation: 2, .. })));
}

#[test]
fn reports_two_entries_for_one_place_once() {
    let (steward, mut participant) = pair();
    participant.hear(&steward, 0);
    let mut other = Desk::steward(spec_of_one());
    other.local(Command::Pause {
        run: spec_of_one().id(),
    });
    let reports = |effects: &[Effect]| {
        let is_fork = |effect: &&Effect| matches!(effect, Effect::Report(Report::Equivocation { .. }));
        effects.iter().filter(is_fork).count()
    };
    assert_eq!(reports(&participant.hear(&other, 0)), 1);
    assert_eq!(reports(&participant.hear(&other, 0)), 0);
}

#[test]
fn stops_after_the_outer_step_that_is_under_way() {
    let mut steward = Desk::steward(spec_of_one());
    steward.join(2, BLOCKS, 1);
    steward.commit(2, 0, 0);
    steward.local(Command::Stop {
        run: spec_of_one().id(),
    });
    assert!(steward.log().entries().iter().all(|entry| entry.body != Body::Stopped));
    steward.apply(0);
    assert_eq!(steward.log().entries().last().unwrap().body, Body::Stopped);
}

#[test]
fn a_run_that_is_stopped_while_its_state_is_scored_gives_the_scoring_up() {
    let mut spec = spec_of_one();
    spec.evaluation = Some(BlobId::default());
    spec.evaluate_every_rounds = 1;
    let run = spec.id();
    let mut steward = Desk::steward(spec);
    steward.join(2, BLOCKS, 1);
    steward.commit(2, 0, 0);
    steward.apply(0);
    let scoring = steward.running(|work| matches!(work, Job::Evaluate { .. }));
    let effects = steward.local(Command::Stop { run });
    assert!(effects.contains(&Effect::Cancel { job: scoring }));
    // It may have been done in this very moment.
    let bits_per_byte_ppm = BTreeMap::new();
    let effects = steward.done(scoring, Outcome::Evaluated { bits_per_byte_ppm });
    assert!(
        effects.iter().all(|effect| !matches!(effect, Effect::Report(_))),
        "{effects:?}"
    );
    assert_eq!(steward.log().entries().last().unwrap().body, Body::Stopped);
}

#[test]
fn the_outer_step_is_told_whose_voice_each_update_is() {
    let mut steward = Desk::steward(spec_of_one());
    steward.join(2, BLOCKS, 1);
    steward.commit(2, 0, 0);
    // Its replica ends before the outer step is taken.
    steward.tell(2, RunMessage::Leave { run: steward.run });
    let apply = steward.running(|work| matches!(work, Job::Apply { .. }));
    let Some(Job::Apply { set, makers, .. }) = steward.running.get(&apply) else {
        unreachable!("it was found by its kind")
    };
    let stages = &makers[&set[0].replica];
    assert_eq!((stages[0].node, stages[0].institution), (node(2), institution(2)));
}

#[test]
fn a_steward_with_a_damaged_log_says_nothing_more() {
    let mut steward = Desk::steward(spec_of_one());
    steward.join(2, BLOCKS, 1);
    steward.stored.entries.last_mut().unwrap().signature = Signature::from_bytes(&[0; 64]);
    let mut again = steward.restarted();
    assert!(
        again
            .seen
            .iter()
            .any(|effect| matches!(effect, Effect::Report(Report::LogDamaged { .. })))
    );
    let effects = again.join(3, BLOCKS, 1);
    assert!(!effects.iter().any(|effect| matches!(effect, Effect::Broadcast { .. })));
}

#[test]
fn a_steward_tells_a_node_that_comes_of_its_run() {
    let mut steward = Desk::steward(spec_of_one());
    let effects = steward.step(Input::PeerFound { node: node(7) });
    let is_head =
        |effect: &Effect| matches!(effect, Effect::Send { to, message: RunMessage::Head { .. } } if *to == node(7));
    assert!(effects.iter().any(is_head), "{effects:?}");
}

#[test]
fn a_participant_says_again_what_it_wants_when_the_steward_comes_back() {
    let (steward, mut participant) = pair();
    participant.hear(&steward, 0);
    let mut other = Desk::new(3);
    other.run = participant.run;
    other.local(Command::Join {
        run: participant.run,
        steward: node(1),
        joining: joining(BLOCKS),
    });
    other.hear(&steward, 0);
    let wishes = |effects: &[Effect]| {
        sent(effects)
            .filter(|message| matches!(message, RunMessage::Join { .. }))
            .count()
    };
    // It has asked, and would ask again after a while only.
    assert_eq!(wishes(&other.step(Input::Wake)), 0);
    assert_eq!(wishes(&other.step(Input::PeerFound { node: node(2) })), 0);
    assert_eq!(wishes(&other.step(Input::PeerFound { node: node(1) })), 1);
}

#[test]
fn hears_of_runs_that_it_does_not_follow() {
    let mut desk = Desk::new(5);
    let run = spec().id();
    let effects = desk.tell(
        1,
        RunMessage::Head {
            run,
            entries: 4,
            head: Digest::default(),
        },
    );
    let heard = Report::Heard { run, steward: node(1) };
    assert_eq!(effects, [Effect::Report(heard)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever anybody says in whatever order: no panic, no second truth, and no more memory than the limits allow.
    #[test]
    fn stands_any_messages(inputs in proptest::collection::vec((1u8..6, 0u8..10, 0u64..4, 0u64..4), 0..120)) {
        let mut steward = Desk::steward(spec_of_one());
        let mut follower = Desk::new(2);
        follower.local(Command::Join { run: spec_of_one().id(), steward: node(1), joining: joining(BLOCKS) });
        for (from, kind, one, other) in inputs {
            let message = message(kind, from, one, other);
            steward.tell(from, message.clone());
            follower.tell(from, message);
            let known = follower.log().len();
            follower.hear(&steward, known);
            steward.done(JobId(one), Outcome::Fetched);
            follower.done(JobId(other), Outcome::Fetched);
            steward.wait(Span::seconds(other));
            follower.wait(Span::seconds(one));
        }
        let known = follower.log().len();
        follower.hear(&steward, known);
        prop_assert_eq!(follower.log().head(), steward.log().head());
    }
}

/// A node with a clock and a memory of its effects.
struct Desk {
    key: u8,
    node: Node,
    now: Instant,
    run: RunId,
    stored: RestoredRun,
    seen: Vec<Effect>,
    running: BTreeMap<JobId, Job>,
}

impl Desk {
    fn new(key: u8) -> Self {
        Self {
            key,
            node: Node::new(Arc::new(Key(key)), 1),
            now: Instant(0),
            run: spec_of_one().id(),
            stored: RestoredRun::default(),
            seen: Vec::new(),
            running: BTreeMap::new(),
        }
    }

    fn steward(spec: RunSpec) -> Self {
        let mut desk = Self::new(1);
        desk.run = spec.id();
        desk.local(Command::Begin { spec });
        // The initial state is in its store, so fetching it takes no time.
        let fetch = desk.running(|work| matches!(work, Job::FetchState { .. }));
        desk.done(fetch, Outcome::Fetched);
        desk
    }

    fn restarted(self) -> Self {
        let mut desk = Self::new(self.key);
        desk.run = self.run;
        let mut effects = Vec::new();
        let stored = BTreeMap::from([(self.run, self.stored)]);
        desk.node = Node::restore(Arc::new(Key(self.key)), 2, desk.now, stored, &mut effects);
        desk.remember(&effects);
        desk.seen = effects;
        desk
    }

    fn step(&mut self, input: Input) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.node.step(self.now, input, &mut effects);
        self.remember(&effects);
        effects
    }

    fn remember(&mut self, effects: &[Effect]) {
        for effect in effects {
            match effect {
                Effect::Persist { what, .. } => match what.clone() {
                    Persist::Follow { steward } => self.stored.steward = steward,
                    Persist::Entry(entry) => self.stored.entries.push(entry),
                    Persist::Commit(signed) => self.stored.commits.push(signed),
                    Persist::DropCommits { before } => self.stored.commits.retain(|one| one.commit.round >= before),
                    Persist::State { round, parts } => self.stored.state = Some((round, parts)),
                    Persist::Joining(joining) => self.stored.joining = joining,
                },
                Effect::Start { job, work } => {
                    self.running.insert(*job, work.clone());
                }
                Effect::Cancel { job } => {
                    self.running.remove(job);
                }
                _ => {}
            }
        }
    }

    fn local(&mut self, command: Command) -> Vec<Effect> {
        self.step(Input::Local(command))
    }

    fn tell(&mut self, from: u8, message: RunMessage) -> Vec<Effect> {
        self.step(Input::Message {
            from: node(from),
            message,
        })
    }

    fn done(&mut self, job: JobId, outcome: Outcome) -> Vec<Effect> {
        self.running.remove(&job);
        self.step(Input::Done { job, outcome })
    }

    fn wait(&mut self, span: Span) -> Vec<Effect> {
        self.now = self.now + span;
        self.step(Input::Wake)
    }

    fn running(&self, is_it: impl Fn(&Job) -> bool) -> JobId {
        let found = self.running.iter().find(|(_, work)| is_it(work));
        *found.map(|(job, _)| job).expect("the job is running")
    }

    fn log(&self) -> &Log {
        self.node.standing(self.run).unwrap().log
    }

    fn ledger(&self) -> &Ledger {
        self.log().ledger().unwrap()
    }

    fn join(&mut self, n: u8, blocks_max: u32, incarnation: u64) -> Vec<Effect> {
        let message = RunMessage::Join {
            run: self.run,
            institution: institution(n),
            blocks_max,
            languages: vec![],
            incarnation,
            entries: self.log().len(),
        };
        self.tell(n, message)
    }

    /// A participant's commit, and its bytes.
    fn commit(&mut self, n: u8, replica: u64, round: u64) {
        let signed = commit_to(self.run, n, replica, round);
        let effects = self.tell(n, RunMessage::Commit(signed));
        let fetch = started(&effects, |work| matches!(work, Job::Fetch { .. }));
        self.done(fetch, Outcome::Fetched);
    }

    /// The steward's outer step.
    fn apply(&mut self, round: u64) {
        let apply = self.running(|work| matches!(work, Job::Apply { .. }));
        let parts = parts(&state(round + 1));
        self.done(apply, Outcome::Applied { parts });
    }

    /// A round of one contribution, after a grace that nobody uses.
    fn round(&mut self, n: u8, replica: u64, round: u64) {
        self.commit(n, replica, round);
        self.wait(Span::seconds(10));
        self.apply(round);
    }

    /// The set of the last round, if one is closed.
    fn closed(&self) -> Option<Vec<(u64, u64)>> {
        let of = |one: &Contribution| (one.replica.0, one.base.0);
        self.log().entries().iter().rev().find_map(|entry| match &entry.body {
            Body::Closed { set, .. } => Some(set.iter().map(of).collect()),
            _ => None,
        })
    }

    fn hear(&mut self, steward: &Self, from: u64) -> Vec<Effect> {
        let start = usize::try_from(from).unwrap();
        let entries: Vec<Entry> = steward.log().entries()[start..].to_vec();
        self.tell(1, RunMessage::Entries { run: self.run, entries })
    }

    /// Brings a participant to its first training job.
    fn train(&mut self, steward: &mut Self) -> JobId {
        self.hear(steward, 0);
        let fetch = self.running(|work| matches!(work, Job::FetchState { .. }));
        self.done(fetch, Outcome::Fetched);
        self.running(|work| matches!(work, Job::Train { .. }))
    }
}

/// A steward, and node 2 that it has admitted.
fn pair() -> (Desk, Desk) {
    let mut steward = Desk::steward(spec_of_one());
    steward.join(2, BLOCKS, 1);
    let mut participant = Desk::new(2);
    participant.local(Command::Join {
        run: spec_of_one().id(),
        steward: node(1),
        joining: joining(BLOCKS),
    });
    (steward, participant)
}

/// The run in which one contribution is a quorum.
fn spec_of_one() -> RunSpec {
    let mut one = spec();
    one.closing.quorum = 1;
    one
}

/// Of node `n`.
fn institution(n: u8) -> InstitutionId {
    InstitutionId([n; 32])
}

fn joining(blocks_max: u32) -> Joining {
    Joining {
        institution: InstitutionId::default(),
        blocks_max,
        languages: vec![],
    }
}

fn parts(blobs: &[BlobId]) -> Vec<(Part, BlobId)> {
    (0..).map(Part).zip(blobs.iter().copied()).collect()
}

fn trained(n: u64) -> Outcome {
    let parts = (0..BLOCKS + 2).map(|part| (Part(part), blob("update", n, u64::from(part))));
    Outcome::Trained {
        parts: parts.collect(),
        tokens: 1920,
        loss_ppm: 1,
    }
}

fn commit(n: u8, replica: u64, round: u64) -> SignedCommit {
    commit_to(spec().id(), n, replica, round)
}

fn commit_to(run: RunId, n: u8, replica: u64, round: u64) -> SignedCommit {
    let update = |part: u32| (Part(part), blob("update", u64::from(n), round * 100 + u64::from(part)));
    let commit = Commit {
        run,
        round: Round(round),
        replica: ReplicaId(replica),
        base: state_hash(&state(round)),
        parts: (0..BLOCKS + 2).map(update).collect(),
        tokens: 1920,
        loss_ppm: 1,
        node: node(n),
    };
    SignedCommit::new(commit, &Key(n))
}

fn ack(answer: CommitAnswer) -> RunMessage {
    RunMessage::Ack {
        run: spec_of_one().id(),
        round: Round(0),
        replica: ReplicaId(0),
        answer,
    }
}

fn sent(effects: &[Effect]) -> impl Iterator<Item = &RunMessage> {
    effects.iter().filter_map(|effect| match effect {
        Effect::Send { message, .. } => Some(message),
        _ => None,
    })
}

fn answers(effects: &[Effect]) -> Vec<CommitAnswer> {
    let answer = |message: &RunMessage| match message {
        RunMessage::Ack { answer, .. } => Some(*answer),
        _ => None,
    };
    sent(effects).filter_map(answer).collect()
}

fn started(effects: &[Effect], is_it: impl Fn(&Job) -> bool) -> JobId {
    let found = effects.iter().find_map(|effect| match effect {
        Effect::Start { job, work } if is_it(work) => Some(*job),
        _ => None,
    });
    found.expect("such a job is begun")
}

fn place(effects: &[Effect], is_it: impl Fn(&Effect) -> bool) -> usize {
    effects.iter().position(is_it).expect("there is such an effect")
}

/// Some message, well formed or not, true or not.
fn message(kind: u8, from: u8, one: u64, other: u64) -> RunMessage {
    let run = spec_of_one().id();
    match kind {
        0 | 1 => RunMessage::Join {
            run,
            institution: InstitutionId::default(),
            blocks_max: u32::try_from(one * 2).unwrap(),
            languages: vec![],
            incarnation: other,
            entries: one,
        },
        2 => RunMessage::Leave { run },
        3 => RunMessage::Alive {
            run,
            incarnation: one,
            entries: other,
        },
        4..=6 => {
            let mut signed = commit_to(run, from, one, other);
            if kind == 5 {
                signed.commit.parts.truncate(usize::try_from(one).unwrap());
            }
            RunMessage::Commit(SignedCommit::new(signed.commit, &Key(from)))
        }
        7 => RunMessage::Ask { run, from: one },
        8 => ack(CommitAnswer::Refused(Refusal::Invalid)),
        _ => RunMessage::Head {
            run,
            entries: one * 100,
            head: Digest([from; 32]),
        },
    }
}
