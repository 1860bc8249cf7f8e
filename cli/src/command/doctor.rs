//! `polder doctor`: what works, what does not, and the line to ask of whoever runs the network. A node that runs is asked;
//! without one, or for a gateway that is named, this program looks by itself.

use std::fmt;

use anyhow::{Context as _, anyhow, ensure};
use polder_node::daemon::{Config, Finding, Health, LocalApi, Target, examine_ahead};
use serde::Serialize;

use crate::client::Client;
use crate::command::join::read_invite;
use crate::context::Context;
use crate::failure::hinted;

/// Arguments of `polder doctor`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Try the gateways of this invite: the line, or a file that holds it. It is not used up
    #[arg(long, value_name = "INVITE")]
    invite: Option<String>,
    /// Try this gateway: a host, HOST:PORT or a multiaddress. May be repeated
    #[arg(long, value_name = "ADDR")]
    gateway: Vec<String>,
}

/// Looks, and prints what was found.
pub(crate) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<()> {
    let targets = targets(arguments)?;
    let runs = LocalApi::read(context.home()).is_ok_and(|api| api.is_some());
    let findings = if runs && targets.is_empty() {
        Client::open(context.home())?.get("/polder/v1/doctor")?
    } else {
        let config = Config::load(context.home())?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .context("cannot start the runtime")?;
        let findings = runtime.block_on(examine_ahead(&config, context.home(), &targets));
        // A name that is still being looked up holds nobody up.
        runtime.shutdown_background();
        findings?
    };
    let answer = Answer { findings };
    context.show(&answer)?;
    answer.verdict()
}

fn targets(arguments: &Arguments) -> anyhow::Result<Vec<Target>> {
    let mut targets = match &arguments.invite {
        Some(text) => Target::of_invite(&read_invite(text)?),
        None => Vec::new(),
    };
    for text in &arguments.gateway {
        let target = Target::of_address(text).map_err(|reason| {
            hinted(
                anyhow!(reason),
                "your invite names gateways too: `polder doctor --invite LINE`",
            )
        })?;
        targets.push(target);
    }
    Ok(targets)
}

#[derive(Serialize)]
struct Answer {
    findings: Vec<Finding>,
}

impl Answer {
    /// What the exit code tells scripts. What is only fair works.
    fn verdict(&self) -> anyhow::Result<()> {
        let bad = self.findings.iter().filter(|finding| finding.health == Health::Bad);
        let bad: Vec<&str> = bad.map(|finding| finding.what.as_str()).collect();
        ensure!(
            bad.is_empty(),
            "{} of {} things do not work here: {}",
            bad.len(),
            self.findings.len(),
            bad.join(", ")
        );
        Ok(())
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            let mark = match finding.health {
                Health::Good => "good",
                Health::Fair => "fair",
                Health::Bad => "BAD",
            };
            writeln!(f, "{mark:<5} {:<9} {}", finding.what, finding.words)?;
        }
        let mut asks: Vec<&String> = Vec::new();
        for line in self.findings.iter().filter_map(|finding| finding.ask.as_ref()) {
            if !asks.contains(&line) {
                asks.push(line);
            }
        }
        if !asks.is_empty() {
            writeln!(f, "\nTo ask of whoever runs this network:")?;
        }
        asks.iter().try_for_each(|line| writeln!(f, "  {line}"))
    }
}
