//! The rules of a run's log, and what follows from its entries: who trains, which round is open, what the state is.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;

use thiserror::Error;

use crate::hash::{BlobId, Digest, NodeId, RunId, digest};
use crate::layout::{BlockRange, Part};
use crate::round::APPLY_BEHIND_MAX;
use crate::run::{RunSpec, SPEC_VERSION, state_hash};

use super::{
    Body, Contribution, ENTRY_BYTES_MAX, LANGUAGE_BYTES_MAX, LANGUAGES_MAX, LATE_ROUNDS_MAX, PARTS_MAX, REPLICAS_MAX,
    ReplicaId, Round, STAGES_MAX, Stage,
};

/// Bytes that a contribution takes beside its parts, and a part takes, at most.
const CONTRIBUTION_BYTES_MAX: usize = 48;
const PART_BYTES: usize = 32;
/// Replicas that are remembered after their end are this many times the active ones at most.
const ENDED_PER_ACTIVE_MAX: usize = 4;

/// Why an entry is not the next one.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum RuleError {
    #[error("a genesis stands at the beginning and nowhere else")]
    Genesis,
    #[error("the genesis is of run {found}, not of {expected}")]
    OtherRun { expected: RunId, found: RunId },
    #[error("the facts of the run are malformed")]
    Malformed,
    #[error("the facts of the run are out of bounds: {0}")]
    Spec(&'static str),
    #[error("the run is over")]
    Over,
    #[error("the run is paused")]
    Paused,
    #[error("the run is not paused")]
    NotPaused,
    #[error("round {found} is not the next, which is {expected}")]
    OtherRound { expected: Round, found: Round },
    #[error("round {0} is closed and its outer step is not in the log yet")]
    Applying(Round),
    #[error("the base is not the state of round {0}")]
    OtherBase(Round),
    #[error("a set has {count} contributions, outside of 1 to {limit}")]
    SetSize { count: usize, limit: usize },
    #[error("contributions are not in order of replica and base round, each once")]
    SetOrder,
    #[error("replica {0} was not admitted in round {1}")]
    NotAdmitted(ReplicaId, Round),
    #[error("the contribution of replica {0} to round {1} is too late")]
    TooLate(ReplicaId, Round),
    #[error("the contribution of replica {0} to round {1} is in a set already")]
    Twice(ReplicaId, Round),
    #[error("{found} parts where the model has {expected}")]
    Parts { expected: usize, found: usize },
    #[error("weight {0} is outside of 1 to {1} tokens")]
    Weight(u64, u64),
    #[error("the state hash is not that of the parts")]
    StateHash,
    #[error("replica {0} is not a new one")]
    ReplicaUsed(ReplicaId),
    #[error("the stages of replica {0} do not cover every block once")]
    Stages(ReplicaId),
    #[error("node {0} is in a replica already")]
    NodeTaken(NodeId),
    #[error("there are {0} replicas, as many as may be")]
    ReplicasFull(usize),
    #[error("replica {0} is to train from round {1}, which has passed")]
    FromPast(ReplicaId, Round),
    #[error("there is no active replica {0}")]
    NoReplica(ReplicaId),
    #[error("round {0} cannot be evaluated now")]
    Evaluation(Round),
}

/// A replica that was admitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replica {
    /// Its id.
    pub id: ReplicaId,
    /// Its stages in order.
    pub stages: Vec<Stage>,
    /// The first round that it trains: as its entry says, or the one in which others ended and left no quorum.
    pub from: Round,
    /// The round that was next to close when it ended; `None` while it is active.
    pub ended: Option<Round>,
}

impl Replica {
    /// Whether it may contribute an update that started from `round`'s state.
    pub fn trains(&self, round: Round) -> bool {
        self.from <= round && self.ended.is_none_or(|ended| round <= ended)
    }

    /// The place of `node` among its stages.
    pub fn stage_of(&self, node: NodeId) -> Option<usize> {
        self.stages.iter().position(|stage| stage.node == node)
    }
}

/// A closed round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoundRecord {
    /// Which.
    pub round: Round,
    /// Its state, one blob per part.
    pub base: Vec<BlobId>,
    /// The hash of that state.
    pub base_hash: Digest,
    /// What was folded in.
    pub set: Vec<Contribution>,
    /// The stages of each replica in the set, some of which may have ended since.
    pub makers: BTreeMap<ReplicaId, Vec<Stage>>,
}

/// What a run is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// This round is trained.
    Open(Round),
    /// This round is closed, and its outer step is taken.
    Applying(Round),
    /// Nothing, until the steward says so. The round is the next to train.
    Paused(Round),
    /// All rounds are done; only the end is not written yet.
    Done,
    /// It ended.
    Over,
}

/// What follows from a log's entries.
///
/// It holds the last few rounds only, and at most a few times [`REPLICAS_MAX`] replicas, whatever the log says.
#[derive(Debug, Clone)]
pub struct Ledger {
    spec: Arc<RunSpec>,
    /// Active ones, and those that ended too recently for their last contributions to be too late.
    replicas: BTreeMap<ReplicaId, Replica>,
    next_replica: ReplicaId,
    /// The next round to close.
    next_round: Round,
    /// Whether the round before `next_round` waits for its `Applied`.
    applying: bool,
    /// The newest state, one blob per part; when applying, that of the closed round.
    state: Vec<BlobId>,
    state_hash: Digest,
    /// The last closed rounds, the newest last. Its length is bounded by [`Ledger::window`].
    recent: VecDeque<RoundRecord>,
    evaluated: Option<Round>,
    paused: bool,
    over: bool,
}

impl Ledger {
    /// The ledger of a log that holds a genesis only.
    ///
    /// # Errors
    ///
    /// [`RuleError`] where `spec_bytes` are not the canonical bytes of run `run`, or its facts are out of bounds.
    pub fn begin(run: RunId, spec_bytes: &[u8]) -> Result<Self, RuleError> {
        let found = RunId(digest(spec_bytes).0);
        if found != run {
            return Err(RuleError::OtherRun { expected: run, found });
        }
        let spec = RunSpec::from_bytes(spec_bytes).map_err(|_| RuleError::Malformed)?;
        if spec.to_bytes() != spec_bytes {
            return Err(RuleError::Malformed);
        }
        check_spec(&spec)?;
        Ok(Self {
            state: spec.initial.clone(),
            state_hash: state_hash(&spec.initial),
            spec: Arc::new(spec),
            replicas: BTreeMap::new(),
            next_replica: ReplicaId(0),
            next_round: Round(0),
            applying: false,
            recent: VecDeque::new(),
            evaluated: None,
            paused: false,
            over: false,
        })
    }

    /// The run's facts.
    pub fn spec(&self) -> &Arc<RunSpec> {
        &self.spec
    }

    /// What the run is doing.
    pub fn phase(&self) -> Phase {
        if self.over {
            Phase::Over
        } else if self.applying {
            Phase::Applying(self.last_closed())
        } else if self.paused {
            Phase::Paused(self.next_round)
        } else if self.next_round.0 >= self.spec.rounds {
            Phase::Done
        } else {
            Phase::Open(self.next_round)
        }
    }

    /// The next round to close: that of the newest contributions.
    pub fn next_round(&self) -> Round {
        self.next_round
    }

    /// The newest state in the log: its round, and one blob per part.
    pub fn state(&self) -> (Round, &[BlobId]) {
        let round = if self.applying {
            self.last_closed()
        } else {
            self.next_round
        };
        (round, &self.state)
    }

    /// The state of `round`, one blob per part, and its hash, where the round is recent.
    pub fn state_of(&self, round: Round) -> Option<(&[BlobId], Digest)> {
        if self.state().0 == round {
            return Some((&self.state, self.state_hash));
        }
        let record = self.record(round)?;
        Some((&record.base, record.base_hash))
    }

    /// What is known of a closed round, where it is recent.
    pub fn record(&self, round: Round) -> Option<&RoundRecord> {
        self.recent.iter().find(|record| record.round == round)
    }

    /// The last closed rounds, oldest first.
    pub fn recent(&self) -> impl Iterator<Item = &RoundRecord> {
        self.recent.iter()
    }

    /// The last round whose state was scored.
    pub fn evaluated(&self) -> Option<Round> {
        self.evaluated
    }

    /// The replicas that train.
    pub fn active(&self) -> impl Iterator<Item = &Replica> {
        self.replicas.values().filter(|replica| replica.ended.is_none())
    }

    /// A replica that is active, or ended recently.
    pub fn replica(&self, id: ReplicaId) -> Option<&Replica> {
        self.replicas.get(&id)
    }

    /// The active replica that `node` is a stage of.
    pub fn replica_of(&self, node: NodeId) -> Option<&Replica> {
        self.active().find(|replica| replica.stage_of(node).is_some())
    }

    /// The id that the next replica gets.
    pub fn next_replica(&self) -> ReplicaId {
        self.next_replica
    }

    /// The contribution of `replica` that started from `base`, where a recent set has it.
    pub fn contribution(&self, replica: ReplicaId, base: Round) -> Option<&Contribution> {
        self.recent
            .iter()
            .filter(|record| record.round >= base)
            .flat_map(|record| &record.set)
            .find(|contribution| contribution.replica == replica && contribution.base == base)
    }

    /// Contributions of one set: as many as an entry of the greatest size holds.
    pub fn set_max(&self) -> usize {
        let each = self.spec.initial.len() * PART_BYTES + CONTRIBUTION_BYTES_MAX;
        (ENTRY_BYTES_MAX - 1024) / each.max(1)
    }

    /// Replicas at once: so many that each finds room in a set even when as many late ones are in it.
    pub fn replicas_max(&self) -> usize {
        REPLICAS_MAX.min(self.set_max() / 2)
    }

    /// Whether `body` may be the next entry.
    ///
    /// # Errors
    ///
    /// [`RuleError`] says which rule forbids it.
    pub fn check(&self, body: &Body) -> Result<(), RuleError> {
        if self.over {
            return Err(RuleError::Over);
        }
        match body {
            Body::Genesis { .. } => Err(RuleError::Genesis),
            Body::Replica { id, stages, from } => self.check_replica(*id, stages, *from),
            Body::ReplicaEnded { id, .. } => match self.replicas.get(id) {
                Some(Replica { ended: None, .. }) => Ok(()),
                _ => Err(RuleError::NoReplica(*id)),
            },
            Body::Closed { round, base, set } => self.check_closed(*round, *base, set),
            Body::Applied { round, parts, state } => self.check_applied(*round, parts, *state),
            Body::Evaluated {
                round,
                bits_per_byte_ppm,
            } => {
                let newer = self.evaluated.is_none_or(|before| before < *round);
                let small = bits_per_byte_ppm.len() <= LANGUAGES_MAX
                    && bits_per_byte_ppm.keys().all(|name| name.len() <= LANGUAGE_BYTES_MAX);
                let applied = round.next() <= self.state().0;
                (newer && small && applied)
                    .then_some(())
                    .ok_or(RuleError::Evaluation(*round))
            }
            Body::Paused if self.paused => Err(RuleError::Paused),
            Body::Resumed if !self.paused => Err(RuleError::NotPaused),
            Body::Paused | Body::Resumed => Ok(()),
            Body::Stopped => self.check_applied_all(),
            Body::Finished => {
                self.check_applied_all()?;
                let end = Round(self.spec.rounds);
                if self.next_round != end {
                    return Err(RuleError::OtherRound {
                        expected: end,
                        found: self.next_round,
                    });
                }
                Ok(())
            }
        }
    }

    /// Takes the next entry.
    ///
    /// # Errors
    ///
    /// What [`Ledger::check`] says; then nothing changes.
    pub fn append(&mut self, body: &Body) -> Result<(), RuleError> {
        self.check(body)?;
        match body {
            Body::Replica { id, stages, from } => {
                self.next_replica = ReplicaId(id.0.saturating_add(1));
                let replica = Replica {
                    id: *id,
                    stages: stages.clone(),
                    from: *from,
                    ended: None,
                };
                self.replicas.insert(*id, replica);
            }
            Body::ReplicaEnded { id, .. } => {
                if let Some(replica) = self.replicas.get_mut(id) {
                    replica.ended = Some(self.next_round);
                }
                self.call_early();
            }
            Body::Closed { round, set, .. } => {
                self.recent.push_back(RoundRecord {
                    round: *round,
                    base: self.state.clone(),
                    base_hash: self.state_hash,
                    set: set.clone(),
                    makers: self.makers(set),
                });
                while self.recent.len() > self.window() {
                    self.recent.pop_front();
                }
                self.next_round = round.next();
                self.applying = true;
                let late_max = u64::from(self.spec.closing.late_rounds_max);
                let next = self.next_round;
                self.replicas
                    .retain(|_, replica| replica.ended.is_none_or(|ended| next.since(ended) <= late_max));
            }
            Body::Applied { parts, state, .. } => {
                self.applying = false;
                self.state.clone_from(parts);
                self.state_hash = *state;
            }
            Body::Evaluated { round, .. } => self.evaluated = Some(*round),
            Body::Paused => self.paused = true,
            Body::Resumed => self.paused = false,
            Body::Stopped | Body::Finished => self.over = true,
            Body::Genesis { .. } => {} // Refused by the check.
        }
        Ok(())
    }

    /// Replicas that were to begin with a later round begin with this one, where those that end leave it without a quorum:
    /// else nobody might be left to train it, and the later round would never come.
    fn call_early(&mut self) {
        let next = self.next_round;
        let training = self.active().filter(|replica| replica.from <= next).count();
        if u32::try_from(training).unwrap_or(u32::MAX) < self.spec.closing.quorum {
            for replica in self.replicas.values_mut().filter(|replica| replica.ended.is_none()) {
                replica.from = replica.from.min(next);
            }
        }
    }

    fn makers(&self, set: &[Contribution]) -> BTreeMap<ReplicaId, Vec<Stage>> {
        let stages = |one: &Contribution| Some((one.replica, self.replicas.get(&one.replica)?.stages.clone()));
        set.iter().filter_map(stages).collect()
    }

    fn last_closed(&self) -> Round {
        Round(self.next_round.0.saturating_sub(1))
    }

    /// Closed rounds to remember: those that late contributions or late nodes may still ask for.
    fn window(&self) -> usize {
        let late = usize::try_from(self.spec.closing.late_rounds_max).unwrap_or(0);
        late.max(usize::try_from(APPLY_BEHIND_MAX).unwrap_or(0)) + 1
    }

    fn check_applied_all(&self) -> Result<(), RuleError> {
        if self.applying {
            return Err(RuleError::Applying(self.last_closed()));
        }
        Ok(())
    }

    fn check_replica(&self, id: ReplicaId, stages: &[Stage], from: Round) -> Result<(), RuleError> {
        if id < self.next_replica || id.0 == u64::MAX {
            return Err(RuleError::ReplicaUsed(id));
        }
        let active = self.active().count();
        if active >= self.replicas_max() || self.replicas.len() >= REPLICAS_MAX * ENDED_PER_ACTIVE_MAX {
            return Err(RuleError::ReplicasFull(active));
        }
        if from < self.next_round {
            return Err(RuleError::FromPast(id, from));
        }
        let blocks = self.spec.layout.blocks();
        let mut covered = 0;
        for (index, stage) in stages.iter().enumerate() {
            if stage.range.first != covered || !stage.range.fits(blocks) || index >= STAGES_MAX {
                return Err(RuleError::Stages(id));
            }
            covered = stage.range.end;
            let before = stages.iter().take(index).any(|earlier| earlier.node == stage.node);
            if before || self.replica_of(stage.node).is_some() {
                return Err(RuleError::NodeTaken(stage.node));
            }
        }
        if covered != blocks {
            return Err(RuleError::Stages(id));
        }
        Ok(())
    }

    fn check_closed(&self, round: Round, base: Digest, set: &[Contribution]) -> Result<(), RuleError> {
        self.check_applied_all()?;
        if self.paused {
            return Err(RuleError::Paused);
        }
        if round != self.next_round || round.0 >= self.spec.rounds {
            return Err(RuleError::OtherRound {
                expected: self.next_round,
                found: round,
            });
        }
        if base != self.state_hash {
            return Err(RuleError::OtherBase(round));
        }
        let limit = self.set_max();
        if set.is_empty() || set.len() > limit {
            return Err(RuleError::SetSize {
                count: set.len(),
                limit,
            });
        }
        let keys = || set.iter().map(|contribution| (contribution.replica, contribution.base));
        if !keys().zip(keys().skip(1)).all(|(one, next)| one < next) {
            return Err(RuleError::SetOrder);
        }
        set.iter()
            .try_for_each(|contribution| self.check_contribution(round, contribution))
    }

    fn check_contribution(&self, round: Round, contribution: &Contribution) -> Result<(), RuleError> {
        let Contribution {
            replica, base, tokens, ..
        } = contribution;
        if *base > round || round.since(*base) > u64::from(self.spec.closing.late_rounds_max) {
            return Err(RuleError::TooLate(*replica, *base));
        }
        if !self
            .replicas
            .get(replica)
            .is_some_and(|admitted| admitted.trains(*base))
        {
            return Err(RuleError::NotAdmitted(*replica, *base));
        }
        if self.contribution(*replica, *base).is_some() {
            return Err(RuleError::Twice(*replica, *base));
        }
        self.check_parts(contribution.parts.len())?;
        let limit = tokens_max(&self.spec);
        if *tokens == 0 || *tokens > limit {
            return Err(RuleError::Weight(*tokens, limit));
        }
        Ok(())
    }

    fn check_applied(&self, round: Round, parts: &[BlobId], state: Digest) -> Result<(), RuleError> {
        if !self.applying || round != self.last_closed() {
            return Err(RuleError::OtherRound {
                expected: self.last_closed(),
                found: round,
            });
        }
        self.check_parts(parts.len())?;
        if state_hash(parts) != state {
            return Err(RuleError::StateHash);
        }
        Ok(())
    }

    fn check_parts(&self, found: usize) -> Result<(), RuleError> {
        let expected = self.spec.initial.len();
        if found != expected {
            return Err(RuleError::Parts { expected, found });
        }
        Ok(())
    }
}

/// The most tokens that one replica can train on in one round, and so the greatest weight: twice what the run asks for,
/// since a fast replica may take up to twice the steps.
pub fn tokens_max(spec: &RunSpec) -> u64 {
    let inner = &spec.inner;
    [inner.micro_batches, inner.batch, inner.seq, 2]
        .into_iter()
        .fold(u64::from(inner.steps), |product, factor| {
            product.saturating_mul(u64::from(factor))
        })
}

/// Names the parts of `range` with `blobs`, one per part of the whole model.
pub(crate) fn parts_of(blobs: &[BlobId], range: BlockRange, blocks: u32) -> Vec<(Part, BlobId)> {
    range
        .parts(blocks)
        .filter_map(|part| Some((Part(part), *blobs.get(usize::try_from(part).ok()?)?)))
        .collect()
}

/// Whether what is trained are the adapters, where there are any.
fn adapters_fit(spec: &RunSpec) -> bool {
    spec.adapters
        .as_ref()
        .is_none_or(|adapters| adapters.layout().as_ref() == Ok(&spec.layout) && adapters.check_base().is_ok())
}

fn check_spec(spec: &RunSpec) -> Result<(), RuleError> {
    let parts = spec.layout.parts.len();
    let closing = &spec.closing;
    let rules = [
        (
            spec.version == SPEC_VERSION,
            "its version is another than this program's",
        ),
        ((3..=PARTS_MAX).contains(&parts), "too few or too many parts"),
        (spec.initial.len() == parts, "not one initial blob for each part"),
        (spec.rounds >= 1, "no rounds"),
        (tokens_max(spec) >= 1, "a round without tokens"),
        (closing.quorum >= 1, "a quorum of nobody"),
        (adapters_fit(spec), "adapters that do not fit their model"),
        (closing.late_rounds_max <= LATE_ROUNDS_MAX, "too many late rounds"),
    ];
    match rules.into_iter().find(|(kept, _)| !kept) {
        Some((_, broken)) => Err(RuleError::Spec(broken)),
        None => spec.inner.check().map_err(RuleError::Spec),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::EndReason;
    use crate::run::{Goldfish, Optimiser};
    use crate::testing::{closed, replica, spec, state};
    use alloc::vec;

    #[test]
    fn takes_a_round_from_admission_to_its_state() {
        let mut ledger = begun();
        ledger.append(&replica(0, &[1], 0)).unwrap();
        ledger.append(&closed(&ledger, &[(0, 0)])).unwrap();
        assert_eq!(ledger.phase(), Phase::Applying(Round(0)));
        ledger.append(&applied(0)).unwrap();
        assert_eq!(ledger.phase(), Phase::Open(Round(1)));
        assert_eq!(ledger.state().1, state(1));
    }

    #[test]
    fn settings_that_would_spoil_every_step_are_refused_by_name() {
        let begin = |change: &dyn Fn(&mut RunSpec)| {
            let mut spec = spec();
            change(&mut spec);
            Ledger::begin(spec.id(), &spec.to_bytes()).map(|_| ())
        };
        let muon = |iterations| Optimiser::Muon {
            learning_rate: 0.02,
            momentum: 0.95,
            iterations,
        };
        assert_eq!(begin(&|spec| spec.inner.optimiser = muon(5)), Ok(()));
        let broken = [
            (begin(&|spec| spec.inner.optimiser = muon(21)), "`iterations`"),
            (begin(&|spec| spec.inner.learning_rate = f32::NAN), "`learning_rate`"),
            (
                begin(&|spec| {
                    spec.inner.optimiser = Optimiser::AdEmaMix {
                        beta_3: 1.0,
                        alpha: 8.0,
                        warmup_steps: 0,
                    }
                }),
                "`beta_3`",
            ),
            (
                begin(&|spec| {
                    spec.inner.goldfish = Some(Goldfish {
                        every: 1,
                        window: 13,
                        seed: 0,
                    })
                }),
                "goldfish",
            ),
            (begin(&|spec| spec.inner.final_ppm = 1_000_001), "`final_rate`"),
            (begin(&|spec| spec.version = 1), "version"),
        ];
        for (found, name) in broken {
            let Err(RuleError::Spec(reason)) = found else {
                panic!("{name}")
            };
            assert!(reason.contains(name), "{reason}");
        }
    }

    #[test]
    fn refuses_a_second_set_for_a_round() {
        let mut ledger = with_replicas(1);
        let set = closed(&ledger, &[(0, 0)]);
        ledger.append(&set).unwrap();
        assert_eq!(ledger.append(&set), Err(RuleError::Applying(Round(0))));
        ledger.append(&applied(0)).unwrap();
        assert!(matches!(ledger.append(&set), Err(RuleError::OtherRound { .. })));
    }

    #[test]
    fn refuses_contributions_of_strangers_and_of_replicas_that_ended() {
        let mut ledger = with_replicas(2);
        let stranger = closed(&ledger, &[(7, 0)]);
        assert_eq!(
            ledger.check(&stranger),
            Err(RuleError::NotAdmitted(ReplicaId(7), Round(0)))
        );
        let reason = EndReason::Left(NodeId([1; 32]));
        ledger
            .append(&Body::ReplicaEnded {
                id: ReplicaId(0),
                reason,
            })
            .unwrap();
        round(&mut ledger, &[(0, 0), (1, 0)]);
        let after_its_end = closed(&ledger, &[(0, 1)]);
        assert_eq!(
            ledger.check(&after_its_end),
            Err(RuleError::NotAdmitted(ReplicaId(0), Round(1)))
        );
    }

    #[test]
    fn takes_a_late_contribution_once_and_within_its_limit() {
        let mut ledger = with_replicas(2);
        round(&mut ledger, &[(0, 0)]);
        round(&mut ledger, &[(0, 1), (1, 0)]);
        assert_eq!(
            ledger.check(&closed(&ledger, &[(1, 0)])),
            Err(RuleError::Twice(ReplicaId(1), Round(0)))
        );
        round(&mut ledger, &[(0, 2)]);
        round(&mut ledger, &[(0, 3)]);
        assert_eq!(
            ledger.check(&closed(&ledger, &[(1, 1)])),
            Err(RuleError::TooLate(ReplicaId(1), Round(1)))
        );
    }

    #[test]
    fn refuses_stages_with_a_gap_and_nodes_in_two_places() {
        let mut ledger = begun();
        let mut gap = replica(0, &[1, 2], 0);
        if let Body::Replica { stages, .. } = &mut gap {
            stages[1].range.first += 1;
        }
        assert_eq!(ledger.check(&gap), Err(RuleError::Stages(ReplicaId(0))));
        ledger.append(&replica(0, &[1, 2], 0)).unwrap();
        let again = ledger.check(&replica(1, &[2], 0));
        assert_eq!(again, Err(RuleError::NodeTaken(NodeId([2; 32]))));
    }

    #[test]
    fn refuses_a_state_hash_that_is_not_that_of_its_parts() {
        let mut ledger = with_replicas(1);
        ledger.append(&closed(&ledger, &[(0, 0)])).unwrap();
        let lie = Body::Applied {
            round: Round(0),
            parts: state(1),
            state: state_hash(&state(2)),
        };
        assert_eq!(ledger.append(&lie), Err(RuleError::StateHash));
    }

    #[test]
    fn says_nothing_more_once_it_is_over() {
        let mut ledger = with_replicas(1);
        ledger.append(&Body::Stopped).unwrap();
        assert_eq!(ledger.append(&Body::Paused), Err(RuleError::Over));
        assert_eq!(ledger.phase(), Phase::Over);
    }

    #[test]
    fn refuses_facts_that_are_not_those_of_the_run() {
        let bytes = spec().to_bytes();
        let other = Ledger::begin(RunId::default(), &bytes);
        assert!(matches!(other, Err(RuleError::OtherRun { .. })));
        let mut no_quorum = spec();
        no_quorum.closing.quorum = 0;
        let refused = Ledger::begin(no_quorum.id(), &no_quorum.to_bytes());
        assert_eq!(refused.map(|_| ()), Err(RuleError::Spec("a quorum of nobody")));
        let mut long = bytes;
        long.push(0);
        let run = RunId(digest(&long).0);
        assert_eq!(Ledger::begin(run, &long).map(|_| ()), Err(RuleError::Malformed));
    }

    #[test]
    fn a_replica_that_waits_for_the_next_round_is_called_when_the_others_end() {
        let mut ledger = with_replicas(1);
        ledger.append(&replica(1, &[2], 1)).unwrap();
        let reason = EndReason::Silent(NodeId([1; 32]));
        let id = ReplicaId(0);
        ledger.append(&Body::ReplicaEnded { id, reason }).unwrap();
        assert_eq!(ledger.check(&closed(&ledger, &[(1, 0)])), Ok(()));
    }

    #[test]
    fn remembers_no_more_rounds_than_its_window() {
        let mut ledger = with_replicas(1);
        for number in 0..20 {
            round(&mut ledger, &[(0, number)]);
        }
        assert_eq!(ledger.recent().count(), 3);
        assert_eq!(ledger.state_of(Round(2)).map(|_| ()), None);
        assert_eq!(
            ledger.state_of(Round(20)).map(|(parts, _)| parts.to_vec()),
            Some(state(20))
        );
    }

    fn begun() -> Ledger {
        Ledger::begin(spec().id(), &spec().to_bytes()).unwrap()
    }

    fn with_replicas(count: u64) -> Ledger {
        let mut ledger = begun();
        for id in 0..count {
            let node = u8::try_from(id + 1).unwrap();
            ledger.append(&replica(id, &[node], 0)).unwrap();
        }
        ledger
    }

    fn round(ledger: &mut Ledger, set: &[(u64, u64)]) {
        let number = ledger.next_round().0;
        ledger.append(&closed(ledger, set)).unwrap();
        ledger.append(&applied(number)).unwrap();
    }

    fn applied(round: u64) -> Body {
        let parts = state(round + 1);
        let state = state_hash(&parts);
        let round = Round(round);
        Body::Applied { round, parts, state }
    }

    #[test]
    fn weights_are_bounded_by_what_a_replica_can_train_on() {
        let ledger = with_replicas(1);
        let mut body = closed(&ledger, &[(0, 0)]);
        if let Body::Closed { set, .. } = &mut body {
            set[0].tokens = u64::MAX;
        }
        assert!(matches!(ledger.check(&body), Err(RuleError::Weight(..))));
        let empty = Body::Closed {
            round: Round(0),
            base: state_hash(&state(0)),
            set: vec![],
        };
        assert!(matches!(ledger.check(&empty), Err(RuleError::SetSize { count: 0, .. })));
    }
}
