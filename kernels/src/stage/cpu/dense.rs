//! Linear layers and norms, with their biases.

use super::elementwise::{layer_norm, rms_norm};
use super::matrix::{Matrix, product_finely, products};
use crate::model::describe::NormKind;

/// `out = weight · x + bias`.
#[derive(Debug)]
pub(in crate::stage) struct Dense {
    pub(in crate::stage) weight: Matrix,
    pub(in crate::stage) bias: Option<Vec<f32>>,
}

impl Dense {
    /// Writes `[n, rows]`.
    pub(super) fn apply(&self, x: &[f32], n: usize, out: &mut [f32]) {
        together(x, n, [(self, out)]);
    }

    /// As [`Dense::apply`], with 15 bits of each activation in place of 7 where the weight is packed.
    pub(super) fn apply_finely(&self, x: &[f32], n: usize, out: &mut [f32]) {
        product_finely(x, n, &self.weight, out);
        self.add_bias(out);
    }

    /// As [`Dense::apply`], into memory of its own.
    pub(super) fn of(&self, x: &[f32], n: usize) -> Vec<f32> {
        let mut out = vec![0.0; n * self.weight.rows()];
        self.apply(x, n, &mut out);
        out
    }

    fn add_bias(&self, out: &mut [f32]) {
        let Some(bias) = &self.bias else { return };
        for row in out.chunks_exact_mut(bias.len()) {
            for (out, bias) in row.iter_mut().zip(bias) {
                *out += bias;
            }
        }
    }
}

/// Several layers of one input, in one product.
pub(super) fn together<const COUNT: usize>(x: &[f32], n: usize, layers: [(&Dense, &mut [f32]); COUNT]) {
    let mut layers = layers;
    let pairs = layers.each_mut().map(|(layer, out)| (&layer.weight, &mut **out));
    products(x, n, pairs);
    for (layer, out) in &mut layers {
        layer.add_bias(out);
    }
}

/// A norm over the last axis.
#[derive(Debug, Clone)]
pub(in crate::stage) struct LoadedNorm {
    kind: NormKind,
    gain: Vec<f32>,
    bias: Vec<f32>,
}

impl LoadedNorm {
    /// `gain` is as stored; `bias` is needed where the norm is centred.
    pub(in crate::stage) fn new(kind: NormKind, mut gain: Vec<f32>, bias: Option<Vec<f32>>) -> Self {
        if kind.plus_one {
            gain.iter_mut().for_each(|gain| *gain += 1.0);
        }
        let bias = bias.unwrap_or_else(|| vec![0.0; gain.len()]);
        Self { kind, gain, bias }
    }

    /// What each channel is multiplied by.
    #[cfg(feature = "gpu")]
    pub(in crate::stage) fn gain(&self) -> &[f32] {
        &self.gain
    }

    /// What is added to each channel, where the mean is taken away first.
    #[cfg(feature = "gpu")]
    pub(in crate::stage) fn bias(&self) -> Option<&[f32]> {
        self.kind.centred.then_some(&self.bias)
    }

    /// What is added to the mean square.
    #[cfg(feature = "gpu")]
    pub(in crate::stage) const fn epsilon(&self) -> f32 {
        self.kind.epsilon
    }

    /// Norms each row of `x`.
    pub(super) fn apply(&self, out: &mut [f32], x: &[f32]) {
        match self.kind.centred {
            true => layer_norm(out, x, &self.gain, &self.bias, self.kind.epsilon),
            false => rms_norm(out, x, &self.gain, self.kind.epsilon),
        }
    }

    /// As [`LoadedNorm::apply`], into memory of its own.
    pub(in crate::stage) fn of(&self, x: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; x.len()];
        self.apply(&mut out, x);
        out
    }

    /// As [`LoadedNorm::apply`] in place, with another number of rows' means: `width` elements are one row, and gains
    /// are taken from where the row lies in `x`.
    pub(super) fn apply_grouped(&self, x: &mut [f32], width: usize) {
        let ones = vec![1.0; width];
        for row in x.chunks_exact_mut(self.gain.len()) {
            let mut out = vec![0.0; row.len()];
            rms_norm(&mut out, row, &ones, self.kind.epsilon);
            for ((x, out), gain) in row.iter_mut().zip(&out).zip(&self.gain) {
                *x = out * gain;
            }
        }
    }
}
