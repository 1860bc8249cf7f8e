//! When this node may work: a watcher looks at the machine every few seconds, and the protocol's policy decides.
//!
//! The owner's own work comes first. Whoever runs the worker follows the decision: told to yield, it stops the worker,
//! which gives all memory of the device back at once.

mod machine;
mod settings;

use std::sync::Arc;
use std::time::Duration;

use polder_protocol::policy::{Contribution, Facts, Policy, Verdict, Window, WindowError};
use polder_protocol::time::Instant;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use machine::Machine;
pub(crate) use machine::week_minute;
pub use settings::Contribute;

/// How often the machine is looked at. A person who starts a program waits no longer for the device than this.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// The policy that a configuration describes.
///
/// # Errors
///
/// [`WindowError`] for a text that is no time window.
pub fn policy(config: &Contribute) -> Result<Policy, WindowError> {
    let windows: Result<Vec<Window>, WindowError> = config.windows.iter().map(|text| text.parse()).collect();
    Ok(Policy {
        windows: windows?,
        load_percent_max: config.load_percent_max,
        yield_to_device_processes: config.yield_to_device_processes,
        ..Policy::default()
    })
}

/// The watcher, for the rest of the node. It stops with the last clone.
#[derive(Debug, Clone)]
pub struct ContributeHandle {
    paused: Arc<watch::Sender<bool>>,
    verdict: watch::Receiver<Verdict>,
    _stop: Arc<DropGuard>,
}

impl ContributeHandle {
    /// A person wants the machine back, until [`Self::resume`].
    pub fn pause(&self) {
        self.paused.send_replace(true);
    }

    /// The person is done.
    pub fn resume(&self) {
        self.paused.send_replace(false);
    }

    /// Whether a person has paused the node.
    pub fn is_paused(&self) -> bool {
        *self.paused.borrow()
    }

    /// Whether the node may work now.
    pub fn decision(&self) -> Verdict {
        *self.verdict.borrow()
    }

    /// Hears of every change of the decision.
    pub fn decisions(&self) -> watch::Receiver<Verdict> {
        self.verdict.clone()
    }
}

/// Starts to watch, on the present tokio runtime. The first decision is made before this returns.
pub fn start(policy: Policy, paused: bool) -> ContributeHandle {
    let mut machine = Machine::new(&policy);
    start_with(policy, paused, LOOK_EVERY, move || machine.look())
}

fn start_with(
    policy: Policy,
    paused: bool,
    every: Duration,
    look: impl FnMut() -> Facts + Send + 'static,
) -> ContributeHandle {
    let mut watcher = Watcher {
        contribution: Contribution::new(policy),
        since: std::time::Instant::now(),
        look,
    };
    let first = watcher.decide(paused);
    let (tell, verdict) = watch::channel(first);
    let (ask, mut asked) = watch::channel(paused);
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = stopped.cancelled() => return,
                () = tokio::time::sleep(every) => {}
                changed = asked.changed() => if changed.is_err() { return },
            }
            let paused = *asked.borrow_and_update();
            // Looking reads many small files, and a driver may be slow to answer.
            let looked = tokio::task::spawn_blocking(move || {
                let verdict = watcher.decide(paused);
                (watcher, verdict)
            });
            let Ok((back, verdict)) = looked.await else {
                // The runtime is shutting down.
                return;
            };
            watcher = back;
            tell.send_if_modified(|known| {
                let changed = *known != verdict;
                *known = verdict;
                changed
            });
        }
    });
    ContributeHandle {
        paused: Arc::new(ask),
        verdict,
        _stop: Arc::new(stop.drop_guard()),
    }
}

struct Watcher<L> {
    contribution: Contribution,
    since: std::time::Instant,
    look: L,
}

impl<L: FnMut() -> Facts> Watcher<L> {
    fn decide(&mut self, paused: bool) -> Verdict {
        let now = Instant(u64::try_from(self.since.elapsed().as_micros()).unwrap_or(u64::MAX));
        // A person does not wait until the machine has been looked at.
        let facts = if paused {
            Facts {
                paused,
                ..Facts::default()
            }
        } else {
            (self.look)()
        };
        self.contribution.step(now, &facts)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use polder_protocol::policy::Reason;
    use polder_protocol::time::Span;

    use super::*;

    const SOON: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn a_persons_word_holds_at_once_and_until_it_is_taken_back() {
        let handle = start_with(Policy::default(), false, Duration::from_secs(3600), Facts::default);
        assert_eq!(handle.decision(), Verdict::MayWork);
        let mut decisions = handle.decisions();
        handle.pause();
        decisions.changed().await.expect("told");
        assert_eq!(handle.decision(), Verdict::MustYield(Reason::Paused));
        assert!(handle.is_paused());
        handle.resume();
        decisions.changed().await.expect("told");
        assert_eq!(handle.decision(), Verdict::MayWork);
    }

    #[tokio::test]
    async fn a_node_that_was_paused_starts_paused() {
        let handle = start(Policy::default(), true);
        assert_eq!(handle.decision(), Verdict::MustYield(Reason::Paused));
    }

    #[tokio::test]
    async fn load_of_others_makes_it_yield_and_calm_lets_it_return() {
        let load = Arc::new(AtomicU32::new(90));
        let seen = load.clone();
        let policy = Policy {
            load_percent_max: 50,
            calm: Span::millis(50),
            ..Policy::default()
        };
        let look = move || Facts {
            load_percent: Some(seen.load(Ordering::Relaxed)),
            ..Facts::default()
        };
        let handle = start_with(policy, false, SOON, look);
        let loaded = Reason::Loaded {
            percent: 90,
            limit_percent: 50,
        };
        assert_eq!(handle.decision(), Verdict::MustYield(loaded));
        load.store(10, Ordering::Relaxed);
        let mut decisions = handle.decisions();
        let works = decisions.wait_for(|verdict| *verdict == Verdict::MayWork);
        let works = tokio::time::timeout(Duration::from_secs(10), works).await;
        works.expect("in time").expect("told");
    }

    #[tokio::test]
    async fn the_watcher_stops_with_its_last_handle() {
        let handle = start_with(Policy::default(), false, SOON, Facts::default);
        let mut decisions = handle.decisions();
        drop(handle);
        let ended = tokio::time::timeout(Duration::from_secs(10), decisions.changed()).await;
        assert!(ended.expect("in time").is_err());
    }

    #[test]
    fn a_configuration_with_a_window_that_is_none_is_refused_by_name() {
        let mut config = Contribute {
            windows: vec!["19:00-07:30".into()],
            ..Contribute::default()
        };
        assert_eq!(policy(&config).expect("a policy").windows.len(), 1);
        config.windows.push("noon".into());
        assert!(policy(&config).expect_err("refused").to_string().contains("noon"));
    }

    #[test]
    fn this_machine_can_be_looked_at() {
        let policy = Policy {
            load_percent_max: 50,
            ..Policy::default()
        };
        let mut machine = Machine::new(&policy);
        assert_eq!(machine.look().load_percent, None, "one look measures no time");
        std::thread::sleep(Duration::from_millis(300));
        let facts = machine.look();
        assert!(facts.load_percent.is_some_and(|percent| percent <= 100), "{facts:?}");
    }
}
