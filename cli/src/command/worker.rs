//! `polder worker`: the process that owns a device. The daemon starts it; people do not.

use std::process::ExitCode;

/// Arguments of `polder worker`. The worker reads them by itself, as `node/worker` documents them.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// `--threads COUNT`, `--device auto|cpu|wgpu`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    _options: Vec<String>,
}

/// Computes until standard input ends.
pub(crate) fn run() -> ExitCode {
    polder_worker::run()
}
