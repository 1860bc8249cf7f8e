//! How much goes to and comes from each peer just now.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use polder_protocol::hash::NodeId;
use tokio_util::sync::CancellationToken;

use crate::data::DataPlane;

/// Over how long a rate is taken: long enough to smooth bursts, short enough to watch.
const OVER: Duration = Duration::from_secs(3);

/// Bytes of the data plane, per second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Rate {
    pub(crate) sent_per_second: u64,
    pub(crate) received_per_second: u64,
}

/// The rates of all peers.
#[derive(Debug, Default)]
pub(crate) struct Rates(Mutex<BTreeMap<NodeId, Rate>>);

impl Rates {
    /// All of them, those that are nothing included.
    pub(crate) fn all(&self) -> BTreeMap<NodeId, Rate> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Takes the rates until `stop`.
pub(crate) fn watch(data: DataPlane, stop: CancellationToken) -> Arc<Rates> {
    let rates = Arc::new(Rates::default());
    let kept = Arc::clone(&rates);
    tokio::spawn(async move {
        let (mut before, mut at) = (totals(&data), Instant::now());
        while tokio::time::timeout(OVER, stop.cancelled()).await.is_err() {
            let (after, now) = (totals(&data), Instant::now());
            let rates = after.iter().map(|(peer, total)| {
                let old = before.get(peer).copied().unwrap_or_default();
                (*peer, rate(old, *total, now - at))
            });
            *kept.0.lock().unwrap_or_else(PoisonError::into_inner) = rates.collect();
            (before, at) = (after, now);
        }
    });
    rates
}

fn totals(data: &DataPlane) -> BTreeMap<NodeId, (u64, u64)> {
    let mut totals: BTreeMap<NodeId, (u64, u64)> = BTreeMap::new();
    for traffic in data.traffic() {
        let (sent, received) = totals.entry(traffic.peer).or_default();
        *sent = sent.saturating_add(traffic.bytes_sent);
        *received = received.saturating_add(traffic.bytes_received);
    }
    totals
}

fn rate(before: (u64, u64), after: (u64, u64), over: Duration) -> Rate {
    let millis = u64::try_from(over.as_millis()).unwrap_or(u64::MAX).max(1);
    let per_second = |before: u64, after: u64| after.saturating_sub(before).saturating_mul(1000) / millis;
    Rate {
        sent_per_second: per_second(before.0, after.0),
        received_per_second: per_second(before.1, after.1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_what_came_in_addition_over_the_time_it_took() {
        let rate = rate((100, 7), (4_100, 7), Duration::from_secs(2));
        assert_eq!((rate.sent_per_second, rate.received_per_second), (2_000, 0));
    }
}
