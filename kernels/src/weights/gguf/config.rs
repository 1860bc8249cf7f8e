//! The `config.json` that a GGUF file's metadata describes: what all architectures say, and those with grouped-query
//! attention in every block.

use serde_json::{Value, json};

use super::metadata::Metadata;
use super::{GgufError, GgufFile};
use crate::weights::WeightsError;

/// The architecture's configuration.
///
/// # Errors
///
/// [`WeightsError`] names the key that is missing, wrong or not implemented.
pub(super) fn read(file: &GgufFile) -> Result<Value, WeightsError> {
    for (key, whole) in [("general.type", "model"), ("general.file_format", "gguf")] {
        if let Some(kind) = file.text(key)?.filter(|kind| *kind != whole) {
            let kind: String = kind.chars().take(32).collect();
            return Err(file.feature(format!("`{key}` `{kind}`")));
        }
    }
    if let Some(files @ 2..) = file.whole("split.count")? {
        return Err(file.feature(format!(
            "reading a model in {files} files (`llama-gguf-split --merge` joins them)"
        )));
    }
    let metadata = Metadata::of(file)?;
    metadata.bounded()?;
    let config = match metadata.architecture.name {
        "llama" => metadata.llama(),
        "mistral3" => metadata.mistral(),
        "qwen2" => metadata.dense("Qwen2ForCausalLM", "qwen2"),
        "qwen3" => metadata.dense("Qwen3ForCausalLM", "qwen3"),
        "qwen3moe" => metadata.qwen_mixture(),
        "smollm3" => metadata.smollm(),
        "gemma3" => metadata.gemma(),
        "apertus" => metadata.apertus(),
        "nemotron" => metadata.nemotron(),
        "deepseek2" => metadata.deepseek(),
        _ => metadata.nemotron_h(),
    }?;
    metadata.nothing_left()?;
    Ok(config)
}

/// Sizes of attention.
pub(super) struct Heads {
    pub(super) head_dim: u64,
    /// Dimensions of a head that turn.
    pub(super) rotated: u64,
}

impl Metadata<'_> {
    /// Refuses numbers of blocks and experts that the file has no room for, before a layout is made of them.
    fn bounded(&self) -> Result<(), WeightsError> {
        let refused = |name: &str, count: u64| {
            self.file.wrong(GgufError::Count {
                field: format!("metadata `{}`", self.key(name)),
                count,
            })
        };
        let blocks = self.required("block_count")?;
        // Every block has a tensor, and every expert of a block a byte.
        if blocks > self.file.header.tensors().len() as u64 {
            return Err(refused("block_count", blocks));
        }
        // Not by `Metadata::whole`: whether anybody asks for it is up to the family.
        let experts = format!("{}.expert_count", self.architecture.name);
        let experts = self.file.whole(&experts)?.unwrap_or(0);
        if experts.saturating_mul(blocks) > self.file.map.len() as u64 {
            return Err(refused("expert_count", experts));
        }
        Ok(())
    }

    /// Blocks of the model itself. Behind them may be some that predict further tokens.
    pub(super) fn blocks(&self) -> Result<u64, WeightsError> {
        let all = self.required("block_count")?;
        let further = self.whole("nextn_predict_layers")?.unwrap_or(0);
        all.checked_sub(further)
            .ok_or_else(|| self.feature("nextn_predict_layers"))
    }

    /// What every family's configuration says.
    pub(super) fn base(&self, class: &str, family: &str) -> Result<Value, WeightsError> {
        match self.flag("attention.causal")? {
            None | Some(true) => {}
            Some(false) => return Err(self.feature("attention.causal")),
        }
        let tensors = self.file.header.tensors();
        let embedding = tensors.get("token_embd.weight");
        let embedding = embedding.ok_or_else(|| self.file.missing_tensor("token_embd.weight"))?;
        let mut config = json!({
            "architectures": [class],
            "model_type": family,
            "hidden_size": self.required("embedding_length")?,
            "num_hidden_layers": self.blocks()?,
            "max_position_embeddings": self.required("context_length")?,
            "vocab_size": embedding.shape.first(),
            "tie_word_embeddings": !tensors.contains_key("output.weight"),
        });
        for (key, name) in [
            ("bos_token_id", "tokenizer.ggml.bos_token_id"),
            ("eos_token_id", "tokenizer.ggml.eos_token_id"),
        ] {
            if let Some(token) = self.file.whole(name)? {
                config[key] = json!(token);
            }
        }
        Ok(config)
    }

    /// Grouped-query attention. `partly` says whether the family rotates less than a head.
    pub(super) fn heads(&self, config: &mut Value, partly: bool) -> Result<Heads, WeightsError> {
        let hidden = self.required("embedding_length")?;
        let heads = self.required("attention.head_count")?;
        let head_dim = self.whole("attention.key_length")?.or(hidden.checked_div(heads));
        let head_dim = head_dim.ok_or_else(|| self.feature("attention.head_count"))?;
        let values = self.whole("attention.value_length")?.unwrap_or(head_dim);
        let rotated = self.whole("rope.dimension_count")?.unwrap_or(head_dim);
        if values != head_dim || !partly && rotated != head_dim {
            return Err(self.file.feature(format!(
                "heads of {head_dim} with values of {values} and {rotated} rotated dimensions"
            )));
        }
        config["num_attention_heads"] = json!(heads);
        config["num_key_value_heads"] = json!(self.whole("attention.head_count_kv")?.unwrap_or(heads));
        config["head_dim"] = json!(head_dim);
        Ok(Heads { head_dim, rotated })
    }

    /// Bases and scaling of rotary frequencies.
    pub(super) fn rope(&self, config: &mut Value, rotated: u64) -> Result<(), WeightsError> {
        let theta = self.number("rope.freq_base")?.unwrap_or(10_000.0);
        config["rope_theta"] = json!(theta);
        let context = self.required("context_length")?;
        if let Some(scaling) = self.rope_scaling(rotated, theta, context)? {
            config["rope_scaling"] = scaling;
        }
        Ok(())
    }

    /// A Llama with other names.
    fn dense(&self, class: &str, family: &str) -> Result<Value, WeightsError> {
        let mut config = self.base(class, family)?;
        let heads = self.heads(&mut config, false)?;
        self.rope(&mut config, heads.rotated)?;
        config["intermediate_size"] = json!(self.required("feed_forward_length")?);
        config["hidden_act"] = json!("silu");
        // Qwen 2 has biases of queries, keys and values, always.
        config["attention_bias"] = json!(family != "qwen2" && self.has_tensor("blk.0.attn_q.bias"));
        config["mlp_bias"] = json!(self.has_tensor("blk.0.ffn_up.bias"));
        config["rms_norm_eps"] = json!(self.number("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-5));
        config["sliding_window"] = Value::Null;
        Ok(config)
    }

    fn llama(&self) -> Result<Value, WeightsError> {
        let experts = self.whole("expert_count")?.unwrap_or(0);
        if experts == 0 {
            return self.dense("LlamaForCausalLM", "llama");
        }
        let mut config = self.dense("MixtralForCausalLM", "mixtral")?;
        config["num_local_experts"] = json!(experts);
        config["num_experts_per_tok"] = json!(self.required("expert_used_count")?);
        Ok(config)
    }

    /// Mistral Small 3, and Ministral 3, whose queries grow with the position.
    fn mistral(&self) -> Result<Value, WeightsError> {
        let beta = self.number("attention.temperature_scale")?.unwrap_or(0.0);
        if beta == 0.0 {
            return self.dense("MistralForCausalLM", "mistral");
        }
        let mut config = self.dense("Ministral3ForCausalLM", "ministral3")?;
        let log = self.number("rope.scaling.yarn_log_multiplier")?.unwrap_or(0.0);
        match config.get_mut("rope_scaling").and_then(Value::as_object_mut) {
            Some(scaling) if scaling.get("rope_type").is_some_and(|kind| kind == "yarn") => {
                scaling.insert("llama_4_scaling_beta".to_owned(), json!(beta));
                if log != 0.0 {
                    scaling.insert("mscale".to_owned(), json!(1.0));
                    scaling.insert("mscale_all_dim".to_owned(), json!(log));
                }
            }
            _ => return Err(self.feature("attention.temperature_scale")),
        }
        Ok(config)
    }

    fn qwen_mixture(&self) -> Result<Value, WeightsError> {
        let mut config = self.dense("Qwen3MoeForCausalLM", "qwen3_moe")?;
        let used = self.required("expert_used_count")?;
        let wide = match self.whole("expert_feed_forward_length")? {
            Some(wide) if wide > 0 => Some(wide),
            _ => self.required("feed_forward_length")?.checked_div(used),
        };
        config["moe_intermediate_size"] = json!(wide);
        config["num_experts"] = json!(self.required("expert_count")?);
        config["num_experts_per_tok"] = json!(used);
        config["norm_topk_prob"] = json!(true);
        config["decoder_sparse_step"] = json!(1);
        config["mlp_only_layers"] = json!([]);
        Ok(config)
    }

    fn smollm(&self) -> Result<Value, WeightsError> {
        let mut config = self.dense("SmolLM3ForCausalLM", "smollm3")?;
        config["no_rope_layer_interval"] = json!(4);
        config["use_sliding_window"] = json!(false);
        Ok(config)
    }

    fn gemma(&self) -> Result<Value, WeightsError> {
        let mut config = self.dense("Gemma3ForCausalLM", "gemma3_text")?;
        config["hidden_activation"] = json!("gelu_pytorch_tanh");
        let heads = self.required("attention.head_count")?;
        let head_dim = config.get("head_dim").and_then(Value::as_u64).unwrap_or(0);
        // The 27B alone divides scores by the width of a share of the stream; files do not say so.
        let largest = self.blocks()? == 62;
        let scalar = match largest {
            true => self.required("embedding_length")?.checked_div(heads),
            false => Some(head_dim),
        };
        config["query_pre_attn_scalar"] = json!(scalar);
        // Without a window llama.cpp rotates all blocks alike, the model's own code does not.
        config["sliding_window"] = match self.required("attention.sliding_window")? {
            0 => return Err(self.feature("attention.sliding_window")),
            window => json!(window),
        };
        config["sliding_window_pattern"] = json!(self.whole("attention.sliding_window_pattern")?.unwrap_or(6));
        config["rope_local_base_freq"] = json!(self.number("rope.freq_base_swa")?.unwrap_or(10_000.0));
        Ok(config)
    }

    fn apertus(&self) -> Result<Value, WeightsError> {
        let mut config = self.dense("ApertusForCausalLM", "apertus")?;
        config["hidden_act"] = json!("xielu");
        config["qk_norm"] = json!(true);
        config["post_norm"] = json!(false);
        if config.get("rope_scaling").is_none() {
            config["rope_scaling"] = json!({"rope_type": "default"});
        }
        Ok(config)
    }

    fn nemotron(&self) -> Result<Value, WeightsError> {
        let mut config = self.base("NemotronForCausalLM", "nemotron")?;
        let heads = self.heads(&mut config, true)?;
        self.rope(&mut config, heads.rotated)?;
        config["partial_rotary_factor"] = json!(heads.rotated as f64 / heads.head_dim.max(1) as f64);
        config["intermediate_size"] = json!(self.required("feed_forward_length")?);
        config["hidden_act"] = json!("relu2");
        config["attention_bias"] = json!(self.has_tensor("blk.0.attn_q.bias"));
        config["mlp_bias"] = json!(self.has_tensor("blk.0.ffn_up.bias"));
        config["norm_eps"] = json!(self.required_number("attention.layer_norm_epsilon")?);
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::builder::Builder;
    use super::super::open;

    #[test]
    fn what_nobody_asked_for_is_refused_by_name() {
        for (name, file) in [
            (
                "llama.attention.sliding_window",
                dense("llama").u32("llama.attention.sliding_window", 64),
            ),
            ("qwen2.expert_count", dense("qwen2").u32("qwen2.expert_count", 4)),
            (
                "llama.rope.scale_linear",
                dense("llama").f32("llama.rope.scale_linear", 2.0),
            ),
            (
                "llama.attention.causal",
                dense("llama").flag("llama.attention.causal", false),
            ),
            (
                "llama.rope.scaling.attn_factor",
                dense("llama").f32("llama.rope.scaling.attn_factor", 1.2),
            ),
            (
                "rope scaling `longrope`",
                dense("llama").text("llama.rope.scaling.type", "longrope"),
            ),
            ("general.type", dense("llama").text("general.type", "adapter")),
            ("model in 3 files", dense("llama").u32("split.count", 3)),
            (
                "blk.0.ffn_gate_shexp.weight",
                tensor(dense("llama"), "blk.0.ffn_gate_shexp.weight", &[8, 8]),
            ),
            ("rope_freqs.weight", tensor(dense("qwen2"), "rope_freqs.weight", &[2])),
            ("gemma3.attention.sliding_window", dense("gemma3")),
            (
                "mistral3.attention.temperature_scale",
                dense("mistral3").f32("mistral3.attention.temperature_scale", 0.1),
            ),
            ("deepseek2.attention.kv_lora_rank", dense("deepseek2")),
            (
                "deepseek2.expert_gating_func",
                dense("deepseek2").u32("deepseek2.expert_gating_func", 4),
            ),
            ("nemotron.attention.layer_norm_epsilon", dense("nemotron")),
            (
                "nemotron_h.feed_forward_length",
                dense("nemotron_h").whole_numbers("nemotron_h.attention.head_count_kv", &[0]),
            ),
        ] {
            let told = refusal(file);
            assert!(told.contains(name), "{name}: {told}");
        }
        // Which says that a feature is not there.
        let told = refusal(
            dense("llama")
                .u32("llama.expert_count", 0)
                .f32("llama.logit_scale", 0.0),
        );
        assert!(told.contains("tokenizer"), "{told}");
    }

    #[test]
    fn counts_are_checked_before_memory_is_taken() {
        let told = refusal(sized("llama", 1 << 30).u32("llama.expert_count", 0));
        assert!(told.contains("llama.block_count") && told.contains("no room"), "{told}");
        let told = refusal(dense("llama").u32("llama.expert_count", 1 << 30));
        assert!(
            told.contains("llama.expert_count") && told.contains("no room"),
            "{told}"
        );
        let told = refusal(dense("qwen3moe").u32("qwen3moe.expert_count", u32::MAX));
        assert!(told.contains("qwen3moe.expert_count"), "{told}");
        // A list for blocks is as long as it is, whatever the file says of blocks.
        let lists = dense("nemotron_h")
            .whole_numbers("nemotron_h.attention.head_count_kv", &[])
            .whole_numbers("nemotron_h.feed_forward_length", &[-1]);
        assert!(refusal(lists).contains("a number for each block"));
        let negative = dense("nemotron_h").whole_numbers("nemotron_h.attention.head_count_kv", &[-1]);
        assert!(refusal(negative).contains("whole numbers from 0"));
    }

    fn dense(architecture: &str) -> Builder {
        sized(architecture, 1)
    }

    fn sized(architecture: &str, blocks: u32) -> Builder {
        let key = |name: &str| format!("{architecture}.{name}");
        let file = Builder::new()
            .text("general.architecture", architecture)
            .u32(&key("block_count"), blocks)
            .u32(&key("context_length"), 64)
            .u32(&key("embedding_length"), 8)
            .u32(&key("attention.head_count"), 2);
        let file = match architecture {
            "nemotron_h" => file,
            _ => file.u32(&key("feed_forward_length"), 8),
        };
        tensor(file, "token_embd.weight", &[4, 8])
    }

    fn tensor(file: Builder, name: &str, shape: &[u64]) -> Builder {
        let bytes = vec![0; 4 * shape.iter().product::<u64>() as usize];
        file.tensor(name, shape, 0, &bytes)
    }

    /// Why a file is refused, with all that is behind it.
    fn refusal(file: Builder) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        fs::write(&path, file.finish()).unwrap();
        let Err(error) = open(&path) else {
            panic!("it was opened");
        };
        let mut told = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(inner) = cause {
            told = format!("{told}: {inner}");
            cause = inner.source();
        }
        told
    }
}
