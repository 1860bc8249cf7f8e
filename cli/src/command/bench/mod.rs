//! `polder bench`: what this machine and its network can do.

mod engine;
mod net;

use crate::context::Context;

/// Arguments of `polder bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Measure how fast the CPU serves a model
    ///
    /// Prints tokens a second of one session that decodes, of a prompt in one piece, and of several sessions that
    /// decode together, and the time from the start of a process to its first token. Figures are medians. The peer's
    /// figures come from kernels/benches/peers/beside_llama_cpp.py.
    Engine(engine::Arguments),
    /// Send activations to a member and time their way back
    Net(net::Arguments),
}

/// Does what was asked.
pub(crate) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<()> {
    match arguments.what {
        What::Engine(arguments) => engine::run(context, arguments),
        What::Net(arguments) => net::run(context, arguments),
    }
}
