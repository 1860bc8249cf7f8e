//! How much a peer may have under way towards this node, from what it was seen to send.

use std::collections::BTreeMap;
use std::time::Duration;

use quinn::VarInt;
use tokio::time::{Instant, sleep};

use super::plane::DataPlane;
use super::settings::{Class, WINDOW_BYTES_MAX, window_bytes};

/// How often the windows are set.
const EVERY: Duration = Duration::from_millis(500);

/// Less would slow down whoever begins to send again.
const LEAST_BYTES: u64 = 4 << 20;

/// Round trips for which what was sent may be held up: it comes, is waited for behind a hole until that is noticed and filled,
/// and its credit goes back. One more, so that the window is not what limits the rate.
const ROUND_TRIPS: f64 = 4.0;

/// The next window of a connection that delivered `bytes` in `time`, with this round trip and window: what is under way in
/// [`ROUND_TRIPS`], twice the window before where the peer says that it was `blocked` by it, and down by an eighth at most, since
/// pauses are short.
fn next_window(before: u64, bytes: u64, time: Duration, round_trip: Duration, blocked: bool) -> u64 {
    let under_way = bytes as f64 / time.as_secs_f64().max(1e-3) * round_trip.as_secs_f64();
    let wanted = (ROUND_TRIPS * under_way) as u64;
    let held = if blocked {
        before.saturating_mul(2)
    } else {
        before - before / 8
    };
    wanted.max(held).clamp(LEAST_BYTES, WINDOW_BYTES_MAX)
}

/// What a connection has shown, and its window.
#[derive(Debug, Clone, Copy)]
struct Seen {
    bytes: u64,
    blocked: u64,
    window: u64,
}

impl DataPlane {
    /// Sets the windows of all bulk connections, now and then, until the plane is shut down.
    pub(super) async fn set_windows(self) {
        let mut known: BTreeMap<usize, Seen> = BTreeMap::new();
        let mut at = Instant::now();
        loop {
            sleep(EVERY).await;
            let time = at.elapsed();
            at = Instant::now();
            let links = self.inner.links.all();
            let mut seen = BTreeMap::new();
            for link in links.iter().filter(|link| link.class == Class::Bulk) {
                let stats = link.connection.stats();
                let (bytes, blocked) = (stats.udp_rx.bytes, stats.frame_rx.data_blocked);
                let id = link.connection.stable_id();
                let before = known.get(&id).copied().unwrap_or(Seen {
                    bytes,
                    blocked,
                    window: window_bytes(Class::Bulk).into(),
                });
                let came = bytes.saturating_sub(before.bytes);
                // A peer that says so without sending gets no more room for it.
                let blocked_by_it = blocked > before.blocked && came >= before.window / 2;
                let window = next_window(before.window, came, time, link.connection.rtt(), blocked_by_it);
                if window != before.window {
                    // At most `WINDOW_BYTES_MAX`, which a variable-length integer holds.
                    link.connection
                        .set_receive_window(VarInt::from_u64(window).unwrap_or(VarInt::MAX));
                }
                seen.insert(id, Seen { bytes, blocked, window });
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
            window = next_window(window, (rate * EVERY.as_secs_f64()) as u64, EVERY, round_trip, false);
        }
        assert!(window > 50_000_000, "{window}");
        let paused = next_window(window, 0, EVERY, round_trip, false);
        assert!(paused > window * 3 / 4 && paused < window);
        for _ in 0..100 {
            window = next_window(window, 0, EVERY, round_trip, false);
        }
        assert_eq!(window, LEAST_BYTES);
    }

    #[test]
    fn a_window_that_holds_a_lossy_path_back_is_widened_until_it_does_not() {
        let round_trip = Duration::from_millis(80);
        let mut window = LEAST_BYTES;
        for _ in 0..12 {
            // Credit comes back after as many round trips as the window reckons with: by the rate alone it would stay.
            let bound = window as f64 / (ROUND_TRIPS * round_trip.as_secs_f64());
            let rate = bound.min(110e6);
            let bytes = (rate * EVERY.as_secs_f64()) as u64;
            window = next_window(window, bytes, EVERY, round_trip, bound < 110e6);
        }
        assert!(window as f64 >= 110e6 * ROUND_TRIPS * 0.08, "{window}");
        assert_eq!(
            next_window(WINDOW_BYTES_MAX, 1 << 30, EVERY, round_trip, true),
            WINDOW_BYTES_MAX
        );
    }
}
