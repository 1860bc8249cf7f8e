//! Caps of what this node uploads: to everybody together, and to each institution.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use polder_protocol::hash::InstitutionId;

use crate::bucket::Bucket;

/// What is asked for at a time: small enough that everybody who waits gets on.
pub(super) const SLICE_BYTES: usize = 64 << 10;

/// Caps in bytes per second; 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct UploadCaps {
    /// To everybody together.
    pub all: u64,
    /// To the members of one institution.
    pub institution: u64,
}

/// The buckets of a node.
#[derive(Debug)]
pub(super) struct Uploads(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    caps: UploadCaps,
    // That of everybody together is the one without an institution.
    buckets: BTreeMap<Option<InstitutionId>, Bucket>,
}

impl Uploads {
    pub(super) fn new(caps: UploadCaps) -> Self {
        let buckets = BTreeMap::new();
        Self(Mutex::new(State { caps, buckets }))
    }

    /// Other caps from now on. What was taken is paid for at the old ones.
    pub(super) fn set(&self, caps: UploadCaps) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).caps = caps;
    }

    /// Takes `bytes` for a member of `institution` and says how long to wait before they may go. Institutions are
    /// those of admitted peers, as many as the charter names.
    pub(super) fn take(&self, now: Instant, institution: InstitutionId, bytes: usize) -> Duration {
        let mut wait = Duration::ZERO;
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let caps = state.caps;
        for (whose, cap) in [(None, caps.all), (Some(institution), caps.institution)] {
            if cap > 0 {
                let bucket = state.buckets.entry(whose).or_insert_with(|| Bucket::new(now));
                wait = wait.max(bucket.take(now, bytes, cap));
            }
        }
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends slices one after the other, as soon as each may go; bytes per second.
    fn rate(uploads: &Uploads, institutions: &[u8], seconds: f64) -> f64 {
        let start = Instant::now();
        let mut sent = 0;
        let mut free_at = vec![start; institutions.len()];
        loop {
            let Some(next) = (0..free_at.len()).min_by_key(|index| free_at[*index]) else {
                return 0.0;
            };
            let now = free_at[next];
            if now >= start + Duration::from_secs_f64(seconds) {
                return sent as f64 / seconds;
            }
            free_at[next] = now + uploads.take(now, InstitutionId([institutions[next]; 32]), SLICE_BYTES);
            // Nobody sends in no time.
            free_at[next] += Duration::from_micros(100);
            sent += SLICE_BYTES;
        }
    }

    #[test]
    fn an_uncapped_node_never_waits() {
        let uploads = Uploads::new(UploadCaps::default());
        let now = Instant::now();
        assert_eq!(uploads.take(now, InstitutionId([1; 32]), 1 << 30), Duration::ZERO);
    }

    #[test]
    fn caps_hold_for_each_institution_and_for_all_of_them() {
        let caps = |all, institution| Uploads::new(UploadCaps { all, institution });
        for (uploads, expected) in [
            (caps(1_250_000, 0), 1_250_000.0),
            (caps(0, 1_250_000), 2_500_000.0),
            (caps(2_000_000, 1_250_000), 2_000_000.0),
        ] {
            let rate = rate(&uploads, &[1, 1, 2], 20.0);
            assert!((rate / expected - 1.0).abs() < 0.03, "{rate} of {expected}");
        }
    }

    #[test]
    fn a_pause_saves_up_no_more_than_a_burst() {
        let uploads = Uploads::new(UploadCaps {
            all: 1_000_000,
            institution: 0,
        });
        let (start, who) = (Instant::now(), InstitutionId([1; 32]));
        uploads.take(start, who, SLICE_BYTES);
        let later = start + Duration::from_secs(60);
        assert_eq!(uploads.take(later, who, SLICE_BYTES), Duration::ZERO);
        assert!(uploads.take(later, who, SLICE_BYTES) > Duration::from_millis(10));
    }
}
