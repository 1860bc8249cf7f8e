//! `polder status`: what this machine's node does.

use std::fmt;

use bytesize::ByteSize;
use polder_node::daemon::{CapClock, CapsStatus, Status};
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
        if !status.control.is_empty() {
            writeln!(f, "control     {}", status.control.join(", "))?;
        }
        writeln!(f, "data        {}", status.data)?;
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
        show_caps(f, &status.caps)?;
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
        if let Some(reason) = &status.shut_out_because {
            writeln!(
                f,
                "shut out    {reason}; ask your institution's gateway for a new invite"
            )?;
        }
        for refusal in &status.refused_by {
            writeln!(f, "refused     by {}: {}", short(&refusal.node), refusal.reason)?;
        }
        for model in &status.models {
            let held = match model.held {
                Some([first, end]) => format!("blocks {first} to {end} of {} here", model.blocks),
                None => format!("none of {} blocks here", model.blocks),
            };
            let whole = match model.holders_min {
                0 => "cannot be asked: some blocks are held by nobody".to_owned(),
                1 => "can be asked; some blocks are held by one node only".to_owned(),
                count => format!("can be asked; every block is held by {count} nodes or more"),
            };
            writeln!(
                f,
                "model       {} ({}), {held}; {whole}",
                model.name,
                short(&model.epoch)
            )?;
        }
        if status.sessions > 0 {
            writeln!(f, "sessions    {}", status.sessions)?;
        }
        for run in &status.runs {
            write!(
                f,
                "run         {}, {}: round {} of {}",
                run.name, run.phase, run.rounds_done, run.rounds_total
            )?;
            let does = [run.role.as_str(), run.activity.as_str()];
            let does: Vec<&str> = does.into_iter().filter(|words| !words.is_empty()).collect();
            match does.is_empty() {
                true => writeln!(f)?,
                false => writeln!(f, "; this node: {}", does.join(", "))?,
            }
        }
        Ok(())
    }
}

/// The caps of now, where there are any now or later.
fn show_caps(f: &mut fmt::Formatter<'_>, caps: &CapsStatus) -> fmt::Result {
    let now = caps.in_force;
    let named = [
        ("upload", now.upload_bytes_per_second),
        (
            "upload to each institution",
            now.upload_bytes_per_second_to_each_institution,
        ),
        ("relaying", now.relay_bytes_per_second),
        (
            "relaying of each institution",
            now.relay_bytes_per_second_of_each_institution,
        ),
        ("relaying of each member", now.relay_bytes_per_second_of_each_member),
        ("relaying of each circuit", now.relay_bytes_per_second_of_each_circuit),
    ];
    let capped = named.iter().filter(|(_, bytes)| *bytes > 0);
    let mut words: Vec<String> = capped
        .map(|(what, bytes)| format!("{what} {}/s", ByteSize(*bytes)))
        .collect();
    if words.is_empty() && caps.changes.is_none() {
        return Ok(());
    }
    if words.is_empty() {
        words.push("none now".into());
    }
    let clock = match caps.clock {
        CapClock::Local => "",
        CapClock::Utc => " UTC",
    };
    write!(f, "caps        {}", words.join(", "))?;
    if let Some(window) = &caps.window {
        write!(f, " (window {window}{clock})")?;
    }
    match &caps.changes {
        Some(minute) => writeln!(f, ", until {minute}{clock}"),
        None => writeln!(f),
    }
}

fn short(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}
