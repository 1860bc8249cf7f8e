//! Llama, and all who kept to it: EuroLLM, Teuken, Salamandra, TildeOpen, Viking, Lucie, OpenEuroLLM, SmolLM2.

use super::super::config::Base;
use super::super::describe::{Activation, NormKind};
use super::super::keys::Keys;
use super::super::positions::RopeKeys;
use super::super::{Config, ConfigError};
use super::dense::{Dense, Layer};

pub(super) fn read(keys: Keys<'_>) -> Result<Config, ConfigError> {
    keys.only_class("LlamaForCausalLM")?;
    keys.must_be_absent(&["sliding_window"])?;
    let base = Base::read(keys, "llama", 2_048, false)?;
    let heads = base.heads(keys, None)?;
    let rotary = RopeKeys::find(keys, base.context, 10_000.0)?.rotary(heads.head_dim)?;
    let bias = keys.flag_or("attention_bias", false)?;
    let norm = NormKind::rms(keys.epsilon("rms_norm_eps", 1e-6)?);
    let model = Dense {
        qkv_bias: bias,
        o_bias: bias,
        mlp_bias: keys.flag_or("mlp_bias", false)?,
        activation: keys.activation("hidden_act", Activation::Silu)?,
        ..Dense::new(base, heads, norm, rotary)
    };
    model.build(keys, |_| Layer::default())
}

#[cfg(test)]
mod tests {
    use super::super::super::{Config, Rope};

    const OLD: &str = include_str!("../../../tests/golden/llama_rope_llama3/config.json");
    const NEW: &str = include_str!("../../../tests/golden/llama_rope_llama3/config.v5.json");

    #[test]
    fn both_spellings_are_the_same_model() {
        let old = Config::from_json(OLD).unwrap();
        assert_eq!(Ok(&old), Config::from_json(NEW).as_ref());
        let llama = old.llama().unwrap();
        assert_eq!(llama.head_dim, 16);
        assert!(matches!(llama.rope, Rope::Llama3 { factor: 8.0, .. }));
    }

    #[test]
    fn biases_have_tensors_of_their_own() {
        let text = OLD.replace("\"attention_bias\": false", "\"attention_bias\": true");
        let config = Config::from_json(&text).unwrap();
        let names: Vec<String> = super::super::super::layout(&config).parts[1]
            .tensors
            .iter()
            .map(|tensor| tensor.name.clone())
            .collect();
        assert_eq!(names.len(), 13);
        assert_eq!(names[2], "model.layers.0.self_attn.q_proj.bias");
        assert!(config.llama().is_err());
    }
}
