//! The configuration of Nemotron-H: lists with a number for each block say which block does what.

use serde_json::{Value, json};

use super::metadata::Metadata;
use crate::weights::WeightsError;

impl Metadata<'_> {
    pub(super) fn nemotron_h(&self) -> Result<Value, WeightsError> {
        let mut config = self.base("NemotronHForCausalLM", "nemotron_h")?;
        let blocks = usize::try_from(self.blocks()?).unwrap_or(usize::MAX);
        let kv_heads = self.per_block("attention.head_count_kv", blocks)?;
        let widths = self.per_block("feed_forward_length", blocks)?;
        let experts = self.whole("expert_count")?.unwrap_or(0);
        // As llama.cpp tells them apart.
        let letter = |(kv_heads, width): (&u64, &u64)| match (*kv_heads, *width) {
            (0, 0) => 'M',
            (_, 0) => '*',
            _ if experts > 0 => 'E',
            _ => '-',
        };
        let pattern: String = kv_heads.iter().zip(&widths).map(letter).collect();
        if let Some(fields) = config.as_object_mut() {
            fields.remove("num_hidden_layers");
        }
        config["hybrid_override_pattern"] = json!(pattern);
        config["layer_norm_epsilon"] = match self.number("attention.layer_norm_rms_epsilon")? {
            Some(epsilon) => json!(epsilon),
            None => json!(self.required_number("attention.layer_norm_epsilon")?),
        };
        self.key("attention.layer_norm_epsilon"); // Further tokens alone need it.
        self.key("rope.dimension_count"); // Nothing is rotated.
        self.key("rope.freq_base");
        config["mlp_hidden_act"] = json!("relu2");
        config["mlp_bias"] = json!(self.a_block_has("ffn_up.bias"));
        if pattern.contains('*') {
            let head_dim = self.required("attention.key_length")?;
            if self.required("attention.value_length")? != head_dim {
                return Err(self.feature("attention.value_length"));
            }
            config["num_attention_heads"] = json!(self.required("attention.head_count")?);
            config["num_key_value_heads"] = json!(self.common("attention.head_count_kv", &kv_heads)?);
            config["head_dim"] = json!(head_dim);
        }
        if pattern.contains('M') {
            self.mamba(&mut config)?;
        }
        if pattern.contains('-') {
            config["intermediate_size"] = json!(self.common("feed_forward_length", &widths)?);
        }
        if pattern.contains('E') {
            self.nemotron_experts(&mut config, self.common("feed_forward_length", &widths)?)?;
        }
        Ok(config)
    }

    /// The number that all blocks have which have one at all.
    fn common(&self, name: &str, values: &[u64]) -> Result<u64, WeightsError> {
        let mut some = values.iter().filter(|value| **value > 0);
        match some.next() {
            Some(first) if some.all(|value| value == first) => Ok(*first),
            _ => Err(self.feature(name)),
        }
    }

    fn mamba(&self, config: &mut Value) -> Result<(), WeightsError> {
        let heads = self.required("ssm.time_step_rank")?;
        let inner = self.required("ssm.inner_size")?;
        if heads == 0 || !inner.is_multiple_of(heads) {
            return Err(self.feature("ssm.inner_size"));
        }
        config["mamba_num_heads"] = json!(heads);
        config["mamba_head_dim"] = json!(inner / heads);
        config["mamba_hidden_act"] = json!("silu");
        config["ssm_state_size"] = json!(self.required("ssm.state_size")?);
        config["n_groups"] = json!(self.required("ssm.group_count")?);
        config["conv_kernel"] = json!(self.required("ssm.conv_kernel")?);
        config["use_conv_bias"] = json!(self.a_block_has("ssm_conv1d.bias"));
        config["use_bias"] = json!(self.a_block_has("ssm_in.bias"));
        Ok(())
    }

    fn nemotron_experts(&self, config: &mut Value, width: u64) -> Result<(), WeightsError> {
        let groups = self.whole("expert_group_count")?.unwrap_or(1).max(1);
        let groups_top = match groups {
            1 => self.whole("expert_group_used_count")?.unwrap_or(1),
            _ => self.required("expert_group_used_count")?,
        };
        let shared = self.whole("expert_shared_count")?.unwrap_or(1);
        let scale = self.number("expert_weights_scale")?.filter(|scale| *scale != 0.0);
        config["n_routed_experts"] = json!(self.required("expert_count")?);
        config["n_shared_experts"] = json!(shared);
        config["num_experts_per_tok"] = json!(self.required("expert_used_count")?);
        config["moe_intermediate_size"] = json!(self.whole("expert_feed_forward_length")?.unwrap_or(width));
        config["moe_shared_expert_intermediate_size"] = json!(self.whole("expert_shared_feed_forward_length")?);
        config["n_group"] = json!(groups);
        config["topk_group"] = json!(groups_top.max(1));
        config["norm_topk_prob"] = json!(self.flag("expert_weights_norm")?.unwrap_or(false));
        config["routed_scaling_factor"] = json!(scale.unwrap_or(1.0));
        if let Some(latent) = self.whole("moe_latent_size")?.filter(|size| *size > 0) {
            config["moe_latent_size"] = json!(latent);
        }
        match self.whole("expert_gating_func")? {
            None | Some(0 | 2) => Ok(()),
            Some(_) => Err(self.feature("expert_gating_func")),
        }
    }
}
