//! `polder ask`: one question, one answer.

use std::io::{IsTerminal, Read};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use crate::answers::{Choosing, Piece, ask, message, who_answered};
use crate::client::Client;
use crate::context::{Context, write_all};

/// The longest question from standard input; the context of any model ends before.
const QUESTION_BYTES_MAX: u64 = 4 << 20;

/// Arguments of `polder ask`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The question; `-` or nothing reads it from standard input
    question: Option<String>,
    #[command(flatten)]
    choosing: Choosing,
    /// What the model is told before the question
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Say which nodes answered
    #[arg(short, long)]
    verbose: bool,
}

/// Asks and prints the answer as it comes.
pub(crate) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<()> {
    let question = match arguments.question.as_deref() {
        Some(question) if question != "-" => question.to_owned(),
        _ => read_question()?,
    };
    if question.trim().is_empty() {
        bail!("there is no question");
    }
    let client = Client::open(context.home())?;
    let mut messages: Vec<Value> = arguments.system.iter().map(|text| message("system", text)).collect();
    messages.push(message("user", &question));
    let mut all = String::new();
    let (mut reason, mut polder, mut usage) = (String::new(), Value::Null, Value::Null);
    for piece in ask(&client, &arguments.choosing.question(context.home(), &messages)?)? {
        match piece? {
            Piece::Text(text) => {
                if !context.json() {
                    write_all(&text)?;
                }
                all.push_str(&text);
            }
            Piece::Ended {
                reason: why,
                polder: who,
            } => (reason, polder) = (why, who),
            Piece::Usage(tokens) => usage = tokens,
        }
    }
    if context.json() {
        let answer = json!({ "answer": all, "finish_reason": reason, "usage": usage, "polder": polder });
        return write_all(&format!("{answer}\n"));
    }
    write_all("\n")?;
    if arguments.verbose {
        eprint!("answered by\n{}", who_answered(&polder));
    }
    if reason == "length" && std::io::stderr().is_terminal() {
        eprintln!("(the answer was cut: its limit of tokens was reached)");
    }
    Ok(())
}

fn read_question() -> anyhow::Result<String> {
    let mut question = String::new();
    let input = std::io::stdin().lock();
    input
        .take(QUESTION_BYTES_MAX)
        .read_to_string(&mut question)
        .context("cannot read the question")?;
    Ok(question)
}
