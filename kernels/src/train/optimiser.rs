//! A stage's optimiser: which rule moves which tensor, what it keeps of each, and that on disk.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;

use polder_protocol::layout::{BlockRange, Layout, TensorLayout};
use polder_protocol::run::{self, Inner};
use rayon::prelude::*;

use super::adamw::AdamW;
use super::ademamix::AdEmaMix;
use super::muon::Muon;
use super::schedule::rate_share;
use super::vectorised::vectorised;
use super::{TrainError, learning_rate};

/// Elements that one task takes.
pub(super) const CHUNK: usize = 1 << 16;
/// What a file of an optimiser's state begins with.
const MAGIC: [u8; 8] = *b"polderO1";
/// Bytes of the hash that such a file ends with.
const HASH_BYTES: u64 = 32;

/// The optimiser of a stage, with its state.
#[derive(Debug)]
pub(super) struct Optimiser {
    inner: Inner,
    steps_total: u64,
    /// Per part, per tensor.
    tensors: Vec<Vec<Kept>>,
    /// Steps that the state has seen.
    steps_seen: u64,
}

/// What is kept of one tensor.
#[derive(Debug)]
struct Kept {
    /// `[rows, cols]`; a tensor of another number of dimensions is one row.
    shape: [usize; 2],
    decayed: bool,
    /// As long as the tensor, each.
    means: Vec<Vec<f32>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    AdamW,
    AdEmaMix,
    Muon,
}

impl Optimiser {
    /// Before the first step of a stage.
    pub(super) fn new(inner: Inner, steps_total: u64, layout: &Layout, range: BlockRange) -> Self {
        let blocks = layout.blocks();
        let tensors = range.parts(blocks).map(|part| {
            let in_block = (1..=blocks).contains(&part);
            let tensors = layout.parts.get(part as usize).map_or(&[][..], |part| &part.tensors);
            tensors
                .iter()
                .map(|tensor| Kept::new(&inner.optimiser, tensor, in_block))
                .collect()
        });
        Self {
            tensors: tensors.collect(),
            inner,
            steps_total,
            steps_seen: 0,
        }
    }

    /// Bytes of the state.
    pub(super) fn bytes(&self) -> u64 {
        self.elements() * 4
    }

    fn elements(&self) -> u64 {
        self.means().map(|mean| mean.len() as u64).sum()
    }

    fn means(&self) -> impl Iterator<Item = &Vec<f32>> {
        self.tensors.iter().flatten().flat_map(|kept| &kept.means)
    }

    /// Whether every tensor is moved by AdamW.
    pub(super) fn is_adamw(&self) -> bool {
        self.inner.optimiser == run::Optimiser::AdamW
    }

    /// The rules of AdamW's next step per part and tensor, for a device that takes it; this counts it as seen.
    pub(super) fn adamw(&mut self, step: u64, square_sum: f64) -> Vec<Vec<AdamW>> {
        let rules = self.rules(step, square_sum);
        let parts = self.tensors.iter();
        parts
            .map(|tensors| tensors.iter().map(|kept| rules.adamw(kept.decayed)).collect())
            .collect()
    }

    /// The means of a tensor.
    pub(super) fn means_of(&self, part: usize, tensor: usize) -> Option<&[Vec<f32>]> {
        Some(&self.tensors.get(part)?.get(tensor)?.means)
    }

    /// Replaces the means of a tensor by those of AdamW that a device has.
    pub(super) fn set_means(&mut self, part: usize, tensor: usize, means: [Vec<f32>; 2]) {
        if let Some(kept) = self.tensors.get_mut(part).and_then(|part| part.get_mut(tensor)) {
            kept.means = means.into();
        }
    }

    /// Moves the parameters of each part by its gradient. `step` is of the run, from 0; `square_sum` is of all stages.
    pub(super) fn step(&mut self, parameters: &mut [Vec<f32>], gradients: &[Vec<f32>], step: u64, square_sum: f64) {
        let rules = self.rules(step, square_sum);
        for ((tensors, parameters), gradient) in self.tensors.iter_mut().zip(parameters).zip(gradients) {
            let mut start = 0;
            for kept in tensors {
                let end = start + kept.shape[0] * kept.shape[1];
                rules.step(&mut parameters[start..end], &gradient[start..end], kept);
                start = end;
            }
        }
    }

    /// The rules of the next step, which is counted.
    fn rules(&mut self, step: u64, square_sum: f64) -> Rules {
        self.steps_seen += 1;
        let (norm, clip) = (square_sum.sqrt(), f64::from(self.inner.clip_norm));
        let gradient_scale = if clip > 0.0 && norm > clip {
            (clip / norm) as f32
        } else {
            1.0
        };
        Rules {
            inner: self.inner,
            learning_rate: learning_rate(&self.inner, self.steps_total, step),
            share: rate_share(&self.inner, self.steps_total, step),
            gradient_scale,
            count: self.steps_seen,
        }
    }

    /// Writes the state to a file: magic, steps seen, number of values, values, and the BLAKE3 hash of all that.
    pub(super) fn write(&self, file: &Path) -> Result<(), TrainError> {
        let write = || {
            let mut out = Hashing(
                BufWriter::with_capacity(1 << 20, File::create(file)?),
                blake3::Hasher::new(),
            );
            out.write_all(&MAGIC)?;
            out.write_all(&self.steps_seen.to_le_bytes())?;
            out.write_all(&self.elements().to_le_bytes())?;
            for mean in self.means() {
                for values in mean.chunks(CHUNK) {
                    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                    out.write_all(&bytes)?;
                }
            }
            let Hashing(mut out, hasher) = out;
            out.write_all(hasher.finalize().as_bytes())?;
            out.into_inner().map_err(|error| error.into_error())?.sync_all()
        };
        write().map_err(|error: io::Error| wrong(file, error.to_string()))
    }

    /// Goes on from a file that [`Optimiser::write`] wrote for the same stage of the same run.
    ///
    /// # Errors
    ///
    /// [`TrainError::File`]; the optimiser is then to be made anew.
    pub(super) fn read(&mut self, file: &Path) -> Result<(), TrainError> {
        let failed = |error: io::Error| wrong(file, error.to_string());
        let open = File::open(file).map_err(failed)?;
        let found = open.metadata().map_err(failed)?.len();
        let expected = 24 + self.elements() * 4 + HASH_BYTES;
        if found != expected {
            return Err(wrong(
                file,
                format!("holds {found} bytes, and this optimiser's state takes {expected}"),
            ));
        }
        let mut input = Hashing(BufReader::with_capacity(1 << 20, open), blake3::Hasher::new());
        let mut head = [[0; 8]; 3];
        for word in &mut head {
            input.read_exact(word).map_err(failed)?;
        }
        let [magic, steps, elements] = head;
        if magic != MAGIC || u64::from_le_bytes(elements) != self.elements() {
            return Err(wrong(file, "is no state of this optimiser".to_owned()));
        }
        let mut bytes = vec![0u8; CHUNK * 4];
        for mean in self.tensors.iter_mut().flatten().flat_map(|kept| &mut kept.means) {
            for values in mean.chunks_mut(CHUNK) {
                let bytes = &mut bytes[..values.len() * 4];
                input.read_exact(bytes).map_err(failed)?;
                let (words, _) = bytes.as_chunks::<4>();
                for (value, word) in values.iter_mut().zip(words) {
                    *value = f32::from_le_bytes(*word);
                }
            }
        }
        let Hashing(mut input, hasher) = input;
        let mut hash = [0; 32];
        input.read_exact(&mut hash).map_err(failed)?;
        if hash != *hasher.finalize().as_bytes() {
            return Err(wrong(file, "is damaged".to_owned()));
        }
        self.steps_seen = u64::from_le_bytes(steps);
        Ok(())
    }
}

impl Kept {
    fn new(optimiser: &run::Optimiser, tensor: &TensorLayout, in_block: bool) -> Self {
        let elements = tensor.elements().unwrap_or(0);
        let convolution = tensor.name.ends_with(".conv1d.weight");
        let (rows, matrix) = match tensor.shape.as_slice() {
            [rows, cols] if *rows > 1 && *cols > 1 => (*rows as usize, in_block && !convolution),
            _ => (1, false),
        };
        let rule = match optimiser {
            run::Optimiser::AdamW => Rule::AdamW,
            run::Optimiser::AdEmaMix { .. } => Rule::AdEmaMix,
            run::Optimiser::Muon { .. } if matrix => Rule::Muon,
            run::Optimiser::Muon { .. } => Rule::AdamW,
        };
        let means = match rule {
            Rule::AdamW => 2,
            Rule::AdEmaMix => 3,
            Rule::Muon => 1,
        };
        Self {
            shape: [rows, elements / rows],
            // Matrices decay; gains, biases and the taps of convolutions do not.
            decayed: tensor.shape.len() >= 2 && !convolution,
            means: (0..means).map(|_| vec![0.0; elements]).collect(),
        }
    }
}

/// The rules of one step.
struct Rules {
    inner: Inner,
    learning_rate: f32,
    /// Of the peak.
    share: f64,
    gradient_scale: f32,
    count: u64,
}

impl Rules {
    fn step(&self, parameters: &mut [f32], gradient: &[f32], kept: &mut Kept) {
        let inner = &self.inner;
        let weight_decay = if kept.decayed { inner.weight_decay } else { 0.0 };
        match (kept.means.as_mut_slice(), inner.optimiser) {
            (
                [fast, slow, square],
                run::Optimiser::AdEmaMix {
                    beta_3,
                    alpha,
                    warmup_steps,
                },
            ) => {
                let rule = AdEmaMix {
                    learning_rate: self.learning_rate,
                    beta_1: inner.beta_1,
                    beta_2: inner.beta_2,
                    beta_3,
                    alpha,
                    epsilon: inner.epsilon,
                    weight_decay,
                    alpha_warmup_steps: warmup_steps.into(),
                    beta_3_warmup_steps: warmup_steps.into(),
                    gradient_scale: self.gradient_scale,
                };
                rule.step(parameters, gradient, [fast, slow, square], self.count);
            }
            (
                [mean],
                run::Optimiser::Muon {
                    learning_rate,
                    momentum,
                    iterations,
                },
            ) => {
                let rule = Muon {
                    learning_rate: (f64::from(learning_rate) * self.share) as f32,
                    momentum,
                    nesterov: true,
                    weight_decay,
                    iterations,
                    gradient_scale: self.gradient_scale,
                };
                rule.step(parameters, gradient, mean, kept.shape);
            }
            ([first, second], _) => self.adamw(kept.decayed).apply(parameters, gradient, first, second),
            _ => unreachable!("a rule keeps as many means as it was made with"),
        }
    }

    fn adamw(&self, decayed: bool) -> AdamW {
        AdamW {
            learning_rate: self.learning_rate,
            beta_1: self.inner.beta_1,
            beta_2: self.inner.beta_2,
            epsilon: self.inner.epsilon,
            weight_decay: if decayed { self.inner.weight_decay } else { 0.0 },
            gradient_scale: self.gradient_scale,
            count: self.count,
        }
    }
}

/// Hashes what passes through.
struct Hashing<T>(T, blake3::Hasher);

impl<T: Write> Write for Hashing<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.0.write(bytes)?;
        self.1.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl<T: Read> Read for Hashing<T> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read(bytes)?;
        self.1.update(&bytes[..read]);
        Ok(read)
    }
}

fn wrong(file: &Path, reason: String) -> TrainError {
    TrainError::File {
        file: file.display().to_string(),
        reason,
    }
}

/// Multiplies all values.
pub(super) fn scale(values: &mut [f32], factor: f32) {
    let chunks = values.par_chunks_mut(CHUNK);
    chunks.for_each(|values| values.iter_mut().for_each(|value| *value *= factor));
}

/// Sum of squares in f64, in an order that does not depend on the number of threads.
pub(super) fn square_sum(values: &[f32]) -> f64 {
    let sums: Vec<f64> = values.par_chunks(CHUNK).map(chunk_square_sum).collect();
    sums.iter().sum()
}

vectorised! {
    fn chunk_square_sum(values: &[f32]) -> f64 {
        let mut lanes = [0.0f64; 16];
        for chunk in values.chunks(16) {
            for (lane, value) in lanes.iter_mut().zip(chunk) {
                *lane += f64::from(*value) * f64::from(*value);
            }
        }
        lanes.iter().sum()
    }
}
