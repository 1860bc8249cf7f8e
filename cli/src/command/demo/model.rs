//! `polder demo --model FILE`: a published model, handed out in stages to nodes of two institutions, and asked. Where
//! every stage has a second holder, a node is killed in the middle of an answer, which goes on as if nothing had
//! happened.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use polder_node::daemon::Status;
use serde_json::{Value, json};

use crate::answers::{Piece, ask, message};
use crate::client::Client;
use crate::context::{Context, write_all};

use super::processes::Node;
use super::{found, place, view::bytes};

/// Stages of a small model are fetched and loaded in seconds; a large one takes its time to be copied.
const SERVED_TIME_MAX: Duration = Duration::from_secs(600);
/// The longest answer.
const ANSWER_TOKENS_MAX: u32 = 60;
/// Pieces of text after which a node is killed.
const PIECES_BEFORE_THE_KILL: usize = 15;

const QUESTIONS: &[&str] = &[
    "Why is the sky blue?",
    "Warum ist der Himmel blau?",
    "Pourquoi le ciel est-il bleu ?",
];

/// An answer, and what it took.
struct Answer {
    text: String,
    nodes: Vec<String>,
    tokens_per_second: f64,
}

/// Hands `file` out to `count` nodes below `root` and asks them.
pub(super) fn run(context: &Context, root: &Path, file: &Path, count: u32, stop: &AtomicBool) -> anyhow::Result<()> {
    let began = Instant::now();
    let file = file.to_str().context("the model's path is not text")?;
    let mut tell = |text: &str| context.say(text);
    // Two holders of every block where there are nodes enough: the second takes over when the first dies.
    let copies = if count >= 4 { 2 } else { 1 };
    let mut nodes = Vec::new();
    let mut blocks_max = 0;
    for number in 0..count {
        let (institution, name) = place(number, count);
        let settings = format!("threads = 1\ntrain = false\nblocks_max = {blocks_max}\n");
        let mut node = Node::prepare(root, &name, &settings)?;
        if number == 0 {
            tell(&format!("{name} brings the model in"))?;
            let _: Value = node.verb(&["model", "import", file])?;
            let list: Value = node.verb(&["model", "list"])?;
            let blocks = list.pointer("/models/0/blocks").and_then(Value::as_u64);
            let blocks = blocks.context("the imported model is not listed")?;
            blocks_max = blocks.div_ceil(u64::from((count / copies).max(1)));
            node = Node::prepare(
                root,
                &name,
                &format!("threads = 1\ntrain = false\nblocks_max = {blocks_max}\n"),
            )?;
        }
        found(&mut nodes, node, institution, &mut tell)?;
        if stop.load(Ordering::Relaxed) {
            bail!("interrupted; nothing was left running");
        }
    }
    let gateway = nodes.first().context("there is no node")?;
    let client = Client::open(&gateway.home)?;
    let model = wait_until_served(&client, copies as usize, stop)?;
    tell(&format!(
        "{model} is held in stages of at most {blocks_max} blocks, each on {copies} node{}\n",
        if copies == 1 { "" } else { "s" }
    ))?;
    let mut answers = Vec::new();
    for question in QUESTIONS {
        if !stop.load(Ordering::Relaxed) {
            answers.push((*question, put(context, &client, &names(&nodes), question, |_| ())?));
        }
    }
    let mut survived = None;
    if copies > 1 && !stop.load(Ordering::Relaxed) {
        survived = survive(context, &client, &mut nodes, &answers)?;
    }
    let memory: u64 = nodes.iter().filter_map(Node::memory_bytes).sum();
    let seconds = began.elapsed().as_secs_f64();
    if context.json() {
        let answers: Vec<Value> = answers
            .iter()
            .map(|(question, answer)| {
                json!({ "question": question, "text": answer.text, "nodes": answer.nodes,
                        "tokens_per_second": answer.tokens_per_second })
            })
            .collect();
        let line = json!({ "model": model, "seconds": seconds, "memory_bytes": memory, "answers": answers,
                           "same_text_after_a_kill": survived });
        write_all(&format!("{line}\n"))?;
    } else {
        context.say(format_args!(
            "\nDone in {seconds:.0} s; {} in all nodes and workers.",
            bytes(memory)
        ))?;
    }
    for node in &mut nodes {
        node.stop();
    }
    if stop.load(Ordering::Relaxed) {
        bail!("interrupted; nothing was left running");
    }
    Ok(())
}

/// Waits until every block has so many holders, and gives the model's name.
fn wait_until_served(client: &Client, copies: usize, stop: &AtomicBool) -> anyhow::Result<String> {
    let deadline = Instant::now() + SERVED_TIME_MAX;
    loop {
        let status: Status = client.get("/polder/v1/status")?;
        if let Some(model) = status.models.first()
            && model.holders_min >= copies
        {
            return Ok(model.name.clone());
        }
        if stop.load(Ordering::Relaxed) {
            bail!("interrupted; nothing was left running");
        }
        if Instant::now() > deadline {
            bail!("the model's stages were not held after {} s", SERVED_TIME_MAX.as_secs());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Asks the first question again and kills a node that computes the answer. Says whether the text was the same.
fn survive(
    context: &Context,
    client: &Client,
    nodes: &mut [Node],
    answers: &[(&str, Answer)],
) -> anyhow::Result<Option<bool>> {
    let Some((question, before)) = answers.first() else {
        return Ok(None);
    };
    context.say("The same again, and a node that computes is killed in the middle of its answer:")?;
    let names = names(nodes);
    let mut killed = None;
    let after = put(context, client, &names, question, |pieces| {
        if pieces == PIECES_BEFORE_THE_KILL
            && let Some(node) = nodes.iter_mut().skip(1).find(|node| computes(node))
        {
            node.kill();
            killed = Some(node.name.clone());
        }
    })?;
    let Some(killed) = killed else {
        context.say("No other node was computing, so none was killed.")?;
        return Ok(None);
    };
    let same = after.text == before.text;
    context.say(format_args!(
        "{killed} was killed and replaced; the text {}.",
        if same { "is the same" } else { "differs" }
    ))?;
    Ok(Some(same))
}

/// Whether a session sits on a node now.
fn computes(node: &Node) -> bool {
    let status = Client::open(&node.home).and_then(|client| client.get::<Status>("/polder/v1/status"));
    status.is_ok_and(|status| status.sessions > 0)
}

/// Names of nodes and their ids.
fn names(nodes: &[Node]) -> Vec<(String, Option<String>)> {
    nodes.iter().map(|node| (node.name.clone(), node.id.clone())).collect()
}

/// Asks, and shows the answer as it comes. `seen` hears how many pieces have come.
fn put(
    context: &Context,
    client: &Client,
    names: &[(String, Option<String>)],
    question: &str,
    mut seen: impl FnMut(usize),
) -> anyhow::Result<Answer> {
    let body = json!({ "messages": [message("user", question)], "temperature": 0.0, "max_tokens": ANSWER_TOKENS_MAX,
                       "stream": true });
    if !context.json() {
        write_all(&format!("> {question}\n  "))?;
    }
    let began = Instant::now();
    let (mut text, mut pieces, mut polder) = (String::new(), 0usize, Value::Null);
    for piece in ask(client, &body)? {
        match piece? {
            Piece::Text(more) => {
                pieces += 1;
                if !context.json() {
                    write_all(&more.replace('\n', "\n  "))?;
                }
                text.push_str(&more);
                seen(pieces);
            }
            Piece::Ended { polder: who, .. } => polder = who,
            Piece::Calls(_) | Piece::Usage(_) => {}
        }
    }
    let tokens_per_second = pieces as f64 / began.elapsed().as_secs_f64();
    let hops = polder
        .get("chain")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    let name = |hop: &Value| -> Option<String> {
        let id = hop.get("node").and_then(Value::as_str)?;
        let known = names.iter().find(|(_, known)| known.as_deref() == Some(id));
        Some(known.map_or_else(|| id.chars().take(8).collect(), |(name, _)| name.clone()))
    };
    let nodes: Vec<String> = hops.iter().filter_map(name).collect();
    context.say(format_args!(
        "\n  [{}; {tokens_per_second:.0} tokens/s]\n",
        nodes.join(", then ")
    ))?;
    Ok(Answer {
        text,
        nodes,
        tokens_per_second,
    })
}
