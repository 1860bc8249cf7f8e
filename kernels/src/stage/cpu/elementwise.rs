//! Norm, gate, softmax and rotation over slices.
//!
//! Additions and multiplications only, in a fixed order: no library's exponential, so every machine has the same bits.

use crate::model::Frequencies;

/// Scales each row to unit root mean square, then each channel by its gain; see the reference's `rms_norm`.
pub(super) fn rms_norm(out: &mut [f32], x: &[f32], gain: &[f32], epsilon: f32) {
    let hidden = gain.len();
    for (out, x) in out.chunks_exact_mut(hidden).zip(x.chunks_exact(hidden)) {
        let squares = sum_of(x, |x| x * x);
        let scale = 1.0 / (squares / hidden as f32 + epsilon).sqrt();
        for ((out, x), gain) in out.iter_mut().zip(x).zip(gain) {
            *out = gain * (x * scale);
        }
    }
}

/// `gate[i] ← gate[i] · sigmoid(gate[i]) · up[i]`.
pub(super) fn swiglu(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp(-*gate)) * up;
    }
}

/// Makes scores a distribution, in place.
pub(super) fn softmax(scores: &mut [f32]) {
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in scores.chunks(16) {
        for (lane, score) in lanes.iter_mut().zip(chunk) {
            *lane = if *score > *lane { *score } else { *lane };
        }
    }
    let max = lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for score in scores.iter_mut() {
        *score = exp(*score - max);
    }
    let share = 1.0 / sum_of(scores, |score| score);
    for score in scores.iter_mut() {
        *score *= share;
    }
}

/// `x[i] ← x[i] + y[i]`.
pub(super) fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// Cosines and sines of `count` positions from `position`, each `[count, head_dim / 2]`.
pub(super) fn turns(frequencies: &Frequencies, position: usize, count: usize) -> (Vec<f32>, Vec<f32>) {
    let pairs = frequencies.pairs();
    let (mut cosines, mut sines) = (vec![0.0; count * pairs], vec![0.0; count * pairs]);
    let rows = cosines.chunks_exact_mut(pairs).zip(sines.chunks_exact_mut(pairs));
    for (offset, (cosines, sines)) in rows.enumerate() {
        frequencies.turn(position + offset, cosines, sines);
    }
    (cosines, sines)
}

/// Rotates the pairs `(i, i + head_dim / 2)` of one head.
pub(super) fn rotate(head: &mut [f32], cosines: &[f32], sines: &[f32]) {
    let (first, second) = head.split_at_mut(cosines.len());
    for (((a, b), cosine), sine) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
        (*a, *b) = (*a * cosine - *b * sine, *b * cosine + *a * sine);
    }
}

/// A sum in 16 lanes that are folded in halves.
fn sum_of(x: &[f32], value: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    for chunk in x.chunks(16) {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += value(*x);
        }
    }
    let mut width = 8;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// eˣ to about two units in the last place, without a branch, so that it runs in lanes.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Beyond these the result is zero or infinite in all but name.
    let x = x.clamp(-87.0, 88.0);
    // Adding and taking away 1.5 · 2²³ rounds to a whole number.
    const ROUND: f32 = 12_582_912.0;
    let whole = x * core::f32::consts::LOG2_E + ROUND;
    let power = whole.to_bits() << 23;
    let whole = whole - ROUND;
    // ln 2 in two pieces, so that the rest is exact.
    let rest = x - whole * 0.693_359_4 + whole * 2.121_944_4e-4;
    let mut series = 1.987_569_1e-4;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        series = series * rest + coefficient;
    }
    let fraction = series * rest * rest + rest + 1.0;
    f32::from_bits(fraction.to_bits().wrapping_add(power))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_right_to_a_few_units_in_the_last_place() {
        for step in -8_600..8_700 {
            let x = step as f32 * 0.01 + 0.003;
            let right = f64::from(x).exp();
            assert!(
                (f64::from(exp(x)) / right - 1.0).abs() < 4e-7,
                "{x}: {} {right}",
                exp(x)
            );
        }
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn norm_and_gate_meet_the_plain_loops() {
        let x: Vec<f32> = (0..74).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        let gain: Vec<f32> = (0..37).map(|i| 1.0 + i as f32 * 0.01).collect();
        let (mut out, mut right) = (vec![0.0; 74], vec![0.0; 74]);
        rms_norm(&mut out, &x, &gain, 1e-5);
        polder_reference::rms_norm(&mut right, &x, &gain, 1e-5);
        assert!(out.iter().zip(&right).all(|(a, b)| (a - b).abs() < 1e-5));
        polder_reference::swiglu(&mut right, &x, &out);
        let mut gate = x.clone();
        swiglu(&mut gate, &out);
        assert!(gate.iter().zip(&right).all(|(a, b)| (a - b).abs() < 1e-5));
    }
}
