//! Reading a `config.json`: every key is checked where it is read, and every error names its key.

use serde_json::{Map, Value};

use super::ConfigError;
use super::describe::Activation;

// No open model comes near these; they keep products of sizes within 64 bits and refuse nonsense early.
pub(super) const VOCABULARY_MAX: u64 = 1 << 22;
pub(super) const WIDTH_MAX: u64 = 1 << 20;
pub(super) const BLOCKS_MAX: u64 = 1_024;
pub(super) const HEADS_MAX: u64 = 4_096;
pub(super) const HEAD_DIM_MAX: u64 = 4_096;
pub(super) const CONTEXT_MAX: u64 = 1 << 26;
pub(super) const EXPERTS_MAX: u64 = 4_096;

/// A JSON object whose keys are asked for by name. A key whose value is null is absent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Keys<'a>(pub(super) &'a Map<String, Value>);

impl<'a> Keys<'a> {
    pub(super) fn value(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key is there, be its value null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    pub(super) fn wrong(&self, key: &'static str, must: &'static str) -> ConfigError {
        let value = self.value(key).map_or_else(|| "absent".to_owned(), Value::to_string);
        ConfigError::Wrong { key, value, must }
    }

    pub(super) fn unsupported(&self, key: &'static str, value: &Value, implemented: &'static str) -> ConfigError {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        ConfigError::Unsupported {
            key,
            value,
            implemented,
        }
    }

    /// Refuses a class that is not `class`, such as a classifier with the same blocks.
    pub(super) fn only_class(&self, class: &'static str) -> Result<(), ConfigError> {
        let Some(classes) = self.value("architectures") else {
            return Ok(());
        };
        let only = classes
            .as_array()
            .is_some_and(|names| names.iter().all(|name| name == class));
        match only {
            true => Ok(()),
            false => Err(self.unsupported("architectures", classes, class)),
        }
    }

    /// Refuses values that would change the numbers: each key must be absent or null.
    pub(super) fn must_be_absent(&self, keys: &[&'static str]) -> Result<(), ConfigError> {
        for key in keys {
            if let Some(value) = self.value(key) {
                return Err(self.unsupported(key, value, "absent or null"));
            }
        }
        Ok(())
    }

    /// Refuses values that would change the numbers: each key must be absent or `must`.
    pub(super) fn must_be(&self, key: &'static str, must: bool) -> Result<(), ConfigError> {
        match self.flag(key)? {
            Some(found) if found != must => {
                let implemented = if must { "true" } else { "false" };
                Err(self.unsupported(key, &Value::Bool(found), implemented))
            }
            _ => Ok(()),
        }
    }

    /// Refuses a text that is not one of `implemented`.
    pub(super) fn one_of(&self, key: &'static str, implemented: &'static [&'static str]) -> Result<(), ConfigError> {
        match self.value(key) {
            Some(value) if !implemented.iter().any(|known| value == known) => {
                let list = implemented.first().copied().unwrap_or_default();
                Err(self.unsupported(key, value, list))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn size(&self, key: &'static str, max: u64) -> Result<usize, ConfigError> {
        self.optional_size(key, max)?.ok_or(ConfigError::Missing { key })
    }

    pub(super) fn size_or(&self, key: &'static str, max: u64, otherwise: usize) -> Result<usize, ConfigError> {
        Ok(self.optional_size(key, max)?.unwrap_or(otherwise))
    }

    pub(super) fn optional_size(&self, key: &'static str, max: u64) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        match value.as_u64() {
            Some(size) if (1..=max).contains(&size) => Ok(usize::try_from(size).ok()),
            _ => Err(self.wrong(key, "a positive whole number within reason")),
        }
    }

    /// As [`Keys::size_or`], where zero means something.
    pub(super) fn count_or(&self, key: &'static str, max: u64, otherwise: usize) -> Result<usize, ConfigError> {
        match self.value(key) {
            Some(value) if value.as_u64() == Some(0) => Ok(0),
            _ => self.size_or(key, max, otherwise),
        }
    }

    pub(super) fn number(&self, key: &'static str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        match value.as_f64().filter(|number| number.is_finite()) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(key, "a number")),
        }
    }

    pub(super) fn positive(&self, key: &'static str) -> Result<f64, ConfigError> {
        self.optional_positive(key)?.ok_or(ConfigError::Missing { key })
    }

    pub(super) fn optional_positive(&self, key: &'static str) -> Result<Option<f64>, ConfigError> {
        match self.number(key)? {
            Some(number) if number > 0.0 && number < 1e12 => Ok(Some(number)),
            Some(_) => Err(self.wrong(key, "positive")),
            None => Ok(None),
        }
    }

    /// The epsilon of a norm.
    pub(super) fn epsilon(&self, key: &'static str, otherwise: f64) -> Result<f32, ConfigError> {
        let epsilon = self.number(key)?.unwrap_or(otherwise);
        if !(0.0..1.0).contains(&epsilon) {
            return Err(self.wrong(key, "a number from 0 to 1"));
        }
        Ok(epsilon as f32)
    }

    pub(super) fn flag(&self, key: &'static str) -> Result<Option<bool>, ConfigError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    pub(super) fn flag_or(&self, key: &'static str, otherwise: bool) -> Result<bool, ConfigError> {
        Ok(self.flag(key)?.unwrap_or(otherwise))
    }

    /// A list of texts, one per block.
    pub(super) fn words(&self, key: &'static str) -> Result<Option<Vec<&'a str>>, ConfigError> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        let words = value
            .as_array()
            .and_then(|list| list.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
        words.map(Some).ok_or_else(|| self.wrong(key, "a list of texts"))
    }

    /// A list of whole numbers.
    pub(super) fn wholes(&self, key: &'static str) -> Result<Option<Vec<u64>>, ConfigError> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        let wholes = value
            .as_array()
            .and_then(|list| list.iter().map(Value::as_u64).collect::<Option<Vec<_>>>());
        wholes
            .map(Some)
            .ok_or_else(|| self.wrong(key, "a list of whole numbers"))
    }

    /// The activation that `key` names.
    pub(super) fn activation(&self, key: &'static str, otherwise: Activation) -> Result<Activation, ConfigError> {
        let Some(name) = self.value(key) else {
            return Ok(otherwise);
        };
        match name.as_str() {
            Some("silu" | "swish") => Ok(Activation::Silu),
            Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
            Some("relu2") => Ok(Activation::SquaredRelu),
            _ => Err(self.unsupported(key, name, "silu, gelu_pytorch_tanh, relu2")),
        }
    }
}
