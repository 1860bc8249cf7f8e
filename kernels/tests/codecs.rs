//! What a codec costs: four workers train one model with each codec on equal tokens, and are scored on held-out text.
//!
//! Everything that a run does to numbers happens here, in one process and always alike: inner AdamW steps on four
//! different sets of languages, pseudo-gradients through the codec's bytes, aggregation, outer step. Short runs from
//! random parameters mislead, so all begin with the same dense warm start.

use std::fs;
use std::path::Path;

use polder_kernels::device::Device;
use polder_kernels::train::{TrainData, TrainStage, initial_parameters};
use polder_protocol::aggregate::{OuterStep, PartState, Update, apply};
use polder_protocol::codec::{ErrorFeedback, Frame, Header, codec_of_round, encode, frame_bytes};
use polder_protocol::hash::{Digest, InstitutionId, RunId};
use polder_protocol::layout::{BlockRange, Layout, Part};
use polder_protocol::run::{Codec, Inner, Optimiser, Outer, Precision, Schedule};

const WORKERS: u64 = 4;
const BLOCKS: u32 = 2;
/// One worker's steps before the rounds.
const WARM_STEPS: u32 = 300;
const ROUNDS: u64 = 24;
const STEPS_PER_ROUND: u32 = 15;
const SEQ: u32 = 64;
const SEED: u64 = 1948;
const LANGUAGES: [&str; 12] = ["cs", "da", "de", "en", "es", "fr", "hu", "it", "nl", "pl", "pt", "sv"];

#[test]
fn four_workers_lose_less_than_one_percent_to_four_bits() {
    let texts = Texts::read();
    let start = warm_start(&texts);
    let raw = train(&texts, &start, dense(Codec::Raw));
    println!("codec        bytes/round  bits/byte  against raw");
    let told = |name: &str, run: &Run| {
        let cost = run.bits_per_byte / raw.bits_per_byte - 1.0;
        println!(
            "{name:12} {:11}  {:9.4}  {:+.2} %",
            run.update_bytes,
            run.bits_per_byte,
            cost * 100.0
        );
        cost
    };
    assert!(
        raw.bits_per_byte < start.bits_per_byte * 0.95,
        "nothing was learned: {start:?} {raw:?}"
    );
    told("warm start", &start_as_run(&start));
    told("raw", &raw);
    for (name, codec) in [("int8", Codec::Int8), ("e3m0", Codec::E3m0)] {
        let cost = told(name, &train(&texts, &start, dense(codec)));
        assert!(cost < 0.01, "{name} costs {:.2} %", cost * 100.0);
    }
    // Of 4,096 values 64 wait too long for their turn in so short a run; 512 do not.
    told("topk_q2 64", &train(&texts, &start, sparse(64, 1.0)));
    let cost = told("topk_q2 512", &train(&texts, &start, sparse(512, 2.0)));
    assert!(cost < 0.03, "topk_q2 of 512 costs {:.2} %", cost * 100.0);
}

fn dense(codec: Codec) -> Outer {
    Outer {
        codec,
        learning_rate: 0.7,
        momentum: 0.9,
        warm_start_rounds: 0,
    }
}

fn sparse(k: u16, learning_rate: f32) -> Outer {
    Outer {
        codec: Codec::TopkQ2 { k, error_decay: 0.95 },
        learning_rate,
        momentum: 0.0,
        warm_start_rounds: 0,
    }
}

/// Bytes are the tokens.
struct Texts {
    workers: Vec<TrainData>,
    all: TrainData,
    held_out: Vec<Vec<u32>>,
}

impl Texts {
    fn read() -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cli/data/udhr");
        let tokens = |name: String| -> Vec<u32> {
            fs::read(folder.join(name))
                .unwrap()
                .into_iter()
                .map(u32::from)
                .collect()
        };
        let mut texts = Self {
            workers: (0..WORKERS).map(|_| TrainData::new()).collect(),
            all: TrainData::new(),
            held_out: Vec::new(),
        };
        for (number, language) in LANGUAGES.iter().enumerate() {
            let train = tokens(format!("{language}.train.txt"));
            texts.all.add(&train);
            texts.workers[number % WORKERS as usize].add(&train);
            texts.held_out.push(tokens(format!("{language}.txt")));
        }
        texts
    }
}

#[derive(Debug)]
struct Start {
    layout: Layout,
    parameters: Vec<Vec<f32>>,
    bits_per_byte: f64,
}

#[derive(Debug)]
struct Run {
    /// Of one worker in one round, all parts.
    update_bytes: usize,
    bits_per_byte: f64,
}

fn start_as_run(start: &Start) -> Run {
    Run {
        update_bytes: 0,
        bits_per_byte: start.bits_per_byte,
    }
}

fn warm_start(texts: &Texts) -> Start {
    let (layout, parameters) = initial_parameters(&config(), SEED).unwrap();
    let inner = inner(WARM_STEPS / 5);
    let mut stage = stage(parameters, inner, u64::from(WARM_STEPS));
    stage.steps(&texts.all, 0, WARM_STEPS, &[SEED]).unwrap();
    Start {
        layout,
        bits_per_byte: score(&mut stage, texts),
        parameters: stage.parameters().unwrap().to_vec(),
    }
}

struct Worker<'a> {
    replica: u64,
    stage: TrainStage,
    data: &'a TrainData,
    feedback: Vec<Option<ErrorFeedback>>,
}

fn train(texts: &Texts, start: &Start, outer: Outer) -> Run {
    let steps_total = ROUNDS * u64::from(STEPS_PER_ROUND);
    let mut workers: Vec<Worker<'_>> = (0..WORKERS)
        .zip(&texts.workers)
        .map(|(replica, data)| Worker {
            replica,
            stage: stage(start.parameters.clone(), inner(10), steps_total),
            data,
            feedback: start.parameters.iter().map(|_| None).collect(),
        })
        .collect();
    let mut states: Vec<PartState> = start.parameters.iter().cloned().map(PartState::initial).collect();
    let mut update_bytes = 0;
    for round in 0..ROUNDS {
        let updates: Vec<Vec<Vec<u8>>> = std::thread::scope(|scope| {
            let trained: Vec<_> = workers
                .iter_mut()
                .map(|worker| scope.spawn(|| worker.round(&start.layout, &states, &outer, round)))
                .collect();
            trained.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        update_bytes = updates[0].iter().map(Vec::len).sum();
        for (part, (layout, state)) in start.layout.parts.iter().zip(&mut states).enumerate() {
            let set: Vec<Update<'_>> = updates
                .iter()
                .zip(1..)
                .map(|(parts, worker)| Update {
                    frame: Frame::parse(&parts[part], layout).unwrap(),
                    weight: 1,
                    institution: InstitutionId([worker; 32]),
                })
                .collect();
            apply(layout, &set, OuterStep::of_round(&outer, round), state).unwrap();
        }
    }
    let parameters = states.into_iter().map(|state| state.parameters).collect();
    Run {
        update_bytes,
        bits_per_byte: score(&mut stage(parameters, inner(0), 1), texts),
    }
}

impl Worker<'_> {
    /// Trains from `states` and writes the update of every part.
    fn round(&mut self, layout: &Layout, states: &[PartState], outer: &Outer, round: u64) -> Vec<Vec<u8>> {
        let parameters = states.iter().map(|state| state.parameters.clone()).collect();
        self.stage.set_parameters(parameters).unwrap();
        let step_first = round * u64::from(STEPS_PER_ROUND);
        let labels = [SEED, round, self.replica];
        self.stage
            .steps(self.data, step_first, STEPS_PER_ROUND, &labels)
            .unwrap();
        let codec = codec_of_round(outer, round);
        let parts = states
            .iter()
            .zip(self.stage.parameters().unwrap())
            .zip(&layout.parts)
            .zip(&mut self.feedback);
        let mut frames = Vec::new();
        for (number, (((state, end), layout), feedback)) in parts.enumerate() {
            let delta: Vec<f32> = state
                .parameters
                .iter()
                .zip(end)
                .map(|(start, end)| start - end)
                .collect();
            let header = Header {
                run: RunId::default(),
                round,
                replica: self.replica,
                base: Digest::default(),
                part: Part(number as u32),
                form: codec.into(),
                tokens: 1,
            };
            let frame = match codec {
                Codec::TopkQ2 { error_decay, .. } => {
                    let feedback = feedback.get_or_insert_with(|| ErrorFeedback::new(error_decay, delta.len()));
                    feedback.encode(&header, layout, &delta).unwrap()
                }
                _ => encode(&header, layout, &delta).unwrap(),
            };
            assert_eq!(Some(frame.len()), frame_bytes(layout, header.form));
            frames.push(frame);
        }
        frames
    }
}

fn stage(parameters: Vec<Vec<f32>>, inner: Inner, steps_total: u64) -> TrainStage {
    let range = BlockRange::whole(BLOCKS);
    TrainStage::new(&config(), range, parameters, inner, steps_total, &Device::cpu()).unwrap()
}

/// Bits per byte over all held-out texts.
fn score(stage: &mut TrainStage, texts: &Texts) -> f64 {
    let bytes: f64 = texts.held_out.iter().map(|text| text.len() as f64).sum();
    let bits: f64 = texts
        .held_out
        .iter()
        .map(|text| {
            let newline = u32::from(b'\n');
            f64::from(stage.score(text, text.len() as u64, newline, SEQ).unwrap()) * text.len() as f64
        })
        .sum();
    bits / bytes
}

fn inner(warmup_steps: u32) -> Inner {
    Inner {
        steps: STEPS_PER_ROUND,
        batch: 8,
        micro_batches: 1,
        seq: SEQ,
        learning_rate: 4e-3,
        warmup_steps,
        beta_1: 0.9,
        beta_2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        clip_norm: 1.0,
        decay_ppm: 200_000,
        final_ppm: 0,
        schedule: Schedule::WarmupStableDecay,
        optimiser: Optimiser::AdamW,
        goldfish: None,
        precision: Precision::F32,
    }
}

fn config() -> String {
    format!(
        r#"{{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 48, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12, "num_hidden_layers": {BLOCKS},
        "vocab_size": 256, "max_position_embeddings": {SEQ}, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": false,
        "torch_dtype": "float32", "initializer_range": 0.02, "bos_token_id": null, "eos_token_id": null}}"#
    )
}
