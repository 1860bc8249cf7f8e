//! Activations, gated or not, and their gradients; see [`Curve`] for the formulas.

use std::convert::Infallible;

use rayon::prelude::*;

use super::slots::Weights;
use crate::model::Curve;
use crate::model::describe::{Activation, Xielu};
use crate::stage::{exp, expm1};
use crate::train::vectorised::vectorised;

/// Rows that one task takes, whatever the number of threads.
const ROWS: usize = 16;

/// An activation with the parameters of a block.
pub(super) fn curve(activation: Activation, weights: Weights<'_>) -> Curve {
    let number = |slot| Ok::<f32, Infallible>(weights.slot(slot).first().copied().unwrap_or(0.0));
    let Ok(curve) = crate::stage::curve(activation, number);
    curve
}

impl Curve {
    /// `out = act(gate) · up` of rows of gate and up side by side, or `act(up)` of rows of `up` alone.
    pub(super) fn forward(self, out: &mut [f32], inner: &[f32], width: usize, gated: bool) {
        let both = if gated { 2 * width } else { width };
        let chunks = out.par_chunks_mut(ROWS * width).zip(inner.par_chunks(ROWS * both));
        chunks.for_each(|(out, inner)| {
            for (out, inner) in out.chunks_exact_mut(width).zip(inner.chunks_exact(both)) {
                let (first, up) = inner.split_at(width);
                row(out, first, up, self);
            }
        });
    }

    /// Turns the gradient of the output into the output, and what went in into its gradient.
    pub(super) fn backward(self, out_gradient: &mut [f32], inner: &mut [f32], width: usize, gated: bool) {
        let both = if gated { 2 * width } else { width };
        let chunks = out_gradient
            .par_chunks_mut(ROWS * width)
            .zip(inner.par_chunks_mut(ROWS * both));
        chunks.for_each(|(out, inner)| {
            for (out, inner) in out.chunks_exact_mut(width).zip(inner.chunks_exact_mut(both)) {
                let (first, up) = inner.split_at_mut(width);
                row_backward(out, first, up, self);
            }
        });
    }

    /// Adds the gradients of xIELU's two parameters, from what went in and the gradient of the activation's output.
    pub(super) fn add_parameter_gradients(
        self,
        gradients: &mut [f32],
        slots: Xielu,
        weights: Weights<'_>,
        x: &[f32],
        out_gradient: &[f32],
    ) {
        let Self::Xielu { epsilon, .. } = self else { return };
        let chunks = x.par_chunks(1 << 12).zip(out_gradient.par_chunks(1 << 12));
        let sums = chunks.map(|(x, gradient)| {
            let (mut above, mut below) = (0.0f64, 0.0f64);
            for (x, gradient) in x.iter().zip(gradient) {
                match *x > 0.0 {
                    true => above += f64::from(gradient * x * x),
                    false => below += f64::from(gradient * (expm1(x.min(epsilon)) - x)),
                }
            }
            (above, below)
        });
        let add = |all: (f64, f64), own: &(f64, f64)| (all.0 + own.0, all.1 + own.1);
        let (above, below) = sums.collect::<Vec<_>>().iter().fold((0.0, 0.0), add);
        for (slot, sum) in [(slots.alpha_p, above), (slots.alpha_n, below)] {
            // The derivative of softplus is the sigmoid.
            let slope = |raw: f32| 1.0 / (1.0 + f64::from(-raw).exp());
            let range = weights.slots.range(slot);
            for (gradient, raw) in gradients[range].iter_mut().zip(weights.slot(slot)) {
                *gradient += (sum * slope(*raw)) as f32;
            }
        }
    }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `(act(x), act′(x))`
#[inline(always)]
fn silu(x: f32) -> (f32, f32) {
    let share = sigmoid(x);
    (x * share, share * (1.0 + x * (1.0 - share)))
}

#[inline(always)]
fn gelu_tanh(x: f32) -> (f32, f32) {
    const ROOT: f32 = 0.797_884_6; // √(2 / π)
    let inner = ROOT * (x + 0.044_715 * x * x * x);
    // (1 + tanh y) / 2 is the sigmoid of 2y.
    let share = sigmoid(2.0 * inner);
    let slope = 2.0 * ROOT * (1.0 + 3.0 * 0.044_715 * x * x);
    (x * share, share + x * share * (1.0 - share) * slope)
}

#[inline(always)]
fn squared_relu(x: f32) -> (f32, f32) {
    let positive = if x > 0.0 { x } else { 0.0 };
    (positive * positive, 2.0 * positive)
}

#[inline(always)]
fn xielu(x: f32, alpha_p: f32, alpha_n: f32, beta: f32, epsilon: f32) -> (f32, f32) {
    if x > 0.0 {
        return (alpha_p * x * x + beta * x, 2.0 * alpha_p * x + beta);
    }
    let low = if x < epsilon { x } else { epsilon };
    let small = expm1(low);
    let slope = if x < epsilon { small } else { -1.0 };
    (alpha_n * (small - x) + beta * x, alpha_n * slope + beta)
}

#[inline(always)]
fn each(out: &mut [f32], first: &[f32], up: &[f32], act: impl Fn(f32) -> (f32, f32)) {
    if up.is_empty() {
        for (out, x) in out.iter_mut().zip(first) {
            *out = act(*x).0;
        }
        return;
    }
    for ((out, x), up) in out.iter_mut().zip(first).zip(up) {
        *out = act(*x).0 * up;
    }
}

#[inline(always)]
fn each_backward(out: &mut [f32], first: &mut [f32], up: &mut [f32], act: impl Fn(f32) -> (f32, f32)) {
    if up.is_empty() {
        for (out, x) in out.iter_mut().zip(first) {
            let (value, slope) = act(*x);
            *x = *out * slope;
            *out = value;
        }
        return;
    }
    for ((out, x), up) in out.iter_mut().zip(first).zip(up) {
        let (value, slope) = act(*x);
        let gradient = *out;
        *out = value * *up;
        *x = gradient * *up * slope;
        *up = gradient * value;
    }
}

vectorised! {
    fn row(out: &mut [f32], first: &[f32], up: &[f32], curve: Curve) {
        match curve {
            Curve::Silu => each(out, first, up, silu),
            Curve::GeluTanh => each(out, first, up, gelu_tanh),
            Curve::SquaredRelu => each(out, first, up, squared_relu),
            Curve::Xielu { alpha_p, alpha_n, beta, epsilon } => {
                each(out, first, up, |x| xielu(x, alpha_p, alpha_n, beta, epsilon));
            }
        }
    }
}

vectorised! {
    fn row_backward(out: &mut [f32], first: &mut [f32], up: &mut [f32], curve: Curve) {
        match curve {
            Curve::Silu => each_backward(out, first, up, silu),
            Curve::GeluTanh => each_backward(out, first, up, gelu_tanh),
            Curve::SquaredRelu => each_backward(out, first, up, squared_relu),
            Curve::Xielu { alpha_p, alpha_n, beta, epsilon } => {
                each_backward(out, first, up, |x| xielu(x, alpha_p, alpha_n, beta, epsilon));
            }
        }
    }
}
