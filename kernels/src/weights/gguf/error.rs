//! What can be wrong with the bytes of a GGUF file.

use thiserror::Error;

use crate::quant::QuantError;

/// Why bytes are not a GGUF file.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum GgufError {
    #[error("it does not begin with `GGUF`")]
    Magic,
    #[error("version {version} is not read, 2 and 3 are")]
    Version { version: u32 },
    #[error("it ends within {field}: {needed} bytes needed at {at}, {left} left")]
    Truncated {
        field: String,
        at: usize,
        needed: u64,
        left: usize,
    },
    #[error("{field} says {count}, which the file has no room for")]
    Count { field: String, count: u64 },
    #[error("{field} is not UTF-8")]
    Text { field: String },
    #[error("{field} has a value of unknown type {code}")]
    ValueType { field: String, code: u32 },
    #[error("{field} is there twice")]
    Repeated { field: String },
    #[error("metadata `{key}` is missing")]
    Missing { key: String },
    #[error("metadata `{key}` is not {must}")]
    Wrong { key: String, must: &'static str },
    #[error("tensor `{tensor}` has {dimensions} dimensions, 1 to 4 are allowed")]
    Dimensions { tensor: String, dimensions: u32 },
    #[error("tensor `{tensor}` is of ggml type {code}, which is not read")]
    TensorType { tensor: String, code: u32 },
    #[error("tensor `{tensor}` of shape {shape:?}")]
    Shape {
        tensor: String,
        shape: Vec<u64>,
        #[source]
        source: QuantError,
    },
    #[error("tensor `{tensor}` of shape {shape:?} is too large for this machine")]
    TooLarge { tensor: String, shape: Vec<u64> },
    #[error("tensor `{tensor}` lies at {start} to {end} of a file of {file_bytes} bytes")]
    Outside {
        tensor: String,
        start: u64,
        end: u64,
        file_bytes: usize,
    },
    #[error("tensor `{tensor}` begins at {start}, which is no multiple of {alignment}")]
    Alignment { tensor: String, start: u64, alignment: u64 },
    #[error("tensors `{first}` and `{second}` share bytes")]
    Overlap { first: String, second: String },
}

/// A key with another kind of value than it must have.
pub(super) fn wrong(key: &str, must: &'static str) -> GgufError {
    GgufError::Wrong {
        key: key.to_owned(),
        must,
    }
}
