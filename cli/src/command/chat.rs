//! `polder chat`: questions and answers in turn, remembered until the end.

use std::io::IsTerminal;
use std::path::Path;

use anyhow::{Context as _, anyhow, ensure};
use serde_json::Value;
use tokio::sync::mpsc;

use crate::answers::{Choosing, Piece, ask, message, shown, who_answered};
use crate::client::Client;
use crate::context::{Context, note, printable, write_all};
use crate::failure::hinted;
use crate::lines::{Line, Lines};

/// Pieces of an answer that wait to be printed.
const PIECES_MAX: usize = 64;

/// Arguments of `polder chat`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    choosing: Choosing,
    /// What the model is told before everything else
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Say which nodes answered
    #[arg(short, long)]
    verbose: bool,
}

/// Talks until the end of the input.
pub(crate) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<()> {
    if context.json() {
        return Err(hinted(
            anyhow!("a conversation is no JSON document"),
            "for programs there are `polder ask --json` and the API, whose address `polder status` prints",
        ));
    }
    let client = Client::open(context.home())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let talked = runtime.block_on(talk(client, context.home(), arguments));
    // A thread that waits for a line must not hold up the end.
    runtime.shutdown_background();
    talked
}

async fn talk(client: Client, home: &Path, arguments: Arguments) -> anyhow::Result<()> {
    write_all("Ctrl-C stops an answer, Ctrl-D leaves.\n")?;
    let mut lines = Lines::after("> ")?;
    let mut unanswered = 0;
    let mut messages: Vec<Value> = arguments.system.iter().map(|text| message("system", text)).collect();
    loop {
        let line = tokio::select! {
            line = lines.next() => line,
            _ = tokio::signal::ctrl_c() => Line::End,
        };
        let line = match line {
            Line::Text(text) => text,
            Line::Dropped => {
                write_all("(Ctrl-D leaves)\n")?;
                continue;
            }
            Line::End => {
                write_all("\n")?;
                // A person has seen it; a script looks at the exit code.
                ensure!(
                    unanswered == 0 || std::io::stdin().is_terminal(),
                    "{unanswered} questions were not answered"
                );
                return Ok(());
            }
        };
        if line.trim().is_empty() {
            continue;
        }
        messages.push(message("user", &line));
        match answer(&client, home, &arguments, &messages).await {
            Ok(text) => messages.push(message("assistant", &text)),
            Err(error) => {
                // The question is forgotten, so that it can be asked again.
                messages.pop();
                note(&printable(&format!("error: {error:#}\n")));
                unanswered += 1;
            }
        }
    }
}

/// Prints one answer as it comes and gives all of it, or what came before Ctrl-C.
async fn answer(client: &Client, home: &Path, arguments: &Arguments, messages: &[Value]) -> anyhow::Result<String> {
    let (sender, mut pieces) = mpsc::channel(PIECES_MAX);
    let question = arguments.choosing.question(home, messages)?;
    let client = client.clone();
    tokio::task::spawn_blocking(move || {
        let asked = match ask(&client, &question) {
            Ok(asked) => asked,
            Err(error) => {
                // Whoever asked may have stopped it.
                let _ = sender.blocking_send(Err(error));
                return;
            }
        };
        for piece in asked {
            if sender.blocking_send(piece).is_err() {
                return;
            }
        }
    });
    let mut all = String::new();
    loop {
        let piece = tokio::select! {
            piece = pieces.recv() => piece,
            _ = tokio::signal::ctrl_c() => None,
        };
        match piece.transpose().context("no answer")? {
            Some(Piece::Text(text)) => {
                write_all(&shown(&text))?;
                all.push_str(&text);
            }
            Some(Piece::Ended { polder, .. }) if arguments.verbose => {
                note(&format!("\nanswered by\n{}", who_answered(&polder)));
            }
            Some(Piece::Ended { .. } | Piece::Calls(_) | Piece::Usage(_)) => {}
            None => break,
        }
    }
    write_all("\n")?;
    Ok(all)
}
