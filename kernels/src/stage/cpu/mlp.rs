//! Perceptrons, gated or not.

use super::dense::{Dense, together};
use super::elementwise::{gelu_tanh, silu, softplus, squared_relu, swiglu, xielu};
use super::matrix::Matrix;
use crate::model::Curve;
use crate::model::describe::{Activation, Mlp, Slot};
use crate::stage::StageError;
use crate::stage::weights::PartReader;

/// The weights of a perceptron.
#[derive(Debug)]
pub(in crate::stage) struct MlpWeights {
    pub(in crate::stage) gate: Option<Dense>,
    pub(in crate::stage) up: Dense,
    pub(in crate::stage) down: Dense,
    pub(in crate::stage) activation: Curve,
}

impl MlpWeights {
    pub(in crate::stage) fn read(reader: &PartReader<'_>, mlp: &Mlp) -> Result<Self, StageError> {
        let number = |slot| Ok::<f32, StageError>(reader.vector(slot)?.first().copied().unwrap_or(0.0));
        let activation = curve(mlp.activation, number)?;
        Ok(Self {
            gate: mlp.gate.as_ref().map(|gate| reader.dense(gate)).transpose()?,
            up: reader.dense(&mlp.up)?,
            down: reader.dense(&mlp.down)?,
            activation,
        })
    }

    /// All that is multiplied with.
    pub(super) fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let denses = self.gate.iter().chain([&self.up, &self.down]);
        denses.map(|dense| &dense.weight)
    }

    /// Width between the two layers.
    pub(super) const fn wide(&self) -> usize {
        self.up.weight.rows()
    }

    /// Of `n` rows. What comes out of the activation has a few very large values, beside which seven bits leave little of
    /// the others, so it is rounded more finely.
    pub(super) fn forward(&self, x: &[f32], n: usize, out: &mut [f32]) {
        let mut up = vec![0.0; n * self.wide()];
        match &self.gate {
            None => {
                self.up.apply(x, n, &mut up);
                apply(self.activation, &mut up);
                self.down.apply_finely(&up, n, out);
            }
            Some(gate) => {
                let mut gated = vec![0.0; up.len()];
                together(x, n, [(gate, &mut gated[..]), (&self.up, &mut up[..])]);
                self.join(&mut gated, &up);
                self.down.apply_finely(&gated, n, out);
            }
        }
    }

    /// `gate ← act(gate) · up`.
    pub(super) fn join(&self, gate: &mut [f32], up: &[f32]) {
        if let Curve::Silu = self.activation {
            return swiglu(gate, up);
        }
        apply(self.activation, gate);
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate *= up;
        }
    }
}

/// An activation whose parameters are read with `number`. The two α are kept above their least by softplus
/// (arXiv 2411.13010).
pub(crate) fn curve<E>(activation: Activation, number: impl Fn(Slot) -> Result<f32, E>) -> Result<Curve, E> {
    Ok(match activation {
        Activation::Silu => Curve::Silu,
        Activation::GeluTanh => Curve::GeluTanh,
        Activation::SquaredRelu => Curve::SquaredRelu,
        Activation::Xielu(slots) => {
            let beta = number(slots.beta)?;
            Curve::Xielu {
                alpha_p: softplus(number(slots.alpha_p)?),
                alpha_n: beta + softplus(number(slots.alpha_n)?),
                beta,
                epsilon: number(slots.epsilon)?,
            }
        }
    })
}

fn apply(curve: Curve, x: &mut [f32]) {
    match curve {
        Curve::Silu => silu(x),
        Curve::GeluTanh => gelu_tanh(x),
        Curve::SquaredRelu => squared_relu(x),
        Curve::Xielu {
            alpha_p,
            alpha_n,
            beta,
            epsilon,
        } => xielu(x, alpha_p, alpha_n, beta, epsilon),
    }
}
