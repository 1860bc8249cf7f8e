//! Which blocks a node should hold, given what others announce and how much it can hold.
//!
//! Blocks that nobody holds come first. Where all are held, the node repeats stages that the fewest hold, from border
//! to border of existing ones, because a chain enters and leaves a stage at its borders only ([`crate::route`]).

use alloc::collections::BTreeSet;
use alloc::vec;
use alloc::vec::Vec;

use crate::hash::NodeId;
use crate::layout::BlockRange;

/// The most stages of others that are looked at, and the most blocks a model may have here: work stays below a second.
const STAGES_MAX: usize = 4_096;
const BLOCKS_MAX: u32 = 1_024;

/// The range that a node with room for `capacity_blocks` should hold of a model of `blocks` blocks, where others hold
/// `held`. `None` without room or without a model.
pub fn place(blocks: u32, held: &[BlockRange], capacity_blocks: u32) -> Option<BlockRange> {
    if capacity_blocks == 0 || blocks == 0 || blocks > BLOCKS_MAX {
        return None;
    }
    let held: Vec<BlockRange> = held
        .iter()
        .copied()
        .filter(|range| range.fits(blocks))
        .take(STAGES_MAX)
        .collect();
    let holders = holders(blocks, &held);
    first_gap(&holders, capacity_blocks).or_else(|| least_held(blocks, &held, &holders, capacity_blocks))
}

/// Whether the node `own`, which holds `range`, should choose anew: another block is held by two fewer nodes than the
/// least held of its own, so that moving evens the stages out. Of several nodes with one range, only the last in the order
/// of ids moves, so that nodes that chose alike at the same moment do not do so again. `offers` are those of all others.
pub fn should_move(blocks: u32, own: NodeId, range: BlockRange, offers: &[(NodeId, BlockRange)]) -> bool {
    if blocks == 0 || blocks > BLOCKS_MAX || !range.fits(blocks) {
        return false;
    }
    let others = offers.iter().filter(|(node, held)| *node != own && held.fits(blocks));
    let others: Vec<(NodeId, BlockRange)> = others.take(STAGES_MAX).copied().collect();
    if others.iter().any(|(node, held)| *held == range && *node > own) {
        return false;
    }
    let held: Vec<BlockRange> = others.iter().map(|(_, held)| *held).collect();
    let counts = holders(blocks, &held);
    let least = |inside: bool| {
        let blocks = (0u32..).zip(&counts);
        let chosen = blocks.filter(|(block, _)| (range.first <= *block && *block < range.end) == inside);
        chosen.map(|(_, count)| *count).min()
    };
    // Without this node its own blocks have one holder fewer already.
    matches!((least(true), least(false)), (Some(inside), Some(outside)) if inside > outside)
}

/// How many hold each block.
fn holders(blocks: u32, held: &[BlockRange]) -> Vec<u32> {
    (0..blocks)
        .map(|block| {
            let holds = held.iter().filter(|range| range.first <= block && block < range.end);
            u32::try_from(holds.count()).unwrap_or(u32::MAX)
        })
        .collect()
}

/// The start of the first run of blocks that nobody holds, as far as there is room.
fn first_gap(holders: &[u32], capacity_blocks: u32) -> Option<BlockRange> {
    let mut gap = (0u32..).zip(holders).skip_while(|(_, count)| **count > 0);
    let (first, _) = gap.next()?;
    let more = gap.take_while(|(_, count)| **count == 0).count();
    let length = u32::try_from(more)
        .unwrap_or(u32::MAX)
        .saturating_add(1)
        .min(capacity_blocks);
    Some(BlockRange {
        first,
        end: first + length,
    })
}

/// Among the ranges from border to border for which there is room: the one whose blocks have the fewest holders, then
/// the longest, then the first.
fn least_held(blocks: u32, held: &[BlockRange], holders: &[u32], capacity_blocks: u32) -> Option<BlockRange> {
    let borders: BTreeSet<u32> = held
        .iter()
        .flat_map(|range| [range.first, range.end])
        .chain([0, blocks])
        .collect();
    let sums = running_sums(holders);
    let mut best: Option<((u64, u32, u32), BlockRange)> = None;
    for first in &borders {
        for end in borders.range(first + 1..) {
            let length = end - first;
            if length > capacity_blocks {
                break;
            }
            // The mean number of holders in thousandths.
            let mean = sum(&sums, *first, *end).saturating_mul(1_000) / u64::from(length);
            let key = (mean, u32::MAX - length, *first);
            if best.is_none_or(|(known, _)| key < known) {
                let range = BlockRange {
                    first: *first,
                    end: *end,
                };
                best = Some((key, range));
            }
        }
    }
    // All stages are larger than this node: it makes a new border, and the next one like it can fill up to the old.
    let new_border = || {
        let least = (0u32..).zip(holders).min_by_key(|(block, count)| (**count, *block))?.0;
        let first = borders.range(..=least).next_back().copied()?;
        let end = first.saturating_add(capacity_blocks).min(blocks);
        Some(BlockRange { first, end })
    };
    best.map(|(_, range)| range).or_else(new_border)
}

fn running_sums(holders: &[u32]) -> Vec<u64> {
    let mut sums = vec![0u64];
    let mut total = 0u64;
    for count in holders {
        total = total.saturating_add(u64::from(*count));
        sums.push(total);
    }
    sums
}

fn sum(sums: &[u64], first: u32, end: u32) -> u64 {
    let at = |block: u32| {
        usize::try_from(block)
            .ok()
            .and_then(|block| sums.get(block))
            .copied()
            .unwrap_or(0)
    };
    at(end).saturating_sub(at(first))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::hash::InstitutionId;
    use crate::route::{self, Offer, RoutePolicy};

    #[test]
    fn a_first_node_takes_what_it_can_from_the_front() {
        assert_eq!(place(30, &[], 12), range(0, 12));
        assert_eq!(place(30, &[], 99), range(0, 30));
        assert_eq!(place(30, &[], 0), None);
    }

    #[test]
    fn a_gap_is_filled_up_to_its_end_and_no_further() {
        let held = [BlockRange { first: 0, end: 10 }, BlockRange { first: 15, end: 30 }];
        assert_eq!(place(30, &held, 12), range(10, 15));
    }

    #[test]
    fn a_spare_node_repeats_the_stage_that_fewest_hold() {
        let front = BlockRange { first: 0, end: 15 };
        let back = BlockRange { first: 15, end: 30 };
        assert_eq!(place(30, &[front, front, back], 20), range(15, 30));
    }

    #[test]
    fn of_nodes_that_chose_alike_one_moves_and_only_where_it_evens_out() {
        let front = BlockRange { first: 0, end: 15 };
        let back = BlockRange { first: 15, end: 30 };
        let node = |id: u8| NodeId([id; 32]);
        let moves = |own: u8, others: &[(u8, BlockRange)]| {
            let others: Vec<_> = others.iter().map(|(id, range)| (node(*id), *range)).collect();
            should_move(30, node(own), front, &others)
        };
        // Three in front and one behind: the last of the three goes.
        assert!(moves(9, &[(1, front), (2, back), (3, front)]));
        assert!(!moves(3, &[(1, front), (2, back), (9, front)]));
        // Two and one: going would only turn it round.
        assert!(!moves(9, &[(1, front), (2, back)]));
        // A gap is filled even by the second of two.
        assert!(moves(9, &[(1, front)]));
        assert!(!moves(9, &[]));
        assert!(!moves(9, &[(1, back)]));
    }

    #[test]
    fn ranges_that_lie_are_not_looked_at() {
        let lie = BlockRange {
            first: 7,
            end: u32::MAX,
        };
        assert_eq!(place(4, &[lie], 4), range(0, 4));
    }

    proptest! {
        #[test]
        fn nodes_that_come_one_by_one_make_a_chain_as_soon_as_they_hold_every_block(
            blocks in 1u32..40,
            capacities in proptest::collection::vec(1u32..20, 1..60),
        ) {
            let mut held = Vec::new();
            for capacity in capacities {
                let range = place(blocks, &held, capacity).unwrap();
                prop_assert!(range.fits(blocks) && range.end - range.first <= capacity);
                held.push(range);
                let offers: Vec<Offer> = held.iter().zip(0u8..).map(|(range, id)| Offer {
                    node: NodeId([id; 32]),
                    institution: InstitutionId([0; 32]),
                    range: *range,
                    token_micros: 1,
                    latency_micros: 1,
                    sessions_free: 1,
                }).collect();
                let whole = BlockRange::whole(blocks);
                let chain = route::choose(&offers, whole, blocks, &RoutePolicy::default(), &BTreeSet::new());
                prop_assert_eq!(chain.is_some(), holders(blocks, &held).iter().all(|count| *count > 0));
            }
        }
    }

    fn range(first: u32, end: u32) -> Option<BlockRange> {
        Some(BlockRange { first, end })
    }
}
