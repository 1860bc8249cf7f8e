//! A mixture of experts. The host chooses, as it does for the CPU, so both choose alike; it waits for the router's numbers
//! once a block.

use super::perceptron::Perceptron;
use super::upload::{Dense, Upload};
use crate::device::cube::{CubeError, Cubes, Floats};
use crate::stage::StageError;
use crate::stage::cpu::{Choice, ExpertWeights, Routing};

#[derive(Debug)]
pub(super) struct Experts {
    router: Dense,
    choice: Choice,
    /// Into the width that experts work in, and out of it.
    latent: Option<(Dense, Dense)>,
    experts: Vec<Perceptron>,
    shared: Option<Perceptron>,
}

impl Experts {
    pub(super) fn upload(upload: &Upload<'_>, weights: &ExpertWeights) -> Result<Self, StageError> {
        let perceptron = |weights| Perceptron::upload(upload, weights);
        Ok(Self {
            router: upload.dense(&weights.router)?,
            choice: weights.choice.clone(),
            latent: match &weights.latent {
                Some((down, up)) => Some((upload.dense(down)?, upload.dense(up)?)),
                None => None,
            },
            experts: weights.experts.iter().map(perceptron).collect::<Result<_, _>>()?,
            shared: weights.shared.as_ref().map(perceptron).transpose()?,
        })
    }

    /// Of `[n, hidden]`; `seen` takes what the router did.
    pub(super) fn of(
        &self,
        cubes: &Cubes,
        x: &Floats,
        n: usize,
        seen: Option<&mut Routing>,
    ) -> Result<Floats, CubeError> {
        let routing = self.choice.of(cubes.read(&self.router.of(cubes, x)?)?);
        let out = match &self.latent {
            None => self.mix(cubes, x, n, &routing.weights)?,
            Some((down, up)) => {
                let within = down.of(cubes, x)?;
                up.of(cubes, &self.mix(cubes, &within, n, &routing.weights)?)?
            }
        };
        if let Some(shared) = &self.shared {
            cubes.add(&out, &shared.of(cubes, x)?)?;
        }
        if let Some(seen) = seen {
            seen.weights.extend(routing.weights);
            seen.scores.extend(routing.scores);
        }
        Ok(out)
    }

    /// What the experts of each row make of it, in the order of their numbers.
    fn mix(&self, cubes: &Cubes, x: &Floats, n: usize, weights: &[f32]) -> Result<Floats, CubeError> {
        let count = self.experts.len();
        let out = cubes.zeros(x.len())?;
        for (index, expert) in self.experts.iter().enumerate() {
            let own = weights.iter().skip(index).step_by(count.max(1)).copied();
            let chosen = own.enumerate().filter(|(_, weight)| *weight != 0.0);
            let (rows, factors): (Vec<usize>, Vec<f32>) = chosen.unzip();
            if rows.is_empty() {
                continue;
            }
            let picked = cubes.pick(&rows, n)?;
            let made = expert.of(cubes, &cubes.gather(x, &picked)?)?;
            cubes.add_to_rows(&out, &made, &cubes.upload(&factors), &picked)?;
        }
        Ok(out)
    }
}
