//! Makes replicas of the nodes that wait: whole ones alone, partial ones as a chain.

use alloc::vec::Vec;

use crate::hash::{InstitutionId, NodeId};
use crate::layout::BlockRange;
use crate::log::{STAGES_MAX, Stage};

/// A node that waits to be admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) node: NodeId,
    pub(crate) institution: InstitutionId,
    /// How many blocks it can hold.
    pub(crate) blocks_max: u32,
    pub(crate) incarnation: u64,
}

/// The next replica that can be made of `waiting` for a model of `blocks` blocks.
///
/// A node that can hold all blocks is one alone, the first by id first. Of the others, the roomiest are taken until
/// they can hold all blocks together, and blocks are dealt as evenly as their room allows, since the slowest stage sets
/// a chain's pace. The choice follows from `waiting` alone, in whatever order.
pub(crate) fn next_replica(waiting: &[Candidate], blocks: u32) -> Option<Vec<Stage>> {
    let mut sorted: Vec<Candidate> = waiting.iter().filter(|one| one.blocks_max > 0).copied().collect();
    sorted.sort_by_key(|one| (one.blocks_max.min(blocks), one.node));
    let whole = sorted.iter().find(|one| one.blocks_max >= blocks);
    if let Some(whole) = whole {
        return Some(deal(core::slice::from_ref(whole), blocks));
    }
    sorted.sort_by_key(|one| (core::cmp::Reverse(one.blocks_max), one.node));
    let mut room = 0u32;
    let needed = sorted
        .iter()
        .take(STAGES_MAX)
        .position(|one| {
            room = room.saturating_add(one.blocks_max);
            room >= blocks
        })?
        .saturating_add(1);
    Some(deal(sorted.get(..needed)?, blocks))
}

/// Blocks for which `waiting` has no room together.
pub(crate) fn blocks_missing(waiting: &[Candidate], blocks: u32) -> u32 {
    let room = waiting.iter().fold(0u32, |sum, one| sum.saturating_add(one.blocks_max));
    blocks.saturating_sub(room)
}

/// Deals `blocks` to `chosen`, which have room for them together.
fn deal(chosen: &[Candidate], blocks: u32) -> Vec<Stage> {
    let mut first = 0;
    let mut stages = Vec::new();
    for (index, one) in chosen.iter().enumerate() {
        let left = blocks.saturating_sub(first);
        let later = chosen.get(index + 1..).unwrap_or_default();
        let nodes_left = u32::try_from(later.len()).unwrap_or(u32::MAX).saturating_add(1);
        // What those after it cannot hold stays with this one.
        let least = blocks_missing(later, left);
        let share = left.div_ceil(nodes_left).max(least).min(one.blocks_max);
        if share == 0 {
            continue; // More nodes than blocks.
        }
        let end = first.saturating_add(share);
        stages.push(Stage {
            node: one.node,
            institution: one.institution,
            range: BlockRange { first, end },
            incarnation: one.incarnation,
        });
        first = end;
    }
    stages
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    #[test]
    fn a_node_with_room_for_all_is_a_replica_alone() {
        let stages = next_replica(&[candidate(1, 2), candidate(2, 9)], 4).unwrap();
        assert_eq!(ranges(&stages), vec![(2, 0, 4)]);
    }

    #[test]
    fn two_halves_make_a_chain() {
        assert_eq!(next_replica(&[candidate(1, 3)], 4), None);
        let stages = next_replica(&[candidate(1, 3), candidate(2, 3)], 4).unwrap();
        assert_eq!(ranges(&stages), vec![(1, 0, 2), (2, 2, 4)]);
    }

    #[test]
    fn a_small_node_gets_no_more_than_it_can_hold() {
        let stages = next_replica(&[candidate(1, 1), candidate(2, 5)], 6).unwrap();
        assert_eq!(ranges(&stages), vec![(2, 0, 5), (1, 5, 6)]);
    }

    proptest! {
        #[test]
        fn a_chain_covers_every_block_once_within_everybody_s_room(
            rooms in proptest::collection::vec(0u32..7, 0..12),
            blocks in 1u32..24,
        ) {
            let waiting: Vec<Candidate> = (1u8..).zip(&rooms).map(|(n, room)| candidate(n, *room)).collect();
            let enough = rooms.iter().sum::<u32>() >= blocks;
            let stages = next_replica(&waiting, blocks);
            prop_assert_eq!(stages.is_some(), enough);
            let mut covered = 0;
            for stage in stages.unwrap_or_default() {
                prop_assert_eq!(stage.range.first, covered);
                covered = stage.range.end;
                let room = waiting.iter().find(|one| one.node == stage.node).unwrap().blocks_max;
                prop_assert!(stage.range.fits(blocks) && stage.range.end - stage.range.first <= room);
            }
            prop_assert_eq!(covered, if enough { blocks } else { 0 });
        }
    }

    fn candidate(n: u8, blocks_max: u32) -> Candidate {
        Candidate {
            node: NodeId([n; 32]),
            institution: InstitutionId([n; 32]),
            blocks_max,
            incarnation: 1,
        }
    }

    fn ranges(stages: &[Stage]) -> Vec<(u8, u32, u32)> {
        stages
            .iter()
            .map(|stage| (stage.node.0[0], stage.range.first, stage.range.end))
            .collect()
    }
}
