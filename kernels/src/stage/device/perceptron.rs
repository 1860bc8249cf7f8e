//! Perceptrons, gated or not.

use super::upload::{Dense, Upload};
use crate::device::cube::{CubeError, Cubes, Floats};
use crate::model::Curve;
use crate::stage::StageError;
use crate::stage::cpu::MlpWeights;

/// `down(act(gate(x)) · up(x))`, or `down(act(up(x)))` without a gate.
#[derive(Debug)]
pub(super) struct Perceptron {
    gate: Option<Dense>,
    up: Dense,
    down: Dense,
    activation: Curve,
}

impl Perceptron {
    pub(super) fn upload(upload: &Upload<'_>, weights: &MlpWeights) -> Result<Self, StageError> {
        Ok(Self {
            gate: weights.gate.as_ref().map(|gate| upload.dense(gate)).transpose()?,
            up: upload.dense(&weights.up)?,
            down: upload.dense(&weights.down)?,
            activation: weights.activation,
        })
    }

    /// Of `[n, hidden]`.
    pub(super) fn of(&self, cubes: &Cubes, x: &Floats) -> Result<Floats, CubeError> {
        let up = self.up.of(cubes, x)?;
        let made = match &self.gate {
            Some(gate) => cubes.activate(self.activation, &gate.of(cubes, x)?, Some(&up))?,
            None => cubes.activate(self.activation, &up, None)?,
        };
        self.down.of(cubes, &made)
    }
}
