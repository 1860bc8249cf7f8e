//! Time as the machines see it: whole microseconds, handed in by whoever drives them.

use core::ops::{Add, Sub};

use serde::{Deserialize, Serialize};

/// Microseconds since the driver's own zero. Never goes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Instant(pub u64);

/// A length of time in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Span(pub u64);

/// Seconds since 1970-01-01 UTC, for certificates and signed announcements, which outlive a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct UnixSeconds(pub u64);

impl Span {
    /// A span of whole milliseconds.
    pub const fn millis(count: u64) -> Self {
        Self(count.saturating_mul(1_000))
    }

    /// A span of whole seconds.
    pub const fn seconds(count: u64) -> Self {
        Self(count.saturating_mul(1_000_000))
    }
}

impl Add<Span> for Instant {
    type Output = Self;
    fn add(self, span: Span) -> Self {
        Self(self.0.saturating_add(span.0))
    }
}

impl Sub for Instant {
    type Output = Span;
    /// The span from `earlier` to `self`; zero when `earlier` is later.
    fn sub(self, earlier: Self) -> Span {
        Span(self.0.saturating_sub(earlier.0))
    }
}
