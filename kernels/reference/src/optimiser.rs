//! The inner optimiser.

/// What AdamW is set to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Step size.
    pub learning_rate: f32,
    /// First moment decay.
    pub beta_1: f32,
    /// Second moment decay.
    pub beta_2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
}

/// One AdamW step with bias correction; `step` counts from 1.
///
/// `m ← β₁ m + (1 − β₁) g`, `v ← β₂ v + (1 − β₂) g²`,
/// `p ← p − rate · (m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + ε) + decay · p)`
pub fn adamw(set: &AdamW, step: u64, parameters: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32]) {
    assert_eq!(parameters.len(), gradient.len());
    assert_eq!(parameters.len(), first.len());
    assert_eq!(parameters.len(), second.len());
    let correction = |beta: f32| (1.0 - f64::from(beta).powf(step as f64)) as f32;
    let (first_correction, second_correction) = (correction(set.beta_1), correction(set.beta_2));
    for (((p, g), m), v) in parameters.iter_mut().zip(gradient).zip(first).zip(second) {
        *m = set.beta_1 * *m + (1.0 - set.beta_1) * g;
        *v = set.beta_2 * *v + (1.0 - set.beta_2) * g * g;
        let update = *m / first_correction / ((*v / second_correction).sqrt() + set.epsilon);
        *p -= set.learning_rate * (update + set.weight_decay * *p);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_step_is_the_learning_rate_against_the_sign() {
        let set = AdamW {
            learning_rate: 0.5,
            beta_1: 0.9,
            beta_2: 0.95,
            epsilon: 0.0,
            weight_decay: 0.0,
        };
        let (mut p, mut m, mut v) = ([1.0, 1.0], [0.0; 2], [0.0; 2]);
        adamw(&set, 1, &mut p, &[3.0, -0.01], &mut m, &mut v);
        assert!((p[0] - 0.5).abs() < 1e-5 && (p[1] - 1.5).abs() < 1e-5);
    }

    #[test]
    fn decay_pulls_to_zero_without_a_gradient() {
        let set = AdamW {
            learning_rate: 0.5,
            beta_1: 0.9,
            beta_2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
        };
        let (mut p, mut m, mut v) = ([2.0], [0.0], [0.0]);
        adamw(&set, 1, &mut p, &[0.0], &mut m, &mut v);
        assert!((p[0] - 1.9).abs() < 1e-6);
    }
}
