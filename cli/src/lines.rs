//! Lines of standard input: edited where a person types them, as they come where a program writes them.

use std::io::{BufRead as _, IsTerminal as _};
use std::thread;

use anyhow::Context as _;
use rustyline::error::ReadlineError;
use rustyline::history::MemHistory;
use rustyline::{Config, Editor};
use tokio::sync::mpsc;

use crate::context::write_all;

/// Lines that can be called up again with the arrow keys. They are kept in memory alone: what is asked is nobody else's.
const REMEMBERED: usize = 1_000;

/// What came of waiting for a line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// A line, without its end. What is pasted at once may hold several.
    Text(String),
    /// Ctrl-C: what was typed is dropped.
    Dropped,
    /// There is no more.
    End,
}

/// Lines of standard input, from a thread of their own: reading cannot be interrupted.
#[derive(Debug)]
pub(crate) struct Lines {
    wanted: mpsc::Sender<()>,
    lines: mpsc::Receiver<Line>,
}

impl Lines {
    /// Of standard input, each after `prompt`.
    ///
    /// # Errors
    ///
    /// That the terminal cannot be used, or that there is no thread to wait on.
    pub(crate) fn after(prompt: &'static str) -> anyhow::Result<Self> {
        let (wanted, wishes) = mpsc::channel(1);
        let (sender, lines) = mpsc::channel(1);
        let mut reader = Reader::new().context("cannot use the terminal")?;
        thread::Builder::new()
            .spawn(move || {
                let mut wishes = wishes;
                while let Some(()) = wishes.blocking_recv() {
                    if sender.blocking_send(reader.read(prompt)).is_err() {
                        return;
                    }
                }
            })
            .context("cannot wait for lines")?;
        Ok(Self { wanted, lines })
    }

    /// The next one.
    pub(crate) async fn next(&mut self) -> Line {
        // A thread that has ended has nothing more to give.
        let _ = self.wanted.send(()).await;
        self.lines.recv().await.unwrap_or(Line::End)
    }
}

enum Reader {
    Person(Box<Editor<(), MemHistory>>),
    Program,
}

impl Reader {
    fn new() -> rustyline::Result<Self> {
        if !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
            return Ok(Self::Program);
        }
        let config = Config::builder().max_history_size(REMEMBERED)?.build();
        let history = MemHistory::with_config(&config);
        let editor = Editor::with_history(config, history)?;
        Ok(Self::Person(Box::new(editor)))
    }

    fn read(&mut self, prompt: &str) -> Line {
        match self {
            Self::Person(editor) => match editor.readline(prompt) {
                Ok(text) => {
                    // Without it the line is only not remembered.
                    let _ = editor.add_history_entry(&text);
                    Line::Text(text)
                }
                Err(ReadlineError::Interrupted) => Line::Dropped,
                Err(_) => Line::End,
            },
            Self::Program => {
                let mut line = Vec::new();
                // Bytes that are no text do not end the conversation.
                if write_all(prompt).is_err()
                    || !matches!(std::io::stdin().lock().read_until(b'\n', &mut line), Ok(1..))
                {
                    return Line::End;
                }
                Line::Text(String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned())
            }
        }
    }
}
