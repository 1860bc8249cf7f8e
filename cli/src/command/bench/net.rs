//! `polder bench net`: how long a member takes to send back what it is sent, and which way it goes.

use std::fmt;

use bytesize::ByteSize;
use polder_node::daemon::{EchoReport, EchoRequest};
use serde::Serialize;

use crate::client::Client;
use crate::context::Context;

/// Arguments of `polder bench net`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The member's id, or its beginning
    #[arg(long, value_name = "ID")]
    peer: String,
    /// Bytes of one echo; an activation of a small model has 64 KiB
    #[arg(long, value_name = "BYTES", default_value_t = 64 << 10)]
    bytes: usize,
    /// Echoes after the first
    #[arg(long, value_name = "COUNT", default_value_t = 20)]
    count: u32,
}

/// Asks the node to measure, and prints the figures.
pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<()> {
    let Arguments { peer, bytes, count } = arguments;
    let client = Client::open(context.home())?;
    let report: EchoReport = client.post("/polder/v1/echo", &EchoRequest { peer, bytes, count })?;
    let place = |percent: usize| {
        report
            .micros
            .get(report.micros.len().saturating_sub(1) * percent / 100)
            .copied()
    };
    context.show(&Answer {
        bytes,
        p50_micros: place(50),
        p95_micros: place(95),
        report: &report,
    })
}

#[derive(Serialize)]
struct Answer<'a> {
    bytes: usize,
    p50_micros: Option<u64>,
    p95_micros: Option<u64>,
    #[serde(flatten)]
    report: &'a EchoReport,
}

impl fmt::Display for Answer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = |micros: u64| micros as f64 / 1000.0;
        writeln!(f, "way         {}", self.report.road)?;
        let size = ByteSize(self.bytes.try_into().unwrap_or(u64::MAX));
        writeln!(
            f,
            "first echo  {:.1} ms for {size}, dialling included",
            millis(self.report.first_micros)
        )?;
        if let (Some(p50), Some(p95)) = (self.p50_micros, self.p95_micros) {
            writeln!(
                f,
                "then        p50 {:.2} ms, p95 {:.2} ms over {} echoes",
                millis(p50),
                millis(p95),
                self.report.micros.len()
            )?;
        }
        Ok(())
    }
}
