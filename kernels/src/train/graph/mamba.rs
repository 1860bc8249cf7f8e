//! Mamba-2 in chunks: within a chunk as attention with decays for scores, between chunks by the state.

use burn::tensor::activation::silu;
use burn::tensor::{Device, Tensor, TensorData};

use super::leaves::Part;
use super::positions::MASKED;
use super::{linear, softplus, unit_rows};
use crate::model::describe::Mamba;

/// Positions of a chunk: its scores are quadratic in them.
const CHUNK: usize = 64;

/// Of normed rows `[batch · seq, hidden]`.
pub(super) fn mamba(part: Part<'_>, shape: &Mamba, seq: usize, x: &Tensor<2>) -> Tensor<2> {
    let Mamba {
        heads,
        head_dim,
        groups,
        state: width,
        ..
    } = *shape;
    let rows = x.dims()[0];
    let (batch, inner, channels) = (rows / seq, shape.inner(), shape.channels());
    let projected = linear(part, &shape.in_proj, x);
    let gate = projected.clone().narrow(1, 0, inner);
    let convolved = convolve(
        part,
        shape,
        projected
            .clone()
            .narrow(1, inner, channels)
            .reshape([batch, seq, channels]),
    );
    let row = |slot| part.vector(slot).reshape([1, 1, heads]);
    let steps = projected
        .narrow(1, inner + channels, heads)
        .reshape([batch, seq, heads]);
    let steps = softplus(steps + row(shape.dt_bias));
    let decays = steps.clone() * row(shape.a_log).exp().neg();

    // All by head: [batch, heads, seq, …].
    let by_head = |x: Tensor<4>| x.permute([0, 2, 1, 3]);
    let values = by_head(
        convolved
            .clone()
            .narrow(2, 0, inner)
            .reshape([batch, seq, heads, head_dim]),
    );
    let of_groups = |first: usize| {
        let own = convolved
            .clone()
            .narrow(2, first, groups * width)
            .reshape([batch, seq, groups, width]);
        let own = by_head(own).unsqueeze_dim::<5>(2).repeat_dim(2, heads / groups);
        own.reshape([batch, heads, seq, width])
    };
    let (b, c) = (of_groups(inner), of_groups(inner + groups * width));
    let steps = steps.permute([0, 2, 1]).unsqueeze_dim::<4>(3);
    let decays = decays.permute([0, 2, 1]);
    let y = scan(values.clone() * steps, b, c, decays);
    let y = y + values * part.vector(shape.d).reshape([1, heads, 1, 1]);

    let y = y.permute([0, 2, 1, 3]).reshape([rows, inner]) * silu(gate);
    let per_group = inner / groups;
    let unit = unit_rows(y.reshape([rows * groups, per_group]), shape.norm.kind.epsilon).reshape([rows, inner]);
    let normed = unit * part.vector(shape.norm.gain).unsqueeze::<2>();
    linear(part, &shape.out_proj, &normed)
}

/// Each channel with its last inputs, and the activation.
fn convolve(part: Part<'_>, shape: &Mamba, x: Tensor<3>) -> Tensor<3> {
    let [batch, seq, channels] = x.dims();
    let before = Tensor::zeros([batch, shape.taps - 1, channels], &x.device());
    let padded = Tensor::cat(vec![before, x], 1);
    let weight = part.matrix(shape.conv);
    let tap = |tap: usize| {
        let weight = weight.clone().narrow(1, tap, 1).reshape([1, 1, channels]);
        padded.clone().narrow(1, tap, seq) * weight
    };
    let sum = (1..shape.taps).fold(tap(0), |sum, at| sum + tap(at));
    silu(match shape.conv_bias {
        Some(bias) => sum + part.vector(bias).reshape([1, 1, channels]),
        None => sum,
    })
}

/// `h ← h · exp(decay) + x ⊗ b`, `y = h · c`, for `x` `[batch, heads, seq, head_dim]`, `b` and `c`
/// `[batch, heads, seq, width]` and `decays` `[batch, heads, seq]`.
fn scan(x: Tensor<4>, b: Tensor<4>, c: Tensor<4>, decays: Tensor<3>) -> Tensor<4> {
    let [_, _, seq, _] = x.dims();
    let device = x.device();
    let mut state: Option<Tensor<4>> = None; // [batch, heads, width, head_dim]
    let mut out = Vec::new();
    for first in (0..seq).step_by(CHUNK) {
        let length = CHUNK.min(seq - first);
        let chunk = |x: &Tensor<4>| x.clone().narrow(2, first, length);
        let (x, b, c) = (chunk(&x), chunk(&b), chunk(&c));
        let sums = decays
            .clone()
            .narrow(2, first, length)
            .matmul(ones_upwards(length, &device));
        let row = sums.clone().unsqueeze_dim::<4>(3);
        let shares = (row.clone() - sums.clone().unsqueeze_dim::<4>(2) + later(length, &device)).exp();
        let scores = c.clone().matmul(b.clone().swap_dims(2, 3)) * shares;
        let mut y = scores.matmul(x.clone());
        let last = sums.clone().narrow(2, length - 1, 1);
        let left = (last.clone() - sums).exp().unsqueeze_dim::<4>(3);
        let added = (b * left).swap_dims(2, 3).matmul(x);
        state = Some(match state {
            None => added,
            Some(state) => {
                y = y + c.matmul(state.clone()) * row.exp();
                state * last.exp().unsqueeze_dim::<4>(3) + added
            }
        });
        out.push(y);
    }
    Tensor::cat(out, 2)
}

/// `[1, length, length]` with ones where the column is not before the row: a product with it sums up.
fn ones_upwards(length: usize, device: &Device) -> Tensor<3> {
    let values = (0..length).flat_map(|row| (0..length).map(move |column| if column >= row { 1.0f32 } else { 0.0 }));
    Tensor::from_data(TensorData::new(values.collect::<Vec<_>>(), [1, length, length]), device)
}

/// `[1, 1, length, length]`: masks columns after the row.
fn later(length: usize, device: &Device) -> Tensor<4> {
    let values = (0..length).flat_map(|row| (0..length).map(move |column| if column > row { MASKED } else { 0.0 }));
    Tensor::from_data(
        TensorData::new(values.collect::<Vec<_>>(), [1, 1, length, length]),
        device,
    )
}
