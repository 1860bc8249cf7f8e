//! Rotary positions: frequencies by the rules of the public checkpoints, and cosines and sines of positions.

use core::f64::consts::PI;

use super::{Config, Rope};

/// What a rotation of one head needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Frequencies {
    /// Radians per position of each pair `(i, i + head_dim / 2)`.
    radians: Vec<f32>,
    /// The factor on cosine and sine.
    scale: f32,
}

impl Frequencies {
    /// The frequencies of a model.
    pub fn of(config: &Config) -> Self {
        let dimensions = config.head_dim as f64;
        let plain = |pair: usize| config.theta.powf(-((2 * pair) as f64) / dimensions);
        let scale = match config.rope {
            Rope::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        };
        let radians = (0..config.head_dim / 2)
            .map(|pair| scaled(config, pair, plain(pair)) as f32)
            .collect();
        Self {
            radians,
            scale: scale as f32,
        }
    }

    /// Pairs of a head.
    pub fn pairs(&self) -> usize {
        self.radians.len()
    }

    /// Writes cosine and sine of every pair at `position`, each `[head_dim / 2]`.
    ///
    /// The angle is an f32 product, as in the implementations that trained the models.
    pub fn turn(&self, position: usize, cosines: &mut [f32], sines: &mut [f32]) {
        for ((cosine, sine), radians) in cosines.iter_mut().zip(sines).zip(&self.radians) {
            let angle = f64::from(position as f32 * radians);
            *cosine = angle.cos() as f32 * self.scale;
            *sine = angle.sin() as f32 * self.scale;
        }
    }
}

fn scaled(config: &Config, pair: usize, plain: f64) -> f64 {
    match config.rope {
        Rope::Default => plain,
        Rope::Linear { factor } => plain / factor,
        Rope::Llama3 {
            factor,
            low_frequency,
            high_frequency,
            original,
        } => {
            let wavelength = 2.0 * PI / plain;
            if wavelength > original / low_frequency {
                plain / factor
            } else if wavelength < original / high_frequency {
                plain
            } else {
                let smooth = (original / wavelength - low_frequency) / (high_frequency - low_frequency);
                (1.0 - smooth) * plain / factor + smooth * plain
            }
        }
        Rope::Yarn {
            factor,
            original,
            beta_fast,
            beta_slow,
            truncate,
            ..
        } => {
            let dimensions = config.head_dim as f64;
            let dimension =
                |rotations: f64| dimensions * (original / (rotations * 2.0 * PI)).ln() / (2.0 * config.theta.ln());
            let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            (low, high) = (low.max(0.0), high.min(dimensions - 1.0));
            if low == high {
                high += 0.001;
            }
            let ramp = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
            plain / factor * ramp + plain * (1.0 - ramp)
        }
    }
}
