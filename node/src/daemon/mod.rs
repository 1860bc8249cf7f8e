//! Start, stop, configuration: the one place that wires everything together.

mod config;
mod local;

pub use config::{Config, ConfigError, Contribute};
pub use local::LocalApi;
