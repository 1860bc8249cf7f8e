//! `polder completions`: a completion script for a shell.

use clap::CommandFactory;

use crate::context::{Context, write_all};

/// Arguments of `polder completions`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Which shell
    shell: clap_complete::Shell,
}

/// Prints the script.
pub(crate) fn run(_context: &Context, arguments: Arguments) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut crate::Arguments::command(), "polder", &mut script);
    write_all(&String::from_utf8_lossy(&script))
}
