//! Worlds: who is there, what the run is, and what goes wrong when. All of it follows from one seed.

use polder_protocol::hash::{BlobId, FederationId, InstitutionId, NodeId, digest};
use polder_protocol::layout::{Layout, PartLayout};
use polder_protocol::rng::Random;
use polder_protocol::run::{
    Boundary, Closing, Codec, Inner, Optimiser, Outer, Precision, RunSpec, SPEC_VERSION, Schedule,
};
use polder_protocol::time::{Instant, Span};

/// Blocks of every world's model: two stages of two, or one of three and one of one.
pub(crate) const BLOCKS: u32 = 4;

/// A mistake that is made on purpose, to see that the invariants find it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// None.
    None,
    /// The steward's disk forgets the commits that it was given.
    ForgetsCommits,
    /// A crash undoes what the steward persisted in its last steps.
    SpeaksBeforeItWrites,
    /// One node takes outer steps in another order.
    OtherOrder,
    /// The steward never hears that an update's bytes are there.
    NeverCloses,
}

/// One node's part in a world. Node 0 is the steward.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// One of three.
    pub(crate) institution: InstitutionId,
    /// Zero for a steward that does not train; fewer than all for a stage.
    pub(crate) blocks_max: u32,
    pub(crate) joins_at: Instant,
    /// It does not come back after the faults.
    pub(crate) is_lost: bool,
}

/// Something that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Crash {
        host: usize,
    },
    CrashAll,
    Restart {
        host: usize,
    },
    RestartAll,
    /// Hosts whose bit is set cannot reach the others.
    Partition {
        mask: u64,
    },
    /// Much is lost, doubled and late.
    Storm,
    /// The network is as it is on an ordinary day.
    Calm,
    /// Everything that a host computes takes several times as long, until then.
    Slow {
        host: usize,
        until: Instant,
    },
    /// The next outer step of a host that is not the steward has a wrong bit.
    Corrupt {
        host: usize,
    },
    Leave {
        host: usize,
    },
    Rejoin {
        host: usize,
    },
    Pause,
    Resume,
}

/// Everything about one simulation.
#[derive(Debug, Clone)]
pub(crate) struct World {
    pub(crate) seed: u64,
    pub(crate) spec: RunSpec,
    pub(crate) plans: Vec<Plan>,
    pub(crate) faults: Vec<(Instant, Fault)>,
    /// From here on nothing goes wrong any more.
    pub(crate) quiet_at: Instant,
    /// How long one round's training takes on a node that is not slow.
    pub(crate) train: Span,
    pub(crate) flaw: Flaw,
}

impl World {
    /// The world of a seed.
    pub(crate) fn of_seed(seed: u64, nodes: u8, flaw: Flaw) -> Self {
        let mut random = Random::from_labels(&[seed, u64::from(nodes)]);
        let spec = spec(seed, &mut random);
        let quiet_at = Instant(0) + Span::seconds(60 + random.below(180));
        let plans: Vec<Plan> = (0..usize::from(nodes)).map(|index| plan(index, &mut random)).collect();
        let mut faults = Vec::new();
        for _ in 0..4 + random.below(12) {
            faults.extend(fault(plans.len(), quiet_at, &mut random));
        }
        faults.retain(|(at, _)| *at < quiet_at);
        faults.sort_by_key(|(at, _)| *at);
        Self {
            seed,
            spec,
            plans,
            faults,
            quiet_at,
            train: Span::seconds(3 + random.below(12)),
            flaw,
        }
    }

    /// When a run that makes progress must be done: every round may take its deadline and the slowest training, and
    /// leases may have to run out first.
    pub(crate) fn done_by(&self) -> Instant {
        let round = self.spec.closing.deadline.0 + 8 * self.train.0 + Span::seconds(20).0;
        self.quiet_at + Span(self.spec.rounds * round + Span::seconds(180).0)
    }
}

/// The id of a host.
pub(crate) fn node_id(host: usize) -> NodeId {
    let mut id = [0; 32];
    for (slot, byte) in id.iter_mut().zip((host as u64 + 1).to_be_bytes()) {
        *slot = byte;
    }
    NodeId(id)
}

fn plan(index: usize, random: &mut Random) -> Plan {
    let draw = random.below(10);
    let blocks_max = match index {
        0 if draw < 4 => 0,
        0 if draw < 7 => 2,
        0 | 1 => BLOCKS,
        _ if draw < 5 => BLOCKS,
        _ if draw < 8 => 2,
        _ if draw == 8 => 1,
        _ => 3,
    };
    let late = random.chance(400_000).then(|| Span::seconds(10 + random.below(140)));
    Plan {
        institution: InstitutionId([1 + (index % 3) as u8; 32]),
        blocks_max,
        joins_at: Instant(random.below(2_000_000)) + late.unwrap_or_default(),
        is_lost: index > 1 && random.chance(100_000),
    }
}

/// A fault, and its end.
fn fault(hosts: usize, quiet_at: Instant, random: &mut Random) -> Vec<(Instant, Fault)> {
    let begin = Instant(random.below(quiet_at.0));
    let end = begin + Span(500_000 + random.below(40_000_000));
    let any = usize::try_from(random.below(hosts as u64)).unwrap_or(0);
    let not_steward = 1 + usize::try_from(random.below(hosts as u64 - 1)).unwrap_or(0);
    match random.below(12) {
        0..4 => vec![(begin, Fault::Crash { host: any }), (end, Fault::Restart { host: any })],
        4 => vec![(begin, Fault::CrashAll), (end, Fault::RestartAll)],
        5 | 6 => {
            let mask = random.next_u64();
            vec![(begin, Fault::Partition { mask }), (end, Fault::Partition { mask: 0 })]
        }
        7 => vec![(begin, Fault::Storm), (end, Fault::Calm)],
        8 | 9 => vec![(
            begin,
            Fault::Slow {
                host: any,
                until: end + Span::seconds(60),
            },
        )],
        10 => {
            if random.chance(500_000) {
                vec![(begin, Fault::Corrupt { host: not_steward })]
            } else {
                vec![(begin, Fault::Pause), (end, Fault::Resume)]
            }
        }
        _ => vec![
            (begin, Fault::Leave { host: not_steward }),
            (end, Fault::Rejoin { host: not_steward }),
        ],
    }
}

fn spec(seed: u64, random: &mut Random) -> RunSpec {
    let parts = BLOCKS + 2;
    RunSpec {
        version: SPEC_VERSION,
        name: format!("seed {seed}"),
        federation: FederationId::default(),
        steward: node_id(0),
        config_json: String::from("{}"),
        layout: Layout {
            parts: vec![PartLayout::default(); parts as usize],
        },
        tokenizer: BlobId::default(),
        initial: (0..parts)
            .map(|part| BlobId(digest(&[seed.to_le_bytes().as_slice(), &part.to_le_bytes()].concat()).0))
            .collect(),
        rounds: 6 + random.below(9),
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
            quorum: 1 + u32::try_from(random.below(3)).unwrap_or(0),
            grace: Span::seconds(1 + random.below(8)),
            deadline: Span::seconds(20 + random.below(20)),
            late_rounds_max: u32::try_from(random.below(3)).unwrap_or(0),
        },
        data: vec![],
        seed,
        evaluation: random.chance(500_000).then(BlobId::default),
        evaluate_every_rounds: 1 + random.below(4),
        boundary: Boundary::F32,
        adapters: None,
    }
}
