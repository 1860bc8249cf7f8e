//! The binary `polder`: one plain function per verb.

// The tensor library's types nest deeper than the default limit.
#![recursion_limit = "256"]

mod answers;
mod client;
mod command;
mod context;
mod failure;
mod hub;
mod institutions;
mod interrupts;
mod lines;
mod pages;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::context::Context;

// Tensors come and go by the megabyte; a caching allocator saves a third of a training step.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Train and serve one open language model together, on the machines you already have.
#[derive(Debug, Parser)]
#[command(name = "polder", version, propagate_version = true, max_term_width = 100)]
struct Arguments {
    #[command(flatten)]
    context: context::Arguments,
    #[command(subcommand)]
    command: command::Command,
}

/// Warnings, but of two libraries errors alone: they warn of what happens every day, such as a network that is away, and what
/// comes of it this program says itself.
const LOGGED: &str = "warn,quinn_udp=error,libp2p_kad=error";

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    log_to_stderr();
    // The worker has no home and prints nothing: its standard output is the daemon's.
    if let command::Command::Worker(_) = arguments.command {
        pages::take_huge();
        return command::worker::run();
    }
    let done = Context::new(&arguments.context).and_then(|context| command::run(&context, arguments.command));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error),
    }
}

/// Logs go to standard error, so that standard output holds nothing but answers.
fn log_to_stderr() {
    let filter = EnvFilter::try_from_env("POLDER_LOG").unwrap_or_else(|_| EnvFilter::new(LOGGED));
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let started = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        // A log that cannot be written, on a full disk, would otherwise be complained of where it cannot be written either,
        // and that ends the thread.
        .log_internal_errors(false)
        .try_init();
    // Only a second subscriber could make this fail, and there is one call.
    debug_assert!(started.is_ok());
}
