//! `polder demo`: two institutions train one small model together on this machine, and then it is asked.
//!
//! Everything is real: processes, keys, certificates, sockets, rounds. Only the network is the loopback interface.

mod model;
mod processes;
mod question;
mod screen;
mod texts;
mod view;
mod watch;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use crate::context::Context;
use crate::interrupts::when_asked_to_end;
use processes::Node;
use texts::TEXTS;
use view::{View, bytes};
use watch::{Display, Watched};

/// The run's name.
const RUN: &str = "declaration";
/// Blocks of the demonstration's model.
const BLOCKS: u32 = 4;
/// Rounds are about so long on two cores; their number follows from the minutes.
const ROUND_SECONDS: f64 = 1.9;

/// Arguments of `polder demo`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// How many nodes, in two institutions; from four on, two of them share one replica as a chain of stages
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(2..=16))]
    nodes: u32,
    /// How long to train
    #[arg(long, default_value_t = 1.5)]
    minutes: f64,
    /// Keep the nodes' folders, and say where they are
    #[arg(long)]
    keep: bool,
    /// Instead of training, hand out this model (GGUF, or a Hugging Face folder) in stages, and ask it
    #[arg(long, value_name = "FILE", conflicts_with = "minutes")]
    model: Option<PathBuf>,
}

/// Runs the demonstration.
pub(crate) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<()> {
    ensure!(
        arguments.minutes.is_finite() && arguments.minutes > 0.0 && arguments.minutes <= 600.0,
        "--minutes {} is not between 0 and 600",
        arguments.minutes
    );
    let stop = Arc::new(AtomicBool::new(false));
    notice_interrupts(&stop)?;
    let shown = demonstrate(context, arguments, &stop);
    // What was interrupted may have failed of that; it is not told as a failure.
    go_on(&stop).and(shown)
}

fn demonstrate(context: &Context, arguments: &Arguments, stop: &AtomicBool) -> anyhow::Result<()> {
    let folder = Folder::new(arguments.keep)?;
    if let Some(model) = &arguments.model {
        let model = fs::canonicalize(model).with_context(|| format!("cannot read {}", model.display()))?;
        model::run(context, &folder.path, &model, arguments.nodes, stop)?;
        return folder.tell(context);
    }
    let began = Instant::now();
    let mut display = Display::new(context)?;
    let mut nodes = found_all(&folder.path, arguments, &mut display, stop)?;
    let view = train(&folder.path, &mut nodes, arguments, &mut display, stop)?;
    let memory: u64 = nodes.iter().filter_map(Node::memory_bytes).sum();
    let answers = if stop.load(Ordering::Relaxed) {
        Vec::new()
    } else {
        display.show(&View {
            headline: "the model is published, held as two stages, and asked".into(),
            ..view.clone()
        })?;
        question::ask(&nodes, RUN, stop)?
    };
    drop(display);
    summary(context, &view, &answers, began.elapsed(), memory)?;
    for node in &mut nodes {
        node.stop();
    }
    folder.tell(context)
}

/// The folder of everything, removed at the end unless it is to be kept.
struct Folder {
    path: PathBuf,
    keep: bool,
}

impl Folder {
    fn new(keep: bool) -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("polder-demo-{}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path, keep })
    }

    /// Says where the folders are, if they stay.
    fn tell(&self, context: &Context) -> anyhow::Result<()> {
        if self.keep {
            context.say(format_args!("The nodes' folders are in {}", self.path.display()))?;
        }
        Ok(())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.keep {
            // What cannot be removed lies in the system's folder for temporary files.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Ctrl-C ends the demonstration in order: nodes first, then the folder. So does whoever asks the process to end, and a
/// terminal that closes: the nodes are in process groups of their own and would go on.
fn notice_interrupts(stop: &Arc<AtomicBool>) -> anyhow::Result<()> {
    let stop = Arc::clone(stop);
    when_asked_to_end(move || stop.store(true, Ordering::Relaxed)).context("cannot wait for signals")
}

/// Ends the preparations when somebody has asked for it; what is under way is dropped, and ends with that.
fn go_on(stop: &AtomicBool) -> anyhow::Result<()> {
    ensure!(!stop.load(Ordering::Relaxed), "interrupted; nothing was left running");
    Ok(())
}

/// Which institution a node belongs to, and what it is called.
fn place(number: u32, nodes: u32) -> (&'static str, String) {
    let first = nodes.div_ceil(2);
    if number < first {
        ("Leiden", format!("leiden-{}", number + 1))
    } else {
        ("Uppsala", format!("uppsala-{}", number - first + 1))
    }
}

/// Whether a node holds half of the model only.
fn is_half(number: u32, nodes: u32) -> bool {
    nodes >= 4 && number + 2 >= nodes
}

/// Founds the federation and starts the nodes.
fn found_all(
    root: &Path,
    arguments: &Arguments,
    display: &mut Display,
    stop: &AtomicBool,
) -> anyhow::Result<Vec<Node>> {
    let count = arguments.nodes;
    let mut nodes: Vec<Node> = Vec::new();
    for number in 0..count {
        go_on(stop)?;
        let (institution, name) = place(number, count);
        let blocks = if is_half(number, count) { BLOCKS / 2 } else { 0 };
        // The model is asked through the nodes that hold a half each.
        let serve = count < 4 || is_half(number, count);
        let settings = format!("threads = 1\nblocks_max = {blocks}\nserve = {serve}\n");
        let node = Node::prepare(root, &name, &settings)?;
        found(&mut nodes, node, institution, &mut |text| display.headline(text))?;
    }
    Ok(nodes)
}

/// Starts `node`: the first founds the federation, all others join with an invite of their institution.
fn found(
    nodes: &mut Vec<Node>,
    mut node: Node,
    institution: &str,
    tell: &mut impl FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    if let Some(gateway) = nodes.first() {
        tell(&format!("{} joins with an invite of {institution}", node.name))?;
        let invite: Value = gateway.verb(&["invite", "--institution", institution])?;
        let line = invite
            .get("invite")
            .and_then(Value::as_str)
            .context("the gateway printed no invite")?;
        node.start(&[line])?;
    } else {
        tell("Leiden and Uppsala found a federation")?;
        let founders = ["--institution", "Leiden", "--institution", "Uppsala"];
        let _: Value = node.verb(&[&["charter", "new", "Delta"][..], &founders].concat())?;
        node.start(&[])?;
    }
    node.wait_until_up()?;
    nodes.push(node);
    Ok(())
}

/// Gives every replica its languages, starts the run, and watches it to its end.
fn train(
    root: &Path,
    nodes: &mut [Node],
    arguments: &Arguments,
    display: &mut Display,
    stop: &AtomicBool,
) -> anyhow::Result<View> {
    display.headline("every node gets its own languages, which stay there")?;
    let held_out = root.join("held-out");
    let own = root.join("texts");
    fs::create_dir_all(&held_out).context("cannot make the folder of held-out texts")?;
    fs::create_dir_all(&own).context("cannot make the folder of texts")?;
    for (code, train, held) in TEXTS {
        fs::write(held_out.join(format!("{code}.txt")), held)?;
        // What baselines may be primed with, so that they are honest.
        fs::write(held_out.join(format!("{code}.train.txt")), train)?;
        fs::write(own.join(format!("{code}.txt")), train)?;
    }
    let count = u32::try_from(nodes.len()).unwrap_or(u32::MAX);
    let replicas = if count >= 4 { nodes.len() - 1 } else { nodes.len() };
    for (number, node) in nodes.iter().enumerate() {
        // The two halves of a chain are one replica.
        let replica = number.min(replicas - 1);
        for (code, ..) in TEXTS.iter().skip(replica).step_by(replicas) {
            go_on(stop)?;
            let path = own.join(format!("{code}.txt"));
            let path = path.to_str().context("the temporary folder's name is not text")?;
            let _: Value = node.verb(&["data", "add", &format!("udhr-{code}"), path, "--language", code])?;
        }
    }
    go_on(stop)?;
    let rounds = (arguments.minutes * 60.0 / ROUND_SECONDS).round().max(2.0) as u64;
    let steward = nodes.first().context("there is no node")?;
    let file = root.join("run.toml");
    fs::write(&file, run_file(rounds, replicas, &held_out)?)?;
    let _: Value = steward.verb(&[
        "run",
        "new",
        file.to_str().context("the temporary folder's name is not text")?,
    ])?;
    let _: Value = steward.verb(&["run", "start", RUN])?;
    let deadline = Instant::now() + Duration::from_secs_f64(arguments.minutes * 60.0);
    let mut watched = Watched::new(nodes, RUN, rounds)?;
    let mut told = false;
    loop {
        let view = watched.look()?;
        display.show(&view)?;
        let done = view.rounds.0 >= rounds || watched.ended();
        let late = Instant::now() > deadline + Duration::from_secs(20);
        if done || late || stop.load(Ordering::Relaxed) {
            if view.rounds.0 == 0 && !stop.load(Ordering::Relaxed) {
                bail!(
                    "no round was finished: {}",
                    watched.trouble().unwrap_or_else(|| "no node says why".into())
                );
            }
            return Ok(view);
        }
        if !told && Instant::now() > deadline {
            told = true;
            let _: Value = nodes.first().context("there is no node")?.verb(&["run", "stop", RUN])?;
        }
        std::thread::sleep(Duration::from_millis(400));
    }
}

fn run_file(rounds: u64, replicas: usize, held_out: &Path) -> anyhow::Result<String> {
    let folder = toml::Value::String(
        held_out
            .to_str()
            .context("the temporary folder's name is not text")?
            .to_owned(),
    );
    Ok(format!(
        "name = \"{RUN}\"\nrounds = {rounds}\nseed = 1948\n\n\
         [model]\nhidden = 128\nblocks = {BLOCKS}\nheads = 4\ncontext = 256\n\n\
         [inner]\nsteps = 12\nbatch = 4\nseq = 128\nlearning_rate = 3e-3\nwarmup_steps = 20\n\n\
         [outer]\ncodec = \"e3m0\"\nmomentum = 0.6\n\n\
         [closing]\nquorum = {replicas}\ngrace = \"1s\"\ndeadline = \"20s\"\n\n\
         [evaluation]\nfolder = {folder}\nevery_rounds = 4\n"
    ))
}

fn summary(
    context: &Context,
    view: &View,
    answers: &[question::Answer],
    took: Duration,
    memory: u64,
) -> anyhow::Result<()> {
    let (now, order_0, compressor) = view.means().unwrap_or_default();
    let better =
        |pick: fn(&view::LanguageLine) -> f64| view.languages.values().filter(|line| line.now < pick(line)).count();
    if context.json() {
        let line = serde_json::json!({
            "rounds": view.rounds.0, "rounds_agreed": view.rounds_agreed, "loss": view.loss(),
            "bits_per_byte": now, "order_0_bits_per_byte": order_0, "compressor_bits_per_byte": compressor,
            "tokens_per_second": view.tokens_per_second, "sent_bytes": view.sent_bytes, "dense_bytes": view.dense_bytes,
            "seconds": took.as_secs_f64(), "memory_bytes": memory,
            "answers": answers.iter().map(|answer| serde_json::json!({ "beginning": answer.beginning, "text": answer.text, "nodes": answer.nodes })).collect::<Vec<_>>(),
        });
        return crate::context::write_all(&format!("{line}\n"));
    }
    context.say(format_args!("\nDone in {:.0} s.", took.as_secs_f64()))?;
    context.say(format_args!(
        "  training   {} rounds, loss {:.3} nats per byte, {:.0} tokens/s",
        view.rounds.0,
        view.loss().unwrap_or_default(),
        view.tokens_per_second
    ))?;
    context.say(format_args!(
        "  agreement  every node had the same state hash after {} of {} rounds",
        view.rounds_agreed, view.rounds.0
    ))?;
    context.say(format_args!(
        "  held out   {now:.2} bits per byte over {} languages; order-0 entropy {order_0:.2} (beaten in {}), primed compressor {compressor:.2} (beaten in {})",
        view.languages.len(),
        better(|line| line.order_0),
        better(|line| line.compressor),
    ))?;
    context.say(format_args!(
        "  traffic    {} sent; dense f32 data parallelism would have sent {}{}",
        bytes(view.sent_bytes),
        bytes(view.dense_bytes),
        view.saving()
            .map_or_else(String::new, |saving| format!(", {saving:.0} times as much")),
    ))?;
    context.say(format_args!("  memory     {} in all nodes and workers", bytes(memory)))?;
    for answer in answers {
        context.say(format_args!(
            "  asked      {}[{}]",
            answer.beginning,
            answer.text.trim_end()
        ))?;
        context.say(format_args!(
            "             computed by {}",
            answer.nodes.join(", then ")
        ))?;
    }
    Ok(())
}
