//! The forward pass of consecutive blocks, in tensors.

use burn::tensor::activation::silu;
use burn::tensor::{Tensor, TensorData};
use polder_protocol::layout::BlockRange;

use super::attention::{Cache, POSITIONS_STEP, Positions, attend};
use super::weight::Weight;
use crate::device::Device;
use crate::stage::cpu::{Dense, LoadedNorm, Matrix};
use crate::stage::plain_llama::{Parts, Shape};
use crate::stage::weights::StageWeights;
use crate::stage::{Input, Output, StageError, Want};

/// Positions that are run together at most: enough to keep a GPU busy, and memory stays bounded for any prompt.
const CHUNK_POSITIONS_MAX: usize = 256;
/// The largest intermediate result: what a GPU with 4 GiB can hold several of.
const SCRATCH_BYTES_MAX: u64 = 64 << 20;

/// The weights of a stage, on the device.
#[derive(Debug)]
pub(in crate::stage) struct Engine {
    shape: Shape,
    device: Device,
    /// At the first stage. It stays with the host, packed as it came: of each token only one row is needed.
    embedding: Option<Matrix>,
    blocks: Vec<Block>,
    head: Option<Head>,
    bytes: u64,
}

#[derive(Debug)]
struct Block {
    attention_norm: Tensor<1>,
    q: Weight,
    k: Weight,
    v: Weight,
    o: Weight,
    mlp_norm: Tensor<1>,
    gate: Weight,
    up: Weight,
    down: Weight,
}

#[derive(Debug)]
struct Head {
    norm: Tensor<1>,
    projection: Weight,
}

/// Keys and values of one session, block by block.
#[derive(Debug)]
pub(in crate::stage) struct Sequence(Vec<Cache>);

impl Engine {
    /// Brings weights to the device, widened.
    pub(in crate::stage) fn upload(
        shape: Shape,
        range: BlockRange,
        weights: StageWeights,
        device: &Device,
    ) -> Result<Self, StageError> {
        let embedding = weights.embedding.as_ref();
        let head = weights.head.as_ref();
        let projection = head.and_then(|head| head.projection.as_ref().or(embedding));
        let blocks = Parts::of_all(&weights)?;
        let matrices = blocks.iter().flat_map(|block| block.matrices()).chain(projection);
        let bytes = matrices
            .map(|matrix| matrix.rows() as u64 * matrix.cols() as u64 * 4)
            .sum();
        if !device.has_room(bytes) {
            return Err(StageError::DeviceMemory {
                what: "weights, widened to f32",
                bytes,
            });
        }
        let head = match (head, projection) {
            (Some(head), Some(projection)) => Some(Head {
                norm: vector(&head.norm, device),
                projection: Weight::upload(projection, device)?,
            }),
            _ => None,
        };
        let blocks = blocks.iter().map(|block| Block::upload(block, device));
        let engine = Self {
            shape,
            device: device.clone(),
            blocks: blocks.collect::<Result<_, _>>()?,
            head,
            bytes,
            embedding: weights.embedding.filter(|_| range.has_embedding()),
        };
        engine.wait()?;
        Ok(engine)
    }

    pub(in crate::stage) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Width of the activations.
    pub(in crate::stage) const fn hidden(&self) -> usize {
        self.shape.hidden
    }

    /// Bytes that a session of so many positions takes.
    pub(in crate::stage) fn sequence_bytes(&self, capacity: u64) -> u64 {
        let width = (self.shape.kv_heads * self.shape.head_dim) as u64;
        capacity.next_multiple_of(POSITIONS_STEP as u64) * self.blocks.len() as u64 * width * 2 * 4
    }

    /// Room for `capacity` positions, which take `bytes`.
    pub(in crate::stage) fn sequence(&self, capacity: usize, bytes: u64) -> Result<Sequence, StageError> {
        let capacity = capacity.next_multiple_of(POSITIONS_STEP);
        // A block's keys, or the scores of one position.
        let one = capacity as u64 * 4 * (self.shape.kv_heads * self.shape.head_dim).max(self.shape.heads) as u64;
        let limit = self.device.buffer_bytes_max();
        if one > limit {
            return Err(StageError::DeviceBuffer {
                what: "a block's cache",
                bytes: one,
                limit,
            });
        }
        if !self.device.has_room(bytes) {
            return Err(StageError::DeviceMemory { what: "caches", bytes });
        }
        let device = self.device.tensors();
        let caches = self.blocks.iter().map(|_| Cache::new(&self.shape, capacity, device));
        let sequence = Sequence(caches.collect());
        self.wait()?;
        Ok(sequence)
    }

    /// Runs positions `position ..`. The caller has checked tokens, lengths and room.
    pub(in crate::stage) fn forward(
        &self,
        sequence: &mut Sequence,
        position: usize,
        input: Input<'_>,
        want: Want,
    ) -> Result<Output, StageError> {
        let hidden = self.shape.hidden;
        let x = match input {
            Input::Hidden(x) => x.to_vec(),
            Input::Tokens(tokens) => self.embed(tokens),
        };
        let n = x.len() / hidden;
        let head = self.head.as_ref().filter(|_| want != Want::Hidden);
        let mut out = Vec::new();
        let mut done = 0;
        while done < n {
            let rows = self.chunk(position + done, head.is_some()).min(n - done);
            let data = TensorData::new(x[done * hidden..][..rows * hidden].to_vec(), [rows, hidden]);
            let x = Tensor::from_data(data, self.device.tensors());
            let x = self.blocks(sequence, position + done, x)?;
            done += rows;
            match (head, want) {
                (None, _) | (_, Want::Hidden) => out.extend(numbers(x)?),
                (Some(head), Want::AllLogits) => out.extend(numbers(self.logits(head, x))?),
                (Some(head), Want::LastLogits) if done == n => {
                    out = numbers(self.logits(head, x.narrow(0, rows - 1, 1)))?;
                }
                (Some(_), Want::LastLogits) => {}
            }
        }
        Ok(match head {
            Some(_) => Output::Logits(out),
            None => Output::Hidden(out),
        })
    }

    /// The embeddings of tokens, `[seq, hidden]`, at the first stage.
    pub(in crate::stage) fn embed(&self, tokens: &[u32]) -> Vec<f32> {
        let hidden = self.shape.hidden;
        let mut x = vec![0.0; tokens.len() * hidden];
        if let Some(embedding) = &self.embedding {
            for (token, x) in tokens.iter().zip(x.chunks_exact_mut(hidden)) {
                embedding.row(*token as usize, x);
            }
        }
        x
    }

    /// How many positions to run together: a power of two, so that few shapes occur.
    fn chunk(&self, position: usize, with_logits: bool) -> usize {
        let shape = &self.shape;
        let read = (position + CHUNK_POSITIONS_MAX).next_multiple_of(POSITIONS_STEP);
        let logits = if with_logits { shape.vocabulary } else { 0 };
        let widest = (shape.heads * read).max(shape.intermediate).max(logits);
        let bytes = SCRATCH_BYTES_MAX.min(self.device.buffer_bytes_max());
        let fit = usize::try_from(bytes / (widest as u64 * 4).max(1)).unwrap_or(usize::MAX);
        1 << fit.clamp(1, CHUNK_POSITIONS_MAX).ilog2()
    }

    fn blocks(&self, sequence: &mut Sequence, position: usize, mut x: Tensor<2>) -> Result<Tensor<2>, StageError> {
        let shape = &self.shape;
        let range = position..position + x.dims()[0];
        let positions = Positions::new(&shape.frequencies, range, self.device.tensors());
        for (block, cache) in self.blocks.iter().zip(&mut sequence.0) {
            let normed = rms_norm(x.clone(), &block.attention_norm, shape.epsilon);
            let projected = [&block.q, &block.k, &block.v].map(|weight| weight.multiply(&normed));
            let mixed = attend(shape, &positions, cache, projected)?;
            x = x + block.o.multiply(&mixed);
            let normed = rms_norm(x.clone(), &block.mlp_norm, shape.epsilon);
            let gated = silu(block.gate.multiply(&normed)) * block.up.multiply(&normed);
            x = x + block.down.multiply(&gated);
        }
        Ok(x)
    }

    fn logits(&self, head: &Head, x: Tensor<2>) -> Tensor<2> {
        head.projection.multiply(&rms_norm(x, &head.norm, self.shape.epsilon))
    }

    /// Waits until the device has done what it was told, and reports what it could not.
    fn wait(&self) -> Result<(), StageError> {
        self.device.tensors().sync().map_err(failed)
    }
}

impl Block {
    fn upload(block: &Parts<'_>, device: &Device) -> Result<Self, StageError> {
        let weight = |dense: &Dense| Weight::upload(&dense.weight, device);
        Ok(Self {
            attention_norm: vector(block.attention_norm, device),
            q: weight(&block.attention.q)?,
            k: weight(&block.attention.k)?,
            v: weight(&block.attention.v)?,
            o: weight(&block.attention.o)?,
            mlp_norm: vector(block.mlp_norm, device),
            gate: weight(block.gate)?,
            up: weight(&block.mlp.up)?,
            down: weight(&block.mlp.down)?,
        })
    }
}

fn vector(norm: &LoadedNorm, device: &Device) -> Tensor<1> {
    let values = norm.gain();
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), device.tensors())
}

fn rms_norm(x: Tensor<2>, gain: &Tensor<1>, epsilon: f32) -> Tensor<2> {
    let scale = x.clone().square().mean_dim(1).add_scalar(epsilon).sqrt().recip();
    x * scale * gain.clone().unsqueeze::<2>()
}

fn numbers(tensor: Tensor<2>) -> Result<Vec<f32>, StageError> {
    tensor.try_into_vec_as::<f32>().map_err(failed)
}

fn failed(error: impl std::fmt::Display) -> StageError {
    StageError::Device {
        reason: error.to_string(),
    }
}
