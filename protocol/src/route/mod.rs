//! Which chain of stages answers a question: the one with the least expected time per token that the policy allows.
//!
//! A stage is entered at its first block and left at its last, so a chain is a path over block numbers whose edges are
//! offers. Whole numbers only: every gateway that knows the same offers chooses the same chain.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::hash::{InstitutionId, NodeId};
use crate::layout::BlockRange;

/// What every stage costs beside its compute and the way there: writing, reading and scheduling a frame.
pub const HOP_MICROS: u64 = 1_000;

/// A node that says it has no session free is a last resort: its word may be a minute old.
pub const FULL_MICROS: u64 = 10_000_000;

/// More offers of one epoch than this are not looked at. A federation of a thousand nodes has about as many.
pub const OFFERS_MAX: usize = 4_096;

/// A stage that a node holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Who holds it.
    pub node: NodeId,
    /// Whose node that is.
    pub institution: InstitutionId,
    /// Which blocks.
    pub range: BlockRange,
    /// Expected time in which the stage handles one token.
    pub token_micros: u32,
    /// Half a round trip to the node, as far as known.
    pub latency_micros: u32,
    /// Sessions for which it has room.
    pub sessions_free: u32,
}

/// Whom to trust with a question.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RoutePolicy {
    /// Who may hold a stage.
    pub who: Who,
    /// Who must hold the first and the last stage, and so sees the tokens; `None` for anybody of `who`.
    pub ends: Option<InstitutionId>,
}

/// Who may hold a stage.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Who {
    /// Every member.
    #[default]
    Any,
    /// Nodes of these institutions.
    Institutions(BTreeSet<InstitutionId>),
    /// These nodes.
    Nodes(BTreeSet<NodeId>),
}

/// One stage of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hop {
    /// Who.
    pub node: NodeId,
    /// Which blocks.
    pub range: BlockRange,
}

impl RoutePolicy {
    /// Whether `offer` may be part of a chain through a model of `blocks` blocks.
    pub fn allows(&self, offer: &Offer, blocks: u32) -> bool {
        let trusted = match &self.who {
            Who::Any => true,
            Who::Institutions(institutions) => institutions.contains(&offer.institution),
            Who::Nodes(nodes) => nodes.contains(&offer.node),
        };
        let at_an_end = offer.range.has_embedding() || offer.range.has_head(blocks);
        trusted && (!at_an_end || self.ends.is_none_or(|home| home == offer.institution))
    }
}

/// The chain that covers `wanted`, part or whole of a model of `blocks` blocks, with the least expected time per token;
/// among equals, the one whose last stages have the smallest ids. `None` where no chain is allowed.
pub fn choose(
    offers: &[Offer],
    wanted: BlockRange,
    blocks: u32,
    policy: &RoutePolicy,
    excluded: &BTreeSet<NodeId>,
) -> Option<Vec<Hop>> {
    let mut usable: Vec<&Offer> = offers
        .iter()
        .take(OFFERS_MAX)
        .filter(|offer| offer.range.fits(blocks) && wanted.first <= offer.range.first && offer.range.end <= wanted.end)
        .filter(|offer| !excluded.contains(&offer.node) && policy.allows(offer, blocks))
        .collect();
    // By first block, so that the way to a block is final before it is gone on from.
    usable.sort_by_key(|offer| (offer.range.first, offer.range.end, offer.node));
    let mut ways: BTreeMap<u32, (u64, Option<&Offer>)> = BTreeMap::new();
    ways.insert(wanted.first, (0, None));
    for offer in usable {
        let Some((before, _)) = ways.get(&offer.range.first).copied() else {
            continue;
        };
        let micros = before.saturating_add(micros(offer));
        let better = ways.get(&offer.range.end).is_none_or(|(known, _)| micros < *known);
        if better {
            ways.insert(offer.range.end, (micros, Some(offer)));
        }
    }
    let mut chain = Vec::new();
    let mut end = wanted.end;
    while end != wanted.first {
        let (_, offer) = ways.get(&end)?;
        let offer = (*offer)?;
        chain.push(Hop {
            node: offer.node,
            range: offer.range,
        });
        end = offer.range.first;
    }
    chain.reverse();
    Some(chain)
}

fn micros(offer: &Offer) -> u64 {
    let full = if offer.sessions_free == 0 { FULL_MICROS } else { 0 };
    u64::from(offer.token_micros) + u64::from(offer.latency_micros) + HOP_MICROS + full
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn takes_the_faster_of_two_chains() {
        let offers = [
            offer(1, 0..4, 9_000),
            offer(2, 0..2, 2_000),
            offer(3, 2..4, 2_000),
            offer(4, 2..4, 1_900),
        ];
        assert_eq!(nodes(&choose_any(&offers, 4)), [2, 4]);
    }

    #[test]
    fn fewer_hops_win_where_compute_is_equal() {
        let offers = [offer(1, 0..4, 4_000), offer(2, 0..2, 2_000), offer(3, 2..4, 2_000)];
        assert_eq!(nodes(&choose_any(&offers, 4)), [1]);
    }

    #[test]
    fn a_full_node_is_a_last_resort() {
        let full = Offer {
            sessions_free: 0,
            ..offer(1, 0..4, 1)
        };
        assert_eq!(nodes(&choose_any(&[full, offer(2, 0..4, 50_000)], 4)), [2]);
        assert_eq!(nodes(&choose_any(&[full], 4)), [1]);
    }

    #[test]
    fn a_gap_has_no_chain() {
        assert_eq!(choose_any(&[offer(1, 0..2, 1), offer(2, 3..4, 1)], 4), None);
        assert_eq!(choose_any(&[], 4), None);
    }

    #[test]
    fn ends_at_home_keep_first_and_last_stage_there() {
        let offers = [
            offer(1, 0..1, 1),
            offer(2, 1..3, 1),
            offer(1, 3..4, 1),
            offer(3, 0..4, 1),
        ];
        let policy = RoutePolicy {
            who: Who::Any,
            ends: Some(InstitutionId([1; 32])),
        };
        let chain = choose(&offers, BlockRange::whole(4), 4, &policy, &BTreeSet::new());
        assert_eq!(nodes(&chain), [1, 2, 1]);
    }

    #[test]
    fn a_replacement_covers_the_gap_and_avoids_the_excluded() {
        let offers = [offer(1, 2..4, 1), offer(2, 2..3, 1), offer(3, 3..4, 1)];
        let gap = BlockRange { first: 2, end: 4 };
        let excluded = BTreeSet::from([NodeId([1; 32])]);
        let chain = choose(&offers, gap, 6, &RoutePolicy::default(), &excluded);
        assert_eq!(nodes(&chain), [2, 3]);
    }

    proptest! {
        #[test]
        fn a_chain_covers_each_block_once_and_none_is_faster(
            edges in proptest::collection::vec((0u32..6, 1u32..6, 0u32..5_000, 0u32..2), 0..12),
        ) {
            let offers: Vec<Offer> = edges.iter().zip(1u8..).map(|((first, length, micros, free), id)| Offer {
                sessions_free: *free,
                ..offer(id, *first..first + length, *micros)
            }).collect();
            let best = fastest(&offers, 0);
            match choose_any(&offers, 6) {
                None => prop_assert_eq!(best, None),
                Some(chain) => {
                    let mut at = 0;
                    let mut total = 0;
                    for hop in &chain {
                        prop_assert_eq!(hop.range.first, at);
                        at = hop.range.end;
                        total += offers.iter().filter(|offer| offer.node == hop.node).map(micros).sum::<u64>();
                    }
                    prop_assert_eq!(at, 6);
                    prop_assert_eq!(best, Some(total));
                }
            }
        }
    }

    /// By trying every chain.
    fn fastest(offers: &[Offer], from: u32) -> Option<u64> {
        if from == 6 {
            return Some(0);
        }
        let fits = |offer: &&Offer| offer.range.first == from && offer.range.end <= 6;
        let ways = offers.iter().filter(fits);
        ways.filter_map(|offer| Some(micros(offer) + fastest(offers, offer.range.end)?))
            .min()
    }

    fn offer(id: u8, range: core::ops::Range<u32>, token_micros: u32) -> Offer {
        Offer {
            node: NodeId([id; 32]),
            institution: InstitutionId([id; 32]),
            range: BlockRange {
                first: range.start,
                end: range.end,
            },
            token_micros,
            latency_micros: 0,
            sessions_free: 1,
        }
    }

    fn choose_any(offers: &[Offer], blocks: u32) -> Option<Vec<Hop>> {
        let whole = BlockRange::whole(blocks);
        choose(offers, whole, blocks, &RoutePolicy::default(), &BTreeSet::new())
    }

    fn nodes(chain: &Option<Vec<Hop>>) -> Vec<u8> {
        chain.iter().flatten().map(|hop| hop.node.0[0]).collect()
    }
}
