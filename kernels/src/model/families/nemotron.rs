//! Nemotron (Luciole 1B and 23B): `LayerNorm1P`, a squared ReLU without a gate, and half of a head rotated.

use super::super::config::Base;
use super::super::describe::{Activation, NormKind};
use super::super::keys::Keys;
use super::super::positions::RopeKeys;
use super::super::{Config, ConfigError};
use super::dense::{Dense, Layer};

pub(super) fn read(keys: Keys<'_>) -> Result<Config, ConfigError> {
    keys.only_class("NemotronForCausalLM")?;
    let base = Base::read(keys, "nemotron", 4_096, false)?;
    let heads = base.heads(keys, None)?;
    let rotary = RopeKeys::find(keys, base.context, 10_000.0)?.partial_rotary(heads.head_dim, 0.5)?;
    let bias = keys.flag_or("attention_bias", false)?;
    let norm = NormKind {
        centred: true,
        plus_one: true,
        epsilon: keys.epsilon("norm_eps", 1e-5)?,
    };
    let model = Dense {
        qkv_bias: bias,
        o_bias: bias,
        mlp_bias: keys.flag_or("mlp_bias", false)?,
        gated: false,
        activation: keys.activation("hidden_act", Activation::SquaredRelu)?,
        ..Dense::new(base, heads, norm, rotary)
    };
    model.build(keys, |_| Layer::default())
}
