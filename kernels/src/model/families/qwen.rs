//! Qwen 2 (and Bielik's small ones): biases of q, k and v. Qwen 3: norms of each head before the rotation, and experts.

use super::super::config::{Base, Heads};
use super::super::describe::{Activation, Mixer, NormKind};
use super::super::keys::{CONTEXT_MAX, EXPERTS_MAX, HEAD_DIM_MAX, Keys, WIDTH_MAX};
use super::super::positions::RopeKeys;
use super::super::routing::{Rule, Score};
use super::super::{Config, ConfigError};
use super::dense::{Dense, Layer, windows};
use super::mixture::{Mixture, Names};

pub(super) fn qwen2(keys: Keys<'_>) -> Result<Config, ConfigError> {
    keys.only_class("Qwen2ForCausalLM")?;
    let model = Dense {
        qkv_bias: true,
        ..model(keys, "qwen2", None)?
    };
    let windows = windows_of(keys, &model.base)?;
    model.build(keys, |block| layer(&windows, block))
}

pub(super) fn qwen3(keys: Keys<'_>) -> Result<Config, ConfigError> {
    keys.only_class("Qwen3ForCausalLM")?;
    let bias = keys.flag_or("attention_bias", false)?;
    let model = Dense {
        qkv_bias: bias,
        o_bias: bias,
        qk_norm: true,
        ..model(keys, "qwen3", Some(128))?
    };
    let windows = windows_of(keys, &model.base)?;
    model.build(keys, |block| layer(&windows, block))
}

pub(super) fn qwen3_moe(keys: Keys<'_>) -> Result<Config, ConfigError> {
    keys.only_class("Qwen3MoeForCausalLM")?;
    let bias = keys.flag_or("attention_bias", false)?;
    let model = Dense {
        qkv_bias: bias,
        o_bias: bias,
        qk_norm: true,
        ..model(keys, "qwen3_moe", None)?
    };
    let window = window(keys)?;
    let dense = keys.wholes("mlp_only_layers")?.unwrap_or_default();
    let step = keys.size_or("decoder_sparse_step", WIDTH_MAX, 1)?;
    let experts_key = if keys.value("num_experts").is_some() {
        "num_experts"
    } else {
        "num_local_experts"
    };
    let feed = model.feed(keys)?;
    let mixture = Mixture {
        experts: keys.size(experts_key, EXPERTS_MAX)?,
        rule: Rule {
            score: Score::Softmax,
            top: keys.size_or("num_experts_per_tok", EXPERTS_MAX, 8)?,
            groups: 1,
            groups_top: 1,
            group_best: 1,
            normalised: keys.flag_or("norm_topk_prob", false)?,
            scale: 1.0,
        },
        wide: keys.size_or("moe_intermediate_size", WIDTH_MAX, 768)?,
        ..Mixture::new(model.base.hidden, Names::EXPERTS)
    };
    mixture.check(keys, &model.base)?;
    let sparse = |block: usize| !dense.contains(&(block as u64)) && (block + 1).is_multiple_of(step);
    model.build_with(
        |_| Layer {
            window,
            ..Layer::default()
        },
        |block, part| match sparse(block) {
            true => Ok(Mixer::Experts(mixture.experts(part, "mlp"))),
            false => Ok(Mixer::Mlp(part.mlp("mlp", feed))),
        },
    )
}

fn model(keys: Keys<'_>, family: &'static str, head_dim: Option<usize>) -> Result<Dense, ConfigError> {
    let base = Base::read(keys, family, 32_768, false)?;
    let mut heads = base.heads(keys, Some(32))?;
    if let (Some(width), None) = (head_dim, keys.optional_size("head_dim", HEAD_DIM_MAX)?) {
        // Qwen 3's heads have this width whatever the hidden size.
        heads = Heads {
            head_dim: width,
            ..heads
        };
    }
    let rotary = RopeKeys::find(keys, base.context, 10_000.0)?.rotary(heads.head_dim)?;
    let norm = NormKind::rms(keys.epsilon("rms_norm_eps", 1e-6)?);
    Ok(Dense {
        activation: keys.activation("hidden_act", Activation::Silu)?,
        ..Dense::new(base, heads, norm, rotary)
    })
}

fn window(keys: Keys<'_>) -> Result<Option<usize>, ConfigError> {
    if !keys.flag_or("use_sliding_window", false)? {
        return Ok(None);
    }
    match keys.has("sliding_window") {
        true => keys.optional_size("sliding_window", CONTEXT_MAX),
        false => Ok(Some(4_096)),
    }
}

/// Blocks from `max_window_layers` on have the window.
fn windows_of(keys: Keys<'_>, base: &Base) -> Result<Vec<Option<usize>>, ConfigError> {
    let first = keys.count_or("max_window_layers", WIDTH_MAX, 28)?;
    windows(keys, base, window(keys)?, |block| block >= first)
}

fn layer(windows: &[Option<usize>], block: usize) -> Layer {
    Layer {
        window: windows.get(block).copied().flatten(),
        ..Layer::default()
    }
}
