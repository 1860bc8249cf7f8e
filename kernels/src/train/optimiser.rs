//! AdamW over slices, and the learning rate's schedule.

use polder_protocol::run::Inner;
use rayon::prelude::*;

use super::vectorised::vectorised;

/// Moments of the parameters of one part.
#[derive(Debug, Clone)]
pub(super) struct Moments {
    first: Vec<f32>,
    second: Vec<f32>,
}

impl Moments {
    pub(super) fn new(elements: usize) -> Self {
        Self {
            first: vec![0.0; elements],
            second: vec![0.0; elements],
        }
    }
}

/// One AdamW step, common to all tensors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
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

/// Elements that one task takes.
const CHUNK: usize = 1 << 16;

impl Step {
    /// Steps the elements `range` of a part, `decayed` or not. See the reference's `adamw`.
    pub(super) fn apply(
        &self,
        parameters: &mut [f32],
        gradient: &[f32],
        moments: &mut Moments,
        range: core::ops::Range<usize>,
        decayed: bool,
    ) {
        let correction = |beta: f32| (1.0 - f64::from(beta).powf(self.count as f64)) as f32;
        let (first_correction, second_correction) = (1.0 / correction(self.beta_1), 1.0 / correction(self.beta_2));
        let decay = if decayed { self.weight_decay } else { 0.0 };
        let step = *self;
        parameters[range.clone()]
            .par_chunks_mut(CHUNK)
            .zip(gradient[range.clone()].par_chunks(CHUNK))
            .zip(moments.first[range.clone()].par_chunks_mut(CHUNK))
            .zip(moments.second[range].par_chunks_mut(CHUNK))
            .for_each(|(((parameters, gradient), first), second)| {
                adamw(
                    parameters,
                    gradient,
                    first,
                    second,
                    step,
                    [first_correction, second_correction, decay],
                );
            });
    }
}

vectorised! {
    /// See [`Step::apply`]; the factors are one divided by both corrections, and the decay.
    fn adamw(
        parameters: &mut [f32],
        gradient: &[f32],
        first: &mut [f32],
        second: &mut [f32],
        step: Step,
        factors: [f32; 3],
    ) {
        let [first_correction, second_correction, decay] = factors;
        for (((p, g), m), v) in parameters.iter_mut().zip(gradient).zip(first).zip(second) {
            let g = g * step.gradient_scale;
            *m = step.beta_1 * *m + (1.0 - step.beta_1) * g;
            *v = step.beta_2 * *v + (1.0 - step.beta_2) * g * g;
            let update = *m * first_correction / ((*v * second_correction).sqrt() + step.epsilon);
            *p -= step.learning_rate * (update + decay * *p);
        }
    }
}

/// The learning rate of inner step `step` (from 0) of a run of `steps_total`: linear warm-up, then the peak, then
/// 1 − √ over the last `decay_ppm` of the run, to zero.
pub fn learning_rate(inner: &Inner, steps_total: u64, step: u64) -> f32 {
    let step = step.saturating_add(1);
    let decay = (u128::from(steps_total) * u128::from(inner.decay_ppm.min(1_000_000)) / 1_000_000) as u64;
    let stable = steps_total.saturating_sub(decay);
    let warmup = u64::from(inner.warmup_steps);
    let share = if step <= warmup {
        step as f64 / warmup as f64
    } else if step <= stable || decay == 0 {
        1.0
    } else {
        1.0 - ((step - stable) as f64 / decay as f64).min(1.0).sqrt()
    };
    (f64::from(inner.learning_rate) * share) as f32
}

/// Multiplies all values.
pub(super) fn scale(values: &mut [f32], factor: f32) {
    let chunks = values.par_chunks_mut(CHUNK);
    chunks.for_each(|values| values.iter_mut().for_each(|value| *value *= factor));
}

/// Sum of squares in f64, in an order that does not depend on the number of threads.
pub(super) fn square_sum(values: &[f32]) -> f64 {
    let sums: Vec<f64> = values.par_chunks(CHUNK).map(chunk_square_sum).collect();
    sums.iter().sum()
}

vectorised! {
    fn chunk_square_sum(values: &[f32]) -> f64 {
        let mut lanes = [0.0f64; 16];
        for chunk in values.chunks(16) {
            for (lane, value) in lanes.iter_mut().zip(chunk) {
                *lane += f64::from(*value) * f64::from(*value);
            }
        }
        lanes.iter().sum()
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
        let mut moments = Moments::new(parameters.len());
        let steps = rule["grads"]
            .as_array()
            .unwrap()
            .iter()
            .zip(rule["p"].as_array().unwrap());
        for (count, (gradient, right)) in (1..).zip(steps) {
            let step = Step {
                learning_rate: number("lr"),
                beta_1: number("beta1"),
                beta_2: number("beta2"),
                epsilon: number("eps"),
                weight_decay: number("weight_decay"),
                gradient_scale: 1.0,
                count,
            };
            let whole = 0..parameters.len();
            step.apply(&mut parameters, &row(gradient), &mut moments, whole, true);
            for (p, right) in parameters.iter().zip(row(right)) {
                assert!((p - right).abs() < 1e-6, "{p} {right}");
            }
        }
    }

    #[test]
    fn the_rate_rises_holds_and_falls_to_zero() {
        let rule = rule("wsd");
        let (peak, low) = (rule["lr"].as_f64().unwrap(), rule["min_lr"].as_f64().unwrap());
        let inner = crate::train::tests::inner(peak as f32, 5, 333_334);
        for (step, right) in row(&rule["lr_at_step_1_to_total"]).into_iter().enumerate() {
            let ours = f64::from(learning_rate(&inner, 30, step as u64));
            // The golden schedule decays to a floor, ours to zero.
            let right = if step < 20 {
                f64::from(right)
            } else {
                (f64::from(right) - low) * peak / (peak - low)
            };
            assert!((ours - right).abs() < peak * 1e-5, "{step}: {ours} {right}");
        }
    }
}
