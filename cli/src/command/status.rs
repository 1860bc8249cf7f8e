//! `polder status`: what this machine's node does.

use std::fmt;

use bytesize::ByteSize;
use polder_node::daemon::Status;
use serde::Serialize;

use crate::client::Client;
use crate::context::Context;

/// Asks the node and prints its answer.
pub(crate) fn run(context: &Context) -> anyhow::Result<()> {
    let client = Client::open(context.home())?;
    let status: Status = client.get("/polder/v1/status")?;
    context.show(&Answer {
        api: format!("http://{}/v1", client.address()),
        status,
    })
}

#[derive(Serialize)]
struct Answer {
    api: String,
    #[serde(flatten)]
    status: Status,
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = &self.status;
        writeln!(f, "node        {}", status.node)?;
        writeln!(
            f,
            "federation  {} ({})",
            status.federation.name,
            short(&status.federation.id)
        )?;
        writeln!(
            f,
            "certified   by {}, to {}",
            status.federation.institution, status.federation.capabilities
        )?;
        writeln!(f, "folder      {}", status.home)?;
        writeln!(f, "local API   {}", self.api)?;
        writeln!(f, "up          {} s", status.uptime_seconds)?;
        match &status.idle_because {
            None => writeln!(f, "works       yes")?,
            Some(reason) => writeln!(f, "works       no: {reason}")?,
        }
        match (&status.device.running, &status.device.reason, &status.device.name) {
            (true, _, Some(name)) => writeln!(f, "worker      running on {name}")?,
            (true, _, None) => writeln!(f, "worker      running")?,
            (false, reason, _) => writeln!(
                f,
                "worker      ended ({})",
                reason.as_deref().unwrap_or("no reason known")
            )?,
        }
        if let Some(reason) = &status.device.fell_back {
            writeln!(f, "            not what was asked for: {reason}")?;
        }
        let traffic = status.traffic;
        writeln!(
            f,
            "data plane  {} sent, {} received",
            ByteSize(traffic.sent_bytes),
            ByteSize(traffic.received_bytes)
        )?;
        writeln!(f, "peers       {}", status.peers.len())?;
        for peer in &status.peers {
            let rtt = peer
                .rtt_micros
                .map_or_else(|| "-".into(), |micros| format!("{:.1} ms", micros as f64 / 1000.0));
            writeln!(
                f,
                "  {}  {:<8} {:>9}  {}",
                short(&peer.node),
                peer.path,
                rtt,
                peer.institution
            )?;
        }
        for run in &status.runs {
            writeln!(f, "run         {}", run.name)?;
        }
        Ok(())
    }
}

fn short(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}
