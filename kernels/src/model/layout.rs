//! Which tensors a model has, in which order.

use polder_protocol::layout::Layout;

use super::Config;

/// The parts of a model and their tensors by Hugging Face name, in the order in which state blobs hold them.
///
/// A model whose output projection is the embedding has no `lm_head.weight`: its head is the final norm alone.
pub fn layout(config: &Config) -> Layout {
    config.layout().clone()
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
