//! Rows of scores made shares, and what their gradients come to.

use crate::stage::exp;
use crate::train::vectorised::{lane_sum, vectorised};

#[inline(always)]
fn largest(scores: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in scores.chunks(16) {
        for (lane, score) in lanes.iter_mut().zip(chunk) {
            *lane = if *score > *lane { *score } else { *lane };
        }
    }
    lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

vectorised! {
    /// Makes scores shares, in place, and returns the logarithm of the sum of their exponentials.
    fn shares(scores: &mut [f32], scale: f32) -> f32 {
        let max = largest(scores) * scale;
        for score in scores.iter_mut() {
            *score = exp(*score * scale - max);
        }
        let sum = lane_sum(scores.len(), |i| scores[i]);
        let share = 1.0 / sum;
        for score in scores.iter_mut() {
            *score *= share;
        }
        max + sum.ln()
    }
}

vectorised! {
    /// Makes scores shares again, and gradients of shares those of scores: `∂s = p · (∂p − along) · scale`.
    fn shares_backward(scores: &mut [f32], gradients: &mut [f32], log_sum: f32, along: f32, scale: f32) {
        for (score, gradient) in scores.iter_mut().zip(gradients) {
            *score = exp(*score * scale - log_sum);
            *gradient = *score * (*gradient - along) * scale;
        }
    }
}

vectorised! {
    /// `Σ a[i] · b[i]`
    fn dot(a: &[f32], b: &[f32]) -> f32 {
        let b = &b[..a.len()];
        lane_sum(a.len(), |i| a[i] * b[i])
    }
}

vectorised! {
    /// The loss of a row of logits in nats; the logits become its gradient, times `share`.
    fn loss(logits: &mut [f32], target: usize, share: f32) -> f32 {
        let aimed = logits[target];
        let max = largest(logits);
        for logit in logits.iter_mut() {
            *logit = exp(*logit - max);
        }
        let sum = lane_sum(logits.len(), |i| logits[i]);
        let factor = share / sum;
        for logit in logits.iter_mut() {
            *logit *= factor;
        }
        logits[target] -= share;
        sum.ln() - (aimed - max)
    }
}
