//! The process that owns a device: reads orders from its standard input, computes, answers on its standard output.
//!
//! One thread reads, one computes, one turns tokens into words and back. The process ends when its input does, so it
//! never outlives the daemon that started it.

mod host;
pub mod models;
mod options;
mod pipes;

use std::io;
use std::process::ExitCode;

use tracing::{error, info};

pub use host::{Engine, HostError, host};
pub use options::{DeviceChoice, Options, OptionsError};

/// Serves orders on standard input and output with these engines until the input ends. See [`host()`].
///
/// Return from `main` with the answer: orders still under way end with the process.
pub fn run_with<C: Engine, T: Engine>(
    options: Options,
    compute: impl FnOnce() -> C + Send + 'static,
    text: impl FnOnce() -> T + Send + 'static,
) -> ExitCode {
    if let Some(threads) = options.threads
        && let Err(error) = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()
    {
        error!(%error, threads, "cannot set the number of threads");
        return ExitCode::FAILURE;
    }
    let replies = match pipes::take_output() {
        Ok(replies) => replies,
        Err(error) => {
            error!(%error, "cannot take standard output");
            return ExitCode::FAILURE;
        }
    };
    match host(io::stdin().lock(), replies, compute, text) {
        Ok(()) => {
            info!("the daemon has closed the pipe");
            ExitCode::SUCCESS
        }
        Err(error) => {
            error!(error = &error as &dyn std::error::Error, "worker ends");
            ExitCode::FAILURE
        }
    }
}
