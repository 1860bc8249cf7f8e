//! What a model is: its `config.json` becomes a description of blocks, a layout of tensors, and rotations.
//!
//! `families` has one file per family; each maps a configuration onto the shared parts of `describe`.

mod config;
mod curve;
pub(crate) mod describe;
mod families;
pub(crate) mod json;
mod keys;
mod layout;
mod part;
mod positions;
pub(crate) mod routing;

pub(crate) use config::Further;
pub use config::{Config, ConfigError, Llama};
pub use curve::Curve;
pub use families::FAMILIES;
pub use layout::layout;
pub use positions::{Frequencies, Rope, Rotary};
