//! Norm, gate, softmax and rotation over slices.
//!
//! Additions and multiplications only, in a fixed order: no library's exponential, so every machine has the same bits.

use crate::model::Frequencies;
use crate::team;

/// Compiles a function for the widest instructions too; they compute the same bits, since nothing is contracted.
macro_rules! widest {
    ($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),* $(,)?) = $body:ident) => {
        $(#[$doc])*
        pub(super) fn $name($($argument: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn wide($($argument: $type),*) {
                    $body($($argument),*)
                }
                #[target_feature(enable = "avx2")]
                fn narrow($($argument: $type),*) {
                    $body($($argument),*)
                }
                if is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the processor has these; AVX-512F comes with each of them.
                    return unsafe { wide($($argument),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has AVX2.
                    return unsafe { narrow($($argument),*) };
                }
            }
            $body($($argument),*)
        }
    };
}

/// Rows of activations that one piece of an elementwise operation takes.
const ROWS_A_PIECE: usize = 8;

/// Scales each row to unit root mean square, then each channel by its gain; see the reference's `rms_norm`.
pub(super) fn rms_norm(out: &mut [f32], x: &[f32], gain: &[f32], epsilon: f32) {
    let part = ROWS_A_PIECE * gain.len();
    team::in_parts(out, part, |index, out| {
        rms_norm_rows(out, &x[index * part..][..out.len()], gain, epsilon);
    });
}

widest! { fn rms_norm_rows(out: &mut [f32], x: &[f32], gain: &[f32], epsilon: f32) = rms_norm_body }

#[inline(always)]
fn rms_norm_body(out: &mut [f32], x: &[f32], gain: &[f32], epsilon: f32) {
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
    const PART: usize = 4_096;
    team::in_parts(gate, PART, |index, gate| {
        swiglu_part(gate, &up[index * PART..][..gate.len()])
    });
}

widest! { fn swiglu_part(gate: &mut [f32], up: &[f32]) = swiglu_body }

#[inline(always)]
fn swiglu_body(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp(-*gate)) * up;
    }
}

widest! {
    /// Makes scores a distribution, in place.
    fn softmax(scores: &mut [f32]) = softmax_body
}

#[inline(always)]
fn softmax_body(scores: &mut [f32]) {
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

/// Takes the mean away, scales to unit variance, then each channel by its gain, and adds a bias.
pub(super) fn layer_norm(out: &mut [f32], x: &[f32], gain: &[f32], bias: &[f32], epsilon: f32) {
    let hidden = gain.len();
    for (out, x) in out.chunks_exact_mut(hidden).zip(x.chunks_exact(hidden)) {
        let mean = sum_of(x, |x| x) / hidden as f32;
        let variance = sum_of(x, |x| (x - mean) * (x - mean)) / hidden as f32;
        let scale = 1.0 / (variance + epsilon).sqrt();
        for (((out, x), gain), bias) in out.iter_mut().zip(x).zip(gain).zip(bias) {
            *out = (x - mean) * scale * gain + bias;
        }
    }
}

/// `x[i] ← x[i] · sigmoid(x[i])`.
pub(super) fn silu(x: &mut [f32]) {
    for x in x {
        *x /= 1.0 + exp(-*x);
    }
}

/// `1 / (1 + e⁻ˣ)`.
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `x[i] ← x[i] / 2 · (1 + tanh(√(2/π) · (x[i] + 0.044715 · x[i]³)))`.
pub(super) fn gelu_tanh(x: &mut [f32]) {
    for x in x {
        let inner = 0.797_884_6 * (*x + 0.044_715 * *x * *x * *x);
        // (1 + tanh y) / 2 is the sigmoid of 2y.
        *x *= sigmoid(2.0 * inner);
    }
}

/// `x[i] ← max(x[i], 0)²`.
pub(super) fn squared_relu(x: &mut [f32]) {
    for x in x {
        let positive = if *x > 0.0 { *x } else { 0.0 };
        *x = positive * positive;
    }
}

/// xIELU: `α₊ x² + β x` above zero, `α₋ (expm1(min(x, ε)) − x) + β x` below (arXiv 2411.13010).
pub(super) fn xielu(x: &mut [f32], alpha_p: f32, alpha_n: f32, beta: f32, epsilon: f32) {
    for x in x {
        let curved = if *x > 0.0 {
            alpha_p * *x * *x
        } else {
            alpha_n * (expm1(if *x < epsilon { *x } else { epsilon }) - *x)
        };
        *x = curved + beta * *x;
    }
}

/// `ln(1 + eˣ)`, without overflow. Parameters and time steps pass here, so it is in f64.
pub(super) fn softplus(x: f32) -> f32 {
    let x = f64::from(x);
    (x.max(0.0) + (-x.abs()).exp().ln_1p()) as f32
}

/// eˣ − 1, exact near zero.
#[inline(always)]
pub(crate) fn expm1(x: f32) -> f32 {
    if x.abs() > 0.35 {
        return exp(x) - 1.0;
    }
    let mut series = 1.984_127e-4;
    for coefficient in [1.388_889e-3, 8.333_334e-3, 4.166_666_8e-2, 0.166_666_67, 0.5, 1.0] {
        series = series * x + coefficient;
    }
    series * x
}

/// Cosines and sines of some positions, for one rotation.
pub(super) struct Turns {
    pairs: usize,
    interleaved: bool,
    /// `[count, pairs]`
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

impl Turns {
    /// Those of `count` positions from `position`.
    pub(super) fn new(frequencies: &Frequencies, interleaved: bool, position: usize, count: usize) -> Self {
        let pairs = frequencies.pairs();
        let (mut cosines, mut sines) = (vec![0.0; count * pairs], vec![0.0; count * pairs]);
        let rows = cosines.chunks_exact_mut(pairs).zip(sines.chunks_exact_mut(pairs));
        for (offset, (cosines, sines)) in rows.enumerate() {
            frequencies.turn(position + offset, cosines, sines);
        }
        Self {
            pairs,
            interleaved,
            cosines,
            sines,
        }
    }

    /// Rotates the first `2 · pairs` elements of one head, `offset` positions after the first.
    pub(super) fn rotate(&self, head: &mut [f32], offset: usize) {
        let at = offset * self.pairs..(offset + 1) * self.pairs;
        let (cosines, sines) = (&self.cosines[at.clone()], &self.sines[at]);
        let head = &mut head[..2 * self.pairs];
        if self.interleaved {
            for ((pair, cosine), sine) in head.chunks_exact_mut(2).zip(cosines).zip(sines) {
                let (a, b) = (pair[0], pair[1]);
                (pair[0], pair[1]) = (a * cosine - b * sine, b * cosine + a * sine);
            }
            return;
        }
        let (first, second) = head.split_at_mut(self.pairs);
        for (((a, b), cosine), sine) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
            (*a, *b) = (*a * cosine - *b * sine, *b * cosine + *a * sine);
        }
    }
}

/// A sum in 16 lanes that are folded in halves.
#[inline(always)]
fn sum_of(x: &[f32], value: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += value(*x);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += value(*x);
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
pub(crate) fn exp(x: f32) -> f32 {
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
    fn small_differences_of_the_exponential_are_exact() {
        for step in -4_000..4_000 {
            let x = step as f32 * 1e-3 + 1e-5;
            let right = f64::from(x).exp_m1();
            assert!(
                (f64::from(expm1(x)) - right).abs() < 4e-7 * right.abs().max(1e-3),
                "{x}"
            );
        }
    }

    #[test]
    fn activations_are_their_formulas() {
        for step in -60..60 {
            let x = f64::from(step) * 0.1 + 0.003;
            let near = |ours: f32, right: f64| assert!((f64::from(ours) - right).abs() < 2e-6 * right.abs().max(1.0));
            let mut own = [x as f32];
            gelu_tanh(&mut own);
            let inner = (2.0 / core::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            near(own[0], 0.5 * x * (1.0 + inner.tanh()));
            let mut own = [x as f32];
            xielu(&mut own, 0.8, 1.3, 0.5, -1e-6);
            let right = if x > 0.0 { 0.8 * x * x } else { 1.3 * (x.exp_m1() - x) };
            near(own[0], right + 0.5 * x);
            near(softplus(x as f32), x.exp().ln_1p());
        }
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
