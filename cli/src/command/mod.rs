//! The verbs. Each is a module with its arguments and one function `run(&Context, Arguments)`.

mod charter;
mod completions;
mod data;
mod institution;
mod invite;
mod model;
mod run;
pub(crate) mod worker;

use clap::Subcommand;

use crate::context::Context;

/// What a person can ask for.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Run(run::Arguments),
    Data(data::Arguments),
    /// Write, show and sign the federation's founding document
    Charter(charter::Arguments),
    /// Make an institution's key, certify its nodes, revoke them
    Institution(institution::Arguments),
    /// Print one line that lets one new node in
    Invite(invite::Arguments),
    /// Print a completion script for a shell
    Completions(completions::Arguments),
    /// Own the device and compute for the daemon that started this process
    #[command(hide = true)]
    Worker(worker::Arguments),
    /// Bring in, list, show and verify models
    Model(model::Arguments),
}

/// Does what was asked.
pub(crate) fn run(context: &Context, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Run(arguments) => run::run(context, arguments),
        Command::Data(arguments) => data::run(context, arguments),
        Command::Charter(arguments) => charter::run(context, arguments),
        Command::Institution(arguments) => institution::run(context, arguments),
        Command::Invite(arguments) => invite::run(context, arguments),
        Command::Completions(arguments) => completions::run(context, arguments),
        Command::Worker(_) => anyhow::bail!("the worker is started before there is a home"),
        Command::Model(arguments) => model::run(context, arguments),
    }
}
