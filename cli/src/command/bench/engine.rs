//! `polder bench engine`: how fast this machine is.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, bail};
use polder_worker::bench::{self, Plan};
use serde::Serialize;

use crate::context::Context;

/// Arguments of `polder bench engine`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// A GGUF file, or a folder with config.json, safetensors and tokenizer.json
    model: PathBuf,
    /// Threads that compute [default: one per core]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=4096))]
    threads: Option<u16>,
    /// Tokens that a session decodes
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    decode: u32,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65536))]
    prefill: u32,
    /// Sessions that decode together
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=256))]
    sessions: u32,
    /// How often each figure is taken
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeats: u32,
    /// Load, answer one question and end: what the time to the first token is taken of
    #[arg(long, hide = true)]
    first_token: bool,
}

/// Does what was asked.
pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<()> {
    let Arguments {
        model,
        threads,
        decode,
        prefill,
        sessions,
        repeats,
        first_token,
    } = arguments;
    let plan = Plan {
        threads: threads.map(usize::from),
        decode_tokens: decode,
        prefill_tokens: prefill,
        sessions,
        repeats,
    };
    let failed = || format!("cannot measure {}", model.display());
    if first_token {
        let token = bench::first_token(&model, plan.threads).with_context(failed)?;
        return context.show(&FirstToken { token });
    }
    let speeds = bench::engine(&model, plan).with_context(failed)?;
    context.show(&Answer {
        model: model.display().to_string(),
        threads,
        sessions,
        decode_tokens_per_second: speeds.decode,
        prefill_tokens_per_second: speeds.prefill,
        together_tokens_per_second: speeds.together,
        served_tokens_per_second: speeds.served,
        load_seconds: speeds.load_seconds,
        first_token_seconds: first_token_seconds(&model, threads, repeats).with_context(failed)?,
    })
}

/// Seconds from starting a process to its first token, with the weights in the page cache. A median.
fn first_token_seconds(model: &Path, threads: Option<u16>, repeats: u32) -> anyhow::Result<f64> {
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    let mut seconds = Vec::new();
    for _ in 0..repeats {
        let mut command = Command::new(&program);
        command.args(["bench", "engine", "--first-token"]).arg(model);
        if let Some(threads) = threads {
            command.args(["--threads", &threads.to_string()]);
        }
        let start = Instant::now();
        let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status();
        let elapsed = start.elapsed().as_secs_f64();
        if !status.context("cannot start a process")?.success() {
            bail!("the process that was to answer a question failed");
        }
        seconds.push(elapsed);
    }
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied().context("nothing was measured")
}

#[derive(Serialize)]
struct FirstToken {
    token: u32,
}

impl fmt::Display for FirstToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.token)
    }
}

#[derive(Serialize)]
struct Answer {
    model: String,
    threads: Option<u16>,
    sessions: u32,
    decode_tokens_per_second: f64,
    prefill_tokens_per_second: f64,
    together_tokens_per_second: f64,
    served_tokens_per_second: f64,
    load_seconds: f64,
    first_token_seconds: f64,
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "model        {}", self.model)?;
        match self.threads {
            Some(threads) => writeln!(f, "threads      {threads}")?,
            None => writeln!(f, "threads      one per core")?,
        }
        writeln!(f, "decoding     {:.1} tokens/s", self.decode_tokens_per_second)?;
        writeln!(f, "prefill      {:.1} tokens/s", self.prefill_tokens_per_second)?;
        writeln!(
            f,
            "together     {:.1} tokens/s, {} sessions",
            self.together_tokens_per_second, self.sessions
        )?;
        writeln!(
            f,
            "served       {:.1} tokens/s, the same, each through the worker's pipes",
            self.served_tokens_per_second
        )?;
        writeln!(f, "loading      {:.0} ms", self.load_seconds * 1e3)?;
        write!(
            f,
            "first token  {:.0} ms after the start",
            self.first_token_seconds * 1e3
        )
    }
}
