//! Which tensors a model has, in which order.

use polder_protocol::layout::{Layout, PartLayout, TensorLayout};

use super::Config;

/// The parts of a model and their tensors by Hugging Face name, in the order in which state blobs hold them.
///
/// A model whose output projection is the embedding has no `lm_head.weight`: its head is the final norm alone.
pub fn layout(config: &Config) -> Layout {
    let embedding = part(vec![tensor(
        "model.embed_tokens.weight",
        &[config.vocabulary, config.hidden],
    )]);
    let mut head = vec![tensor("model.norm.weight", &[config.hidden])];
    if !config.tied {
        head.push(tensor("lm_head.weight", &[config.vocabulary, config.hidden]));
    }
    let blocks = (0..config.blocks).map(|block| block_part(config, block));
    Layout {
        parts: core::iter::once(embedding).chain(blocks).chain([part(head)]).collect(),
    }
}

fn block_part(config: &Config, block: u32) -> PartLayout {
    let (hidden, wide) = (config.hidden, config.intermediate);
    let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let tensors: [(&str, &[usize]); 9] = [
        ("input_layernorm", &[hidden]),
        ("self_attn.q_proj", &[queries, hidden]),
        ("self_attn.k_proj", &[keys, hidden]),
        ("self_attn.v_proj", &[keys, hidden]),
        ("self_attn.o_proj", &[hidden, queries]),
        ("post_attention_layernorm", &[hidden]),
        ("mlp.gate_proj", &[wide, hidden]),
        ("mlp.up_proj", &[wide, hidden]),
        ("mlp.down_proj", &[hidden, wide]),
    ];
    let named = |(name, shape): (&str, &[usize])| tensor(&format!("model.layers.{block}.{name}.weight"), shape);
    part(tensors.into_iter().map(named).collect())
}

fn part(tensors: Vec<TensorLayout>) -> PartLayout {
    PartLayout { tensors }
}

fn tensor(name: &str, shape: &[usize]) -> TensorLayout {
    TensorLayout {
        name: name.to_owned(),
        // A checked configuration has no size beyond 2²⁴.
        shape: shape
            .iter()
            .map(|size| u32::try_from(*size).unwrap_or(u32::MAX))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tied_model_has_every_parameter_once() {
        let config = include_str!("../../tests/golden/llama_tied_sharded/config.json");
        let layout = layout(&Config::from_json(config).unwrap());
        // As counted in the golden case.
        assert_eq!(layout.elements(), Some(153_024));
        assert_eq!(layout.blocks(), 3);
        assert_eq!(layout.parts[4].tensors.len(), 1);
    }

    #[test]
    fn an_untied_model_has_its_projection_in_the_head() {
        let config = include_str!("../../tests/golden/llama_rope_llama3/config.json");
        let layout = layout(&Config::from_json(config).unwrap());
        assert_eq!(layout.elements(), Some(201_152));
        assert_eq!(layout.parts[4].tensors[1].name, "lm_head.weight");
        assert_eq!(layout.parts[1].tensors[1].shape, [128, 64]);
    }
}
