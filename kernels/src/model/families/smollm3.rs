//! SmolLM3: some blocks know no positions.

use super::super::config::Base;
use super::super::describe::{Activation, NormKind};
use super::super::keys::{CONTEXT_MAX, Keys, WIDTH_MAX};
use super::super::positions::RopeKeys;
use super::super::{Config, ConfigError};
use super::dense::{Dense, Layer, windows};

pub(super) fn read(keys: Keys<'_>) -> Result<Config, ConfigError> {
    keys.only_class("SmolLM3ForCausalLM")?;
    let base = Base::read(keys, "smollm3", 32_768, true)?;
    let heads = base.heads(keys, Some(4))?;
    let rotary = RopeKeys::find(keys, base.context, 2_000_000.0)?.rotary(heads.head_dim)?;
    let rotated = rotated(keys, &base)?;
    let window = match keys.flag_or("use_sliding_window", false)? {
        true => keys.optional_size("sliding_window", CONTEXT_MAX)?,
        false => None,
    };
    let windows = windows(keys, &base, window, |block| !rotated[block])?;
    let bias = keys.flag_or("attention_bias", false)?;
    let norm = NormKind::rms(keys.epsilon("rms_norm_eps", 1e-6)?);
    let model = Dense {
        qkv_bias: bias,
        o_bias: bias,
        mlp_bias: keys.flag_or("mlp_bias", false)?,
        activation: keys.activation("hidden_act", Activation::Silu)?,
        ..Dense::new(base, heads, norm, rotary)
    };
    model.build(keys, |block| Layer {
        without_positions: !rotated[block],
        window: windows[block],
    })
}

/// `no_rope_layers` has a one for every block with positions, in spite of its name.
fn rotated(keys: Keys<'_>, base: &Base) -> Result<Vec<bool>, ConfigError> {
    if let Some(flags) = keys.wholes("no_rope_layers")? {
        let rotated: Vec<bool> = flags.iter().take(base.blocks).map(|flag| *flag != 0).collect();
        return match rotated.len() == base.blocks {
            true => Ok(rotated),
            false => Err(keys.wrong("no_rope_layers", "a list of as many flags as there are blocks")),
        };
    }
    let interval = keys.size_or("no_rope_layer_interval", WIDTH_MAX, 4)?;
    Ok((1..=base.blocks).map(|block| !block.is_multiple_of(interval)).collect())
}
