//! When a node may work: its owner's own work comes first.
//!
//! A policy is data; what the machine looks like is data; the decision is a function of both. A node yields at once
//! and comes back only after a while of calm, so that it does not start and stop with every breath of its owner's work.

use alloc::vec::Vec;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::time::{Instant, Span};
pub use crate::window::{WeekMinute, Window, WindowError};

/// What the owner of a machine allows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Local times in which the node may work; empty means always.
    pub windows: Vec<Window>,
    /// Yield while others load the machine by more than so many percent of its cores; 0 never yields.
    pub load_percent_max: u32,
    /// Yield while a foreign process holds memory on the device.
    pub yield_to_device_processes: bool,
    /// How long the owner's work must be over before the node works again.
    pub calm: Span,
}

impl Default for Policy {
    /// Always, except beside a foreign process on the device. A minute of calm outlasts the pauses of a person at
    /// work, and a minute of waiting costs a round nothing.
    fn default() -> Self {
        Self {
            windows: Vec::new(),
            load_percent_max: 0,
            yield_to_device_processes: true,
            calm: Span::seconds(60),
        }
    }
}

/// What the machine looks like now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Facts {
    /// Local time.
    pub minute: WeekMinute,
    /// How much of the machine's cores others use, in percent; `None` where it cannot be measured.
    pub load_percent: Option<u32>,
    /// Processes of others that hold memory on the device.
    pub foreign_device_processes: u32,
    /// Whether a person said `polder pause`.
    pub paused: bool,
}

/// Whether the node may work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// It may.
    MayWork,
    /// It must give back the device now.
    MustYield(Reason),
}

/// Why a node must yield.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error, Serialize, Deserialize)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum Reason {
    #[error("paused: `polder resume` lets it work")]
    Paused,
    #[error("outside the time windows of its configuration")]
    OutsideWindows,
    #[error("{count} other processes use the device")]
    DeviceInUse { count: u32 },
    #[error("others load the machine by {percent} %, over the limit of {limit_percent} %")]
    Loaded { percent: u32, limit_percent: u32 },
    #[error("the machine was in use a moment ago; waiting {seconds} s of calm")]
    Calming { seconds: u64 },
}

impl Policy {
    /// What the facts of one moment say.
    pub fn decide(&self, facts: &Facts) -> Verdict {
        let in_window = self.windows.is_empty() || self.windows.iter().any(|window| window.holds(facts.minute));
        let load_limit = (self.load_percent_max > 0).then_some(self.load_percent_max);
        match (facts.load_percent, load_limit) {
            _ if facts.paused => Verdict::MustYield(Reason::Paused),
            _ if !in_window => Verdict::MustYield(Reason::OutsideWindows),
            _ if self.yield_to_device_processes && facts.foreign_device_processes > 0 => {
                Verdict::MustYield(Reason::DeviceInUse {
                    count: facts.foreign_device_processes,
                })
            }
            (Some(percent), Some(limit_percent)) if percent > limit_percent => {
                Verdict::MustYield(Reason::Loaded { percent, limit_percent })
            }
            _ => Verdict::MayWork,
        }
    }
}

/// A policy over time: yields at once, comes back after calm.
#[derive(Debug, Clone)]
pub struct Contribution {
    policy: Policy,
    /// When others last used the machine, while that is less than [`Policy::calm`] ago.
    disturbed: Option<Instant>,
}

impl Contribution {
    /// Nothing has been seen yet, so nothing is waited for.
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            disturbed: None,
        }
    }

    /// Takes what the machine looks like `now` and decides. Call it every second or so.
    pub fn step(&mut self, now: Instant, facts: &Facts) -> Verdict {
        let verdict = self.policy.decide(facts);
        match verdict {
            Verdict::MustYield(Reason::DeviceInUse { .. } | Reason::Loaded { .. }) => self.disturbed = Some(now),
            // A person's word and the clock need no calm.
            Verdict::MustYield(Reason::Paused | Reason::OutsideWindows | Reason::Calming { .. }) => {}
            Verdict::MayWork => {
                let ends = self.disturbed.map(|disturbed| disturbed + self.policy.calm);
                if let Some(ends) = ends.filter(|ends| now < *ends) {
                    let seconds = (ends - now).0.div_ceil(1_000_000);
                    return Verdict::MustYield(Reason::Calming { seconds });
                }
                self.disturbed = None;
            }
        }
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn every_reason_to_yield_is_said() {
        let policy = Policy {
            windows: vec!["09:00-17:00".parse().unwrap()],
            load_percent_max: 50,
            ..Policy::default()
        };
        let free = Facts {
            minute: WeekMinute::new(0, 600),
            load_percent: Some(50),
            ..Facts::default()
        };
        assert_eq!(policy.decide(&free), Verdict::MayWork);
        let cases = [
            (Facts { paused: true, ..free }, Reason::Paused),
            (
                Facts {
                    minute: WeekMinute::new(0, 60),
                    ..free
                },
                Reason::OutsideWindows,
            ),
            (
                Facts {
                    foreign_device_processes: 2,
                    ..free
                },
                Reason::DeviceInUse { count: 2 },
            ),
            (
                Facts {
                    load_percent: Some(51),
                    ..free
                },
                Reason::Loaded {
                    percent: 51,
                    limit_percent: 50,
                },
            ),
        ];
        for (facts, reason) in cases {
            assert_eq!(policy.decide(&facts), Verdict::MustYield(reason));
        }
    }

    #[test]
    fn it_yields_at_once_and_comes_back_after_calm() {
        let mut contribution = Contribution::new(Policy::default());
        let busy = Facts {
            foreign_device_processes: 1,
            ..Facts::default()
        };
        let at = |seconds: u64| Instant(seconds * 1_000_000);
        assert_eq!(contribution.step(at(0), &Facts::default()), Verdict::MayWork);
        let in_use = Verdict::MustYield(Reason::DeviceInUse { count: 1 });
        assert_eq!(contribution.step(at(1), &busy), in_use);
        let calming = Verdict::MustYield(Reason::Calming { seconds: 59 });
        assert_eq!(contribution.step(at(2), &Facts::default()), calming);
        assert_eq!(contribution.step(at(61), &Facts::default()), Verdict::MayWork);
    }

    #[test]
    fn a_resumed_node_works_at_once() {
        let mut contribution = Contribution::new(Policy::default());
        let paused = Facts {
            paused: true,
            ..Facts::default()
        };
        contribution.step(Instant(0), &paused);
        assert_eq!(contribution.step(Instant(1), &Facts::default()), Verdict::MayWork);
    }
}
