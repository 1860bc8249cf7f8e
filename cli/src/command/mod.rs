//! The verbs. Each is a module with its arguments and one function `run(&Context, Arguments)`.

mod ask;
mod bench;
mod charter;
mod chat;
mod completions;
mod control;
mod data;
mod demo;
mod doctor;
mod institution;
mod invite;
mod join;
mod model;
mod peers;
mod run;
mod status;
pub(crate) mod worker;

use clap::Subcommand;

use crate::context::Context;

/// What a person can ask for.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Ask the model one question
    Ask(ask::Arguments),
    /// Talk with the model
    Chat(chat::Arguments),
    Run(run::Arguments),
    Data(data::Arguments),
    /// Write, show and sign the federation's founding document
    Charter(charter::Arguments),
    /// Make an institution's key, certify its nodes, revoke them
    Institution(institution::Arguments),
    /// Print one line that lets one new node in
    Invite(invite::Arguments),
    /// Watch two institutions train one model together, on this machine alone
    Demo(demo::Arguments),
    /// Run this machine's node: lend its device, hold its data, ask its models
    Join(join::Arguments),
    /// End the node in order
    Leave,
    /// Give the device back to its owner now
    Pause,
    /// Lend the device again
    Resume,
    /// Show what the node does
    Status,
    /// Say what works between this machine and the others, and what to ask of whoever runs the network
    ///
    /// With a running node it tells of that; without one, of what a node would find here. The exit code is 0 where
    /// everything works, be it only fairly, and 1 where something is BAD.
    Doctor(doctor::Arguments),
    /// Show the members that this node has met, and how it reaches them
    Peers,
    /// Print a completion script for a shell
    Completions(completions::Arguments),
    /// Own the device and compute for the daemon that started this process
    #[command(hide = true)]
    Worker(worker::Arguments),
    /// Measure what this machine and its network can do
    Bench(bench::Arguments),
    /// Bring in, list, show and verify models
    Model(model::Arguments),
}

/// Does what was asked.
pub(crate) fn run(context: &Context, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Ask(arguments) => ask::run(context, arguments),
        Command::Chat(arguments) => chat::run(context, arguments),
        Command::Run(arguments) => run::run(context, arguments),
        Command::Data(arguments) => data::run(context, arguments),
        Command::Charter(arguments) => charter::run(context, arguments),
        Command::Institution(arguments) => institution::run(context, arguments),
        Command::Invite(arguments) => invite::run(context, arguments),
        Command::Demo(arguments) => demo::run(context, &arguments),
        Command::Join(arguments) => join::run(context, arguments),
        Command::Leave => control::leave(context),
        Command::Pause => control::pause(context),
        Command::Resume => control::resume(context),
        Command::Status => status::run(context),
        Command::Doctor(arguments) => doctor::run(context, &arguments),
        Command::Peers => peers::run(context),
        Command::Completions(arguments) => completions::run(context, arguments),
        Command::Worker(_) => anyhow::bail!("the worker is started before there is a home"),
        Command::Bench(arguments) => bench::run(context, arguments),
        Command::Model(arguments) => model::run(context, arguments),
    }
}
