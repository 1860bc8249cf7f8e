//! The configuration of DeepSeek V2 and V3, which share an architecture in GGUF.

use serde_json::{Value, json};

use super::metadata::Metadata;
use crate::weights::WeightsError;

// ggml's numbers of the function that router scores go through.
const SOFTMAX: u64 = 1;
const SIGMOID: u64 = 2;

impl Metadata<'_> {
    pub(super) fn deepseek(&self) -> Result<Value, WeightsError> {
        let sigmoid = match self.whole("expert_gating_func")?.unwrap_or(0) {
            0 | SOFTMAX => false,
            SIGMOID => true,
            _ => return Err(self.feature("expert_gating_func")),
        };
        let mut config = match sigmoid {
            true => self.base("DeepseekV3ForCausalLM", "deepseek_v3")?,
            false => self.base("DeepseekV2ForCausalLM", "deepseek_v2")?,
        };
        self.latent_heads(&mut config)?;
        let rotated = self.required("rope.dimension_count")?;
        self.rope(&mut config, rotated)?;
        self.magnitudes(&mut config)?;
        self.deepseek_experts(&mut config, sigmoid)?;
        config["intermediate_size"] = json!(self.required("feed_forward_length")?);
        config["hidden_act"] = json!("silu");
        config["rms_norm_eps"] = json!(self.required_number("attention.layer_norm_rms_epsilon")?);
        config["rope_interleave"] = json!(true);
        Ok(config)
    }

    /// Newer files describe attention over latents, as if there were one head of keys; older ones plain heads.
    fn latent_heads(&self, config: &mut Value) -> Result<(), WeightsError> {
        let heads = self.required("attention.head_count")?;
        let kv_heads = self.whole("attention.head_count_kv")?.unwrap_or(heads);
        let rank = self.required("attention.kv_lora_rank")?;
        let rotated = self.required("rope.dimension_count")?;
        let (key, value) = (
            self.required("attention.key_length")?,
            self.required("attention.value_length")?,
        );
        let of_latents = (
            self.whole("attention.key_length_mla")?.unwrap_or(0),
            self.whole("attention.value_length_mla")?.unwrap_or(0),
        );
        let (key, value) = match of_latents {
            (0, 0) if kv_heads == heads => (key, value),
            of_latents if (kv_heads, key, value) == (1, rank.saturating_add(rotated), rank) => of_latents,
            _ => return Err(self.feature("attention.key_length")),
        };
        let nope = key.checked_sub(rotated);
        config["num_attention_heads"] = json!(heads);
        config["num_key_value_heads"] = json!(heads);
        config["q_lora_rank"] = json!(self.whole("attention.q_lora_rank")?.filter(|rank| *rank > 0));
        config["kv_lora_rank"] = json!(rank);
        config["qk_nope_head_dim"] = json!(nope.ok_or_else(|| self.feature("rope.dimension_count"))?);
        config["qk_rope_head_dim"] = json!(rotated);
        config["v_head_dim"] = json!(value);
        config["attention_bias"] = json!(self.has_tensor("blk.0.attn_kv_a_mqa.bias"));
        Ok(())
    }

    /// YaRN's magnitudes. The file has a tenth of the one of scores, and that of rotations is the same.
    fn magnitudes(&self, config: &mut Value) -> Result<(), WeightsError> {
        let log = self.number("rope.scaling.yarn_log_multiplier")?;
        let Some(scaling) = config.get_mut("rope_scaling").and_then(Value::as_object_mut) else {
            return match log {
                None | Some(0.0) => Ok(()),
                Some(_) => Err(self.feature("rope.scaling.yarn_log_multiplier")),
            };
        };
        if scaling.get("rope_type").is_none_or(|kind| kind != "yarn") {
            return Err(self.feature("rope.scaling.type"));
        }
        // Without it, llama.cpp scales scores in a way that no configuration describes.
        let Some(log) = log.filter(|log| *log > 0.0) else {
            return Err(self.file.missing(&self.key("rope.scaling.yarn_log_multiplier")));
        };
        let all = shortest((log / 0.1) as f32);
        scaling.insert("mscale".to_owned(), json!(all));
        scaling.insert("mscale_all_dim".to_owned(), json!(all));
        Ok(())
    }

    fn deepseek_experts(&self, config: &mut Value, sigmoid: bool) -> Result<(), WeightsError> {
        // Of files from before these were written, nobody can tell how experts are chosen.
        let groups = self.required("expert_group_count")?;
        let groups_top = match groups {
            0 | 1 => self.whole("expert_group_used_count")?.unwrap_or(1),
            _ => self.required("expert_group_used_count")?,
        };
        let scale = self.number("expert_weights_scale")?.filter(|scale| *scale != 0.0);
        config["first_k_dense_replace"] = json!(self.whole("leading_dense_block_count")?.unwrap_or(0));
        config["n_routed_experts"] = json!(self.required("expert_count")?);
        config["n_shared_experts"] = json!(self.whole("expert_shared_count")?.unwrap_or(0));
        config["num_experts_per_tok"] = json!(self.required("expert_used_count")?);
        config["moe_intermediate_size"] = json!(self.required("expert_feed_forward_length")?);
        config["moe_layer_freq"] = json!(1);
        config["n_group"] = json!(groups.max(1));
        config["topk_group"] = json!(groups_top.max(1));
        config["routed_scaling_factor"] = json!(scale.unwrap_or(1.0));
        config["norm_topk_prob"] = json!(self.flag("expert_weights_norm")?.unwrap_or(false));
        (config["scoring_func"], config["topk_method"]) = match (sigmoid, groups) {
            (true, _) => (json!("sigmoid"), json!("noaux_tc")),
            (false, 0 | 1) => (json!("softmax"), json!("greedy")),
            (false, _) => (json!("softmax"), json!("group_limited_greedy")),
        };
        Ok(())
    }
}

/// The f64 that is written as the f32 is.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}
