//! How a failure reaches a person: what, why, and what to try.

use std::error::Error;
use std::fmt;
use std::io::Write;
use std::process::ExitCode;

use crate::context::printable;

/// Adds what to try to a failure. The text is printed after everything else, on a line of its own.
pub(crate) trait Hint<T> {
    /// Says what to try, in the words of whoever typed the command.
    fn hint(self, text: impl Into<String>) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> Hint<T> for Result<T, E> {
    fn hint(self, text: impl Into<String>) -> anyhow::Result<T> {
        self.map_err(|error| hinted(error, text))
    }
}

/// As [`Hint::hint`], for an error at hand.
pub(crate) fn hinted(error: impl Into<anyhow::Error>, text: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Hinted {
        hint: text.into(),
        error: error.into(),
    })
}

/// Prints the failure to standard error and gives the process's exit code: 1. (Misuse of the command line is 2.)
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    // Where standard error is closed there is nobody to tell.
    let _ = std::io::stderr().write_all(render(error).as_bytes());
    ExitCode::FAILURE
}

fn render(error: &anyhow::Error) -> String {
    let mut text = format!("error: {error}\n");
    let mut last = error.to_string();
    for cause in error.chain().skip(1) {
        // Some libraries repeat their source in their own message.
        let cause = cause.to_string();
        if !last.ends_with(&cause) {
            text.push_str(&format!("  caused by: {cause}\n"));
        }
        last = cause;
    }
    if let Some(hinted) = error.chain().find_map(|cause| cause.downcast_ref::<Hinted>()) {
        text.push_str(&format!("  hint: {}\n", hinted.hint));
    }
    printable(&text)
}

/// An error that looks like the one it holds, and carries a hint.
#[derive(Debug)]
struct Hinted {
    hint: String,
    error: anyhow::Error,
}

impl fmt::Display for Hinted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl Error for Hinted {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.error.source()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_failure_says_what_why_and_what_to_try() {
        let refused = std::io::Error::new(
            std::io::ErrorKind::ConnectionRefused,
            "no peer answered at 127.0.0.1:4001",
        );
        let error = Err::<(), _>(refused)
            .hint("does a firewall let UDP through to port 4001?")
            .context("cannot join run `tiny-stories`")
            .unwrap_err();
        assert_eq!(
            render(&error),
            "error: cannot join run `tiny-stories`\n  caused by: no peer answered at 127.0.0.1:4001\n  hint: does a \
             firewall let UDP through to port 4001?\n"
        );
    }
}
