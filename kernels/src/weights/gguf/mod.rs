//! GGUF files, the models of llama.cpp and its kin: read as their Hugging Face folders would be, and written.
//!
//! Bytes to a header: [`header`]. Metadata to a `config.json`: [`config`], [`latent`], [`nemotron_h`], [`rope`]. Where
//! the tensors of a folder are in a file, and in what form: [`places`]. Both ways in full: [`model`], [`export`].

mod architecture;
#[cfg(test)]
pub(super) mod builder;
mod config;
mod describe;
mod error;
mod export;
mod file;
mod header;
mod latent;
mod metadata;
mod model;
mod nemotron_h;
mod places;
mod reader;
mod rope;
mod rows;
mod tokenizer;
mod tokenizer_writer;
mod value;
mod writer;

pub(super) use architecture::NAMES;
pub use error::GgufError;
pub use export::export_gguf;
pub(super) use file::GgufFile;
pub use header::Gguf;
pub(super) use model::open;
