//! `polder peers`: the members that this node has met, and how it reaches them.

use std::fmt;

use bytesize::ByteSize;
use polder_node::daemon::{PeerStatus, Status};
use serde::Serialize;

use crate::client::Client;
use crate::context::Context;

/// Asks the node and prints one line for each member.
pub(crate) fn run(context: &Context) -> anyhow::Result<()> {
    let status: Status = Client::open(context.home())?.get("/polder/v1/status")?;
    context.show(&Answer { peers: status.peers })
}

#[derive(Serialize)]
struct Answer {
    peers: Vec<PeerStatus>,
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.peers.is_empty() {
            return writeln!(
                f,
                "this node has met nobody yet; `polder doctor` says what may stand in the way"
            );
        }
        writeln!(
            f,
            "{:<8}  {:<16}  {:<7}  {:<7}  {:>9}  {:>10}  {:>10}  {:>6}  {:>5}  {:<21}  may",
            "node", "institution", "control", "data", "rtt", "sent/s", "received/s", "loss", "score", "address"
        )?;
        for peer in &self.peers {
            let data = peer.data_path.as_ref();
            let rtt = data.map(|data| data.rtt_micros).or(peer.rtt_micros);
            let rtt = rtt.map_or_else(|| "-".to_owned(), |micros| format!("{:.1} ms", micros as f64 / 1000.0));
            let loss = data.map_or_else(
                || "-".to_owned(),
                |data| format!("{:.2}%", data.loss_ppm as f64 / 10_000.0),
            );
            writeln!(
                f,
                "{:<8}  {:<16}  {:<7}  {:<7}  {:>9}  {:>10}  {:>10}  {:>6}  {:>5}  {:<21}  {}",
                peer.node.get(..8).unwrap_or(&peer.node),
                short(&peer.institution, 16),
                peer.path,
                data.map_or("-", |data| data.road.as_str()),
                rtt,
                ByteSize(peer.sent_bytes_per_second).to_string(),
                ByteSize(peer.received_bytes_per_second).to_string(),
                loss,
                peer.score,
                data.and_then(|data| data.address.as_deref()).unwrap_or("-"),
                peer.capabilities,
            )?;
        }
        Ok(())
    }
}

/// At most `length` characters; what was cut is told.
fn short(text: &str, length: usize) -> String {
    if text.chars().count() <= length {
        return text.to_owned();
    }
    let kept: String = text.chars().take(length.saturating_sub(1)).collect();
    format!("{kept}…")
}
