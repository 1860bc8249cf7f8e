//! The loss of next-token prediction.

/// The natural logarithms of the softmax of one row of logits.
pub fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|logit| (logit - max).exp()).sum();
    logits.iter().map(|logit| logit - max - sum.ln()).collect()
}

/// The loss of each row in nats: `-ln softmax(logits[r, :])[targets[r]]`.
///
/// # Shapes
///
/// - `logits`: `[rows, vocabulary]`, row-major; the result: `[rows]`
pub fn cross_entropy(logits: &[f32], targets: &[u32]) -> Vec<f32> {
    let vocabulary = logits.len() / targets.len();
    assert_eq!(logits.len(), vocabulary * targets.len());
    logits
        .chunks_exact(vocabulary)
        .zip(targets)
        .map(|(row, target)| -log_softmax(row)[*target as usize])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_cost_the_logarithm_of_their_number() {
        let losses = cross_entropy(&[3.0; 8], &[1, 2]);
        assert!(losses.iter().all(|loss| (loss - 4f32.ln()).abs() < 1e-6));
    }

    #[test]
    fn a_certain_target_costs_nothing() {
        assert_eq!(cross_entropy(&[100.0, 0.0, 0.0], &[0]), [0.0]);
    }
}
