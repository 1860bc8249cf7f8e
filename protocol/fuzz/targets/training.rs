//! Training: updates, logs, and a node among peers that lie.

use std::collections::BTreeMap;
use std::sync::Arc;

use polder_protocol::codec::{self, Form};
use polder_protocol::hash::{BlobId, FederationId, InstitutionId, NodeId, RunId};
use polder_protocol::layout::{Layout, Part, PartLayout, TensorLayout};
use polder_protocol::log::{Entry, Log, Received, Seal, Signature};
use polder_protocol::node::{Command, Effect, Input, Joining, Node};
use polder_protocol::round::{Job, JobId, Outcome, RunMessage};
use polder_protocol::run::{
    Boundary, Closing, Codec, Inner, Optimiser, Outer, Precision, RunSpec, SPEC_VERSION, Schedule,
};
use polder_protocol::time::{Instant, Span};
use serde::{Deserialize, Serialize};

use super::each;

/// A part of 4,500 elements: more than one chunk of `topk_q2`, and a tensor of odd length.
pub(crate) fn part() -> PartLayout {
    let tensor = |name: &str, shape: &[u32]| TensorLayout {
        name: name.into(),
        shape: shape.to_vec(),
    };
    PartLayout {
        tensors: vec![tensor("a", &[63, 71]), tensor("b", &[27])],
    }
}

/// A run of node 1 with two blocks, which anybody may join.
pub(crate) fn spec() -> RunSpec {
    RunSpec {
        version: SPEC_VERSION,
        name: "fuzz".into(),
        federation: FederationId([7; 32]),
        steward: node_id(1),
        config_json: "{}".into(),
        layout: Layout { parts: vec![part(); 4] },
        tokenizer: BlobId([8; 32]),
        initial: vec![BlobId([9; 32]); 4],
        rounds: 20,
        inner: Inner {
            steps: 4,
            batch: 1,
            micro_batches: 1,
            seq: 16,
            learning_rate: 1e-3,
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
            grace: Span::seconds(1),
            deadline: Span::seconds(5),
            late_rounds_max: 2,
        },
        data: Vec::new(),
        seed: 1,
        evaluation: None,
        evaluate_every_rounds: 2,
        boundary: Boundary::F32,
        adapters: None,
    }
}

pub(crate) fn node_id(number: u8) -> NodeId {
    NodeId([number; 32])
}

/// Believes every signature, so that what stands behind it is reached.
#[derive(Debug)]
struct Believer(NodeId);

impl Seal for Believer {
    fn node(&self) -> NodeId {
        self.0
    }

    fn sign(&self, _: &'static str, _: &[u8]) -> Signature {
        Signature::from_bytes(&[0; 64])
    }

    fn verify(&self, _: NodeId, _: &'static str, _: &[u8], _: &Signature) -> bool {
        true
    }
}

pub(crate) fn update(bytes: &[u8]) {
    let part = part();
    let Ok((header, values)) = codec::decode(bytes, &part) else {
        return;
    };
    assert_eq!(Some(values.len()), part.elements());
    assert!(values.iter().all(|value| value.is_finite()));
    if header.form == Form::Raw {
        assert_eq!(codec::encode(&header, &part, &values).as_deref(), Ok(bytes));
    }
}

pub(crate) fn run_spec(bytes: &[u8]) {
    if let Ok(spec) = RunSpec::from_bytes(bytes) {
        let _ = (spec.layout.elements(), spec.layout.blocks());
        let again = RunSpec::from_bytes(&spec.to_bytes()).expect("what is written can be read");
        assert_eq!(again.id(), spec.id());
    }
}

pub(crate) fn round_messages(bytes: &[u8]) {
    if let Ok(message) = RunMessage::from_bytes(bytes) {
        assert_eq!(RunMessage::from_bytes(&message.to_bytes()).as_ref(), Ok(&message));
    }
}

/// Entries one after the other. Place, predecessor and author are put right, so that the rules are what decides.
pub(crate) fn log(bytes: &[u8]) {
    let seal = Believer(node_id(1));
    let mut log = None;
    each(bytes, |mut entry: Entry| {
        let log = log.get_or_insert_with(|| Log::new(entry.run));
        entry.run = log.run();
        entry.index = log.len();
        entry.previous = log.head();
        if let Some(spec) = log.spec() {
            entry.author = spec.steward;
        }
        let before = log.len();
        match log.receive(entry, &seal) {
            Received::Appended => assert_eq!(log.len(), before + 1),
            _ => assert_eq!(log.len(), before, "what is refused changes nothing"),
        }
    });
}

/// What happens to the node of [`node`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Event {
    /// A message of one of eight peers, read as the transport reads it.
    Message(u8, Vec<u8>),
    /// The same, as a value; its run is put right.
    Told(u8, RunMessage),
    /// The oldest job ends: well, badly, or for now.
    Done(u8),
    /// So many milliseconds pass.
    Wait(u16),
    /// A peer comes.
    Found(u8),
    /// A peer goes.
    Lost(u8),
}

/// A steward that trains in its own run, among peers that say whatever the input makes them say.
pub(crate) fn node(bytes: &[u8]) {
    let own = node_id(1);
    let spec = spec();
    let run = spec.id();
    let mut node = Node::new(Arc::new(Believer(own)), 1);
    let mut now = Instant(0);
    let mut jobs = BTreeMap::new();
    let joining = Joining {
        institution: InstitutionId([1; 32]),
        blocks_max: 2,
        languages: Vec::new(),
    };
    let steward = own;
    for command in [Command::Begin { spec }, Command::Join { run, steward, joining }] {
        step(&mut node, now, Input::Local(command), &mut jobs);
    }
    let mut events = 0;
    each(bytes, |event: Event| {
        events += 1;
        // A step costs little; thousands of them only make the fuzzer slow.
        if events > 200 {
            return;
        }
        let peer = |number: u8| node_id(2 + number % 8);
        let input = match event {
            Event::Message(from, bytes) => match RunMessage::from_bytes(&bytes) {
                Ok(message) => Input::Message {
                    from: peer(from),
                    message,
                },
                Err(_) => return,
            },
            Event::Told(from, mut message) => {
                put_right(&mut message, run, peer(from));
                // As the transport does.
                if message.check().is_err() {
                    return;
                }
                Input::Message {
                    from: peer(from),
                    message,
                }
            }
            Event::Done(how) => match jobs.pop_first() {
                Some((job, work)) => Input::Done {
                    job,
                    outcome: outcome(&work, how),
                },
                None => return,
            },
            Event::Wait(milliseconds) => {
                now = now + Span::millis(milliseconds.into());
                Input::Wake
            }
            Event::Found(number) => Input::PeerFound { node: peer(number) },
            Event::Lost(number) => Input::PeerLost { node: peer(number) },
        };
        step(&mut node, now, input, &mut jobs);
    });
}

fn step(node: &mut Node, now: Instant, input: Input, jobs: &mut BTreeMap<JobId, Job>) {
    let mut effects = Vec::new();
    node.step(now, input, &mut effects);
    assert!(effects.len() < 10_000, "one message makes much work");
    for effect in effects {
        match effect {
            Effect::Start { job, work } => drop(jobs.insert(job, work)),
            Effect::Cancel { job } => drop(jobs.remove(&job)),
            Effect::Send { message, .. } | Effect::Broadcast { message } => {
                assert_eq!(message.check(), Ok(()), "a node says only what others take");
            }
            Effect::Persist { .. } | Effect::Retain { .. } | Effect::Report(_) => {}
        }
    }
}

fn put_right(message: &mut RunMessage, own: RunId, from: NodeId) {
    match message {
        RunMessage::Entries { run, .. }
        | RunMessage::Head { run, .. }
        | RunMessage::Ask { run, .. }
        | RunMessage::Join { run, .. }
        | RunMessage::JoinAnswer { run, .. }
        | RunMessage::Leave { run }
        | RunMessage::Alive { run, .. }
        | RunMessage::Ack { run, .. } => *run = own,
        RunMessage::Commit(signed) => {
            signed.commit.run = own;
            signed.commit.node = from;
        }
    }
}

fn outcome(work: &Job, how: u8) -> Outcome {
    let reason = String::from("fuzz");
    match how % 4 {
        0 => return Outcome::Failed { reason },
        1 => return Outcome::Invalid { reason },
        _ => {}
    }
    let made = |base: &[(Part, BlobId)]| base.iter().map(|(part, _)| (*part, BlobId([how; 32]))).collect();
    match work {
        Job::Train { base, .. } => Outcome::Trained {
            parts: made(base),
            tokens: 64,
            loss_ppm: 3_000_000,
        },
        Job::Fetch { .. } | Job::FetchState { .. } => Outcome::Fetched,
        Job::Apply { base, .. } => Outcome::Applied { parts: made(base) },
        Job::Evaluate { .. } => Outcome::Evaluated {
            bits_per_byte_ppm: BTreeMap::new(),
        },
    }
}
