//! The process that owns a device: reads orders from its standard input, computes, answers on its standard output.
//!
//! One thread reads, one computes, one turns tokens into words and back. The process ends when its input does, so it
//! never outlives the daemon that started it.

mod batch;
pub mod bench;
mod boundary;
mod compute;
mod grammars;
mod host;
pub mod models;
mod options;
mod pipes;
mod words;

use std::io;
use std::process::ExitCode;

use tracing::{error, info};

pub use host::{Engine, HostError, host};
pub use options::{Options, OptionsError};
pub use polder_kernels::device::{Choice, UnknownDevice};
pub use polder_kernels::text::{byte_level_bpe, bytes as byte_tokenizer};
pub use polder_kernels::train::{initial_adapters, initial_parameters};
pub use polder_kernels::weights::folder_parameters;

/// Serves orders on standard input and output until the input ends.
///
/// It reads `POLDER_WORKER_THREADS` and `POLDER_WORKER_DEVICE`, and `--threads` and `--device` behind the verb `worker`.
/// Return from `main` with the answer: orders still under way end with the process.
pub fn run() -> ExitCode {
    let arguments = std::env::args().skip_while(|argument| argument != "worker").skip(1);
    let variable = |name: &str| std::env::var(name).ok();
    match Options::read(variable, arguments) {
        Ok(options) => run_with(
            options,
            move || compute::Compute::open(options.device),
            words::Words::default,
        ),
        Err(error) => {
            error!(%error, "a worker cannot be started like this");
            ExitCode::FAILURE
        }
    }
}

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
