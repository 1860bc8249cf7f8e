//! What a person writes about lending, under `[contribute]` in `config.toml`.

use serde::{Deserialize, Serialize};

/// When a node may work: its owner's own work comes first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Contribute {
    /// Local times in which the node may work, such as `"19:00-07:30"` or `"mon-fri 18:00-08:00"`; empty means always.
    pub windows: Vec<String>,
    /// Yield while other processes load the machine by more than so many percent of its cores; 0 never yields. Off by
    /// default: a server shared by schedulers sets it.
    pub load_percent_max: u32,
    /// Yield while a foreign process holds memory on the device.
    pub yield_to_device_processes: bool,
}

impl Default for Contribute {
    fn default() -> Self {
        Self {
            windows: Vec::new(),
            load_percent_max: 0,
            yield_to_device_processes: true,
        }
    }
}
