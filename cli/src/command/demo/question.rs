//! The end of the demonstration: the run's state is published as a model, held as two stages on two nodes, and asked.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use crate::client::Client;

use super::processes::Node;

/// Stages are fetched and loaded in a second or two on an idle machine.
const SERVED_TIME_MAX: Duration = Duration::from_secs(40);

/// Beginnings, each in a language of the Declaration.
const BEGINNINGS: &[&str] = &[
    "Everyone has the right to ",
    "Jeder hat das Recht auf ",
    "Toute personne a droit ",
];

/// A beginning, how the model went on, and the nodes that computed it.
pub(super) struct Answer {
    pub(super) beginning: &'static str,
    pub(super) text: String,
    pub(super) nodes: Vec<String>,
}

/// Publishes `run` and has its model complete a few sentences.
pub(super) fn ask(nodes: &[Node], run: &str, stop: &AtomicBool) -> anyhow::Result<Vec<Answer>> {
    let steward = nodes.first().context("there is no node")?;
    let _: Value = steward.verb(&["run", "publish", run])?;
    let client = Client::open(&steward.home)?;
    let deadline = Instant::now() + SERVED_TIME_MAX;
    let mut answers = Vec::new();
    for beginning in BEGINNINGS {
        let body = json!({ "model": run, "prompt": beginning, "max_tokens": 60, "temperature": 0.0 });
        let answer = loop {
            match client.post::<Value>("/v1/completions", &body) {
                Ok(answer) => break answer,
                Err(error) if Instant::now() > deadline => {
                    return Err(error.context("the published model was not served"));
                }
                Err(_) if stop.load(Ordering::Relaxed) => bail!("interrupted"),
                Err(_) => std::thread::sleep(Duration::from_millis(300)),
            }
        };
        answers.push(read(beginning, &answer, nodes)?);
    }
    Ok(answers)
}

fn read(beginning: &'static str, answer: &Value, nodes: &[Node]) -> anyhow::Result<Answer> {
    let text = answer
        .pointer("/choices/0/text")
        .and_then(Value::as_str)
        .context("the answer holds no text")?;
    let chain = answer
        .pointer("/polder/chain")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    let name = |stage: &Value| -> Option<String> {
        let id = stage.get("node").and_then(Value::as_str).or_else(|| stage.as_str())?;
        let known = nodes.iter().find(|node| node.id.as_deref() == Some(id));
        Some(known.map_or_else(|| id.chars().take(8).collect(), |node| node.name.clone()))
    };
    Ok(Answer {
        beginning,
        text: text.replace('\n', " "),
        nodes: chain.iter().filter_map(name).collect(),
    })
}
