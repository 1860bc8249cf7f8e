//! A rate that is not exceeded, kept as one moment.

use std::time::{Duration, Instant};

/// What may go out at once after a pause, as time at the capped rate.
const BURST: Duration = Duration::from_millis(50);

/// A token bucket, kept as the time at which it will have paid for what was taken: whoever comes later waits longer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bucket {
    paid_at: Instant,
}

impl Bucket {
    pub(crate) fn new(now: Instant) -> Self {
        Self { paid_at: now }
    }

    /// Takes `bytes` and says how long to wait before they may go.
    pub(crate) fn take(&mut self, now: Instant, bytes: usize, bytes_per_second: u64) -> Duration {
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let starts = self.paid_at.max(earliest);
        self.paid_at = starts + Duration::from_secs_f64(bytes as f64 / bytes_per_second.max(1) as f64);
        starts.saturating_duration_since(now)
    }

    /// Whether something that was taken is yet to be paid for.
    pub(crate) fn owes(&self, now: Instant) -> bool {
        self.paid_at > now
    }
}
