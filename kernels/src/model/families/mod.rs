//! The families, one file each. A configuration of any other is refused by name.

mod apertus;
mod deepseek;
mod dense;
mod gemma3;
mod llama;
mod mistral;
mod mixture;
mod nemotron;
mod nemotron_h;
mod qwen;
mod smollm3;

use serde_json::Value;

use super::keys::Keys;
use super::{Config, ConfigError};

/// Every `model_type` that runs.
pub const FAMILIES: &str = "llama, mistral, ministral3, qwen2, qwen3, smollm3, apertus, nemotron, gemma3_text, mixtral, \
                            qwen3_moe, deepseek_v2, deepseek_v3, deepseek_v32, mistral4, nemotron_h";

/// Reads a configuration of whatever family it names.
pub(super) fn read(keys: Keys<'_>) -> Result<Config, ConfigError> {
    let family = keys
        .value("model_type")
        .ok_or(ConfigError::Missing { key: "model_type" })?;
    quantisation(keys)?;
    match family.as_str() {
        Some("llama") => llama::read(keys),
        Some("mistral") => mistral::mistral(keys),
        Some("ministral3") => mistral::ministral3(keys),
        Some("mistral4") => deepseek::mistral4(keys),
        Some("qwen2") => qwen::qwen2(keys),
        Some("qwen3") => qwen::qwen3(keys),
        Some("qwen3_moe") => qwen::qwen3_moe(keys),
        Some("smollm3") => smollm3::read(keys),
        Some("apertus") => apertus::read(keys),
        Some("nemotron") => nemotron::read(keys),
        Some("nemotron_h") => nemotron_h::read(keys),
        Some("gemma3_text") => gemma3::read(keys),
        Some("mixtral") => mixture::mixtral(keys),
        Some("deepseek_v2") => deepseek::v2(keys),
        Some("deepseek_v3") => deepseek::v3(keys),
        Some("deepseek_v32") => deepseek::v32(keys),
        _ => Err(keys.unsupported("model_type", family, FAMILIES)),
    }
}

/// Of quantised checkpoints, FP8 with a scale per block is read; what is stored so is found from the tensors themselves.
fn quantisation(keys: Keys<'_>) -> Result<(), ConfigError> {
    let Some(config) = keys.value("quantization_config") else {
        return Ok(());
    };
    let method = config.get("quant_method").and_then(Value::as_str);
    let format = config.get("fmt").and_then(Value::as_str).unwrap_or("e4m3");
    let blocks = config.get("weight_block_size").is_some_and(Value::is_array);
    match method == Some("fp8") && format == "e4m3" && blocks {
        true => Ok(()),
        false => Err(keys.unsupported("quantization_config", config, "fp8 e4m3 with weight_block_size")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Config;

    const LLAMA: &str = include_str!("../../../tests/golden/llama_rope_llama3/config.json");

    #[test]
    fn another_family_is_refused_by_name() {
        let text = LLAMA.replace("\"llama\"", "\"mamba\"");
        let error = Config::from_json(&text).unwrap_err().to_string();
        assert!(
            error.starts_with("model_type `mamba` is not implemented; implemented: llama, mistral"),
            "{error}"
        );
    }

    #[test]
    fn what_would_change_the_numbers_is_refused_by_name() {
        for (from, to, name) in [
            ("\"silu\"", "\"gelu\"", "hidden_act `gelu`"),
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
            (
                "\"mlp_bias\": false",
                "\"mlp_bias\": false, \"quantization_config\": {\"quant_method\": \"gptq\"}",
                "quantization_config",
            ),
        ] {
            let error = Config::from_json(&LLAMA.replace(from, to)).unwrap_err();
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
            let error = Config::from_json(&LLAMA.replace(from, to)).unwrap_err();
            assert!(matches!(error, super::super::ConfigError::Wrong { .. }), "{error}");
        }
    }
}
