//! The Llama family: what a `config.json` says, which tensors follow from it, and how positions turn.

mod config;
mod layout;
mod rope;

pub use config::{Config, ConfigError, Rope};
pub use layout::layout;
pub use rope::Frequencies;
