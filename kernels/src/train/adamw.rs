//! AdamW over slices (Loshchilov and Hutter 2019).

use rayon::prelude::*;

use super::optimiser::CHUNK;
use super::vectorised::vectorised;

/// One step.
#[derive(Debug, Clone, Copy)]
pub(super) struct AdamW {
    pub(super) learning_rate: f32,
    pub(super) beta_1: f32,
    pub(super) beta_2: f32,
    pub(super) epsilon: f32,
    pub(super) weight_decay: f32,
    /// What each gradient is multiplied by first.
    pub(super) gradient_scale: f32,
    /// Steps that these moments have seen, this one included.
    pub(super) count: u64,
}

impl AdamW {
    /// Steps one tensor. See the reference's `adamw`.
    pub(super) fn apply(&self, parameters: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32]) {
        let correction = |beta: f32| (1.0 - f64::from(beta).powf(self.count as f64)) as f32;
        let (first_correction, second_correction) = (1.0 / correction(self.beta_1), 1.0 / correction(self.beta_2));
        let step = *self;
        parameters
            .par_chunks_mut(CHUNK)
            .zip(gradient.par_chunks(CHUNK))
            .zip(first.par_chunks_mut(CHUNK))
            .zip(second.par_chunks_mut(CHUNK))
            .for_each(|(((parameters, gradient), first), second)| {
                adamw(
                    parameters,
                    gradient,
                    first,
                    second,
                    step,
                    [first_correction, second_correction],
                );
            });
    }
}

vectorised! {
    /// See [`AdamW::apply`]; the corrections are one divided by both.
    fn adamw(
        parameters: &mut [f32],
        gradient: &[f32],
        first: &mut [f32],
        second: &mut [f32],
        step: AdamW,
        corrections: [f32; 2],
    ) {
        let [first_correction, second_correction] = corrections;
        for (((p, g), m), v) in parameters.iter_mut().zip(gradient).zip(first).zip(second) {
            let g = g * step.gradient_scale;
            *m = step.beta_1 * *m + (1.0 - step.beta_1) * g;
            *v = step.beta_2 * *v + (1.0 - step.beta_2) * g * g;
            let update = *m * first_correction / ((*v * second_correction).sqrt() + step.epsilon);
            *p -= step.learning_rate * (update + step.weight_decay * *p);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::rules::{row, rule};
    use super::*;

    #[test]
    fn adamw_meets_pytorch() {
        let rule = rule("adamw");
        let number = |name: &str| rule[name].as_f64().unwrap() as f32;
        let mut parameters = row(&rule["p0"]);
        let mut moments = [vec![0.0; parameters.len()], vec![0.0; parameters.len()]];
        let steps = rule["grads"]
            .as_array()
            .unwrap()
            .iter()
            .zip(rule["p"].as_array().unwrap());
        for (count, (gradient, right)) in (1..).zip(steps) {
            let step = AdamW {
                learning_rate: number("lr"),
                beta_1: number("beta1"),
                beta_2: number("beta2"),
                epsilon: number("eps"),
                weight_decay: number("weight_decay"),
                gradient_scale: 1.0,
                count,
            };
            let [first, second] = &mut moments;
            step.apply(&mut parameters, &row(gradient), first, second);
            for (p, right) in parameters.iter().zip(row(right)) {
                assert!((p - right).abs() < 1e-6, "{p} {right}");
            }
        }
    }
}
