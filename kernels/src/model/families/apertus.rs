//! Apertus: norms of each head, other names for the norms, and a perceptron without a gate whose activation, xIELU,
//! has parameters.

use super::super::config::Base;
use super::super::describe::{Activation, Mixer, NormKind, Xielu};
use super::super::keys::Keys;
use super::super::part::Feed;
use super::super::positions::RopeKeys;
use super::super::{Config, ConfigError};
use super::dense::{Dense, Layer};

pub(super) fn read(keys: Keys<'_>) -> Result<Config, ConfigError> {
    keys.only_class("ApertusForCausalLM")?;
    keys.one_of("hidden_act", &["xielu"])?;
    keys.must_be("mlp_bias", false)?;
    keys.must_be("qk_norm", true)?;
    keys.must_be("post_norm", false)?;
    if keys.value("rope_parameters").or(keys.value("rope_scaling")).is_none() {
        return Err(ConfigError::Missing { key: "rope_scaling" });
    }
    let base = Base::read(keys, "apertus", 65_536, false)?;
    let heads = base.heads(keys, None)?;
    let rotary = RopeKeys::find(keys, base.context, 12_000_000.0)?.rotary(heads.head_dim)?;
    let bias = keys.flag_or("attention_bias", false)?;
    let norm = NormKind::rms(keys.epsilon("rms_norm_eps", 1e-5)?);
    let model = Dense {
        norms: ["attention_layernorm", "feedforward_layernorm"],
        qkv_bias: bias,
        o_bias: bias,
        qk_norm: true,
        gated: false,
        ..Dense::new(base, heads, norm, rotary)
    };
    let feed = model.feed(keys)?;
    model.build_with(
        |_| Layer::default(),
        |_, part| {
            let mut parameter = |name: &str, shape: &[usize]| part.tensor(&format!("mlp.act_fn.{name}"), shape);
            let xielu = Xielu {
                alpha_p: parameter("alpha_p", &[1]),
                alpha_n: parameter("alpha_n", &[1]),
                beta: parameter("beta", &[]),
                epsilon: parameter("eps", &[]),
            };
            let activation = Activation::Xielu(xielu);
            Ok(Mixer::Mlp(part.mlp("mlp", Feed { activation, ..feed })))
        },
    )
}
