//! AdEMAMix over slices: AdamW with a second, slow mean of gradients (arXiv 2409.03137), which Apertus was trained with.

use rayon::prelude::*;

use super::optimiser::CHUNK;
use super::vectorised::vectorised;

/// A step's settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct AdEmaMix {
    /// How far a step goes.
    pub(super) learning_rate: f32,
    /// Decay of the fast mean.
    pub(super) beta_1: f32,
    /// Decay of the mean square.
    pub(super) beta_2: f32,
    /// Decay of the slow mean, once warm.
    pub(super) beta_3: f32,
    /// Weight of the slow mean, once warm.
    pub(super) alpha: f32,
    /// Added to the root of the mean square.
    pub(super) epsilon: f32,
    /// Decoupled weight decay.
    pub(super) weight_decay: f32,
    /// Steps over which `alpha` grows in a line.
    pub(super) alpha_warmup_steps: u64,
    /// Steps over which `beta_3` grows so that its half-life does in a line.
    pub(super) beta_3_warmup_steps: u64,
    /// What each gradient is multiplied by first.
    pub(super) gradient_scale: f32,
}

impl AdEmaMix {
    /// Takes step `count` (from 1) with the means: fast, slow, of squares. The fast one is corrected for its bias, the slow
    /// one is not.
    ///
    /// # Panics
    ///
    /// When lengths differ.
    pub(super) fn step(&self, parameters: &mut [f32], gradient: &[f32], means: [&mut [f32]; 3], count: u64) {
        let [fast, slow, square] = means;
        assert!([gradient.len(), fast.len(), slow.len(), square.len()] == [parameters.len(); 4]);
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(count as f64);
        let now = Now {
            settings: *self,
            alpha: self.alpha_at(count),
            beta_3: self.beta_3_at(count),
            fast_share: (1.0 / correction(self.beta_1)) as f32,
            square_share: (1.0 / correction(self.beta_2)) as f32,
        };
        parameters
            .par_chunks_mut(CHUNK)
            .zip(gradient.par_chunks(CHUNK))
            .zip(fast.par_chunks_mut(CHUNK))
            .zip(slow.par_chunks_mut(CHUNK))
            .zip(square.par_chunks_mut(CHUNK))
            .for_each(|((((parameters, gradient), fast), slow), square)| {
                ademamix(parameters, gradient, fast, slow, square, now);
            });
    }

    /// The slow mean's weight at step `step` (from 1).
    fn alpha_at(&self, step: u64) -> f32 {
        match step < self.alpha_warmup_steps {
            true => (f64::from(self.alpha) * step as f64 / self.alpha_warmup_steps as f64) as f32,
            false => self.alpha,
        }
    }

    /// The slow mean's decay at step `step` (from 1): its half-life grows from that of the fast one.
    fn beta_3_at(&self, step: u64) -> f32 {
        if step >= self.beta_3_warmup_steps {
            return self.beta_3;
        }
        let half_life = |beta: f32| 0.5f64.ln() / (f64::from(beta) + 1e-8).ln() - 1.0;
        let share = step as f64 / self.beta_3_warmup_steps as f64;
        let now = (1.0 - share) * half_life(self.beta_1) + share * half_life(self.beta_3);
        0.5f64.powf(1.0 / (now + 1.0)) as f32
    }
}

/// What is common to all elements of a step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Now {
    settings: AdEmaMix,
    alpha: f32,
    beta_3: f32,
    fast_share: f32,
    square_share: f32,
}

vectorised! {
    /// See [`AdEmaMix::step`].
    fn ademamix(
        parameters: &mut [f32],
        gradient: &[f32],
        fast: &mut [f32],
        slow: &mut [f32],
        square: &mut [f32],
        now: Now,
    ) {
        let set = now.settings;
        let means = fast.iter_mut().zip(slow).zip(square);
        for ((p, g), ((fast, slow), square)) in parameters.iter_mut().zip(gradient).zip(means) {
            let g = g * set.gradient_scale;
            *fast = set.beta_1 * *fast + (1.0 - set.beta_1) * g;
            *slow = now.beta_3 * *slow + (1.0 - now.beta_3) * g;
            *square = set.beta_2 * *square + (1.0 - set.beta_2) * g * g;
            let root = (*square * now.square_share).sqrt() + set.epsilon;
            let update = (*fast * now.fast_share + now.alpha * *slow) / root;
            *p -= set.learning_rate * (update + set.weight_decay * *p);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::rules::{number, row, rule, whole};
    use super::*;

    #[test]
    fn ademamix_meets_the_golden_steps() {
        let rule = rule("ademamix");
        let settings = AdEmaMix {
            learning_rate: number(&rule, "lr"),
            beta_1: number(&rule, "beta1"),
            beta_2: number(&rule, "beta2"),
            beta_3: number(&rule, "beta3"),
            alpha: number(&rule, "alpha"),
            epsilon: number(&rule, "eps"),
            weight_decay: number(&rule, "weight_decay"),
            alpha_warmup_steps: whole(&rule, "alpha_warmup"),
            beta_3_warmup_steps: whole(&rule, "beta3_warmup"),
            gradient_scale: 1.0,
        };
        let mut parameters = row(&rule["p0"]);
        let mut means = [0; 3].map(|_| vec![0.0; parameters.len()]);
        let steps = rule["grads"]
            .as_array()
            .unwrap()
            .iter()
            .zip(rule["p"].as_array().unwrap());
        for (at, (gradient, right)) in steps.enumerate() {
            assert!((settings.alpha_at(at as u64 + 1) - row(&rule["alpha_t"])[at]).abs() < 1e-6);
            assert!((settings.beta_3_at(at as u64 + 1) - row(&rule["beta3_t"])[at]).abs() < 1e-6);
            let [fast, slow, square] = &mut means;
            settings.step(&mut parameters, &row(gradient), [fast, slow, square], at as u64 + 1);
            for (p, right) in parameters.iter().zip(row(right)) {
                assert!((p - right).abs() < 2e-6, "{p} {right}");
            }
        }
    }
}
