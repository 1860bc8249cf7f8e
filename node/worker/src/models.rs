//! Models on disk, for commands that convert, make and check them without a worker process.

use std::path::Path;

use polder_kernels::device::{Choice, Device};
use polder_kernels::model::{Config, layout};
use polder_kernels::text::Tokenizer;
use polder_protocol::layout::Layout;

pub use polder_kernels::model::ConfigError;
pub use polder_kernels::quant::PackedType;
pub use polder_kernels::text::{BEGIN_TEXT, END_TEXT, TextError, byte_level_bpe, bytes as byte_tokenizer};
pub use polder_kernels::verify::{Measure, Quantity, Report, VerifyError};
pub use polder_kernels::weights::{
    Exported, ImportedModel, Packed, PartFile, Progress, Quantised, Summary, TypeTotal, Vectors, WeightsError, export,
    export_gguf, import, inspect, quantise, write_state_part,
};

/// The parts and tensors of a model by its Hugging Face `config.json`.
///
/// # Errors
///
/// [`ConfigError`] names the key that is missing, wrong or not implemented.
pub fn layout_of(config_json: &str) -> Result<Layout, ConfigError> {
    Config::from_json(config_json).map(|config| layout(&config))
}

/// Compares the model in a Hugging Face folder with `cases.safetensors` and `expected.json` beside it.
///
/// # Errors
///
/// [`VerifyError`] where the model or its cases cannot be read; numbers that differ are in the report.
pub fn verify(folder: &Path, device: Choice) -> Result<Report, VerifyError> {
    let (device, fell_back) = Device::choose(device);
    if let Some(reason) = fell_back {
        tracing::warn!(%device, reason, "the device that was asked for cannot be used");
    }
    polder_kernels::verify::verify(folder, &device)
}

/// Checks that bytes are a `tokenizer.json` that can be used.
///
/// # Errors
///
/// [`TextError`] says what is wrong with them.
pub fn check_tokenizer(bytes: &[u8]) -> Result<(), TextError> {
    Tokenizer::from_bytes(bytes).map(|_| ())
}

/// A tokenizer and what it makes of some texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Tokens that the tokenizer has.
    pub vocabulary: usize,
    /// Tokens that the texts are cut into.
    pub tokens: u64,
}

/// Cuts texts with a `tokenizer.json`.
///
/// # Errors
///
/// [`TextError`] of the tokenizer.
pub fn tokens_of(tokenizer_json: &[u8], texts: &[String]) -> Result<Cut, TextError> {
    let tokenizer = Tokenizer::from_bytes(tokenizer_json)?;
    let mut tokens = 0;
    // Line by line, so that memory stays small.
    for line in texts.iter().flat_map(|text| text.split_inclusive('\n')) {
        tokens += tokenizer.encode_bare(line)?.len() as u64;
    }
    Ok(Cut {
        vocabulary: tokenizer.vocabulary(),
        tokens,
    })
}
