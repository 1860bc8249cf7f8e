//! Norms of rows, and their gradients.

use rayon::prelude::*;

use super::slots::Weights;
use crate::model::describe::{Norm, NormKind};
use crate::train::vectorised::{lane_sum, vectorised};

/// Rows that one task takes, whatever the number of threads.
const ROWS: usize = 32;

/// A norm with its parameters.
#[derive(Debug, Clone, Copy)]
pub(super) struct Loaded<'a> {
    kind: NormKind,
    gain: &'a [f32],
    bias: Option<&'a [f32]>,
}

impl<'a> Loaded<'a> {
    pub(super) fn new(norm: &Norm, weights: Weights<'a>) -> Self {
        Self {
            kind: norm.kind,
            gain: weights.slot(norm.gain),
            bias: norm.bias.map(|bias| weights.slot(bias)),
        }
    }

    /// The norm of one row.
    pub(super) fn row(self, out: &mut [f32], x: &[f32]) {
        row(out, x, self.gain, self.bias.unwrap_or_default(), self.kind);
    }

    /// The norm of each row.
    pub(super) fn rows(self, out: &mut [f32], x: &[f32]) {
        let width = self.gain.len();
        let chunks = out.par_chunks_mut(ROWS * width).zip(x.par_chunks(ROWS * width));
        chunks.for_each(|(out, x)| {
            for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                self.row(out, x);
            }
        });
    }

    /// Adds the gradient of `x` to `x_gradient`, row by row, and returns those of gain and bias.
    pub(super) fn rows_backward(self, x_gradient: &mut [f32], out_gradient: &[f32], x: &[f32]) -> Sums {
        let width = self.gain.len();
        let sums = x_gradient
            .par_chunks_mut(ROWS * width)
            .zip(out_gradient.par_chunks(ROWS * width))
            .zip(x.par_chunks(ROWS * width))
            .map(|((x_gradient, out_gradient), x)| {
                let mut sums = self.sums();
                let rows = x_gradient.chunks_exact_mut(width).zip(out_gradient.chunks_exact(width));
                for ((x_gradient, out_gradient), x) in rows.zip(x.chunks_exact(width)) {
                    self.row_backward(x_gradient, out_gradient, x, &mut sums);
                }
                sums
            });
        self.all(sums.collect())
    }

    /// No gradients of the parameters yet.
    pub(super) fn sums(self) -> Sums {
        Sums {
            gain: vec![0.0; self.gain.len()],
            bias: vec![0.0; self.bias.map_or(0, <[f32]>::len)],
        }
    }

    /// The sum of `parts`, in order.
    pub(super) fn all(self, parts: Vec<Sums>) -> Sums {
        let mut all = self.sums();
        for part in parts {
            add(&mut all.gain, &part.gain);
            add(&mut all.bias, &part.bias);
        }
        all
    }

    /// As [`Loaded::rows_backward`], for one row.
    pub(super) fn row_backward(self, x_gradient: &mut [f32], out_gradient: &[f32], x: &[f32], sums: &mut Sums) {
        let Sums { gain, bias } = sums;
        row_backward(x_gradient, gain, bias, out_gradient, x, self.gain, self.kind);
    }
}

/// Gradients of a norm's parameters.
#[derive(Debug)]
pub(super) struct Sums {
    gain: Vec<f32>,
    bias: Vec<f32>,
}

impl Sums {
    /// Adds them to a part's gradients.
    pub(super) fn add_to(&self, gradients: &mut [f32], norm: &Norm, weights: Weights<'_>) {
        add(&mut gradients[weights.slots.range(norm.gain)], &self.gain);
        if let Some(bias) = norm.bias {
            add(&mut gradients[weights.slots.range(bias)], &self.bias);
        }
    }
}

fn add(sums: &mut [f32], own: &[f32]) {
    for (sum, own) in sums.iter_mut().zip(own) {
        *sum += own;
    }
}

/// Mean, and one divided by the deviation.
#[inline(always)]
fn moments(x: &[f32], kind: NormKind) -> (f32, f32) {
    let width = x.len() as f32;
    let mean = match kind.centred {
        true => lane_sum(x.len(), |i| x[i]) / width,
        false => 0.0,
    };
    let square = lane_sum(x.len(), |i| (x[i] - mean) * (x[i] - mean)) / width;
    (mean, 1.0 / (square + kind.epsilon).sqrt())
}

vectorised! {
    /// See the reference's `rms_norm` and `layer_norm`. An empty bias is none.
    fn row(out: &mut [f32], x: &[f32], gain: &[f32], bias: &[f32], kind: NormKind) {
        let (mean, scale) = moments(x, kind);
        let more = if kind.plus_one { 1.0 } else { 0.0 };
        for ((out, x), gain) in out.iter_mut().zip(x).zip(gain) {
            *out = (x - mean) * scale * (gain + more);
        }
        for (out, bias) in out.iter_mut().zip(bias) {
            *out += bias;
        }
    }
}

vectorised! {
    /// With `u = (x − mean) · scale` and `d = ∂out · gain`: `∂x += scale · (d − mean(d) − u · mean(u · d))`, where the
    /// mean of `d` is only taken away by a norm that is centred.
    fn row_backward(
        x_gradient: &mut [f32],
        gain_sums: &mut [f32],
        bias_sums: &mut [f32],
        out_gradient: &[f32],
        x: &[f32],
        gain: &[f32],
        kind: NormKind,
    ) {
        let width = x.len();
        let (out_gradient, gain) = (&out_gradient[..width], &gain[..width]);
        let (x_gradient, gain_sums) = (&mut x_gradient[..width], &mut gain_sums[..width]);
        let (mean, scale) = moments(x, kind);
        let more = if kind.plus_one { 1.0 } else { 0.0 };
        let along = lane_sum(width, |i| out_gradient[i] * (gain[i] + more) * ((x[i] - mean) * scale)) / width as f32;
        let level = match kind.centred {
            true => lane_sum(width, |i| out_gradient[i] * (gain[i] + more)) / width as f32,
            false => 0.0,
        };
        for i in 0..width {
            let unit = (x[i] - mean) * scale;
            x_gradient[i] += scale * (out_gradient[i] * (gain[i] + more) - level - unit * along);
            gain_sums[i] += out_gradient[i] * unit;
        }
        for (sum, own) in bias_sums.iter_mut().zip(out_gradient) {
            *sum += own;
        }
    }
}
