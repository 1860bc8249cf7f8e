//! What a steward holds of the updates that are in no set yet, stage by stage.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

use crate::hash::{BlobId, NodeId};
use crate::layout::Part;
use crate::log::{Contribution, Ledger, Phase, ReplicaId, Round, tokens_max};

use super::{Commit, CommitAnswer, JobId, Refusal, SignedCommit};

/// Sorted as a set is.
pub(crate) type Key = (ReplicaId, Round);

/// The updates that are in no set yet.
///
/// It holds one update for each admitted replica and each round that is not too late, and never more than a set takes,
/// so that whatever it accepts finds room in the next set.
#[derive(Debug, Default)]
pub(crate) struct Gathering {
    updates: BTreeMap<Key, Update>,
}

#[derive(Debug)]
struct Update {
    /// By place in the replica.
    stages: BTreeMap<usize, Share>,
    /// How many stages the replica has.
    stages_total: usize,
    /// Its nodes have been told that it cannot be lost.
    accepted: bool,
}

#[derive(Debug)]
struct Share {
    signed: SignedCommit,
    /// The job that fetches its blobs; `None` once they are here.
    fetching: Option<JobId>,
}

/// What is to be done about a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Judged {
    /// Answer this, nothing else.
    Answer(CommitAnswer),
    /// Fetch its blobs; the node is this stage of its replica.
    New {
        /// Its place in the replica.
        stage: usize,
        /// Stages of the replica.
        stages_total: usize,
    },
}

impl Gathering {
    /// Judges a commit by the log and by what is here. The signature is the caller's to check, after the cheap things.
    pub(crate) fn judge(&self, ledger: &Ledger, commit: &Commit) -> Judged {
        match self.try_judge(ledger, commit) {
            Ok(judged) => judged,
            Err(refusal) => Judged::Answer(CommitAnswer::Refused(refusal)),
        }
    }

    fn try_judge(&self, ledger: &Ledger, commit: &Commit) -> Result<Judged, Refusal> {
        let open = ledger.next_round();
        let key = (commit.replica, commit.round);
        if let Some(included) = ledger.contribution(commit.replica, commit.round) {
            let same = commit.parts.iter().all(|(part, blob)| {
                let index = usize::try_from(part.0).unwrap_or(usize::MAX);
                included.parts.get(index) == Some(blob)
            });
            let answer = same.then_some(CommitAnswer::Accepted).ok_or(Refusal::Different)?;
            return Ok(Judged::Answer(answer));
        }
        if ledger.phase() == Phase::Over || open.0 >= ledger.spec().rounds {
            return Err(Refusal::RunOver);
        }
        if open.since(commit.round) > u64::from(ledger.spec().closing.late_rounds_max) {
            return Err(Refusal::TooLate { open });
        }
        let replica = ledger.replica(commit.replica).ok_or(Refusal::NotAdmitted)?;
        let index = replica.stage_of(commit.node).ok_or(Refusal::NotAdmitted)?;
        let stage = replica.stages.get(index).ok_or(Refusal::NotAdmitted)?;
        let parts = stage.range.parts(ledger.spec().layout.blocks());
        if !replica.trains(commit.round) || !commit.parts.iter().map(|(part, _)| part.0).eq(parts) {
            return Err(Refusal::NotAdmitted);
        }
        let base = ledger.state_of(commit.round).map(|(_, hash)| hash);
        if base != Some(commit.base) {
            return Err(Refusal::OtherBase);
        }
        if commit.tokens == 0 || commit.tokens > tokens_max(ledger.spec()) {
            return Err(Refusal::Invalid);
        }
        match self.updates.get(&key) {
            Some(update) => match update.stages.get(&index) {
                Some(share) if share.signed.commit != *commit => return Err(Refusal::Different),
                Some(_) if update.accepted => return Ok(Judged::Answer(CommitAnswer::Accepted)),
                Some(_) => return Ok(Judged::Answer(CommitAnswer::Waiting)),
                None => {}
            },
            // It comes again, after the next set.
            None if self.updates.len() >= ledger.set_max() => return Ok(Judged::Answer(CommitAnswer::Waiting)),
            None => {}
        }
        Ok(Judged::New {
            stage: index,
            stages_total: replica.stages.len(),
        })
    }

    /// Keeps a commit that was judged new; `fetching` is `None` where its blobs are here.
    pub(crate) fn keep(
        &mut self,
        signed: SignedCommit,
        stage: usize,
        stages_total: usize,
        fetching: Option<JobId>,
    ) -> Key {
        let key = (signed.commit.replica, signed.commit.round);
        let update = self.updates.entry(key).or_insert(Update {
            stages: BTreeMap::new(),
            stages_total,
            accepted: false,
        });
        update.stages.insert(stage, Share { signed, fetching });
        key
    }

    /// The blobs of a share are here.
    pub(crate) fn fetched(&mut self, job: JobId) -> Option<(Key, &SignedCommit)> {
        let (key, share) = self.shares_mut().find(|(_, share)| share.fetching == Some(job))?;
        share.fetching = None;
        Some((key, &share.signed))
    }

    /// The blobs of a share cannot be had. It is forgotten; its node offers it again.
    pub(crate) fn fetch_failed(&mut self, job: JobId) -> Option<SignedCommit> {
        let key = self
            .shares_mut()
            .find_map(|(key, share)| (share.fetching == Some(job)).then_some(key))?;
        let update = self.updates.get_mut(&key)?;
        let stage = *update.stages.iter().find(|(_, share)| share.fetching == Some(job))?.0;
        let share = update.stages.remove(&stage)?;
        if update.stages.is_empty() {
            self.updates.remove(&key);
        }
        Some(share.signed)
    }

    /// Accepts an update if every stage's share of it is here and it was not accepted before. Returns its nodes.
    pub(crate) fn accept(&mut self, key: Key) -> Option<Vec<NodeId>> {
        let update = self.updates.get_mut(&key)?;
        let whole = update.stages.len() == update.stages_total;
        let here = update.stages.values().all(|share| share.fetching.is_none());
        if !whole || !here || update.accepted {
            return None;
        }
        update.accepted = true;
        Some(update.nodes())
    }

    /// Accepted updates that started from `round`'s state.
    pub(crate) fn accepted_of(&self, round: Round) -> impl Iterator<Item = ReplicaId> {
        self.updates
            .iter()
            .filter(move |((_, base), update)| *base == round && update.accepted)
            .map(|((replica, _), _)| *replica)
    }

    /// Whether any update is accepted.
    pub(crate) fn has_accepted(&self) -> bool {
        self.updates.values().any(|update| update.accepted)
    }

    /// Everything that is accepted, as a set.
    pub(crate) fn set(&self) -> Vec<Contribution> {
        let accepted = self.updates.iter().filter(|(_, update)| update.accepted);
        accepted.map(|(key, update)| update.contribution(*key)).collect()
    }

    /// Forgets all that the log has, or that it cannot take any more. Returns what nobody will fold in: key, nodes, and
    /// the jobs that still fetch for it.
    pub(crate) fn prune(&mut self, ledger: &Ledger) -> Vec<(Key, Vec<NodeId>, Vec<JobId>)> {
        let open = ledger.next_round();
        let late_max = u64::from(ledger.spec().closing.late_rounds_max);
        let is_over = ledger.phase() == Phase::Over || open.0 >= ledger.spec().rounds;
        let mut dropped = Vec::new();
        self.updates.retain(|key, update| {
            if ledger.contribution(key.0, key.1).is_some() {
                return false;
            }
            if is_over || open.since(key.1) > late_max {
                let jobs = update.stages.values().filter_map(|share| share.fetching).collect();
                dropped.push((*key, update.nodes(), jobs));
                return false;
            }
            true
        });
        dropped
    }

    /// Adds the blobs of everything that is here.
    pub(crate) fn retain(&self, blobs: &mut BTreeSet<BlobId>) {
        let shares = self.updates.values().flat_map(|update| update.stages.values());
        let parts = shares.flat_map(|share| &share.signed.commit.parts);
        blobs.extend(parts.map(|(_, blob)| *blob));
    }

    fn shares_mut(&mut self) -> impl Iterator<Item = (Key, &mut Share)> {
        self.updates
            .iter_mut()
            .flat_map(|(key, update)| update.stages.values_mut().map(|share| (*key, share)))
    }
}

impl Update {
    fn nodes(&self) -> Vec<NodeId> {
        self.stages.values().map(|share| share.signed.commit.node).collect()
    }

    fn commits(&self) -> impl Iterator<Item = &Commit> {
        self.stages.values().map(|share| &share.signed.commit)
    }

    fn contribution(&self, (replica, base): Key) -> Contribution {
        // Stages lie in block order, so their parts end to end are all parts in order.
        let parts: Vec<(Part, BlobId)> = self.commits().flat_map(|commit| commit.parts.iter().copied()).collect();
        Contribution {
            replica,
            base,
            tokens: self.commits().map(|commit| commit.tokens).max().unwrap_or(0),
            loss_ppm: self.commits().map(|commit| commit.loss_ppm).max().unwrap_or(0),
            parts: parts.into_iter().map(|(_, blob)| blob).collect(),
        }
    }
}
