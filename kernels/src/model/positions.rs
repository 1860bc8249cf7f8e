//! Rotary positions: what a configuration says of them, and cosines and sines that follow.

use core::f64::consts::PI;

use serde_json::{Map, Value};

use super::ConfigError;
use super::describe::QueryScale;
use super::keys::Keys;

/// How rotary frequencies of a longer context follow from those of training.
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

/// A rotation of the first `dimensions` of a head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rotary {
    /// Base of the frequencies.
    pub theta: f64,
    /// Scaling of the frequencies.
    pub rope: Rope,
    /// Dimensions that turn; even.
    pub dimensions: usize,
    /// Whether pairs are `(2i, 2i + 1)`; otherwise `(i, i + dimensions / 2)`.
    pub interleaved: bool,
}

/// What a rotation of one head needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Frequencies {
    /// Radians per position of each pair.
    radians: Vec<f32>,
    /// The factor on cosine and sine.
    scale: f32,
}

impl Frequencies {
    /// The frequencies of a rotation.
    pub fn of(rotary: &Rotary) -> Self {
        let scale = match rotary.rope {
            Rope::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        };
        let radians = (0..rotary.dimensions / 2).map(|pair| rotary.radians(pair) as f32);
        Self {
            radians: radians.collect(),
            scale: scale as f32,
        }
    }

    /// Pairs of a head.
    pub fn pairs(&self) -> usize {
        self.radians.len()
    }

    /// Writes cosine and sine of every pair at `position`, each `[dimensions / 2]`.
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

impl Rotary {
    fn radians(&self, pair: usize) -> f64 {
        let dimensions = self.dimensions as f64;
        let plain = self.theta.powf(-((2 * pair) as f64) / dimensions);
        match self.rope {
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
                let dimension =
                    |rotations: f64| dimensions * (original / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
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
}

/// The keys about positions, in either spelling: `rope_theta` with `rope_scaling`, or `rope_parameters`.
#[derive(Debug, Clone, Copy)]
pub(super) struct RopeKeys<'a> {
    outer: Keys<'a>,
    inner: Keys<'a>,
    context: usize,
    theta: f64,
}

static NOTHING: std::sync::LazyLock<Map<String, Value>> = std::sync::LazyLock::new(Map::new);

impl<'a> RopeKeys<'a> {
    /// Finds them. `context` is the model's longest context, `theta` its family's base.
    pub(super) fn find(keys: Keys<'a>, context: usize, theta: f64) -> Result<Self, ConfigError> {
        let inner = match (keys.value("rope_parameters"), keys.value("rope_scaling")) {
            (Some(Value::Object(parameters)), _) => parameters,
            (Some(_), _) => return Err(keys.wrong("rope_parameters", "an object")),
            (None, Some(Value::Object(scaling))) => scaling,
            (None, Some(_)) => return Err(keys.wrong("rope_scaling", "an object or null")),
            (None, None) => &NOTHING,
        };
        Ok(Self::of(keys, inner, context, theta))
    }

    /// Those of one kind of layer, whose parameters are `inner`.
    pub(super) fn of(outer: Keys<'a>, inner: &'a Map<String, Value>, context: usize, theta: f64) -> Self {
        Self {
            outer,
            inner: Keys(inner),
            context,
            theta,
        }
    }

    /// The rotation of whole heads of `head_dim`.
    pub(super) fn rotary(&self, head_dim: usize) -> Result<Rotary, ConfigError> {
        for keys in [self.inner, self.outer] {
            if let Some(share) = keys.value("partial_rotary_factor")
                && share.as_f64() != Some(1.0)
            {
                return Err(keys.unsupported("partial_rotary_factor", share, "1"));
            }
        }
        self.rotary_of(head_dim)
    }

    /// The rotation of heads of `head_dim`, of which `share` turn unless the keys say otherwise.
    pub(super) fn partial_rotary(&self, head_dim: usize, share: f64) -> Result<Rotary, ConfigError> {
        let share = match self.inner.number("partial_rotary_factor")? {
            Some(share) => share,
            None => self.outer.number("partial_rotary_factor")?.unwrap_or(share),
        };
        let dimensions = (head_dim as f64 * share) as usize;
        if !(share > 0.0 && share <= 1.0) || dimensions == 0 || !dimensions.is_multiple_of(2) {
            let key = "partial_rotary_factor";
            return Err(self.outer.wrong(key, "a share from 0 to 1 of head_dim that is even"));
        }
        self.rotary_of(dimensions)
    }

    /// The rotation of exactly `dimensions`.
    pub(super) fn rotary_of(&self, dimensions: usize) -> Result<Rotary, ConfigError> {
        let theta = match self.inner.number("rope_theta")? {
            Some(theta) => theta,
            None => self.outer.number("rope_theta")?.unwrap_or(self.theta),
        };
        if !(theta > 1.0 && theta < 1e15) {
            return Err(self.outer.wrong("rope_theta", "above 1"));
        }
        Ok(Rotary {
            theta,
            rope: self.rope()?,
            dimensions,
            interleaved: false,
        })
    }

    /// The factor on queries that grows with the position.
    pub(super) fn query_scale(&self) -> Result<Option<QueryScale>, ConfigError> {
        let Some(beta) = self.inner.number("llama_4_scaling_beta")? else {
            return Ok(None);
        };
        Ok(Some(QueryScale {
            beta: beta as f32,
            original: self.original()? as f32,
        }))
    }

    /// `(0.1 · mscale_all_dim · ln factor + 1)²`, which DeepSeek's YaRN multiplies scores by.
    pub(super) fn latent_scale(&self) -> Result<f64, ConfigError> {
        if self.rope()? == Rope::Default {
            return Ok(1.0);
        }
        let all = self.inner.number("mscale_all_dim")?.unwrap_or(0.0);
        match all == 0.0 {
            true => Ok(1.0),
            false => Ok(magnitude(self.factor()?, all).powi(2)),
        }
    }

    fn rope(&self) -> Result<Rope, ConfigError> {
        // Before `rope_type` it was called `type`.
        let kind = self.inner.value("rope_type").or_else(|| self.inner.value("type"));
        let Some(kind) = kind else {
            let scaled = ["factor", "low_freq_factor", "short_factor", "beta_fast"];
            return match scaled.iter().any(|key| self.inner.value(key).is_some()) {
                true => Err(ConfigError::Missing { key: "rope_type" }),
                false => Ok(Rope::Default),
            };
        };
        match kind.as_str() {
            Some("default") => Ok(Rope::Default),
            Some("linear") => Ok(Rope::Linear {
                factor: self.inner.positive("factor")?,
            }),
            Some("llama3") => self.llama3(),
            Some("yarn") => self.yarn(),
            _ => {
                let implemented = "default, linear, llama3, yarn";
                Err(self.inner.unsupported("rope_type", kind, implemented))
            }
        }
    }

    fn llama3(&self) -> Result<Rope, ConfigError> {
        let keys = self.inner;
        let (low, high) = (keys.positive("low_freq_factor")?, keys.positive("high_freq_factor")?);
        if high <= low {
            return Err(keys.wrong("high_freq_factor", "above low_freq_factor"));
        }
        Ok(Rope::Llama3 {
            factor: keys.positive("factor")?,
            low_frequency: low,
            high_frequency: high,
            original: self.original()?,
        })
    }

    fn yarn(&self) -> Result<Rope, ConfigError> {
        let keys = self.inner;
        let factor = self.factor()?;
        let attention_factor = match keys.number("attention_factor")? {
            Some(given) => given,
            None => match (keys.number("mscale")?, keys.number("mscale_all_dim")?) {
                (Some(one), Some(all)) if one != 0.0 && all != 0.0 => magnitude(factor, one) / magnitude(factor, all),
                _ => magnitude(factor, 1.0),
            },
        };
        Ok(Rope::Yarn {
            factor,
            original: self.original()?,
            beta_fast: keys.optional_positive("beta_fast")?.unwrap_or(32.0),
            beta_slow: keys.optional_positive("beta_slow")?.unwrap_or(1.0),
            attention_factor,
            truncate: keys.flag_or("truncate", true)?,
        })
    }

    fn factor(&self) -> Result<f64, ConfigError> {
        match self.inner.optional_positive("factor")? {
            Some(factor) => Ok(factor),
            None => Ok(self.context as f64 / self.original()?),
        }
    }

    fn original(&self) -> Result<f64, ConfigError> {
        let key = "original_max_position_embeddings";
        // Some configurations keep it beside the rest, and then that one counts.
        let given = match self.outer.optional_positive(key)? {
            Some(given) => Some(given),
            None => self.inner.optional_positive(key)?,
        };
        Ok(given.unwrap_or(self.context as f64))
    }
}

/// YaRN's magnitude of `share`.
fn magnitude(factor: f64, share: f64) -> f64 {
    match factor > 1.0 {
        true => 0.1 * share * factor.ln() + 1.0,
        false => 1.0,
    }
}
