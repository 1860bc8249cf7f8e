//! A device with a model of four parts of eight numbers: every part is added to what comes in, and the loss is half the
//! square of what comes out. A chain and a whole model compute the same bits.

use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use polder_protocol::layout::BlockRange;
use polder_protocol::rng::Random;
use polder_protocol::run::Inner;
use polder_protocol::work::{Answer, Task};

use super::super::world::Compute;

pub(super) const WIDTH: usize = 8;
const BLOCKS: u32 = 2;

/// The device.
#[derive(Default)]
pub(super) struct Toy {
    state: Mutex<State>,
    /// Fails every order from the one when this reaches zero; far below zero it lives for ever.
    lives: AtomicI64,
}

#[derive(Default)]
struct State {
    range: Option<(BlockRange, Inner)>,
    parts: Vec<[f32; WIDTH]>,
    gradient: [f32; WIDTH],
    kept: Vec<u32>,
    /// Steps that the optimiser remembers.
    remembered: u64,
}

impl Toy {
    pub(super) fn new() -> Self {
        let toy = Self::default();
        toy.lives.store(i64::MIN / 2, Ordering::Relaxed);
        toy
    }

    pub(super) fn die_after(&self, orders: i64) {
        self.lives.store(orders, Ordering::Relaxed);
    }
}

impl Compute for Toy {
    fn order(&self, task: Task, payload: Bytes) -> BoxFuture<'_, Result<(Answer, Bytes), String>> {
        let left = self.lives.fetch_sub(1, Ordering::Relaxed);
        let result = if (-1_000_000..=0).contains(&left) {
            Err("the worker died".to_owned())
        } else {
            self.state.lock().unwrap().order(task, &payload)
        };
        // As a real device, it takes a while.
        async move {
            tokio::task::yield_now().await;
            result
        }
        .boxed()
    }

    fn life(&self) -> u64 {
        1
    }
}

impl State {
    fn order(&mut self, task: Task, payload: &Bytes) -> Result<(Answer, Bytes), String> {
        let answer = match task {
            Task::TrainLoad {
                range,
                part_files,
                inner,
                optimiser_file,
                ..
            } => {
                let saved = optimiser_file.map(|file| fs::read(file).unwrap());
                self.remembered = saved.map_or(0, |bytes| u64::from_le_bytes(bytes.try_into().unwrap()));
                self.range = Some((range, inner));
                self.set(&part_files);
                Answer::Loaded {
                    bytes: 0,
                    hidden: WIDTH as u32,
                }
            }
            Task::TrainSet { part_files, .. } => {
                self.set(&part_files);
                Answer::Done
            }
            Task::TrainData { .. } => Answer::Data { tokens: 1_000 },
            Task::TrainSteps {
                step_first,
                steps,
                labels,
                ..
            } => {
                let losses = (0..steps).map(|step| self.whole_step(&labels, step_first + u64::from(step)));
                let losses: Vec<f32> = losses.collect();
                let (_, inner) = self.range.unwrap();
                let tokens = u64::from(steps * inner.batch * inner.seq * inner.micro_batches);
                Answer::Stepped { losses, tokens }
            }
            Task::TrainBatch { labels, batch, seq } => Answer::Batch {
                tokens: batch_of(&labels, batch, seq),
            },
            Task::TrainForward {
                tokens, micro_batch, ..
            } => {
                let (range, _) = self.range.unwrap();
                let input = if range.has_embedding() {
                    input_of(&tokens)
                } else {
                    floats(payload)
                };
                let out = self.forward(input);
                if !range.has_head(BLOCKS) {
                    self.kept.push(micro_batch);
                    return Ok((Answer::Hidden, bytes(out)));
                }
                self.add(out);
                return Ok((Answer::Loss { loss: loss_of(out) }, bytes(out)));
            }
            Task::TrainBackward { micro_batch, .. } => {
                assert_eq!(self.kept.remove(0), micro_batch);
                self.add(floats(payload));
                return Ok((Answer::Hidden, payload.clone()));
            }
            Task::TrainSquareSum { micro_batches, .. } => {
                let mean = self.gradient.map(|value| f64::from(value) / f64::from(micro_batches));
                let sum = mean.iter().map(|value| value * value).sum::<f64>() * self.parts.len() as f64;
                Answer::SquareSum { sum }
            }
            Task::TrainApply { square_sum, .. } => {
                self.apply(square_sum);
                Answer::Done
            }
            Task::TrainWrite {
                part_files,
                optimiser_file,
                ..
            } => {
                fs::write(optimiser_file.unwrap(), self.remembered.to_le_bytes()).unwrap();
                for (part, file) in self.parts.iter().zip(part_files) {
                    fs::write(file, bytes(*part)).unwrap();
                }
                Answer::Done
            }
            other => return Err(format!("a toy does not know {other:?}")),
        };
        Ok((answer, Bytes::new()))
    }

    fn set(&mut self, files: &[String]) {
        self.parts = files.iter().map(|file| floats(&fs::read(file).unwrap())).collect();
        self.gradient = [0.0; WIDTH];
        self.kept.clear();
    }

    fn forward(&self, mut hidden: [f32; WIDTH]) -> [f32; WIDTH] {
        for part in &self.parts {
            hidden.iter_mut().zip(part).for_each(|(hidden, value)| *hidden += value);
        }
        hidden
    }

    fn add(&mut self, gradient: [f32; WIDTH]) {
        self.gradient
            .iter_mut()
            .zip(gradient)
            .for_each(|(sum, value)| *sum += value);
    }

    fn apply(&mut self, square_sum: f64) {
        let (_, inner) = self.range.unwrap();
        let clip = (f64::from(inner.clip_norm) / square_sum.sqrt()).min(1.0) as f32;
        self.remembered += 1;
        let rate = inner.learning_rate * clip / inner.micro_batches as f32 / self.remembered as f32;
        for part in &mut self.parts {
            part.iter_mut()
                .zip(self.gradient)
                .for_each(|(value, gradient)| *value -= rate * gradient);
        }
        self.gradient = [0.0; WIDTH];
    }

    fn whole_step(&mut self, labels: &[u64], step: u64) -> f32 {
        let (_, inner) = self.range.unwrap();
        let mut losses = 0.0;
        for micro_batch in 0..inner.micro_batches {
            let mut labels = labels.to_vec();
            labels.extend([step % u64::from(inner.steps), u64::from(micro_batch)]);
            let out = self.forward(input_of(&batch_of(&labels, inner.batch, inner.seq)));
            losses += loss_of(out);
            self.add(out);
        }
        let mean = self
            .gradient
            .map(|value| f64::from(value) / f64::from(inner.micro_batches));
        // Stages of two parts each, summed as a chain sums them.
        let half = mean.iter().map(|value| value * value).sum::<f64>() * 2.0;
        self.apply(half + half);
        losses / inner.micro_batches as f32
    }
}

fn batch_of(labels: &[u64], batch: u32, seq: u32) -> Vec<u32> {
    let mut random = Random::from_labels(labels);
    (0..batch * (seq + 1)).map(|_| random.below(256) as u32).collect()
}

fn input_of(tokens: &[u32]) -> [f32; WIDTH] {
    std::array::from_fn(|i| tokens[i % tokens.len()] as f32 / 256.0)
}

fn loss_of(out: [f32; WIDTH]) -> f32 {
    out.iter().map(|value| value * value).sum::<f32>() / 2.0
}

fn floats(bytes: &[u8]) -> [f32; WIDTH] {
    let (values, _) = bytes.as_chunks::<4>();
    std::array::from_fn(|i| f32::from_le_bytes(values[i]))
}

pub(super) fn bytes(values: [f32; WIDTH]) -> Bytes {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
