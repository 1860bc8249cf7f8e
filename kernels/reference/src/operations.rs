//! Products, norms and the gate.

/// Multiplies by a linear layer's weight: `out[r, o] = Σ_i x[r, i] · weight[o, i]`.
///
/// # Shapes
///
/// - `x`: `[rows, inputs]`, `weight`: `[outputs, inputs]`, `out`: `[rows, outputs]`, row-major
pub fn matmul(out: &mut [f32], x: &[f32], weight: &[f32], inputs: usize) {
    let outputs = weight.len() / inputs;
    assert_eq!(weight.len(), outputs * inputs);
    assert_eq!(x.len() / inputs, out.len() / outputs);
    for (out, x) in out.chunks_exact_mut(outputs).zip(x.chunks_exact(inputs)) {
        for (out, weight) in out.iter_mut().zip(weight.chunks_exact(inputs)) {
            let mut sum = 0.0;
            for (x, weight) in x.iter().zip(weight) {
                sum += x * weight;
            }
            *out = sum;
        }
    }
}

/// Scales each row to unit root mean square, then each channel by a learned gain.
///
/// `out[r, h] = gain[h] · x[r, h] / √(mean(x[r, :]²) + epsilon)`
///
/// # Shapes
///
/// - `x`, `out`: `[rows, hidden]`, row-major
/// - `gain`: `[hidden]`
pub fn rms_norm(out: &mut [f32], x: &[f32], gain: &[f32], epsilon: f32) {
    let hidden = gain.len();
    assert_eq!(out.len(), x.len());
    for (out, x) in out.chunks_exact_mut(hidden).zip(x.chunks_exact(hidden)) {
        let mut squares = 0.0;
        for x in x {
            squares += x * x;
        }
        let scale = 1.0 / (squares / hidden as f32 + epsilon).sqrt();
        for ((out, x), gain) in out.iter_mut().zip(x).zip(gain) {
            *out = gain * (x * scale);
        }
    }
}

/// The gated activation: `out[i] = gate[i] · sigmoid(gate[i]) · up[i]`.
pub fn swiglu(out: &mut [f32], gate: &[f32], up: &[f32]) {
    assert_eq!(out.len(), gate.len());
    assert_eq!(out.len(), up.len());
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + (-gate).exp()) * up;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matmul_takes_rows_of_the_weight() {
        let mut out = [0.0; 4];
        matmul(&mut out, &[1.0, 2.0, 3.0, 4.0], &[1.0, 1.0, 0.0, -1.0], 2);
        assert_eq!(out, [3.0, -2.0, 7.0, -4.0]);
    }

    #[test]
    fn rms_norm_of_a_constant_row_is_the_gain() {
        let mut out = [0.0; 4];
        rms_norm(&mut out, &[4.0; 4], &[1.0, 2.0, 3.0, -1.0], 0.0);
        assert_eq!(out, [1.0, 2.0, 3.0, -1.0]);
    }

    #[test]
    fn swiglu_of_a_closed_gate_is_nothing() {
        let mut out = [9.0; 3];
        swiglu(&mut out, &[0.0, 100.0, -100.0], &[5.0, 2.0, 2.0]);
        assert_eq!(out[0], 0.0);
        assert_eq!(out[1], 200.0);
        assert!(out[2].abs() < 1e-30);
    }
}
