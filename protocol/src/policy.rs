//! When a node may work: its owner's own work comes first.
//!
//! A policy is data; what the machine looks like is data; the decision is a function of both. A node yields at once
//! and comes back only after a while of calm, so that it does not start and stop with every breath of its owner's work.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::time::{Instant, Span};

/// Minutes of a day.
const DAY_MINUTES: u16 = 24 * 60;

/// What the owner of a machine allows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Local times of day in which the node may work; empty means always.
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

/// A time of day, from one minute up to another; past midnight where the end comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// The first minute of the day, below 1,440.
    from_minute: u16,
    /// One past the last minute of the day, at most 1,440.
    until_minute: u16,
}

/// A text that is no time window.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[error("`{text}` is no time window: write it as \"19:00-07:30\"")]
pub struct WindowError {
    /// The text.
    pub text: String,
}

impl Window {
    /// Whether it holds this minute of the day.
    pub fn holds(&self, minute: u16) -> bool {
        if self.from_minute < self.until_minute {
            (self.from_minute..self.until_minute).contains(&minute)
        } else {
            minute >= self.from_minute || minute < self.until_minute
        }
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (from, until) = (self.from_minute, self.until_minute);
        write!(
            f,
            "{:02}:{:02}-{:02}:{:02}",
            from / 60,
            from % 60,
            until / 60,
            until % 60
        )
    }
}

impl FromStr for Window {
    type Err = WindowError;
    fn from_str(text: &str) -> Result<Self, WindowError> {
        let window = || {
            let (from, until) = text.split_once('-')?;
            let window = Self {
                from_minute: minute_of_day(from)?,
                until_minute: minute_of_day(until)?,
            };
            (window.from_minute < DAY_MINUTES && window.from_minute != window.until_minute).then_some(window)
        };
        window().ok_or_else(|| WindowError { text: text.to_string() })
    }
}

fn minute_of_day(text: &str) -> Option<u16> {
    let (hours, minutes) = text.trim().split_once(':')?;
    let (hours, minutes): (u16, u16) = (hours.parse().ok()?, minutes.parse().ok()?);
    let minute = hours.checked_mul(60)?.checked_add(minutes)?;
    (minutes < 60 && minute <= DAY_MINUTES).then_some(minute)
}

/// What the machine looks like now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Facts {
    /// Local time of day in minutes.
    pub minute_of_day: u16,
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
        let in_window = self.windows.is_empty() || self.windows.iter().any(|window| window.holds(facts.minute_of_day));
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
    use proptest::prelude::*;

    #[test]
    fn a_window_may_pass_midnight() {
        let night: Window = "19:00-07:30".parse().unwrap();
        assert_eq!(night.to_string(), "19:00-07:30");
        assert!(night.holds(23 * 60) && night.holds(0) && night.holds(7 * 60 + 29));
        assert!(!night.holds(7 * 60 + 30) && !night.holds(12 * 60));
        let day: Window = "00:00-24:00".parse().unwrap();
        assert!(day.holds(0) && day.holds(1439));
    }

    #[test]
    fn what_is_no_window_is_named() {
        for text in [
            "",
            "19-7",
            "25:00-26:00",
            "12:60-13:00",
            "08:00-08:00",
            "24:00-01:00",
            "99999:00-1:00",
        ] {
            assert_eq!(text.parse::<Window>(), Err(WindowError { text: text.to_string() }));
        }
    }

    #[test]
    fn every_reason_to_yield_is_said() {
        let policy = Policy {
            windows: vec!["09:00-17:00".parse().unwrap()],
            load_percent_max: 50,
            ..Policy::default()
        };
        let free = Facts {
            minute_of_day: 600,
            load_percent: Some(50),
            ..Facts::default()
        };
        assert_eq!(policy.decide(&free), Verdict::MayWork);
        let cases = [
            (Facts { paused: true, ..free }, Reason::Paused),
            (
                Facts {
                    minute_of_day: 60,
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

    proptest! {
        #[test]
        fn a_window_survives_its_text(from in 0u16..1440, until in 0u16..=1440) {
            prop_assume!(from != until);
            let window = Window { from_minute: from, until_minute: until };
            prop_assert_eq!(window.to_string().parse(), Ok(window));
        }

        #[test]
        fn no_text_makes_it_panic(text in ".{0,40}") {
            let _ = text.parse::<Window>();
        }
    }
}
