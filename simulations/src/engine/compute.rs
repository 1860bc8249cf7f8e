//! What jobs take and what comes of them. A hash stands for every tensor.

use std::collections::BTreeMap;

use polder_protocol::hash::{BlobId, NodeId, digest};
use polder_protocol::layout::Part;
use polder_protocol::log::{ReplicaId, Round};
use polder_protocol::round::{Job, JobId, Outcome};
use polder_protocol::time::Span;

use crate::invariants::Violation;
use crate::oracle::step_part;
use crate::worlds::Flaw;

use super::{Engine, Event};

/// A stage waits so long for its neighbours.
const MEETING: Span = Span::seconds(45);
/// A stage notices so soon that a neighbour is gone.
const NOTICE: Span = Span::seconds(1);

/// The stages of a chain that train a round together: host, life and job of each that has come.
pub(crate) type Meetings = BTreeMap<(ReplicaId, Round), Vec<(usize, u64, JobId)>>;

impl Engine {
    /// A host begins a job.
    pub(super) fn begin(&mut self, host: usize, job: JobId, work: Job) -> Result<(), Violation> {
        self.has_base(host, job, &work)?;
        let slow = if self.now < self.hosts[host].slow_until { 8 } else { 1 };
        let life = self.hosts[host].life;
        let jitter = self.random.below(1_000_000);
        let spans = match &work {
            Job::Fetch { .. } => Span(20_000 + jitter / 4),
            Job::FetchState { .. } => Span(100_000 + jitter * 3),
            Job::Apply { .. } => Span((50_000 + jitter / 2) * slow),
            Job::Evaluate { .. } => Span((200_000 + jitter * 60) * slow),
            Job::Train {
                round, replica, stages, ..
            } if stages.len() > 1 => {
                let (key, stages) = ((*replica, *round), stages.len());
                self.hosts[host].jobs.insert(job, work);
                return self.meet(key, stages, (host, life, job), slow);
            }
            Job::Train { .. } => Span((self.world.train.0 + jitter) * slow),
        };
        self.hosts[host].jobs.insert(job, work);
        self.after(spans, Event::Done { host, life, job });
        Ok(())
    }

    /// Whether what a job builds on is in the host's store, and nothing that was let go.
    pub(super) fn has_base(&self, host: usize, job: JobId, work: &Job) -> Result<(), Violation> {
        let (Job::Train { base, .. } | Job::Apply { base, .. } | Job::Evaluate { parts: base, .. }) = work else {
            return Ok(());
        };
        let store = &self.hosts[host].disk.blobs;
        match base.iter().find(|(_, blob)| !store.contains(blob)) {
            Some((part, _)) => Err(Violation::new(
                "a job's base is in the store",
                format!("host {host} lacks {part:?} for {job:?}"),
            )),
            None => Ok(()),
        }
    }

    fn meet(
        &mut self,
        key: (ReplicaId, Round),
        stages: usize,
        who: (usize, u64, JobId),
        slow: u64,
    ) -> Result<(), Violation> {
        let meeting = self.meetings.entry(key).or_default();
        meeting.retain(|(host, ..)| *host != who.0);
        meeting.push(who);
        if meeting.len() < stages {
            let (host, life, job) = who;
            self.after(MEETING, Event::Unmet { host, life, job, key });
            return Ok(());
        }
        let met = meeting.clone();
        let span = Span((self.world.train.0 + self.random.below(1_000_000)) * slow);
        for (host, life, job) in met {
            self.after(span, Event::Done { host, life, job });
        }
        Ok(())
    }

    /// A stage waited long enough.
    pub(super) fn unmet(&mut self, host: usize, life: u64, job: JobId, key: (ReplicaId, Round)) -> bool {
        let Some(meeting) = self.meetings.get_mut(&key) else {
            return false;
        };
        let stages = match self.hosts[host].jobs.get(&job) {
            Some(Job::Train { stages, .. }) => stages.len(),
            _ => return false,
        };
        if meeting.len() >= stages || !meeting.contains(&(host, life, job)) {
            return false;
        }
        meeting.retain(|one| *one != (host, life, job));
        true
    }

    /// A host is gone or gave its job up: those who trained with it notice.
    pub(super) fn part_ways(&mut self, host: usize, job: Option<JobId>) {
        let is_there = |met: &(usize, u64, JobId)| met.0 == host && job.is_none_or(|job| job == met.2);
        let keys: Vec<_> = self
            .meetings
            .iter()
            .filter(|(_, meeting)| meeting.iter().any(is_there))
            .map(|(key, _)| *key)
            .collect();
        for key in keys {
            for (other, life, job) in self.meetings.remove(&key).unwrap_or_default() {
                if other != host {
                    let reason = "a neighbour is gone";
                    self.after(
                        NOTICE,
                        Event::Failed {
                            host: other,
                            life,
                            job,
                            reason,
                        },
                    );
                }
            }
        }
    }

    /// What comes of a job that is done now.
    pub(super) fn outcome(&mut self, host: usize, work: &Job) -> Outcome {
        if self.now < self.world.quiet_at && self.random.chance(20_000) {
            return failed("bad luck");
        }
        match work {
            Job::Fetch { parts, sources, .. } | Job::FetchState { parts, sources, .. } => {
                let blobs: Vec<BlobId> = parts.iter().map(|(_, blob)| *blob).collect();
                if self.fetch(host, &blobs, sources) {
                    Outcome::Fetched
                } else {
                    failed("nobody has it")
                }
            }
            Job::Apply { .. } => self.apply(host, work),
            Job::Train {
                run,
                round,
                replica,
                base,
                ..
            } => {
                let life = self.hosts[host].life;
                let made = |part: &Part| {
                    let labels = format!("update {run} {round} {replica} {life} {part:?} {host}");
                    (*part, BlobId(digest(labels.as_bytes()).0))
                };
                let parts: Vec<(Part, BlobId)> = base.iter().map(|(part, _)| made(part)).collect();
                let store = &mut self.hosts[host].disk.blobs;
                store.extend(parts.iter().map(|(_, blob)| *blob));
                self.meetings.remove(&(*replica, *round));
                Outcome::Trained {
                    parts,
                    tokens: 1 + self.random.below(3000),
                    loss_ppm: 1_000_000,
                }
            }
            Job::Evaluate { .. } => Outcome::Evaluated {
                bits_per_byte_ppm: BTreeMap::from([("nl".to_string(), 2_000_000)]),
            },
        }
    }

    fn apply(&mut self, host: usize, work: &Job) -> Outcome {
        let Job::Apply {
            round,
            base,
            set,
            makers,
            sources,
            ..
        } = work
        else {
            return failed("not an outer step");
        };
        let index = |part: &Part| part.0 as usize;
        let needed: Vec<BlobId> = set
            .iter()
            .flat_map(|one| base.iter().filter_map(|(part, _)| one.parts.get(index(part)).copied()))
            .collect();
        if !self.fetch(host, &needed, sources) {
            return failed("the set is incomplete");
        }
        let mut set = set.clone();
        if self.world.flaw == Flaw::OtherOrder && host == 0 {
            set.reverse();
        }
        let mut parts: Vec<(Part, BlobId)> = base
            .iter()
            .map(|(part, blob)| (*part, step_part(*blob, *round, index(part), &set, makers)))
            .collect();
        if std::mem::take(&mut self.hosts[host].corrupt)
            && let Some((_, blob)) = parts.first_mut()
        {
            blob.0[0] ^= 1;
            self.tally.corruptions += 1;
        }
        let store = &mut self.hosts[host].disk.blobs;
        store.extend(parts.iter().map(|(_, blob)| *blob));
        Outcome::Applied { parts }
    }

    /// Copies blobs into a host's store; true if they are all there then.
    fn fetch(&mut self, host: usize, blobs: &[BlobId], sources: &[NodeId]) -> bool {
        for blob in blobs {
            if self.hosts[host].disk.blobs.contains(blob) {
                continue;
            }
            let has = |index: usize| {
                let other = &self.hosts[index];
                other.node.is_some()
                    && sources.contains(&other.id)
                    && self.network.connects(host, index)
                    && other.disk.blobs.contains(blob)
            };
            if !(0..self.hosts.len()).any(has) {
                return false;
            }
            self.hosts[host].disk.blobs.insert(*blob);
        }
        true
    }
}

pub(super) fn failed(reason: &str) -> Outcome {
    Outcome::Failed {
        reason: reason.to_string(),
    }
}
