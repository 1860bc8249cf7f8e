//! The data plane beside iperf3 over one emulated link between two namespaces: each in turn, then both at once.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::emulator::{ADDRESSES, Link, Path};
use crate::{BULK_TIME, Measured, Outcome, QUEUE, ROUND_TRIP};

/// What one run of either program may take: it connects, and measures three times.
const PROGRAM_TIME_MAX: Duration = Duration::from_secs(90);

/// A program that ends with the bench, also after an error.
struct Running(Child);

impl Running {
    fn start(namespace: &str, program: &str, words: &[String]) -> Outcome<Self> {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace, program]).args(words);
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        Ok(Self(child))
    }

    /// What it printed, once it has ended by itself.
    fn finish(mut self) -> Outcome<String> {
        let mut stdout = self.0.stdout.take().ok_or("no output")?;
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let text = std::io::read_to_string(&mut stdout);
            sender.send(text).ok();
        });
        Ok(receiver.recv_timeout(PROGRAM_TIME_MAX)??)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Measures at each rate, clean and with loss, and prints a line for each.
pub(crate) fn run(rates: &[f64]) -> Outcome<()> {
    if let Err(error) = Command::new("iperf3").arg("--version").output() {
        println!("skipped: iperf3: {error} (on Debian: apt-get install iperf3)");
        return Ok(());
    }
    println!(
        "round trip {ROUND_TRIP:?}, queue {QUEUE:?}; {BULK_TIME:?} from a cold start; iperf3 with cubic before and after"
    );
    for megabits in rates {
        for loss_per_mille in [0.0, 5.0] {
            let path = Path {
                megabits: *megabits,
                round_trip: ROUND_TRIP,
                queue: QUEUE,
                loss_per_mille,
                seed: 1,
            };
            match Link::new(path) {
                Ok(link) => one_path(&link, path)?,
                Err(reason) => {
                    println!("skipped: {reason}");
                    return Ok(());
                }
            }
        }
    }
    Ok(())
}

fn one_path(link: &Link, path: Path) -> Outcome<()> {
    let megabits = path.megabits;
    println!("{megabits} Mbit/s, loss {:.1} %", path.loss_per_mille / 10.0);
    let before = finish_iperf(start_iperf(link)?)?;
    let counted = overflowed(link);
    let ours = finish_ours(start_ours(link, megabits)?)?;
    let overshoot = share(counted, overflowed(link));
    let after = finish_iperf(start_iperf(link)?)?;
    let theirs = (before + after) / 2.0;
    println!("  alone    {ours}");
    println!(
        "           {:.3} of the link, {:.2} of iperf3's {before:.1} and {after:.1} Mbit/s, overshoot {:.2} %",
        ours.megabits / megabits,
        ours.megabits / theirs,
        overshoot * 100.0
    );
    let (own, other) = (start_ours(link, megabits)?, start_iperf_later(link)?);
    let (ours, theirs) = (finish_ours(own)?, finish_iperf(other)?);
    println!(
        "  together {:.3} of the link for us, {:.3} for one flow of iperf3",
        ours.megabits / megabits,
        theirs / megabits
    );
    if link.missed() > 0 {
        println!(
            "  {} packets never came onto the link: this machine was too slow",
            link.missed()
        );
    }
    Ok(())
}

type Pair = (Running, Running);

/// A server that answers one client, and the client.
fn start_iperf(link: &Link) -> Outcome<Pair> {
    let server = words("-s -1 -J");
    let server = Running::start(&link.namespaces[1], "iperf3", &server)?;
    std::thread::sleep(Duration::from_millis(500));
    let client = words(&format!("-c {} -C cubic -J -t {}", ADDRESSES[1], BULK_TIME.as_secs()));
    Ok((server, Running::start(&link.namespaces[0], "iperf3", &client)?))
}

/// As our own transfer begins, after its echoes.
fn start_iperf_later(link: &Link) -> Outcome<Pair> {
    std::thread::sleep(crate::IDLE_TIME);
    start_iperf(link)
}

/// What the receiver got, in Mbit/s.
fn finish_iperf((server, client): Pair) -> Outcome<f64> {
    let report: serde_json::Value = serde_json::from_str(&client.finish()?)?;
    drop(server);
    let rate = report.pointer("/end/sum_received/bits_per_second");
    let rate = rate.and_then(serde_json::Value::as_f64);
    Ok(rate.ok_or_else(|| format!("iperf3 says {report}"))? * 1e-6)
}

/// This program again, as both ends.
fn start_ours(link: &Link, megabits: f64) -> Outcome<Pair> {
    static PORT: std::sync::atomic::AtomicU16 = std::sync::atomic::AtomicU16::new(7001);
    let program = std::env::current_exe()?;
    let program = program.to_str().ok_or("a path that is no text")?;
    // Another port each time, since the one before may still be bound.
    let port = PORT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let server = words(&format!("serve {}:{port}", ADDRESSES[1]));
    let server = Running::start(&link.namespaces[1], program, &server)?;
    std::thread::sleep(Duration::from_millis(500));
    let client = words(&format!("dial {}:{port} {megabits} json", ADDRESSES[1]));
    Ok((server, Running::start(&link.namespaces[0], program, &client)?))
}

fn finish_ours((server, client): Pair) -> Outcome<Measured> {
    let began = Instant::now();
    let text = client.finish()?;
    drop(server);
    serde_json::from_str(text.trim()).map_err(|error| format!("{error} after {:?}: {text}", began.elapsed()).into())
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// Packets sent and overflowed on the way there.
fn overflowed(link: &Link) -> (u64, u64) {
    use std::sync::atomic::Ordering::Relaxed;
    let counts = &link.counts[0];
    (counts.sent.load(Relaxed), counts.overflowed.load(Relaxed))
}

fn share(before: (u64, u64), after: (u64, u64)) -> f64 {
    (after.1 - before.1) as f64 / (after.0 - before.0).max(1) as f64
}
