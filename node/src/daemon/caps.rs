//! Which caps are in force: those of the configuration, or of the first of its windows that holds now.

use std::sync::Arc;
use std::time::Duration;

use polder_protocol::policy::{WeekMinute, Window, WindowError};
use serde::{Deserialize, Serialize};

use super::Shared;
use super::config::Config;
use crate::contribute::week_minute;
use crate::control::{ControlHandle, RelayCaps};
use crate::data::{DataPlane, UploadCaps};

/// How often it is looked whether a window has begun or ended.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Caps in bytes per second; 0 is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Caps {
    /// Blobs that leave this node, to everybody together.
    pub upload_bytes_per_second: u64,
    /// The same, to the members of one institution.
    pub upload_bytes_per_second_to_each_institution: u64,
    /// What this node relays as a gateway, all circuits together.
    pub relay_bytes_per_second: u64,
    /// What it relays from the members of one institution.
    pub relay_bytes_per_second_of_each_institution: u64,
    /// What it relays from one member.
    pub relay_bytes_per_second_of_each_member: u64,
    /// Each direction of one relayed circuit.
    pub relay_bytes_per_second_of_each_circuit: u64,
}

/// Other caps at some times, under `[[cap_windows]]` in `config.toml`. What is not named stays as at other times; 0 lifts
/// a cap.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "as in `Caps`")]
pub struct CapWindow {
    /// When, such as `"mon-fri 08:00-18:00"`.
    pub when: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upload_bytes_per_second: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upload_bytes_per_second_to_each_institution: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relay_bytes_per_second: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relay_bytes_per_second_of_each_institution: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relay_bytes_per_second_of_each_member: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relay_bytes_per_second_of_each_circuit: Option<u64>,
}

/// By which clock windows of caps are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CapClock {
    /// The machine's time zone, summer time included.
    #[default]
    Local,
    /// Coordinated universal time, for nodes of several countries.
    Utc,
}

impl CapClock {
    /// Which minute of the week it is.
    fn now(self) -> WeekMinute {
        let now = jiff::Zoned::now();
        match self {
            Self::Local => week_minute(&now),
            Self::Utc => week_minute(&now.with_time_zone(jiff::tz::TimeZone::UTC)),
        }
    }
}

/// The caps of a week.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Schedule {
    otherwise: Caps,
    windows: Vec<(Window, Caps)>,
    clock: CapClock,
}

impl Schedule {
    /// What the configuration says; the first window that holds a moment decides.
    pub(super) fn new(config: &Config) -> Result<Self, WindowError> {
        let otherwise = Caps {
            upload_bytes_per_second: config.upload_bytes_per_second,
            upload_bytes_per_second_to_each_institution: config.upload_bytes_per_second_to_each_institution,
            relay_bytes_per_second: config.relay_bytes_per_second,
            relay_bytes_per_second_of_each_institution: config.relay_bytes_per_second_of_each_institution,
            relay_bytes_per_second_of_each_member: config.relay_bytes_per_second_of_each_member,
            relay_bytes_per_second_of_each_circuit: config.relay_bytes_per_second_of_each_circuit,
        };
        let windows: Result<Vec<_>, _> = config
            .cap_windows
            .iter()
            .map(|window| Ok((window.when.parse()?, window.over(otherwise))))
            .collect();
        Ok(Self {
            otherwise,
            windows: windows?,
            clock: config.cap_clock,
        })
    }

    /// The caps of a moment, and the window that they are from.
    fn at(&self, minute: WeekMinute) -> (Option<Window>, Caps) {
        let holds = self.windows.iter().find(|(window, _)| window.holds(minute));
        holds.map_or((None, self.otherwise), |(window, caps)| (Some(*window), *caps))
    }

    /// The caps of now.
    pub(super) fn now(&self) -> Caps {
        self.at(self.clock.now()).1
    }

    /// The same, for `polder status`.
    pub(super) fn status(&self, relayed_bytes: u64) -> CapsStatus {
        self.status_at(self.clock.now(), relayed_bytes)
    }

    fn status_at(&self, now: WeekMinute, relayed_bytes: u64) -> CapsStatus {
        let (window, in_force) = self.at(now);
        let changes = now.next_change(|minute| self.at(minute).1);
        CapsStatus {
            in_force,
            window: window.map(|window| window.to_string()),
            changes: changes.map(|minute| minute.to_string()),
            clock: self.clock,
            relayed_bytes,
        }
    }
}

impl CapWindow {
    fn over(&self, otherwise: Caps) -> Caps {
        let or = |own: Option<u64>, otherwise| own.unwrap_or(otherwise);
        Caps {
            upload_bytes_per_second: or(self.upload_bytes_per_second, otherwise.upload_bytes_per_second),
            upload_bytes_per_second_to_each_institution: or(
                self.upload_bytes_per_second_to_each_institution,
                otherwise.upload_bytes_per_second_to_each_institution,
            ),
            relay_bytes_per_second: or(self.relay_bytes_per_second, otherwise.relay_bytes_per_second),
            relay_bytes_per_second_of_each_institution: or(
                self.relay_bytes_per_second_of_each_institution,
                otherwise.relay_bytes_per_second_of_each_institution,
            ),
            relay_bytes_per_second_of_each_member: or(
                self.relay_bytes_per_second_of_each_member,
                otherwise.relay_bytes_per_second_of_each_member,
            ),
            relay_bytes_per_second_of_each_circuit: or(
                self.relay_bytes_per_second_of_each_circuit,
                otherwise.relay_bytes_per_second_of_each_circuit,
            ),
        }
    }
}

/// What `polder status` says of caps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapsStatus {
    /// The caps of now.
    #[serde(flatten)]
    pub in_force: Caps,
    /// The window that they are from; none at other times.
    pub window: Option<String>,
    /// When others come into force, such as `mon 08:00`; none where they never change.
    pub changes: Option<String>,
    /// The clock of both.
    pub clock: CapClock,
    /// What this node has relayed since it started.
    pub relayed_bytes: u64,
}

impl Caps {
    /// As the data plane takes them.
    pub(super) fn upload(self) -> UploadCaps {
        UploadCaps {
            all: self.upload_bytes_per_second,
            institution: self.upload_bytes_per_second_to_each_institution,
        }
    }

    fn relay(self) -> RelayCaps {
        RelayCaps {
            all: self.relay_bytes_per_second,
            institution: self.relay_bytes_per_second_of_each_institution,
            member: self.relay_bytes_per_second_of_each_member,
            circuit: self.relay_bytes_per_second_of_each_circuit,
        }
    }

    fn apply(self, data: &DataPlane, control: &ControlHandle) {
        data.set_upload_caps(self.upload());
        control.set_relay_caps(self.relay());
    }
}

/// Keeps both planes at the caps of the hour, until the node stops.
pub(super) fn keep(shared: &Arc<Shared>) {
    let mut in_force = shared.caps.now();
    in_force.apply(&shared.data, &shared.control);
    if shared.caps.windows.is_empty() {
        return;
    }
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        while tokio::time::timeout(LOOK_EVERY, shared.stop.cancelled()).await.is_err() {
            let caps = shared.caps.now();
            if caps != in_force {
                in_force = caps;
                caps.apply(&shared.data, &shared.control);
                tracing::info!(?caps, "other caps are in force");
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(text: &str) -> Result<Schedule, WindowError> {
        Schedule::new(&toml::from_str(text).expect("a configuration"))
    }

    #[test]
    fn two_megabytes_a_second_on_weekdays_and_no_limit_otherwise() {
        let text = "[[cap_windows]]\nwhen = \"mon-fri 08:00-18:00\"\nupload_bytes_per_second = 2_000_000\n";
        let schedule = schedule(text).expect("a schedule");
        let at = |day, hour: u16| schedule.status_at(WeekMinute::new(day, hour * 60), 0);
        let (monday, saturday) = (at(0, 9), at(5, 9));
        assert_eq!(monday.in_force.upload_bytes_per_second, 2_000_000);
        assert_eq!(monday.window.as_deref(), Some("mon-fri 08:00-18:00"));
        assert_eq!(monday.changes.as_deref(), Some("mon 18:00"));
        assert_eq!(saturday.in_force, Caps::default());
        assert_eq!(
            (saturday.window, saturday.changes.as_deref()),
            (None, Some("mon 08:00"))
        );
    }

    #[test]
    fn the_first_window_decides_and_what_it_does_not_name_stays() {
        let text = "relay_bytes_per_second = 7\nupload_bytes_per_second = 5\n\
                    [[cap_windows]]\nwhen = \"sat 00:00-12:00\"\nupload_bytes_per_second = 0\n\
                    [[cap_windows]]\nwhen = \"00:00-24:00\"\nrelay_bytes_per_second_of_each_member = 3\n";
        let schedule = schedule(text).expect("a schedule");
        let (_, morning) = schedule.at(WeekMinute::new(5, 60));
        let (_, evening) = schedule.at(WeekMinute::new(5, 18 * 60));
        let relay = |caps: Caps| (caps.relay_bytes_per_second, caps.relay_bytes_per_second_of_each_member);
        assert_eq!((morning.upload_bytes_per_second, relay(morning)), (0, (7, 0)));
        assert_eq!((evening.upload_bytes_per_second, relay(evening)), (5, (7, 3)));
    }

    #[test]
    fn caps_that_never_change_say_so_and_a_wrong_window_is_named() {
        let status = schedule("upload_bytes_per_second = 5").expect("a schedule").status(0);
        assert_eq!((status.window, status.changes), (None, None));
        let error = schedule("[[cap_windows]]\nwhen = \"office hours\"\n").expect_err("refused");
        assert!(error.to_string().contains("office hours"));
    }
}
