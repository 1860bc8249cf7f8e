//! Rotary positions: frequencies by the rules of the public checkpoints, and the rotation.

use core::f64::consts::PI;

/// How the frequencies of a longer context follow from those of training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rope {
    /// As trained.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// How much longer.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// How much longer.
        factor: f64,
        /// Wavelengths above `original / low_frequency` are divided.
        low_frequency: f64,
        /// Wavelengths below `original / high_frequency` are kept.
        high_frequency: f64,
        /// Positions seen in training.
        original: f64,
    },
    /// YaRN: a ramp over dimensions, and a factor on cosine and sine.
    Yarn {
        /// How much longer.
        factor: f64,
        /// Positions seen in training.
        original: f64,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is divided.
        beta_slow: f64,
        /// The factor on cosine and sine.
        attention_factor: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
}

/// What a rotation needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Frequencies {
    /// Radians per position of each pair `(i, i + head_dim / 2)`.
    pub radians: Vec<f32>,
    /// The factor on cosine and sine.
    pub scale: f32,
}

/// The frequencies of `head_dim / 2` pairs with base `theta`.
pub fn frequencies(rope: Rope, theta: f64, head_dim: usize) -> Frequencies {
    let plain = |pair: usize| theta.powf(-((2 * pair) as f64) / head_dim as f64);
    let mut scale = 1.0;
    let radians = (0..head_dim / 2)
        .map(|pair| match rope {
            Rope::Default => plain(pair),
            Rope::Linear { factor } => plain(pair) / factor,
            Rope::Llama3 {
                factor,
                low_frequency,
                high_frequency,
                original,
            } => {
                let wavelength = 2.0 * PI / plain(pair);
                if wavelength > original / low_frequency {
                    plain(pair) / factor
                } else if wavelength < original / high_frequency {
                    plain(pair)
                } else {
                    let smooth = (original / wavelength - low_frequency) / (high_frequency - low_frequency);
                    (1.0 - smooth) * plain(pair) / factor + smooth * plain(pair)
                }
            }
            Rope::Yarn {
                factor,
                original,
                beta_fast,
                beta_slow,
                attention_factor,
                truncate,
            } => {
                scale = attention_factor;
                let dimension =
                    |rotations: f64| head_dim as f64 * (original / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln());
                let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                let ramp = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                plain(pair) / factor * ramp + plain(pair) * (1.0 - ramp)
            }
        })
        .map(|radians| radians as f32)
        .collect();
    Frequencies {
        radians,
        scale: scale as f32,
    }
}

/// Rotates the pairs `(i, i + head_dim / 2)` of one head at `position`, in place.
pub fn rotate(head: &mut [f32], position: usize, frequencies: &Frequencies) {
    let half = frequencies.radians.len();
    assert_eq!(head.len(), 2 * half);
    let (first, second) = head.split_at_mut(half);
    for ((a, b), radians) in first.iter_mut().zip(second).zip(&frequencies.radians) {
        let angle = f64::from(position as f32 * radians);
        let (sine, cosine) = (
            angle.sin() as f32 * frequencies.scale,
            angle.cos() as f32 * frequencies.scale,
        );
        (*a, *b) = (*a * cosine - *b * sine, *b * cosine + *a * sine);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn position_zero_turns_nothing() {
        let mut head = [1.0, 2.0, 3.0, 4.0];
        rotate(&mut head, 0, &frequencies(Rope::Default, 10_000.0, 4));
        assert_eq!(head, [1.0, 2.0, 3.0, 4.0]);
    }

    #[test]
    fn the_first_pair_turns_by_one_radian_a_position() {
        let mut head = [1.0, 0.0, 0.0, 0.0];
        rotate(&mut head, 2, &frequencies(Rope::Default, 10_000.0, 4));
        assert!((head[0] - 2f32.cos()).abs() < 1e-7);
        assert!((head[2] - 2f32.sin()).abs() < 1e-7);
    }

    #[test]
    fn linear_scaling_slows_every_pair_alike() {
        let plain = frequencies(Rope::Default, 100.0, 4);
        let slow = frequencies(Rope::Linear { factor: 4.0 }, 100.0, 4);
        assert_eq!(plain.radians, [1.0, 0.1]);
        assert_eq!(slow.radians, [0.25, 0.025]);
    }

    #[test]
    fn llama3_keeps_short_waves_and_slows_long_ones() {
        let rope = Rope::Llama3 {
            factor: 8.0,
            low_frequency: 1.0,
            high_frequency: 4.0,
            original: 64.0,
        };
        let scaled = frequencies(rope, 10_000.0, 8);
        // Wavelengths 6.3, 63, 628, 6283: kept, on the ramp, and divided twice.
        assert_eq!(scaled.radians[0], 1.0);
        assert!(scaled.radians[1] > 0.0125 && scaled.radians[1] < 0.1);
        assert!((scaled.radians[2] - 0.01 / 8.0).abs() < 1e-9);
        assert!((scaled.radians[3] - 0.001 / 8.0).abs() < 1e-10);
    }
}
