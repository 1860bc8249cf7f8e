//! Why training fails.

use polder_protocol::adapters::AdapterError;
use thiserror::Error;

use super::MICRO_BATCHES_KEPT_MAX;
use crate::model::ConfigError;

/// Why a training stage was not loaded, or did not do what it was asked.
#[derive(Debug, Clone, Error, PartialEq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum TrainError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("the adapters: {0}")]
    Adapters(#[from] AdapterError),
    #[error("the run's settings: {0}")]
    Setting(&'static str),
    #[error("blocks {first} to {end} are not a range of a model of {blocks} blocks")]
    Range { first: u32, end: u32, blocks: u32 },
    #[error("a model with `tie_word_embeddings` cannot be trained in several stages: first and last share a tensor")]
    TiedStages,
    #[error("the stage has {expected} parts, not {found}")]
    PartCount { expected: usize, found: usize },
    #[error("part {part} has {expected} parameters, not {found}")]
    PartSize { part: u32, expected: usize, found: usize },
    #[error("parameter file {file}: {reason}")]
    File { file: String, reason: String },
    #[error("{batch} sequences of {seq} tokens are not a micro-batch that fits {found} values")]
    Shape { batch: u32, seq: u32, found: usize },
    #[error("token {token} is not below {vocabulary}")]
    Token { token: u32, vocabulary: usize },
    #[error("this stage takes {takes}")]
    Kind { takes: &'static str },
    #[error("micro-batch {micro_batch} has not been run forward, or its backward is done")]
    NoMicroBatch { micro_batch: u32 },
    #[error("{MICRO_BATCHES_KEPT_MAX} micro-batches are kept, which is the limit")]
    Full,
    #[error("the local texts are shorter than one sequence of {seq} tokens")]
    TooLittleData { seq: u32 },
    #[error("no gradients have been made since the last step")]
    NoGradients,
    #[error("{what} holds numbers that are not finite")]
    NotFinite { what: &'static str },
    #[error("{what} of {bytes} bytes exceeds the device's largest buffer of {limit}")]
    DeviceBuffer { what: &'static str, bytes: u64, limit: u64 },
    #[error("the device failed: {reason}")]
    Device { reason: String },
}
