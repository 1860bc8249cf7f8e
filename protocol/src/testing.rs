//! What the tests of the log, the round and the node share: a small run, and keys that cost nothing.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use crate::hash::{BlobId, FederationId, InstitutionId, NodeId, digest};
use crate::layout::{BlockRange, Layout, PartLayout};
use crate::log::{Body, Contribution, Ledger, ReplicaId, Round, Seal, Signature, Stage};
use crate::run::{Boundary, Closing, Codec, Inner, Optimiser, Outer, Precision, RunSpec, SPEC_VERSION, Schedule};
use crate::time::Span;

/// Blocks of the run's model.
pub(crate) const BLOCKS: u32 = 4;

/// The key of node `[n; 32]`. Its signature is a hash that anybody could make, which no test does by accident.
#[derive(Debug)]
pub(crate) struct Key(pub(crate) u8);

impl Seal for Key {
    fn node(&self) -> NodeId {
        node(self.0)
    }

    fn sign(&self, domain: &'static str, bytes: &[u8]) -> Signature {
        signature(self.node(), domain, bytes)
    }

    fn verify(&self, node: NodeId, domain: &'static str, bytes: &[u8], given: &Signature) -> bool {
        signature(node, domain, bytes) == *given
    }
}

/// Node `[n; 32]`.
pub(crate) fn node(n: u8) -> NodeId {
    NodeId([n; 32])
}

fn signature(node: NodeId, domain: &str, bytes: &[u8]) -> Signature {
    let sealed = digest(&[&node.0, domain.as_bytes(), bytes].concat());
    let mut twice = [0; 64];
    for (slot, byte) in twice.iter_mut().zip(sealed.0.iter().chain(&sealed.0)) {
        *slot = *byte;
    }
    Signature::from_bytes(&twice)
}

/// A run of node 1: 100 rounds, quorum 2, grace 10 s, deadline 60 s, 2 rounds late.
pub(crate) fn spec() -> RunSpec {
    RunSpec {
        version: SPEC_VERSION,
        name: String::from("test"),
        federation: FederationId::default(),
        steward: node(1),
        config_json: String::from("{}"),
        layout: Layout {
            parts: vec![PartLayout::default(); 6],
        },
        tokenizer: BlobId::default(),
        initial: state(0),
        rounds: 100,
        inner: Inner {
            steps: 30,
            batch: 1,
            micro_batches: 1,
            seq: 64,
            learning_rate: 0.001,
            warmup_steps: 0,
            beta_1: 0.9,
            beta_2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            clip_norm: 1.0,
            decay_ppm: 0,
            final_ppm: 0,
            schedule: Schedule::WarmupStableDecay,
            optimiser: Optimiser::AdamW,
            goldfish: None,
            precision: Precision::F32,
        },
        outer: Outer {
            codec: Codec::Raw,
            learning_rate: 0.7,
            momentum: 0.9,
            warm_start_rounds: 0,
        },
        closing: Closing {
            quorum: 2,
            grace: Span::seconds(10),
            deadline: Span::seconds(60),
            late_rounds_max: 2,
        },
        data: vec![],
        seed: 7,
        evaluation: None,
        evaluate_every_rounds: 0,
        boundary: Boundary::F32,
        adapters: None,
    }
}

/// The state of a round, one blob per part.
pub(crate) fn state(round: u64) -> Vec<BlobId> {
    (0..BLOCKS + 2)
        .map(|part| blob("state", round, u64::from(part)))
        .collect()
}

/// A blob that two labels and a word name.
pub(crate) fn blob(word: &str, one: u64, other: u64) -> BlobId {
    BlobId(digest(&[word.as_bytes(), &one.to_le_bytes(), &other.to_le_bytes()].concat()).0)
}

/// A replica of as many equal stages as there are nodes, in their first life.
pub(crate) fn replica(id: u64, nodes: &[u8], from: u64) -> Body {
    let each = BLOCKS / u32::try_from(nodes.len()).unwrap();
    let stages = (0u32..)
        .zip(nodes)
        .map(|(index, n)| Stage {
            node: node(*n),
            institution: InstitutionId([*n; 32]),
            range: BlockRange {
                first: index * each,
                end: (index + 1) * each,
            },
            incarnation: 1,
        })
        .collect();
    let id = ReplicaId(id);
    let from = Round(from);
    Body::Replica { id, stages, from }
}

/// The next round's set: contributions of (replica, base round).
pub(crate) fn closed(ledger: &Ledger, set: &[(u64, u64)]) -> Body {
    let (round, state) = ledger.state();
    let sorted: BTreeMap<_, _> = set.iter().map(|key| (*key, ())).collect();
    Body::Closed {
        round,
        base: crate::run::state_hash(state),
        set: sorted
            .into_keys()
            .map(|(replica, base)| Contribution {
                replica: ReplicaId(replica),
                base: Round(base),
                tokens: 1920,
                loss_ppm: 2_000_000,
                parts: (0..6).map(|part| blob("update", replica * 1000 + base, part)).collect(),
            })
            .collect(),
    }
}
