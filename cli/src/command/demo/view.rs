//! What the demonstration shows: plain values, filled from the nodes' own status reports.

use std::collections::BTreeMap;
use std::time::Duration;

/// One node of the demonstration.
#[derive(Debug, Clone, Default)]
pub(crate) struct NodeLine {
    /// Such as `leiden-1`.
    pub(crate) name: String,
    /// Such as `whole model` or `blocks 0-1`.
    pub(crate) role: String,
    /// Such as `training` or `fetching state`.
    pub(crate) state: String,
    /// The hash of the state after its last round, shortened.
    pub(crate) state_hash: String,
}

/// Held-out bits per byte of one language.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LanguageLine {
    /// Under the text's own byte frequencies.
    pub(crate) order_0: f64,
    /// Of a compressor primed with the language's training text.
    pub(crate) compressor: f64,
    /// Of the model now.
    pub(crate) now: f64,
}

/// Everything on the screen.
#[derive(Debug, Clone, Default)]
pub(crate) struct View {
    /// What is going on, in one line.
    pub(crate) headline: String,
    /// Since the start.
    pub(crate) elapsed: Duration,
    /// Rounds done and planned.
    pub(crate) rounds: (u64, u64),
    /// Mean training loss of each round, nats per token.
    pub(crate) losses: Vec<f64>,
    /// Tokens per second of all nodes together.
    pub(crate) tokens_per_second: f64,
    /// The nodes.
    pub(crate) nodes: Vec<NodeLine>,
    /// Held-out results by language code.
    pub(crate) languages: BTreeMap<String, LanguageLine>,
    /// Bytes that all nodes sent for training.
    pub(crate) sent_bytes: u64,
    /// Bytes that dense f32 data parallelism would have sent for the same steps.
    pub(crate) dense_bytes: u64,
    /// Rounds after which every node reported the same hash.
    pub(crate) rounds_agreed: u64,
}

impl View {
    /// How many times fewer bytes were sent than dense data parallelism would have sent.
    pub(crate) fn saving(&self) -> Option<f64> {
        (self.sent_bytes > 0 && self.dense_bytes > 0).then(|| self.dense_bytes as f64 / self.sent_bytes as f64)
    }

    /// The loss of the last round.
    pub(crate) fn loss(&self) -> Option<f64> {
        self.losses.last().copied()
    }

    /// Mean over languages of the model, the order-0 entropy and the compressor, in bits per byte.
    pub(crate) fn means(&self) -> Option<(f64, f64, f64)> {
        let count = self.languages.len();
        (count > 0).then(|| {
            let mean = |pick: fn(&LanguageLine) -> f64| self.languages.values().map(pick).sum::<f64>() / count as f64;
            (
                mean(|line| line.now),
                mean(|line| line.order_0),
                mean(|line| line.compressor),
            )
        })
    }

    /// One line for a log or a pipe.
    pub(crate) fn line(&self) -> String {
        let loss = self.loss().map_or_else(|| "-".into(), |loss| format!("{loss:.3}"));
        let bits = self.means().map_or_else(|| "-".into(), |(now, ..)| format!("{now:.2}"));
        let saving = self
            .saving()
            .map_or_else(|| "-".into(), |saving| format!("{saving:.0}x"));
        format!(
            "round {:>3}/{} · loss {loss} · {bits} bits/byte held out · {:.0} tokens/s · sent {}, {saving} less than dense · hashes equal {}/{}",
            self.rounds.0,
            self.rounds.1,
            self.tokens_per_second,
            bytes(self.sent_bytes),
            self.rounds_agreed,
            self.rounds.0,
        )
    }
}

/// Bytes for people.
pub(crate) fn bytes(count: u64) -> String {
    bytesize::ByteSize(count).to_string()
}
