//! Mistral (Minerva, Bielik, Nemo, Small): a window, and heads of any width. Ministral 3: queries grow with the position.

use super::super::config::Base;
use super::super::describe::{Activation, NormKind};
use super::super::keys::{CONTEXT_MAX, Keys};
use super::super::positions::RopeKeys;
use super::super::{Config, ConfigError};
use super::dense::{Dense, Layer};

/// What Mistral 7B had, and what the key's absence means.
const WINDOW: usize = 4_096;

pub(super) fn mistral(keys: Keys<'_>) -> Result<Config, ConfigError> {
    keys.only_class("MistralForCausalLM")?;
    let base = Base::read(keys, "mistral", 131_072, false)?;
    let heads = base.heads(keys, Some(8))?;
    let rotary = RopeKeys::find(keys, base.context, 10_000.0)?.rotary(heads.head_dim)?;
    let window = match keys.has("sliding_window") {
        true => keys.optional_size("sliding_window", CONTEXT_MAX)?,
        false => Some(WINDOW),
    };
    let norm = NormKind::rms(keys.epsilon("rms_norm_eps", 1e-6)?);
    let model = Dense {
        activation: keys.activation("hidden_act", Activation::Silu)?,
        ..Dense::new(base, heads, norm, rotary)
    };
    model.build(keys, |_| Layer {
        window,
        ..Layer::default()
    })
}

pub(super) fn ministral3(keys: Keys<'_>) -> Result<Config, ConfigError> {
    keys.only_class("Ministral3ForCausalLM")?;
    if keys.value("rope_parameters").or(keys.value("rope_scaling")).is_none() {
        return Err(ConfigError::Missing { key: "rope_parameters" });
    }
    let base = Base::read(keys, "ministral3", 262_144, false)?;
    let heads = base.heads(keys, Some(8))?;
    let rope = RopeKeys::find(keys, base.context, 10_000.0)?;
    let window = keys.optional_size("sliding_window", CONTEXT_MAX)?;
    let norm = NormKind::rms(keys.epsilon("rms_norm_eps", 1e-5)?);
    let model = Dense {
        activation: keys.activation("hidden_act", Activation::Silu)?,
        query_scale: rope.query_scale()?,
        ..Dense::new(base, heads, norm, rope.rotary(heads.head_dim)?)
    };
    model.build(keys, |_| Layer {
        window,
        ..Layer::default()
    })
}
