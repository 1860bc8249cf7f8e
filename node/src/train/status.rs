//! What people may know of the runs that this node follows: the log as it comes, and what this node does about it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use polder_protocol::hash::{BlobId, NodeId, RunId};
use polder_protocol::layout::Part;
use polder_protocol::log::{Body, Contribution, Entry, ReplicaId, Round, Stage};
use polder_protocol::run::{Evaluation, RunSpec};
use serde::{Deserialize, Serialize};

/// Rounds that stay in memory; all of them are in `rounds.jsonl`.
const ROUNDS_KEPT: usize = 512;
/// Own updates whose blobs are remembered: more rounds than a refusal can come late.
const UPDATES_KEPT: usize = 16;

/// One finished round as this node saw it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct RoundReport {
    /// Which.
    pub round: u64,
    /// Mean training loss in nats per token, weighted by tokens.
    pub loss: f64,
    /// Tokens of all contributions.
    pub tokens: u64,
    /// From the outer step before to this one; zero for rounds that this node learned of later.
    pub seconds: f64,
    /// Of all replicas together.
    pub tokens_per_second: f64,
    /// Contributions in the set.
    pub contributions: usize,
    /// Those of them that came late.
    pub late: usize,
    /// Bytes that this node's data plane sent meanwhile.
    pub sent_bytes: u64,
    /// Bytes that this node's data plane received meanwhile.
    pub received_bytes: u64,
    /// What this node would have sent to average dense f32 gradients of its parts after every inner step (ring
    /// all-reduce among as many replicas).
    pub dense_bytes: u64,
    /// The hash of the state after the round, by the log.
    pub state_hash: String,
    /// Whether this node's own outer step gave that state; `None` where it took none.
    pub agreed: Option<bool>,
    /// Held-out bits per byte by language, where the round was evaluated.
    pub bits_per_byte: BTreeMap<String, f64>,
}

/// Held-out bits per UTF-8 byte of one language.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct LanguageStatus {
    /// Under the text's own byte frequencies.
    pub order_0: f64,
    /// Of a compressor primed with the language's training text.
    pub compressor: f64,
    /// Of the model at its first evaluation.
    pub first: Option<f64>,
    /// Of the model at its last evaluation.
    pub now: Option<f64>,
}

/// A replica by the log.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ReplicaStatus {
    /// Its id.
    pub replica: u64,
    /// Its nodes, and the blocks of each as `first-end`.
    pub stages: Vec<(String, String)>,
}

/// One run as this node sees it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct RunStatus {
    /// Its id, in hexadecimal digits.
    pub run: String,
    /// What people call it.
    pub name: String,
    /// Its steward.
    pub steward: String,
    /// `new`, `training`, `paused`, `stopped` or `finished`.
    pub phase: String,
    /// What this node is: `whole model`, `blocks 0-1` or `follower`.
    pub role: String,
    /// What it does now.
    pub activity: String,
    /// Rounds whose outer step is in the log.
    pub rounds_done: u64,
    /// Rounds in all.
    pub rounds_total: u64,
    /// Rounds after which this node's own hash was the log's.
    pub rounds_agreed: u64,
    /// Rounds after which it was another.
    pub rounds_diverged: u64,
    /// Tokens of all rounds.
    pub tokens: u64,
    /// Of the last round.
    pub tokens_per_second: f64,
    /// Of all rounds that this node saw.
    pub sent_bytes: u64,
    /// Of all rounds that this node saw.
    pub received_bytes: u64,
    /// Of all rounds that this node saw.
    pub dense_bytes: u64,
    /// After the last outer step.
    pub state_hash: String,
    /// Replicas that train.
    pub replicas: Vec<ReplicaStatus>,
    /// Results by language code.
    pub languages: BTreeMap<String, LanguageStatus>,
    /// The last rounds, oldest first.
    pub recent: Vec<RoundReport>,
    /// What went wrong last, where something did.
    pub trouble: Option<String>,
}

/// What this node knows of its runs.
#[derive(Debug)]
pub(super) struct Board {
    me: NodeId,
    runs: Mutex<BTreeMap<RunId, Known>>,
}

#[derive(Debug, Default)]
struct Known {
    spec: Option<RunSpec>,
    status: RunStatus,
    /// What an earlier life of this node saw of the rounds whose entries come next.
    seen: BTreeMap<u64, RoundReport>,
    stages: BTreeMap<ReplicaId, Vec<Stage>>,
    closed: BTreeMap<Round, Vec<Contribution>>,
    /// The newest state in the log.
    parts: Vec<BlobId>,
    /// What this node found before the log said it.
    agreed_early: BTreeMap<u64, bool>,
    /// This node's own updates of the last rounds, to take them back into the error when they are refused.
    updates: BTreeMap<Round, Vec<(Part, BlobId)>>,
    applied_at: Option<Instant>,
    traffic_then: (u64, u64),
}

impl Board {
    pub(super) fn new(me: NodeId) -> Self {
        Self {
            me,
            runs: Mutex::default(),
        }
    }

    /// What an earlier life of this node saw of a run's rounds: [`Board::entry`] takes it up again.
    pub(super) fn seen(&self, run: RunId, reports: BTreeMap<u64, RoundReport>) {
        self.lock().entry(run).or_default().seen = reports;
    }

    /// Takes an entry of a run's log. `traffic` is `None` for those of an earlier life; otherwise the answer is the
    /// report that changed.
    pub(super) fn entry(&self, entry: &Entry, traffic: Option<(u64, u64)>) -> Option<RoundReport> {
        let mut runs = self.lock();
        let known = runs.entry(entry.run).or_default();
        let report = match &entry.body {
            Body::Genesis { spec } => {
                known.genesis(entry.run, spec);
                known.traffic_then = traffic.unwrap_or_default();
                known.applied_at = traffic.map(|_| Instant::now());
                None
            }
            Body::Replica { id, stages, .. } => {
                known.stages.insert(*id, stages.clone());
                None
            }
            Body::ReplicaEnded { id, .. } => {
                known.stages.remove(id);
                None
            }
            Body::Closed { round, set, .. } => {
                known.closed.insert(*round, set.clone());
                None
            }
            Body::Applied { round, parts, state } => {
                known.parts.clone_from(parts);
                Some(known.applied(*round, state.to_string(), traffic, self.me))
            }
            Body::Evaluated {
                round,
                bits_per_byte_ppm,
            } => known.evaluated(*round, bits_per_byte_ppm),
            Body::Paused => known.phase("paused"),
            Body::Resumed => known.phase("training"),
            Body::Stopped => known.phase("stopped"),
            Body::Finished => known.phase("finished"),
        };
        known.name_stages(self.me);
        report.filter(|_| traffic.is_some())
    }

    /// Whether this node's outer step of a round gave the log's state.
    pub(super) fn agreed(&self, run: RunId, round: Round, agreed: bool) -> Option<RoundReport> {
        let mut runs = self.lock();
        let known = runs.get_mut(&run)?;
        let status = &mut known.status;
        let report = status.recent.iter_mut().find(|report| report.round == round.0);
        let Some(report) = report else {
            known.agreed_early.insert(round.0, agreed);
            return None;
        };
        if report.agreed.is_some() {
            return None; // Known from an earlier life.
        }
        report.agreed = Some(agreed);
        let report = report.clone();
        status.count(agreed);
        Some(report)
    }

    /// The baselines of a run's held-out texts.
    pub(super) fn baselines(&self, run: RunId, evaluation: &Evaluation) {
        self.change(run, |status| {
            for (language, held_out) in &evaluation.languages {
                let line = status.languages.entry(language.clone()).or_default();
                line.order_0 = f64::from(held_out.order_0_bits_per_byte);
                line.compressor = f64::from(held_out.compressor_bits_per_byte);
            }
        });
    }

    /// What this node trained in a round.
    pub(super) fn updated(&self, run: RunId, round: Round, parts: Vec<(Part, BlobId)>) {
        if let Some(known) = self.lock().get_mut(&run) {
            known.updates.insert(round, parts);
            while known.updates.len() > UPDATES_KEPT {
                known.updates.pop_first();
            }
        }
    }

    /// Takes what this node trained in a round.
    pub(super) fn own_update(&self, run: RunId, round: Round) -> Option<Vec<(Part, BlobId)>> {
        self.lock().get_mut(&run)?.updates.remove(&round)
    }

    pub(super) fn preparing(&self, run: RunId) {
        self.activity(run, "loading the state".to_owned());
    }

    pub(super) fn trained(&self, run: RunId, step: u32, steps: u32, loss: f32, tokens: u64) {
        self.activity(run, format!("step {step} of {steps}, loss {loss:.3}, {tokens} tokens"));
    }

    pub(super) fn activity(&self, run: RunId, activity: String) {
        self.change(run, |status| status.activity = activity);
    }

    pub(super) fn trouble(&self, run: RunId, trouble: Option<String>) {
        self.change(run, |status| status.trouble = trouble);
    }

    /// Forgets all runs, before they are read from their journals again.
    pub(super) fn clear(&self) {
        self.lock().clear();
    }

    /// All runs, the newest name last.
    pub(super) fn list(&self) -> Vec<RunStatus> {
        self.lock().values().map(|known| known.status.clone()).collect()
    }

    /// The ids of all runs.
    pub(super) fn ids(&self) -> Vec<RunId> {
        self.lock().keys().copied().collect()
    }

    /// A run's facts, once its log has begun.
    pub(super) fn spec(&self, run: RunId) -> Option<RunSpec> {
        self.lock().get(&run)?.spec.clone()
    }

    /// Whether a run can still train.
    pub(super) fn is_open(&self, run: RunId) -> bool {
        let phase = self.lock().get(&run).map(|known| known.status.phase.clone());
        phase.is_some_and(|phase| phase != "stopped" && phase != "finished")
    }

    /// The newest state in the log, all parts, and the nodes that may have it.
    pub(super) fn newest_state(&self, run: RunId) -> Option<(RunSpec, Vec<BlobId>, Vec<NodeId>)> {
        let runs = self.lock();
        let known = runs.get(&run)?;
        let spec = known.spec.clone()?;
        let parts = if known.parts.is_empty() {
            spec.initial.clone()
        } else {
            known.parts.clone()
        };
        let mut sources = vec![spec.steward];
        sources.extend(known.stages.values().flatten().map(|stage| stage.node));
        sources.retain(|node| *node != self.me);
        sources.dedup();
        Some((spec, parts, sources))
    }

    fn change(&self, run: RunId, change: impl FnOnce(&mut RunStatus)) {
        if let Some(known) = self.lock().get_mut(&run) {
            change(&mut known.status);
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<RunId, Known>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RunStatus {
    fn count(&mut self, agreed: bool) {
        let rounds = if agreed {
            &mut self.rounds_agreed
        } else {
            &mut self.rounds_diverged
        };
        *rounds = rounds.saturating_add(1);
    }
}

impl Known {
    fn genesis(&mut self, run: RunId, spec: &[u8]) {
        let Ok(spec) = RunSpec::from_bytes(spec) else {
            return; // The machines refuse such a log.
        };
        self.status.run = run.to_string();
        self.status.name.clone_from(&spec.name);
        self.status.steward = spec.steward.to_string();
        self.status.phase = "training".to_owned();
        self.status.rounds_total = spec.rounds;
        self.spec = Some(spec);
    }

    fn phase(&mut self, phase: &str) -> Option<RoundReport> {
        self.status.phase = phase.to_owned();
        None
    }

    fn applied(&mut self, round: Round, state_hash: String, traffic: Option<(u64, u64)>, me: NodeId) -> RoundReport {
        let set = self.closed.remove(&round).unwrap_or_default();
        self.closed.retain(|other, _| *other > round);
        let tokens: u64 = set.iter().map(|update| update.tokens).sum();
        // A stage that does not see the loss says zero; the log keeps what the last stage says.
        let weighted: f64 = set
            .iter()
            .map(|update| update.tokens as f64 * update.loss_ppm as f64 / 1e6)
            .sum();
        let now = Instant::now();
        let before = self.applied_at.replace(now);
        let seconds = before
            .filter(|_| traffic.is_some())
            .map_or(0.0, |then| (now - then).as_secs_f64());
        let traffic_now = traffic.unwrap_or_default();
        // Only what this node saw of this very outer step.
        let seen = self.seen.remove(&round.0).filter(|seen| seen.state_hash == state_hash);
        let report = RoundReport {
            round: round.0,
            loss: if tokens > 0 { weighted / tokens as f64 } else { 0.0 },
            tokens,
            seconds,
            tokens_per_second: if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 },
            contributions: set.len(),
            late: set.iter().filter(|update| update.base != round).count(),
            sent_bytes: traffic_now.0.saturating_sub(self.traffic_then.0),
            received_bytes: traffic_now.1.saturating_sub(self.traffic_then.1),
            dense_bytes: if traffic.is_some() {
                self.dense_bytes(set.len() as u64, me)
            } else {
                0
            },
            state_hash,
            agreed: self.agreed_early.remove(&round.0),
            bits_per_byte: BTreeMap::new(),
        };
        let report = match seen {
            Some(seen) if traffic.is_none() => RoundReport {
                seconds: seen.seconds,
                tokens_per_second: seen.tokens_per_second,
                sent_bytes: seen.sent_bytes,
                received_bytes: seen.received_bytes,
                dense_bytes: seen.dense_bytes,
                agreed: seen.agreed,
                ..report
            },
            _ => report,
        };
        self.traffic_then = traffic_now;
        let status = &mut self.status;
        status.rounds_done = round.0.saturating_add(1);
        status.tokens = status.tokens.saturating_add(tokens);
        status.tokens_per_second = report.tokens_per_second;
        if let Some(agreed) = report.agreed {
            status.count(agreed);
        }
        status.sent_bytes = status.sent_bytes.saturating_add(report.sent_bytes);
        status.received_bytes = status.received_bytes.saturating_add(report.received_bytes);
        status.dense_bytes = status.dense_bytes.saturating_add(report.dense_bytes);
        status.state_hash.clone_from(&report.state_hash);
        status.trouble = None;
        if status.recent.len() >= ROUNDS_KEPT {
            status.recent.remove(0);
        }
        status.recent.push(report.clone());
        report
    }

    /// `steps × 2 (R − 1) / R × 4 bytes` for each parameter that this node trains.
    fn dense_bytes(&self, replicas: u64, me: NodeId) -> u64 {
        let Some(spec) = &self.spec else { return 0 };
        let Some(stage) = self.stages.values().flatten().find(|stage| stage.node == me) else {
            return 0;
        };
        let parts = stage.range.parts(spec.layout.blocks());
        let layouts = parts.filter_map(|part| spec.layout.parts.get(usize::try_from(part).ok()?));
        let elements: u64 = layouts
            .filter_map(|layout| u64::try_from(layout.elements()?).ok())
            .sum();
        let sent = u64::from(spec.inner.steps).saturating_mul(elements).saturating_mul(8);
        (sent / replicas.max(1)).saturating_mul(replicas.saturating_sub(1))
    }

    fn evaluated(&mut self, round: Round, bits_ppm: &BTreeMap<String, u64>) -> Option<RoundReport> {
        let bits: BTreeMap<String, f64> = bits_ppm
            .iter()
            .map(|(code, bits)| (code.clone(), *bits as f64 / 1e6))
            .collect();
        for (language, bits) in &bits {
            let line = self.status.languages.entry(language.clone()).or_default();
            line.first.get_or_insert(*bits);
            line.now = Some(*bits);
        }
        let report = self.status.recent.iter_mut().find(|report| report.round == round.0)?;
        report.bits_per_byte = bits;
        Some(report.clone())
    }

    fn name_stages(&mut self, me: NodeId) {
        let blocks = self.spec.as_ref().map_or(0, |spec| spec.layout.blocks());
        let name = |stage: &Stage| format!("{}-{}", stage.range.first, stage.range.end);
        let replica = |(id, stages): (&ReplicaId, &Vec<Stage>)| ReplicaStatus {
            replica: id.0,
            stages: stages
                .iter()
                .map(|stage| (stage.node.to_string(), name(stage)))
                .collect(),
        };
        self.status.replicas = self.stages.iter().map(replica).collect();
        let own = self.stages.values().flatten().find(|stage| stage.node == me);
        self.status.role = match own {
            Some(stage) if stage.range.first == 0 && stage.range.end == blocks => "whole model".to_owned(),
            Some(stage) => format!("blocks {}", name(stage)),
            None => "follower".to_owned(),
        };
    }
}
