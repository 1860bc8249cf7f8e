//! `polder leave`, `pause` and `resume`: what a person tells a running node.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::bail;
use serde::Serialize;
use serde_json::{Value, json};

use crate::client::Client;
use crate::context::Context;

/// What a node that leaves may take: it finishes what is under way and tells its peers.
const LEAVE_TIME_MAX: Duration = Duration::from_secs(15);

/// Ends the node in order, and waits for it.
pub(crate) fn leave(context: &Context) -> anyhow::Result<()> {
    let client = Client::open(context.home())?;
    let _: Value = client.post("/polder/v1/leave", &json!({}))?;
    let deadline = Instant::now() + LEAVE_TIME_MAX;
    while Instant::now() < deadline {
        if Client::open(context.home()).is_err() {
            return context.show(&State::Left);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    bail!(
        "the node (process {}) is still leaving after {} s",
        client.process(),
        LEAVE_TIME_MAX.as_secs()
    )
}

/// Gives the device back to its owner now.
pub(crate) fn pause(context: &Context) -> anyhow::Result<()> {
    let _: Value = Client::open(context.home())?.post("/polder/v1/pause", &json!({}))?;
    context.show(&State::Paused)
}

/// Lends the device again.
pub(crate) fn resume(context: &Context) -> anyhow::Result<()> {
    let _: Value = Client::open(context.home())?.post("/polder/v1/resume", &json!({}))?;
    context.show(&State::Resumed)
}

/// What has become of the node.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(tag = "state", rename_all = "lowercase")]
enum State {
    Left,
    Paused,
    Resumed,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Left => "The node has left.",
            Self::Paused => "Paused: the worker has ended and the device is free. `polder resume` goes on.",
            Self::Resumed => "Resumed.",
        })
    }
}
