//! The verbs. Each is a module with its arguments and one function `run(&Context, Arguments)`.

mod completions;
mod data;

use clap::Subcommand;

use crate::context::Context;

/// What a person can ask for.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Data(data::Arguments),
    /// Print a completion script for a shell
    Completions(completions::Arguments),
}

/// Does what was asked.
pub(crate) fn run(context: &Context, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Data(arguments) => data::run(context, arguments),
        Command::Completions(arguments) => completions::run(context, arguments),
    }
}
