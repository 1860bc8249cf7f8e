//! A Hugging Face `config.json`, read into a shape that cannot be wrong.
//!
//! Both spellings of rotary positions are read: `rope_theta` with `rope_scaling`, and `rope_parameters`. Whatever would
//! change the numbers and is not implemented is refused by name; nothing is ignored in silence.

use serde_json::{Map, Value};
use thiserror::Error;

/// Why a `config.json` is not a model that runs here.
#[derive(Debug, Clone, Error, PartialEq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum ConfigError {
    #[error("the model's configuration is not a JSON object: {reason}")]
    NotJson { reason: String },
    #[error("the model's configuration lacks `{key}`")]
    Missing { key: &'static str },
    #[error("`{key}` of the model's configuration is {value}, and must be {must}")]
    Wrong {
        key: &'static str,
        value: String,
        must: &'static str,
    },
    #[error("{key} `{value}` is not implemented; implemented: {implemented}")]
    Unsupported {
        key: &'static str,
        value: String,
        implemented: &'static str,
    },
}

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

/// A Llama, checked: every size is positive and within its limit, heads divide evenly, `head_dim` is even.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Token ids are below this.
    pub vocabulary: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the gated layer.
    pub intermediate: usize,
    /// Blocks.
    pub blocks: u32,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Epsilon of the norms.
    pub epsilon: f32,
    /// Base of the rotary frequencies.
    pub theta: f64,
    /// Scaling of the rotary frequencies.
    pub rope: Rope,
    /// Whether the output projection is the embedding.
    pub tied: bool,
    /// The longest context that the model was made for, in tokens.
    pub context_tokens_max: u32,
    /// Standard deviation of initial weights.
    pub initializer_range: f32,
}

// No open model comes near these; they keep products of sizes within 64 bits and refuse nonsense early.
const VOCABULARY_MAX: u64 = 1 << 22;
const WIDTH_MAX: u64 = 1 << 20;
const BLOCKS_MAX: u64 = 1_024;
const HEADS_MAX: u64 = 4_096;
const HEAD_DIM_MAX: u64 = 4_096;
const CONTEXT_MAX: u64 = 1 << 26;

impl Config {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] names the key that is missing, wrong or not implemented.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let value: Value = serde_json::from_str(text).map_err(|error| ConfigError::NotJson {
            reason: error.to_string(),
        })?;
        let Value::Object(object) = value else {
            return Err(ConfigError::NotJson {
                reason: "another kind of value".to_owned(),
            });
        };
        let keys = Keys(&object);
        keys.refuse_other_families()?;

        let hidden = keys.size("hidden_size", WIDTH_MAX)?;
        let heads = keys.size("num_attention_heads", HEADS_MAX)?;
        let kv_heads = keys.optional_size("num_key_value_heads", HEADS_MAX)?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            return Err(keys.wrong("num_key_value_heads", "a divisor of num_attention_heads"));
        }
        let head_dim = match keys.optional_size("head_dim", HEAD_DIM_MAX)? {
            Some(head_dim) => head_dim,
            None if hidden % heads == 0 => hidden / heads,
            None => return Err(keys.wrong("hidden_size", "a multiple of num_attention_heads, or head_dim given")),
        };
        if head_dim % 2 != 0 {
            return Err(keys.wrong("head_dim", "even"));
        }
        let context = keys
            .optional_size("max_position_embeddings", CONTEXT_MAX)?
            .unwrap_or(2_048);
        let (theta, rope) = keys.rope(context)?;
        let epsilon = keys.number("rms_norm_eps")?.unwrap_or(1e-6);
        if !(0.0..1.0).contains(&epsilon) {
            return Err(keys.wrong("rms_norm_eps", "a number from 0 to 1"));
        }
        let initializer_range = keys.number("initializer_range")?.unwrap_or(0.02);
        if !(0.0..=10.0).contains(&initializer_range) {
            return Err(keys.wrong("initializer_range", "a number from 0 to 10"));
        }
        Ok(Self {
            vocabulary: keys.size("vocab_size", VOCABULARY_MAX)?,
            hidden,
            intermediate: keys.size("intermediate_size", WIDTH_MAX)?,
            // Within `BLOCKS_MAX`.
            blocks: keys.size("num_hidden_layers", BLOCKS_MAX)? as u32,
            heads,
            kv_heads,
            head_dim,
            epsilon: epsilon as f32,
            theta,
            rope,
            tied: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            // Within `CONTEXT_MAX`.
            context_tokens_max: context as u32,
            initializer_range: initializer_range as f32,
        })
    }
}

struct Keys<'a>(&'a Map<String, Value>);

impl Keys<'_> {
    fn value(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &'static str, must: &'static str) -> ConfigError {
        let value = self.value(key).map_or_else(|| "absent".to_owned(), Value::to_string);
        ConfigError::Wrong { key, value, must }
    }

    fn unsupported(&self, key: &'static str, value: &Value, implemented: &'static str) -> ConfigError {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        ConfigError::Unsupported {
            key,
            value,
            implemented,
        }
    }

    fn refuse_other_families(&self) -> Result<(), ConfigError> {
        let family = self
            .value("model_type")
            .ok_or(ConfigError::Missing { key: "model_type" })?;
        if family != "llama" {
            return Err(self.unsupported("model_type", family, "llama"));
        }
        let Some(architectures) = self.value("architectures") else {
            return self.refuse_unknown_features();
        };
        let only_llama = architectures
            .as_array()
            .is_some_and(|names| names.iter().all(|name| name == "LlamaForCausalLM"));
        if !only_llama {
            return Err(self.unsupported("architectures", architectures, "LlamaForCausalLM"));
        }
        self.refuse_unknown_features()
    }

    fn refuse_unknown_features(&self) -> Result<(), ConfigError> {
        if let Some(activation) = self.value("hidden_act").filter(|name| *name != "silu") {
            return Err(self.unsupported("hidden_act", activation, "silu"));
        }
        for key in ["attention_bias", "mlp_bias"] {
            if let Some(bias) = self.value(key).filter(|value| **value != Value::Bool(false)) {
                return Err(self.unsupported(key, bias, "false"));
            }
        }
        for key in ["quantization_config", "sliding_window"] {
            if let Some(value) = self.value(key) {
                return Err(self.unsupported(key, value, "absent or null"));
            }
        }
        match self.number("partial_rotary_factor")? {
            Some(share) if share != 1.0 => {
                let share = Value::from(share);
                Err(self.unsupported("partial_rotary_factor", &share, "1"))
            }
            _ => Ok(()),
        }
    }

    fn size(&self, key: &'static str, max: u64) -> Result<usize, ConfigError> {
        self.optional_size(key, max)?.ok_or(ConfigError::Missing { key })
    }

    fn optional_size(&self, key: &'static str, max: u64) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        match value.as_u64() {
            Some(size) if (1..=max).contains(&size) => Ok(usize::try_from(size).ok()),
            _ => Err(self.wrong(key, "a positive whole number within reason")),
        }
    }

    fn number(&self, key: &'static str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        match value.as_f64().filter(|number| number.is_finite()) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(key, "a number")),
        }
    }

    fn flag(&self, key: &'static str) -> Result<Option<bool>, ConfigError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    fn rope(&self, context: usize) -> Result<(f64, Rope), ConfigError> {
        let nothing = Map::new();
        let (scaling, new) = match (self.value("rope_parameters"), self.value("rope_scaling")) {
            (Some(Value::Object(parameters)), _) => (parameters, true),
            (Some(_), _) => return Err(self.wrong("rope_parameters", "an object")),
            (None, Some(Value::Object(scaling))) => (scaling, false),
            (None, Some(_)) => return Err(self.wrong("rope_scaling", "an object or null")),
            (None, None) => (&nothing, false),
        };
        let inner = Keys(scaling);
        let theta = match inner.number("rope_theta")? {
            Some(theta) if new => theta,
            _ => self.number("rope_theta")?.unwrap_or(10_000.0),
        };
        if !(theta > 1.0 && theta < 1e15) {
            return Err(self.wrong("rope_theta", "above 1"));
        }
        // Before `rope_type` it was called `type`.
        let kind = inner.value("rope_type").or_else(|| inner.value("type"));
        let Some(kind) = kind else {
            return match scaling.is_empty() || new {
                true => Ok((theta, Rope::Default)),
                false => Err(ConfigError::Missing { key: "rope_type" }),
            };
        };
        let rope = match kind.as_str() {
            Some("default") => Rope::Default,
            Some("linear") => Rope::Linear {
                factor: inner.positive("factor")?,
            },
            Some("llama3") => inner.llama3()?,
            Some("yarn") => inner.yarn(context)?,
            _ => return Err(self.unsupported("rope_type", kind, "default, linear, llama3, yarn")),
        };
        Ok((theta, rope))
    }

    fn positive(&self, key: &'static str) -> Result<f64, ConfigError> {
        match self.number(key)? {
            Some(number) if number > 0.0 && number < 1e12 => Ok(number),
            Some(_) => Err(self.wrong(key, "positive")),
            None => Err(ConfigError::Missing { key }),
        }
    }

    fn llama3(&self) -> Result<Rope, ConfigError> {
        let (low, high) = (self.positive("low_freq_factor")?, self.positive("high_freq_factor")?);
        if high <= low {
            return Err(self.wrong("high_freq_factor", "above low_freq_factor"));
        }
        Ok(Rope::Llama3 {
            factor: self.positive("factor")?,
            low_frequency: low,
            high_frequency: high,
            original: self.positive("original_max_position_embeddings")?,
        })
    }

    fn yarn(&self, context: usize) -> Result<Rope, ConfigError> {
        let factor = self.positive("factor")?;
        let scale = |of: f64| match factor > 1.0 {
            true => 0.1 * of * factor.ln() + 1.0,
            false => 1.0,
        };
        let attention_factor = match self.number("attention_factor")? {
            Some(given) => given,
            None => match (self.number("mscale")?, self.number("mscale_all_dim")?) {
                (Some(one), Some(all)) if one != 0.0 && all != 0.0 => scale(one) / scale(all),
                _ => scale(1.0),
            },
        };
        let given = |key, otherwise| match self.value(key) {
            Some(_) => self.positive(key),
            None => Ok(otherwise),
        };
        Ok(Rope::Yarn {
            factor,
            original: given("original_max_position_embeddings", context as f64)?,
            beta_fast: given("beta_fast", 32.0)?,
            beta_slow: given("beta_slow", 1.0)?,
            attention_factor,
            truncate: self.flag("truncate")?.unwrap_or(true),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = include_str!("../../tests/golden/llama_rope_llama3/config.json");
    const NEW: &str = include_str!("../../tests/golden/llama_rope_llama3/config.v5.json");

    #[test]
    fn both_spellings_are_the_same_model() {
        let old = Config::from_json(OLD).unwrap();
        assert_eq!(Ok(&old), Config::from_json(NEW).as_ref());
        assert_eq!(old.head_dim, 16);
        assert!(matches!(old.rope, Rope::Llama3 { factor: 8.0, .. }));
    }

    #[test]
    fn another_family_is_refused_by_name() {
        let text = OLD.replace("\"llama\"", "\"mixtral\"");
        let error = Config::from_json(&text).unwrap_err().to_string();
        assert_eq!(error, "model_type `mixtral` is not implemented; implemented: llama");
    }

    #[test]
    fn what_would_change_the_numbers_is_refused_by_name() {
        for (from, to, name) in [
            ("\"silu\"", "\"gelu\"", "hidden_act `gelu`"),
            (
                "\"attention_bias\": false",
                "\"attention_bias\": true",
                "attention_bias `true`",
            ),
            (
                "\"rope_type\": \"llama3\"",
                "\"rope_type\": \"longrope\"",
                "rope_type `longrope`",
            ),
            (
                "\"LlamaForCausalLM\"",
                "\"LlamaForSequenceClassification\"",
                "architectures",
            ),
        ] {
            let error = Config::from_json(&OLD.replace(from, to)).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn sizes_beyond_reason_are_refused() {
        for (from, to) in [
            ("\"hidden_size\": 64", "\"hidden_size\": 0"),
            ("\"hidden_size\": 64", "\"hidden_size\": 99999999999"),
            ("\"head_dim\": 16", "\"head_dim\": 15"),
            ("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3"),
            ("\"num_hidden_layers\": 3", "\"num_hidden_layers\": -3"),
        ] {
            let error = Config::from_json(&OLD.replace(from, to)).unwrap_err();
            assert!(matches!(error, ConfigError::Wrong { .. }), "{error}");
        }
    }
}
