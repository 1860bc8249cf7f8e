//! The link emulator of the benches does what it says. As root, with `ip` and `ping`; otherwise skipped.
#![cfg(target_os = "linux")]

#[path = "../benches/emulator/mod.rs"]
mod emulator;

use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::Duration;

use emulator::{ADDRESSES, Link, Path};

/// Echoes that came back, the shortest of their round trips in milliseconds, and packets the link says it lost.
fn ping(path: Path) -> Result<(u64, f64, u64), String> {
    let link = Link::new(path)?;
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &link.namespaces[0]]);
    // 200 echoes, 10 ms apart.
    command.args([
        "timeout",
        "20",
        "ping",
        "-q",
        "-c",
        "200",
        "-i",
        "0.01",
        "-W",
        "1",
        ADDRESSES[1],
    ]);
    let output = command.output().map_err(|error| format!("ping: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let unread = || format!("ping says {text} {}", String::from_utf8_lossy(&output.stderr));
    // "200 packets transmitted, 190 received, ..." and "rtt min/avg/max/mdev = 20.1/...".
    let received = text.split(" received").next().and_then(|text| text.rsplit(' ').next());
    let received = received.and_then(|count| count.parse().ok()).ok_or_else(unread)?;
    let shortest = text.split("= ").nth(1).and_then(|text| text.split('/').next());
    let shortest = shortest.and_then(|millis| millis.parse().ok()).ok_or_else(unread)?;
    let lost = link
        .counts
        .iter()
        .map(|counts| counts.lost.load(Ordering::Relaxed))
        .sum();
    assert_eq!(link.missed(), 0);
    assert!(
        link.counts
            .iter()
            .all(|counts| counts.overflowed.load(Ordering::Relaxed) == 0)
    );
    assert!(link.counts[0].sent.load(Ordering::Relaxed) >= 200);
    Ok((received, shortest, lost))
}

#[test]
fn a_link_delays_what_it_carries_and_loses_the_same_packets_each_time() {
    let path = Path {
        megabits: 10.0,
        round_trip: Duration::from_millis(20),
        queue: Duration::from_millis(100),
        loss_per_mille: 50.0,
        seed: 7,
    };
    let first = match ping(path) {
        Ok(measured) => measured,
        Err(reason) => return println!("skipped: {reason}"),
    };
    // One in ten echoes loses its way there or back: 20 of 200, and seeded.
    assert!((8..=32).contains(&first.2), "{first:?}");
    assert_eq!(first.0 + first.2, 200);
    assert!(first.1 >= 20.0, "{first:?}");
    let again = ping(path).expect("it went before");
    assert_eq!((first.0, first.2), (again.0, again.2));
    let clean = Path {
        loss_per_mille: 0.0,
        ..path
    };
    let clean = ping(clean).expect("it went before");
    assert_eq!((clean.0, clean.2), (200, 0));
}
