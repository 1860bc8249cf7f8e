//! How much a peer may have under way towards this node, from what it was seen to send.

use std::collections::BTreeMap;
use std::time::Duration;

use quinn::VarInt;
use tokio::time::{Instant, sleep};

use super::plane::DataPlane;
use super::settings::{Class, window_bytes};

/// How often the windows are set.
const EVERY: Duration = Duration::from_millis(500);

/// Less would slow down whoever begins to send again.
const LEAST_BYTES: u64 = 4 << 20;

/// 5 Gbit/s at 100 ms; what one peer can make this node hold.
const MOST_BYTES: u64 = 64 << 20;

/// The next window of a connection that delivered `bytes` in `time`, with this round trip and window: twice what was
/// under way, so that the window is never what limits the rate, and down by an eighth at most, since pauses are short.
fn next_window(before: u64, bytes: u64, time: Duration, round_trip: Duration) -> u64 {
    let under_way = bytes as f64 / time.as_secs_f64().max(1e-3) * round_trip.as_secs_f64();
    let wanted = (2.0 * under_way) as u64;
    wanted.max(before - before / 8).clamp(LEAST_BYTES, MOST_BYTES)
}

impl DataPlane {
    /// Sets the windows of all bulk connections, now and then, until the plane is shut down.
    pub(super) async fn set_windows(self) {
        let mut known: BTreeMap<usize, (u64, u64)> = BTreeMap::new();
        let mut at = Instant::now();
        loop {
            sleep(EVERY).await;
            let time = at.elapsed();
            at = Instant::now();
            let links = self.inner.links.all();
            let mut seen = BTreeMap::new();
            for link in links.iter().filter(|link| link.class == Class::Bulk) {
                let start = u64::from(window_bytes(Class::Bulk));
                let received = link.connection.stats().udp_rx.bytes;
                let id = link.connection.stable_id();
                let (before, window) = known.get(&id).copied().unwrap_or((received, start));
                let next = next_window(window, received.saturating_sub(before), time, link.connection.rtt());
                if next != window {
                    // At most `MOST_BYTES`, which a variable-length integer holds.
                    link.connection
                        .set_receive_window(VarInt::from_u64(next).unwrap_or(VarInt::MAX));
                }
                seen.insert(id, (received, next));
            }
            known = seen;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_grows_as_long_as_it_is_the_limit_and_shrinks_slowly_after() {
        let round_trip = Duration::from_millis(200);
        let mut window = 16 << 20;
        // 2 Gbit/s at 200 ms have 50 MB under way.
        for _ in 0..20 {
            let rate = (window as f64 / round_trip.as_secs_f64()).min(250e6);
            window = next_window(window, (rate * EVERY.as_secs_f64()) as u64, EVERY, round_trip);
        }
        assert!(window > 50_000_000, "{window}");
        let paused = next_window(window, 0, EVERY, round_trip);
        assert!(paused > window * 3 / 4 && paused < window);
        for _ in 0..100 {
            window = next_window(window, 0, EVERY, round_trip);
        }
        assert_eq!(window, LEAST_BYTES);
    }
}
