//! Events, and their order in time.

use polder_protocol::log::{ReplicaId, Round};
use polder_protocol::round::{JobId, RunMessage};
use polder_protocol::time::Instant;

use crate::worlds::Fault;

/// Something that happens.
#[derive(Debug)]
pub(crate) enum Event {
    Deliver {
        to: usize,
        from: usize,
        message: RunMessage,
    },
    Wake {
        host: usize,
        life: u64,
    },
    Done {
        host: usize,
        life: u64,
        job: JobId,
    },
    Failed {
        host: usize,
        life: u64,
        job: JobId,
        reason: &'static str,
    },
    Unmet {
        host: usize,
        life: u64,
        job: JobId,
        key: (ReplicaId, Round),
    },
    Found {
        host: usize,
        peer: usize,
    },
    Lost {
        host: usize,
        peer: usize,
    },
    Join {
        host: usize,
    },
    Fault(Fault),
    Quiet,
}

/// When it happens.
#[derive(Debug)]
pub(super) struct Scheduled {
    pub(super) at: Instant,
    /// Breaks ties, so that order follows from the seed alone.
    pub(super) sequence: u64,
    pub(super) event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.sequence) == (other.at, other.sequence)
    }
}
impl Eq for Scheduled {}
impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.sequence).cmp(&(other.at, other.sequence))
    }
}
