//! What two who keep the directory tell a newcomer, held against each other: who leaves many out is found out.

use alloc::collections::{BTreeMap, BTreeSet};

use crate::hash::NodeId;

/// Snapshots that are held against each other; those of further peers are not needed.
const SNAPSHOTS_MAX: usize = 4;

/// Fewer missing nodes than this are those that came and went between two questions.
const MISSING_MIN: usize = 4;

/// What comparing says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// There are not yet two.
    Alone,
    /// Two tell of the same nodes, but for few.
    Agreed,
    /// This one leaves out more than a quarter of what the others know together.
    Withholds {
        /// Who.
        by: NodeId,
        /// How many it leaves out.
        missing: usize,
    },
}

/// Whole directories as some nodes told them: names only, since the announcements are signed.
#[derive(Debug, Clone, Default)]
pub struct Snapshots(BTreeMap<NodeId, BTreeSet<NodeId>>);

impl Snapshots {
    /// Takes what `by` told in place of what it told before, and compares.
    pub fn take(&mut self, by: NodeId, nodes: BTreeSet<NodeId>) -> Verdict {
        if self.0.len() >= SNAPSHOTS_MAX && !self.0.contains_key(&by) {
            self.0.pop_first();
        }
        self.0.insert(by, nodes);
        if self.0.len() < 2 {
            return Verdict::Alone;
        }
        let all: BTreeSet<NodeId> = self.0.values().flatten().copied().collect();
        let missing = |nodes: &BTreeSet<NodeId>| all.len().saturating_sub(nodes.len());
        let worst = self.0.iter().max_by_key(|(_, nodes)| missing(nodes));
        match worst {
            Some((by, nodes)) if missing(nodes) >= MISSING_MIN && missing(nodes).saturating_mul(4) > all.len() => {
                Verdict::Withholds {
                    by: *by,
                    missing: missing(nodes),
                }
            }
            Some(_) | None => Verdict::Agreed,
        }
    }

    /// Forgets what `by` told: it has left, or withholds.
    pub fn forget(&mut self, by: NodeId) {
        self.0.remove(&by);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_that_tell_alike_agree_and_one_that_leaves_many_out_is_named() {
        let mut snapshots = Snapshots::default();
        assert_eq!(snapshots.take(node(1), nodes(0..100)), Verdict::Alone);
        assert_eq!(snapshots.take(node(2), nodes(2..101)), Verdict::Agreed);
        let eclipse = snapshots.take(node(3), nodes(90..101));
        assert_eq!(
            eclipse,
            Verdict::Withholds {
                by: node(3),
                missing: 90
            }
        );
        snapshots.forget(node(3));
        assert_eq!(snapshots.take(node(4), nodes(0..101)), Verdict::Agreed);
    }

    #[test]
    fn a_small_federation_may_differ_by_who_came_just_now() {
        let mut snapshots = Snapshots::default();
        snapshots.take(node(1), nodes(0..1));
        assert_eq!(snapshots.take(node(2), nodes(0..4)), Verdict::Agreed);
    }

    #[test]
    fn no_more_are_kept_than_needed() {
        let mut snapshots = Snapshots::default();
        for n in 0..20 {
            snapshots.take(node(n), nodes(0..9));
        }
        assert_eq!(snapshots.0.len(), SNAPSHOTS_MAX);
    }

    fn node(n: u8) -> NodeId {
        NodeId([n; 32])
    }

    fn nodes(range: core::ops::Range<u8>) -> BTreeSet<NodeId> {
        range.map(node).collect()
    }
}
