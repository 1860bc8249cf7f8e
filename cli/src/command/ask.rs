//! `polder ask`: one question, one answer.

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use crate::answers::{Choosing, Piece, ask, message, shown, who_answered};
use crate::client::Client;
use crate::context::{Context, note, write_all};

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
    /// Offer the model the tools in this JSON file, a list of OpenAI's `{"type": "function", "function": ...}`; what it
    /// calls is printed, not carried out
    #[arg(long, value_name = "FILE")]
    tools: Option<PathBuf>,
    /// Answer with a call of one of the tools, whatever the question
    #[arg(long, requires = "tools")]
    must_call: bool,
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
    let mut asked = arguments.choosing.question(context.home(), &messages)?;
    if let Some(file) = &arguments.tools {
        asked["tools"] = tools(file)?;
        if arguments.must_call {
            asked["tool_choice"] = "required".into();
        }
    }
    let mut calls: Vec<Value> = Vec::new();
    for piece in ask(&client, &asked)? {
        match piece? {
            Piece::Text(text) => {
                if !context.json() {
                    write_all(&shown(&text))?;
                }
                all.push_str(&text);
            }
            Piece::Calls(more) => calls.extend(more),
            Piece::Ended {
                reason: why,
                polder: who,
            } => (reason, polder) = (why, who),
            Piece::Usage(tokens) => usage = tokens,
        }
    }
    if context.json() {
        let mut answer = json!({ "answer": all, "finish_reason": reason, "usage": usage, "polder": polder });
        if !calls.is_empty() {
            answer["tool_calls"] = calls.into();
        }
        return write_all(&format!("{answer}\n"));
    }
    if calls.is_empty() || !all.is_empty() {
        write_all("\n")?;
    }
    for call in &calls {
        let text = |path: &str| call.pointer(path).and_then(Value::as_str).unwrap_or_default();
        write_all(&shown(&format!(
            "call {} {}\n",
            text("/function/name"),
            text("/function/arguments")
        )))?;
    }
    if arguments.verbose {
        note(&format!("answered by\n{}", who_answered(&polder)));
    }
    if reason == "length" && std::io::stderr().is_terminal() {
        note("(the answer was cut: its limit of tokens was reached)\n");
    }
    Ok(())
}

/// The tools in `file`: a list, or a single one.
fn tools(file: &Path) -> anyhow::Result<Value> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    match serde_json::from_str(&text) {
        Ok(Value::Array(tools)) => Ok(tools.into()),
        Ok(tool @ Value::Object(_)) => Ok(Value::from(vec![tool])),
        Ok(_) => bail!("{} holds neither a list of tools nor a tool", file.display()),
        Err(error) => Err(error).with_context(|| format!("{} is not JSON", file.display())),
    }
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
