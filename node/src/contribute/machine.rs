//! What the machine looks like: time of day, load of others, processes of others on the device.

use std::collections::{BTreeMap, BTreeSet};

use nvml_wrapper::Nvml;
use polder_protocol::policy::{Facts, Policy, WeekMinute};
use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};

/// Deeper descent than this is no family of ours: the daemon starts workers, and a worker starts nothing.
const DESCENT_MAX: usize = 8;

/// Looks at the machine, as far as the policy asks.
pub(super) struct Machine {
    // A system that does not tell of its processes is one without load.
    system: Option<System>,
    // No driver is a normal answer.
    devices: Option<Nvml>,
    asks_load: bool,
    looked: bool,
}

impl Machine {
    pub(super) fn new(policy: &Policy) -> Self {
        let devices = if policy.yield_to_device_processes {
            Nvml::init().ok()
        } else {
            None
        };
        Self {
            system: System::new().ok(),
            devices,
            asks_load: policy.load_percent_max > 0,
            looked: false,
        }
    }

    pub(super) fn look(&mut self) -> Facts {
        let mut facts = Facts {
            minute: week_minute(&jiff::Zoned::now()),
            ..Facts::default()
        };
        let Some(system) = self
            .system
            .as_mut()
            .filter(|_| self.asks_load || self.devices.is_some())
        else {
            return facts;
        };
        let what = ProcessRefreshKind::nothing().with_cpu().without_tasks();
        system.refresh_processes_specifics(ProcessesToUpdate::All, true, what);
        let ours = ours(system);
        if let Some(devices) = &self.devices {
            facts.foreign_device_processes = foreign_device_processes(devices, system, &ours);
        }
        if self.asks_load {
            system.refresh_cpu_usage();
            // Use is measured between two looks.
            let looked = std::mem::replace(&mut self.looked, true);
            facts.load_percent = load_of_others(system, &ours).filter(|_| looked);
        }
        facts
    }
}

/// Which minute of the week it is, where the clock is set so.
pub(crate) fn week_minute(now: &jiff::Zoned) -> WeekMinute {
    let minute = i32::from(now.hour()) * 60 + i32::from(now.minute());
    let day = now.weekday().to_monday_zero_offset();
    WeekMinute::new(u8::try_from(day).unwrap_or(0), u16::try_from(minute).unwrap_or(0))
}

/// This process and those that it started.
fn ours(system: &System) -> BTreeSet<Pid> {
    let own = Pid::from_u32(std::process::id());
    let processes = system.processes();
    let parents: BTreeMap<Pid, Pid> = processes
        .iter()
        .filter_map(|(pid, process)| Some((*pid, process.parent()?)))
        .collect();
    let is_ours = |pid: &Pid| {
        let line = std::iter::successors(Some(*pid), |pid| parents.get(pid).copied());
        line.take(DESCENT_MAX).any(|ancestor| ancestor == own)
    };
    processes.keys().copied().filter(is_ours).collect()
}

/// How much of all cores others use, in percent.
fn load_of_others(system: &System, ours: &BTreeSet<Pid>) -> Option<u32> {
    let cores = u16::try_from(system.cpus().len()).ok().filter(|cores| *cores > 0)?;
    // A process has 100 percent for each core that it fills.
    let by_us = ours.iter().filter_map(|pid| system.process(*pid));
    let by_us: f32 = by_us.map(|process| process.cpu_usage()).sum();
    let others = system.global_cpu_usage() - by_us / f32::from(cores);
    // A cast of a float saturates, and makes zero of what is no number.
    Some(others.clamp(0.0, 100.0).round() as u32)
}

/// Processes that compute on a device of this machine and are not ours. What only draws does not count: every desktop
/// does.
fn foreign_device_processes(devices: &Nvml, system: &System, ours: &BTreeSet<Pid>) -> u32 {
    let mut foreign = BTreeSet::new();
    for index in 0..devices.device_count().unwrap_or(0) {
        let processes = devices
            .device_by_index(index)
            .and_then(|device| device.running_compute_processes());
        // A device that does not tell is taken for free, like one without a driver.
        for process in processes.unwrap_or_default() {
            let pid = Pid::from_u32(process.pid);
            // Inside a container the driver names processes as the host does. One that we cannot see may be our own
            // worker, so we do not yield to it.
            if system.process(pid).is_some() && !ours.contains(&pid) {
                foreign.insert(pid);
            }
        }
    }
    u32::try_from(foreign.len()).unwrap_or(u32::MAX)
}
