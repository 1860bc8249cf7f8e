//! `polder doctor`: what works, what does not, and the line to ask of whoever runs the network.

use std::fmt;

use polder_node::daemon::{Finding, Health};
use serde::Serialize;

use crate::client::Client;
use crate::context::Context;

/// Asks the node to look, and prints what it found.
pub(crate) fn run(context: &Context) -> anyhow::Result<()> {
    let findings: Vec<Finding> = Client::open(context.home())?.get("/polder/v1/doctor")?;
    context.show(&Answer { findings })
}

#[derive(Serialize)]
struct Answer {
    findings: Vec<Finding>,
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
        let mut asks = self
            .findings
            .iter()
            .filter_map(|finding| finding.ask.as_ref())
            .peekable();
        if asks.peek().is_some() {
            writeln!(f, "\nTo ask of whoever runs this network:")?;
        }
        asks.try_for_each(|line| writeln!(f, "  {line}"))
    }
}
