//! What can be wrong with a model's files.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::GgufError;
use crate::model::ConfigError;
use crate::quant::QuantError;

/// Why weights could not be read, converted or written.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum WeightsError {
    #[error("cannot {action} {}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is neither a GGUF file nor a folder with a config.json", path.display())]
    NotAModel { path: PathBuf },
    #[error("{} is missing: {hint}", path.display())]
    MissingFile { path: PathBuf, hint: &'static str },
    #[error("{} is already there: choose another place, or remove it first", path.display())]
    AlreadyThere { path: PathBuf },
    #[error("{} is no whole safetensors file: {reason}; fetch or copy it again", path.display())]
    Safetensors { path: PathBuf, reason: String },
    #[error("{} is no whole GGUF file; fetch or copy it again", path.display())]
    Gguf {
        path: PathBuf,
        #[source]
        source: GgufError,
    },
    #[error("{}: {reason}", path.display())]
    Json { path: PathBuf, reason: String },
    #[error("{} describes a model that cannot run here", path.display())]
    Config {
        path: PathBuf,
        #[source]
        source: ConfigError,
    },
    #[error("{}: architecture `{architecture}` is not implemented; implemented: {}", path.display(), super::gguf::NAMES)]
    Architecture { path: PathBuf, architecture: String },
    #[error("{}: {feature} is not implemented", path.display())]
    Feature { path: PathBuf, feature: String },
    #[error("{}: tensor `{tensor}` is missing", path.display())]
    MissingTensor { path: PathBuf, tensor: String },
    #[error("{}: tensor `{tensor}` is not one of this model's", path.display())]
    UnknownTensor { path: PathBuf, tensor: String },
    #[error("{}: tensor `{tensor}` has shape {found:?}, the model's configuration asks for {expected:?}", path.display())]
    Shape {
        path: PathBuf,
        tensor: String,
        expected: Vec<usize>,
        found: Vec<usize>,
    },
    #[error("{}: tensor `{tensor}` has elements of type {dtype}; F32, F16 and BF16 are read", path.display())]
    ElementType {
        path: PathBuf,
        tensor: String,
        dtype: String,
    },
    #[error("{}: metadata `{key}` is `{value}`, expected a packed type and dimensions that fit the tensor", path.display())]
    PackedNote { path: PathBuf, key: String, value: String },
    #[error("{}: tensor `{tensor}` has values that are not finite, or become so", path.display())]
    NotFinite { path: PathBuf, tensor: String },
    #[error("{}: tensor `{tensor}`", path.display())]
    Quant {
        path: PathBuf,
        tensor: String,
        #[source]
        source: QuantError,
    },
    #[error("{}: the tokenizer cannot be used: {reason}", path.display())]
    Tokenizer { path: PathBuf, reason: String },
}

impl WeightsError {
    /// For `map_err`: what was being done to which file.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// For `map_err`: which tensor of which file.
    pub(crate) fn quant(path: &Path, tensor: &str) -> impl FnOnce(QuantError) -> Self {
        let (path, tensor) = (path.to_owned(), tensor.to_owned());
        move |source| Self::Quant { path, tensor, source }
    }
}
