//! Gemma 3 (BgGPT 3): norms before and after each sublayer, windows on most blocks with positions of their own.

use serde_json::Value;

use super::super::config::{Base, Heads, LLAMA_NAMES};
use super::super::describe::{Activation, Mixer, NormKind, Sublayer};
use super::super::keys::{CONTEXT_MAX, HEAD_DIM_MAX, Keys, WIDTH_MAX};
use super::super::part::{Feed, Grouped};
use super::super::positions::{RopeKeys, Rotary};
use super::super::{Config, ConfigError};
use super::dense::windows;

/// Bases of the frequencies on blocks without and with a window.
const THETAS: [f64; 2] = [1_000_000.0, 10_000.0];

pub(super) fn read(keys: Keys<'_>) -> Result<Config, ConfigError> {
    keys.only_class("Gemma3ForCausalLM")?;
    keys.must_be_absent(&["final_logit_softcapping", "attn_logit_softcapping"])?;
    keys.must_be("use_bidirectional_attention", false)?;
    let base = Base::read(keys, "gemma3_text", 131_072, true)?;
    let heads = Heads {
        head_dim: keys.size_or("head_dim", HEAD_DIM_MAX, 256)?,
        ..base.heads(keys, Some(4))?
    };
    let norm = NormKind {
        plus_one: true,
        ..NormKind::rms(keys.epsilon("rms_norm_eps", 1e-6)?)
    };
    let bias = keys.flag_or("attention_bias", false)?;
    let window = match keys.has("sliding_window") {
        true => keys.optional_size("sliding_window", CONTEXT_MAX)?,
        false => Some(4_096),
    };
    let pattern = match keys.optional_size("sliding_window_pattern", WIDTH_MAX)? {
        Some(pattern) => pattern,
        None => keys.size_or("_sliding_window_pattern", WIDTH_MAX, 6)?,
    };
    let windows = windows(keys, &base, window, |block| !(block + 1).is_multiple_of(pattern))?;
    let local = local_blocks(keys, &base, pattern)?;
    let scalar = keys.optional_positive("query_pre_attn_scalar")?.unwrap_or(256.0);
    let feed = Feed {
        hidden: base.hidden,
        wide: keys.size("intermediate_size", WIDTH_MAX)?,
        gated: true,
        bias: false,
        activation: keys.activation("hidden_activation", Activation::GeluTanh)?,
    };
    let mut config = base.build(
        LLAMA_NAMES,
        norm,
        rotaries(keys, &base, heads.head_dim)?,
        |block, part| {
            let grouped = Grouped {
                hidden: base.hidden,
                heads: heads.heads,
                kv_heads: heads.kv_heads,
                head_dim: heads.head_dim,
                qkv_bias: bias,
                o_bias: bias,
                qk_norm: Some(norm),
                rotary: Some(usize::from(local[block])),
                window: windows[block],
                scale: Some(scalar.powf(-0.5) as f32),
                query_scale: None,
            };
            Ok(vec![
                Sublayer {
                    norm: part.norm("input_layernorm", norm, base.hidden),
                    mixer: Mixer::Attention(part.attention("self_attn", grouped)),
                    after: Some(part.norm("post_attention_layernorm", norm, base.hidden)),
                },
                Sublayer {
                    norm: part.norm("pre_feedforward_layernorm", norm, base.hidden),
                    mixer: Mixer::Mlp(part.mlp("mlp", feed)),
                    after: Some(part.norm("post_feedforward_layernorm", norm, base.hidden)),
                },
            ])
        },
    )?;
    config.embedding_scale = (base.hidden as f64).sqrt() as f32;
    Ok(config)
}

/// Which blocks are of the windowed kind: they have the local positions even where the window is null.
fn local_blocks(keys: Keys<'_>, base: &Base, pattern: usize) -> Result<Vec<bool>, ConfigError> {
    let marked = windows(keys, base, Some(1), |block| !(block + 1).is_multiple_of(pattern))?;
    Ok(marked.iter().map(Option::is_some).collect())
}

/// Of blocks without a window, which alone are scaled, and of those with one.
fn rotaries(keys: Keys<'_>, base: &Base, head_dim: usize) -> Result<Vec<Rotary>, ConfigError> {
    let [global, local] = THETAS;
    let nested = keys
        .value("rope_parameters")
        .and_then(Value::as_object)
        .filter(|parameters| parameters.contains_key("full_attention") || parameters.contains_key("sliding_attention"));
    if let Some(parameters) = nested {
        let nothing = serde_json::Map::new();
        let of = |kind: &str, theta| {
            let inner = parameters.get(kind).and_then(Value::as_object).unwrap_or(&nothing);
            RopeKeys::of(Keys(inner), inner, base.context, theta).rotary(head_dim)
        };
        return Ok(vec![of("full_attention", global)?, of("sliding_attention", local)?]);
    }
    let rotated = RopeKeys::find(keys, base.context, global)?.rotary(head_dim)?;
    let local = Rotary {
        theta: keys.optional_positive("rope_local_base_freq")?.unwrap_or(local),
        rope: super::super::Rope::Default,
        ..rotated
    };
    Ok(vec![rotated, local])
}
