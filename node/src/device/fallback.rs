//! When a device has failed too often, so that the CPU takes its place.

use std::time::Duration;

use super::Description;

/// Deaths in a row after which a device is given up: one may be chance, and each costs a loading of everything.
const CRASHES_MAX: u32 = 2;
/// A worker that lived so long did not die of a device that cannot compute.
const SOUND_AFTER: Duration = Duration::from_secs(600);

/// Counts the deaths of workers that were not told to end.
#[derive(Debug, Default)]
pub(super) struct Crashes {
    in_a_row: u32,
}

impl Crashes {
    /// Counts a death after `life` on the device that the worker described, if it came so far. Answers with what to tell
    /// people when it is time to compute on the CPU.
    pub(super) fn count(&mut self, life: Duration, device: Option<&Description>, reason: &str) -> Option<String> {
        if device.is_some_and(|device| device.is_cpu) {
            self.in_a_row = 0; // Not a device's doing.
            return None;
        }
        self.in_a_row = if life >= SOUND_AFTER { 1 } else { self.in_a_row + 1 };
        let device = device.map_or("a device that it could not describe", |device| &device.name);
        (self.in_a_row >= CRASHES_MAX).then(|| {
            format!(
                "the worker died {CRASHES_MAX} times in a row on {device}, at last because {reason}; it computes on the \
                 CPU until the node is started anew"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_secs(5);

    #[test]
    fn a_device_is_given_up_after_two_deaths_in_a_row() {
        let mut crashes = Crashes::default();
        assert_eq!(crashes.count(SHORT, Some(&gpu()), "it ended"), None);
        let told = crashes.count(SHORT, Some(&gpu()), "it ended").unwrap();
        assert!(told.contains("wgpu (a card)"), "{told}");
    }

    #[test]
    fn a_long_life_begins_a_new_row() {
        let mut crashes = Crashes::default();
        assert_eq!(crashes.count(SHORT, None, "it ended"), None);
        assert_eq!(crashes.count(SOUND_AFTER, None, "it ended"), None);
        assert!(crashes.count(SHORT, None, "it ended").is_some());
    }

    #[test]
    fn deaths_on_the_cpu_are_not_the_devices() {
        let mut crashes = Crashes::default();
        let cpu = Description { is_cpu: true, ..gpu() };
        for _ in 0..5 {
            assert_eq!(crashes.count(SHORT, Some(&cpu), "it ended"), None);
        }
    }

    fn gpu() -> Description {
        Description {
            name: "wgpu (a card)".to_owned(),
            memory_bytes: None,
            is_cpu: false,
            fell_back: None,
        }
    }
}
