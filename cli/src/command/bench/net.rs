//! `polder bench net`: how long a member takes to send back what it is sent, how much the link carries, and which way
//! it goes.

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
    #[arg(long, value_name = "BYTES", default_value_t = 64 << 10,
        value_parser = clap::value_parser!(u32).range(1..=4 << 20))]
    bytes: u32,
    /// Echoes after the first
    #[arg(long, value_name = "COUNT", default_value_t = 20, value_parser = clap::value_parser!(u32).range(..=10_000))]
    count: u32,
    /// Then send so much, such as 256MiB, for 20 s at most, with echoes beside it
    #[arg(long, value_name = "SIZE")]
    bulk: Option<ByteSize>,
}

/// Asks the node to measure, and prints the figures.
pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<()> {
    let Arguments {
        peer,
        bytes,
        count,
        bulk,
    } = arguments;
    let bytes = usize::try_from(bytes)?;
    let bulk = bulk.map_or(0, |size| size.0);
    let client = Client::open(context.home())?;
    let report: EchoReport = client.post(
        "/polder/v1/echo",
        &EchoRequest {
            peer,
            bytes,
            count,
            bulk,
        },
    )?;
    context.show(&Answer {
        bytes,
        p50_micros: place(&report.micros, 50),
        p95_micros: place(&report.micros, 95),
        report: &report,
    })
}

/// A percentile of sorted times.
fn place(micros: &[u64], percent: usize) -> Option<u64> {
    micros.get(micros.len().saturating_sub(1) * percent / 100).copied()
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
        if let Some(bulk) = &self.report.bulk {
            let seconds = bulk.micros.max(1) as f64 / 1e6;
            writeln!(
                f,
                "bulk        {:.1} Mbit/s: {} in {seconds:.1} s, {:.2} % of {} packets lost",
                bulk.bytes as f64 * 8e-6 / seconds,
                ByteSize(bulk.bytes),
                bulk.lost_packets as f64 / bulk.sent_packets.max(1) as f64 * 100.0,
                bulk.sent_packets,
            )?;
            let window = ByteSize(bulk.window_bytes);
            let round_trip = millis(bulk.round_trip_micros);
            writeln!(f, "            window {window}, round trip {round_trip:.1} ms")?;
            if let (Some(p50), Some(p95)) = (place(&bulk.echo_micros, 50), place(&bulk.echo_micros, 95)) {
                let (p50, p95) = (millis(p50), millis(p95));
                let count = bulk.echo_micros.len();
                writeln!(f, "beside it   p50 {p50:.2} ms, p95 {p95:.2} ms over {count} echoes")?;
            }
        }
        Ok(())
    }
}
