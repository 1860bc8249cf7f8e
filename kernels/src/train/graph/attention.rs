//! Attention: each key-value head meets the queries of its whole group in one product.

use burn::tensor::Tensor;

use super::leaves::Part;
use super::positions::Positions;
use super::{linear, norm, softmax};
use crate::model::describe::{Attention, Norm};
use crate::train::TrainError;

/// Grouped-query attention of normed rows `[batch · seq, hidden]`.
pub(super) fn grouped(
    part: Part<'_>,
    shape: &Attention,
    positions: &Positions,
    x: &Tensor<2>,
) -> Result<Tensor<2>, TrainError> {
    let Attention {
        heads,
        kv_heads,
        head_dim,
        ..
    } = *shape;
    let seq = positions.seq();
    let batch = x.dims()[0] / seq;
    let split = |x: Tensor<2>, heads: usize, own: &Option<Norm>| {
        let x = match own {
            Some(own) => norm(part, own, x.reshape([batch * seq * heads, head_dim])),
            None => x,
        };
        x.reshape([batch, seq, heads, head_dim])
    };
    let rotate = |x: Tensor<4>| match shape.rotary {
        Some(rotary) => positions.rotate(x, rotary),
        None => x,
    };
    let q = rotate(split(linear(part, &shape.q, x), heads, &shape.q_norm));
    let k = rotate(split(linear(part, &shape.k, x), kv_heads, &shape.k_norm));
    let v = split(linear(part, &shape.v, x), kv_heads, &None);
    let q = positions.scaled(q, shape.query_scale);
    let mixed = attend_to_window(positions, [q, k, v], shape.scale, shape.window)?;
    Ok(linear(part, &shape.o, &mixed))
}

/// Attention to all positions before, or to those of a window: by the device's own kernels where it has them.
pub(super) fn attend_to_window(
    positions: &Positions,
    [q, k, v]: [Tensor<4>; 3],
    scale: f32,
    window: Option<usize>,
) -> Result<Tensor<2>, TrainError> {
    let ([_, _, heads, width], [_, _, kv_heads, value]) = (q.dims(), v.dims());
    match positions.attending(width, value) {
        Some(attending) => attending.attend(q, k, v, scale, window),
        None => Ok(attend(q, k, v, scale, positions.mask(window, heads / kv_heads))),
    }
}

/// Softmax attention: `q` `[batch, seq, heads, width]`, `k` and `v` `[batch, seq, kv_heads, …]`, to `[rows, heads · …]`.
pub(super) fn attend(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, scale: f32, mask: Tensor<4>) -> Tensor<2> {
    let ([batch, seq, heads, width], [_, _, kv_heads, value]) = (q.dims(), v.dims());
    let group = heads / kv_heads;
    let q = q
        .mul_scalar(scale)
        .reshape([batch, seq, kv_heads, group, width])
        .permute([0, 2, 3, 1, 4])
        .reshape([batch, kv_heads, group * seq, width]);
    let k = k.permute([0, 2, 3, 1]);
    let v = v.permute([0, 2, 1, 3]);
    let shares = softmax(q.matmul(k) + mask);
    shares
        .matmul(v)
        .reshape([batch, kv_heads, group, seq, value])
        .permute([0, 3, 1, 2, 4])
        .reshape([batch * seq, heads * value])
}
