//! A model's configuration as the metadata of a GGUF file, for each architecture what llama.cpp asks for.
//!
//! What a configuration says and its architecture has no word for is left out here and found out when the written file
//! is read again and compared.

use serde_json::Value;

use super::architecture::Architecture;
use super::places::mixers;
use super::rope;
use super::writer::GgufWriter;
use crate::model::Config;
use crate::model::describe::{Attention, Block, Experts, LatentAttention, LatentQuery, Mamba, Mixer, Mlp};
use crate::model::routing::Score;

// ggml's numbers of the function that router scores go through.
const SOFTMAX: u32 = 1;
const SIGMOID: u32 = 2;

/// Adds everything but the tokenizer.
///
/// # Errors
///
/// The feature that GGUF has no word for.
pub(super) fn describe(
    writer: &mut GgufWriter<'_>,
    architecture: Architecture,
    config: &Config,
    json: &Value,
) -> Result<(), &'static str> {
    let mut description = Description {
        writer,
        architecture,
        config,
        json,
    };
    description.base();
    match architecture.name {
        "deepseek2" => description.latent()?,
        "nemotron_h" | "nemotron_h_moe" => description.hybrid()?,
        _ => description.grouped()?,
    }
    description.rotations()
}

struct Description<'d, 'w> {
    writer: &'d mut GgufWriter<'w>,
    architecture: Architecture,
    config: &'d Config,
    json: &'d Value,
}

impl<'d> Description<'d, '_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture.name)
    }

    /// No size of a model that was accepted is beyond 32 bits.
    fn whole(&mut self, name: &str, value: usize) {
        self.writer.whole(&self.key(name), value as u32);
    }

    fn number(&mut self, name: &str, value: f32) {
        self.writer.number(&self.key(name), value);
    }

    fn base(&mut self) {
        let config = self.config;
        self.whole("block_count", config.blocks as usize);
        self.whole("context_length", config.context_tokens_max as usize);
        self.whole("embedding_length", config.hidden);
        self.whole("vocab_size", config.vocabulary);
        let epsilon = config.head.norm.kind.epsilon;
        match self.architecture.name {
            "nemotron" => self.number("attention.layer_norm_epsilon", epsilon),
            "nemotron_h" | "nemotron_h_moe" => {
                self.number("attention.layer_norm_epsilon", epsilon);
                self.number("attention.layer_norm_rms_epsilon", epsilon);
            }
            _ => self.number("attention.layer_norm_rms_epsilon", epsilon),
        }
    }

    fn attention(&self) -> Result<&'d Attention, &'static str> {
        let mut found = mixers(self.config).filter_map(|mixer| match mixer {
            Mixer::Attention(attention) => Some(attention),
            _ => None,
        });
        found.next().ok_or("a model without attention")
    }

    fn mlp(&self) -> Option<&'d Mlp> {
        mixers(self.config).find_map(|mixer| match mixer {
            Mixer::Mlp(mlp) => Some(mlp),
            _ => None,
        })
    }

    fn experts(&self) -> Option<&'d Experts> {
        mixers(self.config).find_map(|mixer| match mixer {
            Mixer::Experts(experts) => Some(experts),
            _ => None,
        })
    }

    /// Width of one expert.
    fn expert_width(experts: &Experts) -> usize {
        experts.experts.first().map_or(0, |expert| expert.up.rows)
    }

    /// Width of a perceptron: where no block has one, what the configuration says nevertheless.
    fn width(&self) -> usize {
        let of_mlp = self.mlp().map(|mlp| mlp.up.rows);
        let written = || usize::try_from(self.json.get("intermediate_size")?.as_u64()?).ok();
        of_mlp.or_else(written).unwrap_or(0)
    }

    /// Grouped-query attention in every block.
    fn grouped(&mut self) -> Result<(), &'static str> {
        let attention = self.attention()?;
        let (heads, kv_heads, head_dim) = (attention.heads, attention.kv_heads, attention.head_dim);
        let query_scale = attention.query_scale;
        self.whole("attention.head_count", heads);
        self.whole("attention.head_count_kv", kv_heads);
        self.whole("attention.key_length", head_dim);
        self.whole("attention.value_length", head_dim);
        self.whole("feed_forward_length", self.width());
        if let Some(experts) = self.experts() {
            let (count, top, wide) = (
                experts.experts.len(),
                experts.router.rule.top,
                Self::expert_width(experts),
            );
            self.whole("expert_count", count);
            self.whole("expert_used_count", top);
            if self.architecture.name == "qwen3moe" {
                self.whole("expert_feed_forward_length", wide);
            }
        }
        if self.architecture.name == "gemma3" {
            self.windows();
        }
        if let Some(scale) = query_scale {
            self.number("attention.temperature_scale", scale.beta);
            let all = self.of_rope("mscale_all_dim").unwrap_or(0.0);
            self.number("rope.scaling.yarn_log_multiplier", all as f32);
        }
        Ok(())
    }

    /// Gemma's windows: one block of so many has none.
    fn windows(&mut self) {
        let config = self.config;
        let windows = config.description.iter().map(|Block(sublayers)| {
            sublayers.iter().find_map(|sublayer| match &sublayer.mixer {
                Mixer::Attention(attention) => Some(attention.window),
                _ => None,
            })
        });
        let windows: Vec<Option<usize>> = windows.map(Option::flatten).collect();
        if let Some(window) = windows.iter().flatten().next() {
            self.whole("attention.sliding_window", *window);
        }
        // Without such a block, one behind the last would be the first.
        let first = windows.iter().position(Option::is_none).unwrap_or(windows.len());
        if first != 5 {
            self.whole("attention.sliding_window_pattern", first + 1);
        }
    }

    /// Attention over latents, which llama.cpp computes as one head of keys for all queries.
    fn latent(&mut self) -> Result<(), &'static str> {
        let config = self.config;
        let latent = mixers(config).find_map(|mixer| match mixer {
            Mixer::Latent(latent) => Some(latent),
            _ => None,
        });
        let latent: &LatentAttention = latent.ok_or("a model without attention")?;
        self.whole("attention.head_count", latent.heads);
        self.whole("attention.head_count_kv", 1);
        self.whole("attention.kv_lora_rank", latent.rank);
        self.whole("attention.key_length", latent.rank + latent.rope);
        self.whole("attention.value_length", latent.rank);
        self.whole("attention.key_length_mla", latent.nope + latent.rope);
        self.whole("attention.value_length_mla", latent.value);
        if let LatentQuery::LowRank(down, ..) = &latent.query {
            self.whole("attention.q_lora_rank", down.rows);
        }
        let experts = self.experts().ok_or("a model without experts in this architecture")?;
        let (wide, shared) = (
            Self::expert_width(experts),
            experts.shared.as_ref().map_or(0, |shared| shared.up.rows),
        );
        let dense = self
            .config
            .description
            .iter()
            .take_while(|block| is_dense(block))
            .count();
        self.whole("feed_forward_length", self.width());
        self.whole("leading_dense_block_count", dense);
        self.whole("expert_feed_forward_length", wide);
        self.whole("expert_shared_count", shared.checked_div(wide).unwrap_or(0));
        self.routing();
        if let Some(all) = self.of_rope("mscale_all_dim") {
            self.number("rope.scaling.yarn_log_multiplier", (0.1 * all) as f32);
        }
        Ok(())
    }

    /// How experts are chosen and weighed.
    fn routing(&mut self) {
        let Some(experts) = self.experts() else { return };
        let (count, rule) = (experts.experts.len(), experts.router.rule);
        self.whole("expert_count", count);
        self.whole("expert_used_count", rule.top);
        self.whole("expert_group_count", rule.groups);
        self.whole("expert_group_used_count", rule.groups_top);
        self.number("expert_weights_scale", rule.scale);
        self.writer.flag(&self.key("expert_weights_norm"), rule.normalised);
        let function = match rule.score {
            Score::Softmax => SOFTMAX,
            Score::Sigmoid => SIGMOID,
        };
        self.whole("expert_gating_func", function as usize);
    }

    /// Mamba, attention, perceptrons and experts, one a block: lists say which.
    fn hybrid(&mut self) -> Result<(), &'static str> {
        let config = self.config;
        let per_block = |of: &dyn Fn(&Mixer) -> usize| -> Vec<i32> {
            let blocks = config.description.iter();
            let first = blocks.map(|Block(sublayers)| sublayers.first().map_or(0, |sublayer| of(&sublayer.mixer)));
            first.map(|value| value as i32).collect()
        };
        let kv_heads = per_block(&|mixer| match mixer {
            Mixer::Attention(attention) => attention.kv_heads,
            _ => 0,
        });
        let widths = per_block(&|mixer| match mixer {
            Mixer::Mlp(mlp) => mlp.up.rows,
            Mixer::Experts(experts) => Self::expert_width(experts),
            _ => 0,
        });
        self.writer
            .whole_numbers(&self.key("attention.head_count_kv"), &kv_heads);
        self.writer.whole_numbers(&self.key("feed_forward_length"), &widths);
        let attention = self.attention()?;
        let (heads, head_dim) = (attention.heads, attention.head_dim);
        self.whole("attention.head_count", heads);
        self.whole("attention.key_length", head_dim);
        self.whole("attention.value_length", head_dim);
        let mamba = mixers(config).find_map(|mixer| match mixer {
            Mixer::Mamba(mamba) => Some(mamba),
            _ => None,
        });
        let mamba: &Mamba = mamba.ok_or("a model without Mamba in this architecture")?;
        self.whole("ssm.conv_kernel", mamba.taps);
        self.whole("ssm.inner_size", mamba.inner());
        self.whole("ssm.state_size", mamba.state);
        self.whole("ssm.time_step_rank", mamba.heads);
        self.whole("ssm.group_count", mamba.groups);
        if let Some(experts) = self.experts() {
            let wide = Self::expert_width(experts);
            let shared = experts.shared.as_ref().map(|shared| shared.up.rows);
            let latent = experts.latent.as_ref().map(|(down, _)| down.rows);
            self.whole("expert_feed_forward_length", wide);
            self.whole("expert_shared_count", usize::from(shared.is_some()));
            self.whole("expert_shared_feed_forward_length", shared.unwrap_or(0));
            if let Some(latent) = latent {
                self.whole("moe_latent_size", latent);
            }
            self.routing();
        }
        Ok(())
    }

    fn rotations(&mut self) -> Result<(), &'static str> {
        let Some(rotary) = self.config.rotaries.first() else {
            return Ok(());
        };
        self.whole("rope.dimension_count", rotary.dimensions);
        self.number("rope.freq_base", rotary.theta as f32);
        if let Some(local) = self.config.rotaries.get(1) {
            self.number("rope.freq_base_swa", local.theta as f32);
        }
        let name = self.architecture.name;
        let key = |of: &str| format!("{name}.{of}");
        rope::describe(self.writer, &key, rotary, self.architecture.divisors)
    }

    /// A number of the rotation's scaling: newer configurations put all of it in one place.
    fn of_rope(&self, key: &str) -> Option<f64> {
        let mut places = ["rope_parameters", "rope_scaling"].into_iter();
        let found = places.find_map(|key| self.json.get(key).filter(|value| value.is_object()));
        found?.get(key)?.as_f64()
    }
}

fn is_dense(Block(sublayers): &Block) -> bool {
    !sublayers
        .iter()
        .any(|sublayer| matches!(sublayer.mixer, Mixer::Experts(_)))
}
