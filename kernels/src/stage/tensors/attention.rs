//! Causal attention over a cache on the device, with grouped queries.

use std::ops::Range;

use burn::tensor::activation::softmax;
use burn::tensor::{Device, Tensor, TensorData};

use crate::model::Frequencies;
use crate::stage::StageError;
use crate::stage::plain_llama::Shape;

/// Positions are read in whole steps of so many, so that few shapes occur: kernels are chosen, and with some drivers
/// made, per shape.
pub(super) const POSITIONS_STEP: usize = 64;
/// What masks a position: far below any score, and finite, so that nothing becomes NaN.
const MASKED: f32 = -1e30;

/// Keys and values of one block for one session, `[kv_heads, capacity, head_dim]` each.
///
/// What lies beyond the positions that were written is finite, so that masking it leaves nothing of it.
#[derive(Debug)]
pub(super) struct Cache {
    // Taken while it is written: a tensor with one owner is written in place.
    keys: Option<Tensor<3>>,
    values: Option<Tensor<3>>,
}

impl Cache {
    pub(super) fn new(shape: &Shape, capacity: usize, device: &Device) -> Self {
        let zeros = || Some(Tensor::zeros([shape.kv_heads, capacity, shape.head_dim], device));
        Self {
            keys: zeros(),
            values: zeros(),
        }
    }
}

/// What all blocks share about the positions of one forward.
#[derive(Debug)]
pub(super) struct Positions {
    /// Those that are run.
    range: Range<usize>,
    /// Those that are read: a whole number of steps.
    read: usize,
    /// `[n, 1, head_dim / 2]`
    cosines: Tensor<3>,
    sines: Tensor<3>,
    /// `[1, 1, n, read]`: zero for what a position sees.
    mask: Tensor<4>,
}

impl Positions {
    pub(super) fn new(frequencies: &Frequencies, range: Range<usize>, device: &Device) -> Self {
        let (n, pairs) = (range.len(), frequencies.pairs());
        let read = range.end.next_multiple_of(POSITIONS_STEP);
        let (mut cosines, mut sines) = (vec![0.0; n * pairs], vec![0.0; n * pairs]);
        let rows = cosines.chunks_exact_mut(pairs).zip(sines.chunks_exact_mut(pairs));
        for (position, (cosines, sines)) in range.clone().zip(rows) {
            frequencies.turn(position, cosines, sines);
        }
        let mask = range
            .clone()
            .flat_map(|position| (0..read).map(move |other| if other <= position { 0.0 } else { MASKED }));
        let rotation = |values| Tensor::from_data(TensorData::new(values, [n, 1, pairs]), device);
        Self {
            read,
            cosines: rotation(cosines),
            sines: rotation(sines),
            mask: Tensor::from_data(TensorData::new(mask.collect::<Vec<f32>>(), [1, 1, n, read]), device),
            range,
        }
    }
}

/// Writes keys and values of these positions, and attends from them to all up to each.
///
/// # Shapes
///
/// - `q`, the answer: `[n, heads · head_dim]`
/// - `k`, `v`: `[n, kv_heads · head_dim]`
pub(super) fn attend(
    shape: &Shape,
    positions: &Positions,
    cache: &mut Cache,
    [q, k, v]: [Tensor<2>; 3],
) -> Result<Tensor<2>, StageError> {
    let (heads, kv_heads, width) = (shape.heads, shape.kv_heads, shape.head_dim);
    let (n, group, read) = (positions.range.len(), heads / kv_heads, positions.read);
    let q = rotate(q.reshape([n, heads, width]), positions).mul_scalar(1.0 / (width as f32).sqrt());
    let k = rotate(k.reshape([n, kv_heads, width]), positions).permute([1, 0, 2]);
    let v = v.reshape([n, kv_heads, width]).permute([1, 0, 2]);
    let keys = write(&mut cache.keys, k, positions, read)?;
    let values = write(&mut cache.values, v, positions, read)?;
    // Each key-value head meets the queries of its whole group in one product.
    let q = q
        .reshape([n, kv_heads, group, width])
        .permute([1, 2, 0, 3])
        .reshape([kv_heads, group * n, width]);
    let scores = q.matmul(keys.transpose()).reshape([kv_heads, group, n, read]);
    let shares = softmax(scores + positions.mask.clone(), 3).reshape([kv_heads, group * n, read]);
    let mixed = shares
        .matmul(values)
        .reshape([kv_heads, group, n, width])
        .permute([2, 0, 1, 3]);
    Ok(mixed.reshape([n, heads * width]))
}

/// Writes `[kv_heads, n, head_dim]` into a cache, and returns its first `read` positions.
fn write(
    cache: &mut Option<Tensor<3>>,
    new: Tensor<3>,
    positions: &Positions,
    read: usize,
) -> Result<Tensor<3>, StageError> {
    let Some(old) = cache.take() else {
        // Only where a driver failed in the middle of a write.
        return Err(StageError::Device {
            reason: "the session's cache was lost".to_owned(),
        });
    };
    let [kv_heads, _, width] = old.dims();
    let whole = old.slice_assign([0..kv_heads, positions.range.clone(), 0..width], new);
    Ok(cache.insert(whole).clone().narrow(1, 0, read))
}

/// Rotates the pairs `(i, i + head_dim / 2)` of `[n, heads, head_dim]`.
fn rotate(x: Tensor<3>, positions: &Positions) -> Tensor<3> {
    let half = x.dims()[2] / 2;
    let (first, second) = (x.clone().narrow(2, 0, half), x.narrow(2, half, half));
    let (cosines, sines) = (positions.cosines.clone(), positions.sines.clone());
    let turned = first.clone() * cosines.clone() - second.clone() * sines.clone();
    Tensor::cat(vec![turned, second * cosines + first * sines], 2)
}
