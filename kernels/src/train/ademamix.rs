//! AdEMAMix over slices: AdamW with a second, slow mean of gradients (arXiv 2409.03137), which Apertus was trained with.

/// A step's settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdEmaMix {
    /// How far a step goes.
    pub learning_rate: f32,
    /// Decay of the fast mean.
    pub beta_1: f32,
    /// Decay of the mean square.
    pub beta_2: f32,
    /// Decay of the slow mean, once warm.
    pub beta_3: f32,
    /// Weight of the slow mean, once warm.
    pub alpha: f32,
    /// Added to the root of the mean square.
    pub epsilon: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Steps over which `alpha` grows in a line.
    pub alpha_warmup_steps: u64,
    /// Steps over which `beta_3` grows so that its half-life does in a line.
    pub beta_3_warmup_steps: u64,
}

/// What is kept of each parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct AdEmaMixState {
    fast: Vec<f32>,
    slow: Vec<f32>,
    square: Vec<f32>,
    steps: u64,
}

impl AdEmaMixState {
    /// Before the first step.
    pub fn new(elements: usize) -> Self {
        Self {
            fast: vec![0.0; elements],
            slow: vec![0.0; elements],
            square: vec![0.0; elements],
            steps: 0,
        }
    }
}

impl AdEmaMix {
    /// Takes a step. The fast mean is corrected for its bias, the slow one is not.
    ///
    /// # Panics
    ///
    /// When lengths differ.
    pub fn step(&self, parameters: &mut [f32], gradient: &[f32], state: &mut AdEmaMixState) {
        assert!(parameters.len() == gradient.len() && parameters.len() == state.fast.len());
        state.steps += 1;
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(state.steps as f64);
        let fast_share = (1.0 / correction(self.beta_1)) as f32;
        let square_share = (1.0 / correction(self.beta_2)) as f32;
        let (alpha, beta_3) = (self.alpha_at(state.steps), self.beta_3_at(state.steps));
        let means = state.fast.iter_mut().zip(&mut state.slow).zip(&mut state.square);
        for ((p, g), ((fast, slow), square)) in parameters.iter_mut().zip(gradient).zip(means) {
            *fast = self.beta_1 * *fast + (1.0 - self.beta_1) * g;
            *slow = beta_3 * *slow + (1.0 - beta_3) * g;
            *square = self.beta_2 * *square + (1.0 - self.beta_2) * g * g;
            let update = (*fast * fast_share + alpha * *slow) / ((*square * square_share).sqrt() + self.epsilon);
            *p -= self.learning_rate * (update + self.weight_decay * *p);
        }
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
        };
        let mut parameters = row(&rule["p0"]);
        let mut state = AdEmaMixState::new(parameters.len());
        let steps = rule["grads"]
            .as_array()
            .unwrap()
            .iter()
            .zip(rule["p"].as_array().unwrap());
        for (at, (gradient, right)) in steps.enumerate() {
            assert!((settings.alpha_at(at as u64 + 1) - row(&rule["alpha_t"])[at]).abs() < 1e-6);
            assert!((settings.beta_3_at(at as u64 + 1) - row(&rule["beta3_t"])[at]).abs() < 1e-6);
            settings.step(&mut parameters, &row(gradient), &mut state);
            for (p, right) in parameters.iter().zip(row(right)) {
                assert!((p - right).abs() < 2e-6, "{p} {right}");
            }
        }
    }
}
