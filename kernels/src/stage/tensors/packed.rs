//! The forward pass of consecutive blocks with our own kernels, weights packed on the device.

use super::Shape;
use super::engine::Parts;
use crate::device::Device;
use crate::device::cube::{AttentionShape, CubeError, Cubes, Floats, PackedOnDevice};
use crate::quant::DeviceBlocks;
use crate::stage::cpu::{Dense, LoadedNorm, Matrix};
use crate::stage::{StageError, Want};

/// A stage's blocks and head.
#[derive(Debug)]
pub(super) struct Packed {
    cubes: Cubes,
    blocks: Vec<Block>,
    head: Option<(Floats, PackedOnDevice)>,
}

#[derive(Debug)]
struct Block {
    attention_norm: Floats,
    q: PackedOnDevice,
    k: PackedOnDevice,
    v: PackedOnDevice,
    o: PackedOnDevice,
    mlp_norm: Floats,
    gate: PackedOnDevice,
    up: PackedOnDevice,
    down: PackedOnDevice,
}

/// Keys and values of one block for one session, `[capacity, kv_heads, head_dim]` each.
#[derive(Debug)]
pub(super) struct PackedCache {
    keys: Floats,
    values: Floats,
}

impl Packed {
    /// Uploads weights as they are packed. `None` where the device runs no kernels of ours, or a weight is of a type that
    /// they do not multiply or is too large for one buffer.
    pub(super) fn upload(
        blocks: &[Parts<'_>],
        head: Option<(&LoadedNorm, &Matrix)>,
        device: &Device,
    ) -> Result<Option<Self>, StageError> {
        let Ok(cubes) = Cubes::of(device) else {
            return Ok(None);
        };
        let matrices = blocks.iter().flat_map(Parts::matrices);
        let mut bytes: u64 = 0;
        for matrix in matrices.chain(head.map(|(_, projection)| projection)) {
            let elements = matrix.rows() as u64 * matrix.cols() as u64;
            let one = match matrix {
                Matrix::Packed(packed) if Cubes::multiplies(packed.ty()) => {
                    DeviceBlocks::bytes_max(packed.ty(), elements)
                }
                _ => return Ok(None),
            };
            if one > device.buffer_bytes_max() {
                return Ok(None);
            }
            bytes = bytes.saturating_add(one);
        }
        if !device.has_room(bytes) {
            return Err(StageError::DeviceMemory {
                what: "packed weights",
                bytes,
            });
        }
        let matrix = |matrix: &Matrix| match matrix {
            Matrix::Packed(packed) => Ok(cubes.upload_packed(packed)?),
            Matrix::Plain(_) => Err(StageError::Device {
                reason: "a weight is not packed".to_owned(),
            }),
        };
        let weight = |dense: &Dense| matrix(&dense.weight);
        let blocks = blocks.iter().map(|block| {
            Ok(Block {
                attention_norm: cubes.upload(block.attention_norm.gain()),
                q: weight(&block.attention.q)?,
                k: weight(&block.attention.k)?,
                v: weight(&block.attention.v)?,
                o: weight(&block.attention.o)?,
                mlp_norm: cubes.upload(block.mlp_norm.gain()),
                gate: weight(block.gate)?,
                up: weight(&block.mlp.up)?,
                down: weight(&block.mlp.down)?,
            })
        });
        let blocks = blocks.collect::<Result<_, StageError>>()?;
        let head = match head {
            Some((norm, projection)) => Some((cubes.upload(norm.gain()), matrix(projection)?)),
            None => None,
        };
        Ok(Some(Self { cubes, blocks, head }))
    }

    /// Whether logits can be had.
    pub(super) fn has_head(&self) -> bool {
        self.head.is_some()
    }

    /// Bytes on the device.
    pub(super) fn bytes(&self) -> u64 {
        let blocks = self.blocks.iter().flat_map(|block| {
            let Block { q, k, v, o, .. } = block;
            [q, k, v, o, &block.gate, &block.up, &block.down]
        });
        let all = blocks.chain(self.head.iter().map(|(_, projection)| projection));
        all.map(|weight| weight.bytes() as u64).sum()
    }

    pub(super) fn caches(&self, shape: &Shape, capacity: usize) -> Vec<PackedCache> {
        let room = || self.cubes.room(capacity * shape.kv_heads * shape.head_dim);
        let blocks = self.blocks.iter();
        blocks
            .map(|_| PackedCache {
                keys: room(),
                values: room(),
            })
            .collect()
    }

    /// Runs `[rows, hidden]` at positions `position ..`; what is wanted of them, or nothing where `last` is not set and
    /// only the last logits are.
    pub(super) fn forward(
        &self,
        shape: &Shape,
        caches: &[PackedCache],
        position: usize,
        x: &[f32],
        want: Want,
        last: bool,
    ) -> Result<Vec<f32>, StageError> {
        let (cubes, rows) = (&self.cubes, x.len() / shape.hidden);
        let pairs = shape.frequencies.pairs();
        let (mut cosines, mut sines) = (vec![0.0; rows * pairs], vec![0.0; rows * pairs]);
        let turns = cosines.chunks_exact_mut(pairs).zip(sines.chunks_exact_mut(pairs));
        for (position, (cosines, sines)) in (position..).zip(turns) {
            shape.frequencies.turn(position, cosines, sines);
        }
        let (cosines, sines) = (cubes.upload(&cosines), cubes.upload(&sines));
        let heads = AttentionShape {
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
        };
        let width = shape.kv_heads * shape.head_dim;
        let x = cubes.upload(x);
        // What the last sublayer gave: it is added where the next one norms.
        let mut added: Option<Floats> = None;
        for (block, cache) in self.blocks.iter().zip(caches) {
            let normed = cubes.add_and_normalise(&x, added.as_ref(), &block.attention_norm, shape.epsilon)?;
            let q = cubes.multiply(&normed, &block.q)?;
            let k = cubes.multiply(&normed, &block.k)?;
            let v = cubes.multiply(&normed, &block.v)?;
            cubes.rotate(&q, &cosines, &sines, shape.heads, shape.head_dim)?;
            cubes.rotate(&k, &cosines, &sines, shape.kv_heads, shape.head_dim)?;
            cubes.append(&k, &cache.keys, position, width)?;
            cubes.append(&v, &cache.values, position, width)?;
            let mixed = cubes.attend(heads, &q, &cache.keys, &cache.values, position)?;
            let mixed = cubes.multiply(&mixed, &block.o)?;
            let normed = cubes.add_and_normalise(&x, Some(&mixed), &block.mlp_norm, shape.epsilon)?;
            let gate = cubes.multiply(&normed, &block.gate)?;
            let up = cubes.multiply(&normed, &block.up)?;
            added = Some(cubes.multiply(&cubes.gate(&gate, &up)?, &block.down)?);
        }
        match (&self.head, want) {
            (Some(_), Want::LastLogits) if !last => Ok(Vec::new()),
            (Some((norm, projection)), Want::AllLogits | Want::LastLogits) => {
                let normed = cubes.add_and_normalise(&x, added.as_ref(), norm, shape.epsilon)?;
                let normed = match want {
                    Want::LastLogits => cubes.part(&normed, (rows - 1) * shape.hidden, shape.hidden)?,
                    _ => normed,
                };
                Ok(cubes.read(&cubes.multiply(&normed, projection)?)?)
            }
            (None, _) | (_, Want::Hidden) => {
                if let (Some(block), Some(added)) = (self.blocks.last(), &added) {
                    // For the sum.
                    cubes.add_and_normalise(&x, Some(added), &block.mlp_norm, shape.epsilon)?;
                }
                Ok(cubes.read(&x)?)
            }
        }
    }
}

impl From<CubeError> for StageError {
    fn from(error: CubeError) -> Self {
        Self::Device {
            reason: error.to_string(),
        }
    }
}
