//! `polder run`: training runs of this node's federation.

mod draft;
mod file;

use std::fmt;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Subcommand;
use polder_node::train::RunStatus;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::client::{Client, segment};
use crate::context::Context;
use file::RunFile;

/// Make, start, watch and export training runs
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make a run from a run file; nothing is trained yet
    New {
        /// The run file (TOML)
        file: PathBuf,
    },
    /// Start a run, or resume a paused one
    Start {
        /// The run's name
        name: String,
    },
    /// Let the round in training be the last for now
    Pause {
        /// The run's name
        name: String,
    },
    /// End a run for good
    Stop {
        /// The run's name
        name: String,
    },
    /// Train in a run again that this node had left
    Join {
        /// The run's name
        name: String,
    },
    /// Train in a run no more; it goes on without this node
    Leave {
        /// The run's name
        name: String,
    },
    /// Show runs: all, or one with its rounds and results
    Status {
        /// The run's name
        name: Option<String>,
    },
    /// Publish the newest state as a model that the federation serves
    Publish {
        /// The run's name
        name: String,
        /// What people call the model [default: the run's name]
        #[arg(long, value_name = "NAME")]
        r#as: Option<String>,
    },
    /// Write the newest state as a Hugging Face folder
    Export {
        /// The run's name
        name: String,
        /// The folder, which must be empty or not be there
        #[arg(long, value_name = "FOLDER")]
        to: PathBuf,
        /// Write the adapters alone, as PEFT reads them, and not the model with them
        #[arg(long)]
        adapter: bool,
    },
}

/// Does what was asked.
pub(crate) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<()> {
    let client = Client::open(context.home())?;
    match arguments.verb {
        Verb::New { file } => new(context, &client, &file),
        Verb::Start { name } => act(context, &client, &name, "start", "started"),
        Verb::Pause { name } => act(context, &client, &name, "pause", "pausing"),
        Verb::Publish { name, r#as } => publish(context, &client, &name, r#as.as_deref()),
        Verb::Stop { name } => act(context, &client, &name, "stop", "stopping"),
        Verb::Join { name } => act(context, &client, &name, "join", "joining"),
        Verb::Leave { name } => act(context, &client, &name, "leave", "leaving"),
        Verb::Status { name: None } => context.show(&client.get::<Runs>("/train/runs")?),
        Verb::Status { name: Some(name) } => context.show(&Shown(
            client.get::<RunStatus>(&format!("/train/runs/{}", segment(&name)))?,
        )),
        Verb::Export { name, to, adapter } => {
            let folder = std::path::absolute(&to).with_context(|| format!("cannot use {}", to.display()))?;
            let path = format!("/train/runs/{}/export", segment(&name));
            context.show(&client.post::<Exported>(&path, &json!({ "folder": folder, "adapter": adapter }))?)
        }
    }
}

fn new(context: &Context, client: &Client, path: &std::path::Path) -> anyhow::Result<()> {
    let file = RunFile::read(path)?;
    // The daemon reads the files from here, and keeps its own copies.
    let folder = context
        .home()
        .join("runs")
        .join(format!("draft-{}", std::process::id()));
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let made = draft::draft(&file, &folder).and_then(|new| client.post::<Made>("/train/runs", &new));
    // What is left in it is of no use to anybody.
    let _ = std::fs::remove_dir_all(&folder);
    context.show(&made?)
}

fn act(context: &Context, client: &Client, name: &str, verb: &str, done: &'static str) -> anyhow::Result<()> {
    client.post::<serde_json::Value>(&format!("/train/runs/{}/{verb}", segment(name)), &json!({}))?;
    context.show(&Acted {
        name: name.to_owned(),
        done,
    })
}

fn publish(context: &Context, client: &Client, run: &str, name: Option<&str>) -> anyhow::Result<()> {
    let body = json!({ "run": run, "name": name.unwrap_or(run) });
    context.show(&client.post::<Published>("/polder/v1/publish", &body)?)
}

#[derive(Debug, Serialize, Deserialize)]
struct Published {
    epoch: String,
    name: String,
}

impl fmt::Display for Published {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "`{}` is published as epoch {}", self.name, self.epoch)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Made {
    run: String,
    name: String,
}

impl fmt::Display for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { run, name } = self;
        writeln!(f, "made run {name} ({run})")?;
        write!(f, "start it with `polder run start {name}`")
    }
}

#[derive(Debug, Serialize)]
struct Acted {
    name: String,
    done: &'static str,
}

impl fmt::Display for Acted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.done, self.name)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Exported {
    folder: PathBuf,
}

impl fmt::Display for Exported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "wrote {}", self.folder.display())
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Runs {
    runs: Vec<RunStatus>,
}

impl fmt::Display for Runs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.runs.is_empty() {
            return write!(f, "no runs");
        }
        for run in &self.runs {
            let short = run.run.get(..8).unwrap_or_default();
            let (done, total) = (run.rounds_done, run.rounds_total);
            writeln!(
                f,
                "{:20} {short} {:9} round {done}/{total}{}",
                run.name,
                run.phase,
                activity(run, "  ")
            )?;
        }
        Ok(())
    }
}

/// What the node does for a run, after `before`; nothing where there is nothing left or nothing yet to do.
fn activity(run: &RunStatus, before: &str) -> String {
    if run.activity.is_empty() || matches!(run.phase.as_str(), "finished" | "stopped") {
        return String::new();
    }
    format!("{before}{}", run.activity)
}

/// One run in full.
#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Shown(RunStatus);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let run = &self.0;
        writeln!(f, "{} ({})", run.name, run.run)?;
        writeln!(f, "  {}, round {} of {}", run.phase, run.rounds_done, run.rounds_total)?;
        writeln!(f, "  this node: {}{}", run.role, activity(run, "; "))?;
        writeln!(f, "  replicas: {}", run.replicas.len())?;
        if let Some(last) = run.recent.last() {
            writeln!(
                f,
                "  loss {:.4} nats/token, {:.0} tokens/s",
                last.loss, last.tokens_per_second
            )?;
            let agreed = run.rounds_agreed;
            writeln!(
                f,
                "  state {}, own hash equal in {agreed} rounds, another in {}",
                run.state_hash, run.rounds_diverged
            )?;
        }
        let bytes = |count| bytesize::ByteSize(count).to_string();
        write!(
            f,
            "  sent {}, received {}",
            bytes(run.sent_bytes),
            bytes(run.received_bytes)
        )?;
        match run.dense_bytes {
            0 => writeln!(f)?,
            dense => writeln!(f, "; dense data parallelism would have sent {}", bytes(dense))?,
        }
        if !run.languages.is_empty() {
            writeln!(f, "  held-out bits per byte    now   first  zstd   order 0")?;
        }
        for (code, line) in &run.languages {
            let number = |value: Option<f64>| value.map_or_else(|| "    -".to_owned(), |value| format!("{value:5.2}"));
            let (now, first) = (number(line.now), number(line.first));
            writeln!(
                f,
                "    {code:20}  {now}  {first}  {:5.2}  {:5.2}",
                line.compressor, line.order_0
            )?;
        }
        if let Some(trouble) = &run.trouble {
            writeln!(f, "  trouble: {trouble}")?;
        }
        Ok(())
    }
}
