//! What happened in a simulation, counted.

use std::fmt;

/// What happened, counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) events: u64,
    pub(crate) messages: u64,
    pub(crate) dropped: u64,
    pub(crate) duplicated: u64,
    pub(crate) crashes: u64,
    pub(crate) other_faults: u64,
    pub(crate) corruptions: u64,
    pub(crate) rounds: u64,
    pub(crate) late: u64,
    /// Contributions that several stages made together.
    pub(crate) of_chains: u64,
    pub(crate) virtual_seconds: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Self) {
        self.events += other.events;
        self.messages += other.messages;
        self.dropped += other.dropped;
        self.duplicated += other.duplicated;
        self.crashes += other.crashes;
        self.other_faults += other.other_faults;
        self.corruptions += other.corruptions;
        self.rounds += other.rounds;
        self.late += other.late;
        self.of_chains += other.of_chains;
        self.virtual_seconds += other.virtual_seconds;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} events in {} virtual seconds, {} rounds closed, with {} late contributions and {} of chains\n\
             faults: {} of {} messages dropped, {} doubled, {} crashes, {} wrong outer steps, {} others",
            self.events,
            self.virtual_seconds,
            self.rounds,
            self.late,
            self.of_chains,
            self.dropped,
            self.messages,
            self.duplicated,
            self.crashes,
            self.corruptions,
            self.other_faults
        )
    }
}
