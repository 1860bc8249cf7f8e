//! The architectures of GGUF files that are read and written, and the families that they are.

use super::places::mixers;
use crate::model::Config;
use crate::model::describe::Mixer;

/// An architecture of GGUF files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Architecture {
    /// In `general.architecture`, and before the keys of the metadata.
    pub(super) name: &'static str,
    /// Whether rows of queries and keys stand in an order of their own, for a rotation of neighbours.
    pub(super) rows_moved: bool,
    /// Whether gains of norms are stored one larger than in the Hugging Face folder.
    pub(super) gains_whole: bool,
    /// Whether `rope_freqs.weight` divides the frequencies. Elsewhere llama.cpp ignores it, so it is refused.
    pub(super) divisors: bool,
}

const PLAIN: Architecture = Architecture {
    name: "",
    rows_moved: false,
    gains_whole: false,
    divisors: false,
};

/// Those that are read and written. Mistral's and Mixtral's files call themselves llama.
const ARCHITECTURES: [Architecture; 12] = [
    Architecture {
        name: "llama",
        rows_moved: true,
        divisors: true,
        ..PLAIN
    },
    Architecture {
        name: "mistral3",
        rows_moved: true,
        divisors: true,
        ..PLAIN
    },
    Architecture { name: "qwen2", ..PLAIN },
    Architecture { name: "qwen3", ..PLAIN },
    Architecture {
        name: "qwen3moe",
        ..PLAIN
    },
    Architecture {
        name: "smollm3",
        rows_moved: true,
        ..PLAIN
    },
    Architecture {
        name: "gemma3",
        gains_whole: true,
        ..PLAIN
    },
    Architecture {
        name: "apertus",
        divisors: true,
        ..PLAIN
    },
    Architecture {
        name: "nemotron",
        gains_whole: true,
        ..PLAIN
    },
    Architecture {
        name: "deepseek2",
        ..PLAIN
    },
    Architecture {
        name: "nemotron_h",
        ..PLAIN
    },
    Architecture {
        name: "nemotron_h_moe",
        ..PLAIN
    },
];

/// Their names, to say in errors.
pub(in super::super) const NAMES: &str = "llama, mistral3, qwen2, qwen3, qwen3moe, smollm3, gemma3, apertus, nemotron, \
                                          deepseek2, nemotron_h, nemotron_h_moe";

/// The architecture with a name.
pub(super) fn named(name: &str) -> Option<Architecture> {
    ARCHITECTURES.into_iter().find(|known| known.name == name)
}

/// The architecture that a model is written as. What of it the architecture has no word for is found out when the
/// written file is compared.
pub(super) fn of(config: &Config) -> Option<Architecture> {
    named(match config.family {
        "llama" | "mistral" | "mixtral" => "llama",
        "ministral3" => "mistral3",
        "qwen2" => "qwen2",
        "qwen3" => "qwen3",
        "qwen3_moe" => "qwen3moe",
        "smollm3" => "smollm3",
        "gemma3_text" => "gemma3",
        "apertus" => "apertus",
        "nemotron" => "nemotron",
        "deepseek_v2" | "deepseek_v3" => "deepseek2",
        "nemotron_h" if mixers(config).any(|mixer| matches!(mixer, Mixer::Experts(_))) => "nemotron_h_moe",
        "nemotron_h" => "nemotron_h",
        _ => return None,
    })
}
