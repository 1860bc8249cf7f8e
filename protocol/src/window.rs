//! Times of a week, and windows of them, as people write them: `19:00-07:30`, `mon-fri 08:00-18:00`.
//!
//! Nothing here knows a clock or a time zone: whoever asks says which minute of the week it is.

use alloc::string::{String, ToString};
use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Minutes of a day.
const DAY_MINUTES: u16 = 24 * 60;

/// Minutes of a week.
const WEEK_MINUTES: u16 = 7 * DAY_MINUTES;

const DAY_NAMES: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

/// A window that names no days has all of them.
const EVERY_DAY: u8 = 0x7f;

/// A minute of a week, which begins on Monday at 00:00.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct WeekMinute(u16);

impl WeekMinute {
    /// From days since Monday and minutes since midnight; what is beyond the week begins it again.
    pub fn new(days_since_monday: u8, minute_of_day: u16) -> Self {
        let minutes = u32::from(days_since_monday) * u32::from(DAY_MINUTES) + u32::from(minute_of_day);
        Self(u16::try_from(minutes % u32::from(WEEK_MINUTES)).unwrap_or_default())
    }

    /// The next minute at which `of` has another value than now, within a week; `None` where it never has.
    pub fn next_change<T: PartialEq>(self, of: impl Fn(Self) -> T) -> Option<Self> {
        let now = of(self);
        let mut later = (1..WEEK_MINUTES).map(|minutes| Self((self.0 + minutes) % WEEK_MINUTES));
        later.find(|minute| of(*minute) != now)
    }

    fn day(self) -> u16 {
        self.0 / DAY_MINUTES
    }

    fn minute_of_day(self) -> u16 {
        self.0 % DAY_MINUTES
    }
}

impl fmt::Display for WeekMinute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (day, minute) = (day_name(self.day()), self.minute_of_day());
        write!(f, "{day} {:02}:{:02}", minute / 60, minute % 60)
    }
}

/// A time of day, from one minute up to another, on some days of the week. Where the end comes first it passes midnight,
/// and belongs to the day on which it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// A bit for each day, Monday's the lowest; never 0.
    days: u8,
    /// The first minute of the day, below 1,440.
    from_minute: u16,
    /// One past the last minute of the day, at most 1,440.
    until_minute: u16,
}

/// A text that is no time window.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[error("`{text}` is no time window: write it as \"19:00-07:30\" or \"mon-fri 08:00-18:00\"")]
pub struct WindowError {
    /// The text.
    pub text: String,
}

impl Window {
    /// Whether it holds this minute.
    pub fn holds(&self, at: WeekMinute) -> bool {
        let (day, minute) = (at.day(), at.minute_of_day());
        if self.from_minute < self.until_minute {
            self.begins_on(day) && (self.from_minute..self.until_minute).contains(&minute)
        } else {
            let day_before = (day + 6) % 7;
            (self.begins_on(day) && minute >= self.from_minute)
                || (self.begins_on(day_before) && minute < self.until_minute)
        }
    }

    fn begins_on(&self, day: u16) -> bool {
        self.days & (1 << day) != 0
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.days != EVERY_DAY {
            let mut parted = "";
            let mut day = 0;
            while day < 7 {
                let run = (day..7).take_while(|day| self.begins_on(*day)).count();
                let run = u16::try_from(run).unwrap_or_default();
                if run > 0 {
                    write!(f, "{parted}{}", day_name(day))?;
                    parted = ",";
                }
                if run > 1 {
                    write!(f, "-{}", day_name(day + run - 1))?;
                }
                day += run + 1;
            }
            write!(f, " ")?;
        }
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
            let (days, times) = match text.trim().rsplit_once(char::is_whitespace) {
                Some((days, times)) => (days_of_week(days)?, times),
                None => (EVERY_DAY, text),
            };
            let (from, until) = times.split_once('-')?;
            let window = Self {
                days,
                from_minute: minute_of_day(from)?,
                until_minute: minute_of_day(until)?,
            };
            (window.from_minute < DAY_MINUTES && window.from_minute != window.until_minute).then_some(window)
        };
        window().ok_or_else(|| WindowError { text: text.to_string() })
    }
}

/// `daily`, or days and spans of days between commas; a span may pass Sunday.
fn days_of_week(text: &str) -> Option<u8> {
    if text.trim().eq_ignore_ascii_case("daily") {
        return Some(EVERY_DAY);
    }
    let mut days = 0;
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (day_number(first)?, day_number(last)?);
        let span = (last + 7 - first) % 7;
        (0..=span).for_each(|ahead| days |= 1 << ((first + ahead) % 7));
    }
    Some(days)
}

fn day_number(text: &str) -> Option<usize> {
    let text = text.trim();
    DAY_NAMES.iter().position(|name| text.eq_ignore_ascii_case(name))
}

fn day_name(day: u16) -> &'static str {
    DAY_NAMES.get(usize::from(day)).copied().unwrap_or_default()
}

fn minute_of_day(text: &str) -> Option<u16> {
    let (hours, minutes) = text.trim().split_once(':')?;
    let (hours, minutes): (u16, u16) = (hours.parse().ok()?, minutes.parse().ok()?);
    let minute = hours.checked_mul(60)?.checked_add(minutes)?;
    (minutes < 60 && minute <= DAY_MINUTES).then_some(minute)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MON: u8 = 0;
    const FRI: u8 = 4;
    const SAT: u8 = 5;
    const SUN: u8 = 6;

    fn at(day: u8, hours: u16, minutes: u16) -> WeekMinute {
        WeekMinute::new(day, hours * 60 + minutes)
    }

    #[test]
    fn a_window_may_pass_midnight() {
        let night: Window = "19:00-07:30".parse().unwrap();
        assert_eq!(night.to_string(), "19:00-07:30");
        for day in MON..=SUN {
            assert!(night.holds(at(day, 23, 0)) && night.holds(at(day, 0, 0)) && night.holds(at(day, 7, 29)));
            assert!(!night.holds(at(day, 7, 30)) && !night.holds(at(day, 12, 0)));
        }
        let day: Window = "00:00-24:00".parse().unwrap();
        assert!(day.holds(at(MON, 0, 0)) && day.holds(at(SUN, 23, 59)));
    }

    #[test]
    fn a_night_belongs_to_the_day_on_which_it_begins() {
        let nights: Window = "fri,sun 22:00-06:00".parse().unwrap();
        assert!(nights.holds(at(FRI, 22, 0)) && nights.holds(at(SAT, 5, 59)) && nights.holds(at(MON, 5, 59)));
        assert!(!nights.holds(at(FRI, 5, 0)) && !nights.holds(at(SAT, 22, 0)) && !nights.holds(at(SUN, 5, 0)));
    }

    #[test]
    fn days_are_written_in_many_ways_and_said_in_one() {
        for (written, said) in [
            ("Mon-Fri 8:00-18:00", "mon-fri 08:00-18:00"),
            ("daily 09:00-17:00", "09:00-17:00"),
            ("sat-mon 00:00-24:00", "mon,sat-sun 00:00-24:00"),
            ("sun, tue 01:00-02:00", "tue,sun 01:00-02:00"),
        ] {
            assert_eq!(written.parse::<Window>().unwrap().to_string(), said);
        }
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
            "weekdays 08:00-18:00",
            "mon- 08:00-18:00",
            ", 08:00-18:00",
        ] {
            assert_eq!(text.parse::<Window>(), Err(WindowError { text: text.to_string() }));
        }
    }

    #[test]
    fn the_next_change_is_the_windows_edge() {
        let work: Window = "mon-fri 08:00-18:00".parse().unwrap();
        let next = |day, hours| at(day, hours, 0).next_change(|minute| work.holds(minute));
        assert_eq!(next(MON, 9), Some(at(MON, 18, 0)));
        assert_eq!(next(FRI, 18), Some(at(MON, 8, 0)));
        assert_eq!(at(FRI, 18, 5).to_string(), "fri 18:05");
        assert_eq!(at(FRI, 18, 5).next_change(|_| 1), None);
    }

    proptest! {
        #[test]
        fn a_window_survives_its_text(days in 1u8..128, from in 0u16..1440, until in 0u16..=1440) {
            prop_assume!(from != until);
            let window = Window { days, from_minute: from, until_minute: until };
            prop_assert_eq!(window.to_string().parse(), Ok(window));
        }

        #[test]
        fn a_window_holds_as_many_minutes_as_its_days_and_times_say(days in 1u8..128, from in 0u16..1440, until in 0u16..=1440) {
            prop_assume!(from != until);
            let window = Window { days, from_minute: from, until_minute: until };
            let held = (0..WEEK_MINUTES).filter(|minute| window.holds(WeekMinute(*minute))).count();
            let each = if from < until { until - from } else { DAY_MINUTES - from + until };
            prop_assert_eq!(held, usize::from(each) * days.count_ones() as usize);
        }

        #[test]
        fn no_text_makes_it_panic(text in ".{0,40}") {
            let _ = text.parse::<Window>();
        }
    }
}
