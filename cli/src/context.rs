//! What every verb needs to know: where the home is, and for whom to print.

use std::fmt::Display;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use etcetera::BaseStrategy;
use serde::Serialize;

use crate::failure::Hint;

/// Options that every verb takes.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Arguments {
    /// The folder of this node's keys, charter, data and models [default: polder in the user's data folder]
    #[arg(long, global = true, value_name = "DIR", env = "POLDER_HOME")]
    home: Option<PathBuf>,
    /// Print one JSON document, for programs
    #[arg(long, global = true)]
    json: bool,
}

/// What every verb is given.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    home: PathBuf,
    json: bool,
}

impl Context {
    /// Settles where the home is.
    pub(crate) fn new(arguments: &Arguments) -> anyhow::Result<Self> {
        let home = match &arguments.home {
            Some(home) => home.clone(),
            None => etcetera::choose_base_strategy()
                .context("cannot tell where this user's data folder is")
                .hint("name a folder with --home DIR, or set POLDER_HOME")?
                .data_dir()
                .join("polder"),
        };
        Ok(Self {
            home: std::path::absolute(&home).with_context(|| format!("cannot use {} as a home", home.display()))?,
            json: arguments.json,
        })
    }

    /// The home's folder, absolute. It need not exist.
    pub(crate) fn home(&self) -> &Path {
        &self.home
    }

    /// Whether a program reads what is printed.
    pub(crate) fn json(&self) -> bool {
        self.json
    }

    /// Prints an answer: as text for people, or as one line of JSON for programs.
    pub(crate) fn show<T: Serialize + Display>(&self, answer: &T) -> anyhow::Result<()> {
        let text = if self.json {
            serde_json::to_string(answer)?
        } else {
            printable(&answer.to_string())
        };
        write_all(&format!("{}\n", text.trim_end_matches('\n')))
    }

    /// Tells a person what goes on; a program hears nothing.
    pub(crate) fn say(&self, text: impl Display) -> anyhow::Result<()> {
        if self.json {
            Ok(())
        } else {
            write_all(&format!("{}\n", printable(&text.to_string())))
        }
    }
}

/// Writes to standard error, where there may be nobody: a log on a full disk, or a reader that has gone away.
pub(crate) fn note(text: &str) {
    // There is no other place to say so.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Text that may hold what others wrote, such as the name of a model, without what would steer a terminal.
pub(crate) fn printable(text: &str) -> String {
    let steers = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    text.replace(steers, "\u{fffd}")
}

/// Writes to standard output at once. A reader that has gone away, such as `head`, is no failure of ours.
pub(crate) fn write_all(text: &str) -> anyhow::Result<()> {
    let mut output = io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_wrote_steers_no_terminal() {
        assert_eq!(
            printable("a\u{1b}[31mb\u{9b}\r\n\té"),
            "a\u{fffd}[31mb\u{fffd}\u{fffd}\n\té"
        );
    }
}
