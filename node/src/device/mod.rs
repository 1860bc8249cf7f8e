//! The daemon's end of the worker: starts the process that owns the device, hands it orders, notices its death.
//!
//! Any number of orders may be under way; the worker answers them in order. A worker that dies by itself is started
//! again after a wait that doubles from a quarter of a second to half a minute; one that was killed stays down until
//! [`Device::start_again`]. Whatever a worker had loaded is gone with it: watch [`Device::life`]. A worker whose device
//! fails again and again is started on the CPU.

mod fallback;
mod launch;
mod line;

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use polder_protocol::work::frame::FrameError;
use polder_protocol::work::{Answer, Task};
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};

use fallback::Crashes;
pub use launch::{Launch, Launched, Process};
use line::Line;

/// The first wait before a worker that died is started again.
const BACKOFF_MIN: Duration = Duration::from_millis(250);
/// The longest: a driver that crashes at every start costs little, and one that was repaired is found soon.
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// A worker that lived so long starts again without the waits of earlier deaths.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);

/// A worker process. Clones speak to the same one; it ends when the last is dropped.
#[derive(Debug, Clone)]
pub struct Device {
    wanted: Arc<watch::Sender<Wanted>>,
    shared: Arc<Shared>,
}

/// Whether a worker is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Life {
    /// Yes. The number grows with each start; a new number means that everything loaded before is gone.
    Running(u64),
    /// No, for this reason.
    Down(String),
}

/// What a worker says of its device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Such as `cpu (AVX-512, 2 threads)`.
    pub name: String,
    /// Bytes of its memory, where known.
    pub memory_bytes: Option<u64>,
    /// Whether it is the CPU.
    pub is_cpu: bool,
    /// Why it is not the device that was asked for, where it is another.
    pub fell_back: Option<String>,
}

/// Why an order came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DeviceError {
    /// There is no worker.
    #[error("the worker is not running: {reason}")]
    NotRunning {
        /// Why not.
        reason: String,
    },
    /// The worker died before it answered.
    #[error("the worker died: {reason}")]
    Died {
        /// What is known of it.
        reason: String,
    },
    /// The worker answered that it could not. Nothing changed.
    #[error("{reason}")]
    Failed {
        /// What happened, to what.
        reason: String,
    },
    /// The worker answered something else than was asked.
    #[error("the worker answered {answer} to an order for something else")]
    Unexpected {
        /// The answer.
        answer: String,
    },
    /// The order is too large to send.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

impl DeviceError {
    /// An answer that does not belong to its order.
    pub fn unexpected(answer: &Answer) -> Self {
        let mut answer = format!("{answer:?}");
        answer.truncate(answer.floor_char_boundary(80));
        Self::Unexpected { answer }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Running,
    Down,
}

#[derive(Debug)]
struct Shared {
    line: Mutex<Option<Line>>,
    life: watch::Sender<Life>,
    /// Of the worker that runs, once it has told; its `fell_back` is the supervisor's where that gave the device up.
    description: Mutex<Option<Description>>,
}

impl Device {
    /// Starts the worker. Must be called within a tokio runtime.
    pub fn start(launch: impl Launch) -> Self {
        let (wanted, wanted_seen) = watch::channel(Wanted::Running);
        Self::supervised(launch, wanted, wanted_seen)
    }

    /// As [`Device::start`], but the worker stays down until [`Device::start_again`].
    pub fn start_down(launch: impl Launch) -> Self {
        let (wanted, wanted_seen) = watch::channel(Wanted::Down);
        Self::supervised(launch, wanted, wanted_seen)
    }

    fn supervised(launch: impl Launch, wanted: watch::Sender<Wanted>, seen: watch::Receiver<Wanted>) -> Self {
        let shared = Arc::new(Shared {
            line: Mutex::new(None),
            life: watch::Sender::new(Life::Down("it was not started".to_owned())),
            description: Mutex::new(None),
        });
        tokio::spawn(supervise(launch, Arc::clone(&shared), seen));
        let wanted = Arc::new(wanted);
        Self { wanted, shared }
    }

    /// Hands the worker an order and waits for its answer. An order that waits for the start of a worker is handed to
    /// it when it is there. Dropping the future takes the order back if it has not been sent, and forgets its answer
    /// otherwise.
    ///
    /// # Errors
    ///
    /// [`DeviceError`]: among others when the worker is down, dies meanwhile, or answers [`Answer::Failed`].
    pub async fn order(&self, task: Task, payload: Bytes) -> Result<(Answer, Bytes), DeviceError> {
        let line = match self.line() {
            Some(line) => line,
            None => self.line_soon().await?,
        };
        line.order(task, payload).await
    }

    /// Ends the worker and gives the device back at once; all orders under way fail.
    pub fn kill(&self) {
        self.wanted.send_replace(Wanted::Down);
    }

    /// Starts a worker that was killed. Does nothing when one runs.
    pub fn start_again(&self) {
        self.wanted.send_replace(Wanted::Running);
    }

    /// Whether a worker is there.
    pub fn is_running(&self) -> bool {
        matches!(*self.shared.life.borrow(), Life::Running(_))
    }

    /// Tells of every start and every death.
    pub fn life(&self) -> watch::Receiver<Life> {
        self.shared.life.subscribe()
    }

    /// What the worker says of its device; `None` until it has, and when there is none.
    pub fn description(&self) -> Option<Description> {
        self.shared.described().clone()
    }

    fn line(&self) -> Option<Line> {
        self.shared.line.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits one backoff's first step for a worker that is about to start.
    async fn line_soon(&self) -> Result<Line, DeviceError> {
        let mut life = self.life();
        if *self.wanted.borrow() == Wanted::Running {
            let started = life.wait_for(|life| matches!(life, Life::Running(_)));
            // A miss is reported below, with the reason for it.
            let _ = tokio::time::timeout(BACKOFF_MIN * 2, started).await;
        }
        self.line().ok_or_else(|| DeviceError::NotRunning {
            reason: match &*self.shared.life.borrow() {
                Life::Down(reason) => reason.clone(),
                Life::Running(_) => "it has just been started".to_owned(),
            },
        })
    }
}

impl Shared {
    fn described(&self) -> MutexGuard<'_, Option<Description>> {
        self.description.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps a worker alive while one is wanted, until all handles are gone.
async fn supervise(launch: impl Launch, shared: Arc<Shared>, mut wanted: watch::Receiver<Wanted>) {
    let mut launch: Box<dyn Launch> = Box::new(launch);
    let mut backoff = BACKOFF_MIN;
    let (mut crashes, mut given_up) = (Crashes::default(), None);
    for number in 1.. {
        if wanted.wait_for(|wanted| *wanted == Wanted::Running).await.is_err() {
            return;
        }
        let began = Instant::now();
        let reason = match launch.launch() {
            Ok(launched) => {
                info!(life = number, "worker started");
                live(launched, number, &shared, &mut wanted, given_up.as_deref()).await
            }
            Err(error) => format!("it could not be started: {error}"),
        };
        *shared.line.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let description = shared.described().take();
        shared.life.send_replace(Life::Down(reason.clone()));
        let down_is_wanted = wanted.has_changed().is_err() || *wanted.borrow_and_update() == Wanted::Down;
        if down_is_wanted {
            info!(life = number, "worker ended");
            continue;
        }
        if began.elapsed() >= HEALTHY_AFTER {
            backoff = BACKOFF_MIN;
        }
        if given_up.is_none()
            && let Some(on_cpu) = launch.on_cpu()
        {
            given_up = crashes.count(began.elapsed(), description.as_ref(), &reason);
            if let Some(told) = &given_up {
                warn!(life = number, "{told}");
                launch = on_cpu;
            }
        }
        warn!(life = number, reason, wait_millis = backoff.as_millis(), "worker died");
        // A kill during the wait is seen above.
        let _ = tokio::time::timeout(backoff, wanted.changed()).await;
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

/// One worker from start to end. Answers with why it ended.
async fn live(
    mut launched: Launched,
    number: u64,
    shared: &Shared,
    wanted: &mut watch::Receiver<Wanted>,
    given_up: Option<&str>,
) -> String {
    let (line, serving) = Line::over(launched.input, launched.output);
    *shared.line.lock().unwrap_or_else(PoisonError::into_inner) = Some(line.clone());
    shared.life.send_replace(Life::Running(number));
    let killed = async {
        // Either all handles are gone, or somebody wants the device back.
        let _ = wanted.wait_for(|wanted| *wanted == Wanted::Down).await;
    };
    let (mut reason, killed) = tokio::select! {
        reason = serving => (reason, false),
        () = killed => ("it was told to end".to_owned(), true),
        never = describe(&line, shared, given_up) => match never {},
    };
    if let Some(child) = &mut launched.child {
        // A worker that ended by itself has a status to show; one that hangs is ended.
        let patience = if killed {
            Duration::ZERO
        } else {
            Duration::from_millis(500)
        };
        match tokio::time::timeout(patience, child.wait()).await {
            Ok(Ok(status)) if !status.success() => reason = format!("it ended with {status}"),
            Ok(_) => {}
            Err(_) => {
                // An error here means that it is gone already.
                let _ = child.kill().await;
            }
        }
    }
    line.close(&reason);
    reason
}

/// Asks a worker for its device, and keeps the answer.
async fn describe(line: &Line, shared: &Shared, given_up: Option<&str>) -> Infallible {
    if let Ok((answer, _)) = line.order(Task::Hello, Bytes::new()).await
        && let Answer::Device {
            name,
            memory_bytes,
            is_cpu,
            fell_back,
        } = answer
    {
        info!(device = name, fell_back, "the worker computes");
        *shared.described() = Some(Description {
            name,
            memory_bytes,
            is_cpu,
            fell_back: given_up.map(str::to_owned).or(fell_back),
        });
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `cat` is a worker: the bytes of an order for [`Task::Hello`] read as the reply [`Answer::Done`].
    fn cat() -> Device {
        Device::start(shell("exec cat"))
    }

    fn shell(script: &str) -> Process {
        Process::new("sh").argument("-c").argument(script)
    }

    #[tokio::test]
    async fn many_orders_are_answered_with_their_own_payloads() {
        let device = cat();
        let orders = (0u8..100).map(|byte| device.order(Task::Hello, Bytes::from(vec![byte; 10_000])));
        let answers = futures::future::join_all(orders).await;
        for (byte, answer) in (0u8..).zip(answers) {
            assert_eq!(answer, Ok((Answer::Done, Bytes::from(vec![byte; 10_000]))));
        }
    }

    #[tokio::test]
    async fn waiting_orders_fail_when_the_worker_dies() {
        let device = Device::start(shell("read line; exit 3"));
        let error = device.order(Task::Hello, Bytes::from_static(b"\n")).await.unwrap_err();
        assert!(error.to_string().contains("exit status: 3"), "{error}");
    }

    #[tokio::test]
    async fn a_kill_fails_waiting_orders_and_a_start_again_serves_new_ones() {
        let device = cat();
        let mut life = device.life();
        assert!(device.order(Task::Hello, Bytes::new()).await.is_ok());
        device.kill();
        life.wait_for(|life| matches!(life, Life::Down(_))).await.unwrap();
        let error = device.order(Task::Hello, Bytes::new()).await.unwrap_err();
        assert_eq!(
            error,
            DeviceError::NotRunning {
                reason: "it was told to end".to_owned()
            }
        );
        device.start_again();
        assert!(device.order(Task::Hello, Bytes::new()).await.is_ok());
        assert!(device.is_running());
    }

    #[tokio::test]
    async fn an_order_under_way_fails_at_a_kill() {
        let device = Device::start(shell("exec sleep 1000"));
        let order = device.order(Task::Hello, Bytes::new());
        tokio::pin!(order);
        assert!(futures::poll!(&mut order).is_pending());
        device.life().wait_for(|life| *life == Life::Running(1)).await.unwrap();
        assert!(futures::poll!(&mut order).is_pending());
        device.kill();
        assert!(matches!(
            order.await,
            Err(DeviceError::Died { .. } | DeviceError::NotRunning { .. })
        ));
    }

    #[tokio::test]
    async fn a_worker_that_dies_is_started_again() {
        let device = Device::start(shell("exit 1"));
        let mut life = device.life();
        life.wait_for(|life| *life == Life::Running(2)).await.unwrap();
    }

    /// Dies at once, unless it is told to compute on the CPU.
    #[tokio::test]
    async fn a_worker_that_dies_twice_on_its_device_is_started_on_the_cpu() {
        let script = "[ \"$POLDER_WORKER_DEVICE\" = cpu ] || exit 74; exec cat";
        let device = Device::start(shell(script).device("wgpu"));
        let mut life = device.life();
        life.wait_for(|life| *life == Life::Running(3)).await.unwrap();
        let answer = device.order(Task::Hello, Bytes::from_static(b"served")).await;
        assert_eq!(answer, Ok((Answer::Done, Bytes::from_static(b"served"))));
    }

    #[tokio::test]
    async fn a_worker_says_what_it_computes_on() {
        let (input, orders) = tokio::io::duplex(1 << 16);
        let (mut replies, output) = tokio::io::duplex(1 << 16);
        let shared = Shared {
            line: Mutex::new(None),
            life: watch::Sender::new(Life::Running(1)),
            description: Mutex::new(None),
        };
        let (line, serving) = Line::over(input, output);
        let answer = Answer::Device {
            name: "cpu (2 threads)".to_owned(),
            memory_bytes: Some(5),
            is_cpu: true,
            fell_back: None,
        };
        let reply = polder_protocol::work::Reply { id: 1, answer };
        let start = polder_protocol::work::frame::frame_start(&reply, 0).unwrap();
        let told = async {
            tokio::io::AsyncWriteExt::write_all(&mut replies, &start).await.unwrap();
            while shared.described().is_none() {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            never = describe(&line, &shared, Some("the card failed")) => match never {},
            reason = serving => panic!("{reason}"),
            () = told => {}
        }
        drop(orders);
        let description = shared.described().clone().unwrap();
        assert_eq!(description.name, "cpu (2 threads)");
        assert_eq!(description.fell_back.as_deref(), Some("the card failed"));
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let device = Device::start(Process::new("/nowhere/polder"));
        let error = device.order(Task::Hello, Bytes::new()).await.unwrap_err();
        assert!(error.to_string().contains("/nowhere/polder"), "{error}");
    }

    #[tokio::test]
    async fn garbage_from_a_worker_ends_it() {
        let device = Device::start(shell("printf 'hello, this is no frame'; exec cat >/dev/null"));
        let error = device.order(Task::Hello, Bytes::new()).await.unwrap_err();
        assert!(error.to_string().contains("over the limit"), "{error}");
    }
}
