//! Whoever asks this process to end: a person with Ctrl-C, the system, or a terminal that closes.

use std::io;

/// Tells when somebody asks this process to end. From its making on, such a wish no longer ends it by itself.
pub(crate) struct Wishes {
    #[cfg(unix)]
    signals: [tokio::signal::unix::Signal; 3],
}

impl Wishes {
    /// Within a runtime.
    ///
    /// # Errors
    ///
    /// That the system does not tell of signals.
    pub(crate) fn new() -> io::Result<Self> {
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            Ok(Self {
                signals: [
                    signal(SignalKind::interrupt())?,
                    signal(SignalKind::terminate())?,
                    signal(SignalKind::hangup())?,
                ],
            })
        }
        #[cfg(not(unix))]
        Ok(Self {})
    }

    /// Waits for one.
    ///
    /// # Errors
    ///
    /// That the system does not tell of signals.
    pub(crate) async fn next(&mut self) -> io::Result<()> {
        #[cfg(unix)]
        {
            let [interrupt, terminate, hang_up] = &mut self.signals;
            tokio::select! {
                _ = interrupt.recv() => Ok(()),
                _ = terminate.recv() => Ok(()),
                _ = hang_up.recv() => Ok(()),
            }
        }
        #[cfg(not(unix))]
        tokio::signal::ctrl_c().await
    }
}

/// Does `work` on a thread of its own once somebody asks this process to end.
///
/// # Errors
///
/// That the system does not tell of signals, or that there is no thread to wait on.
pub(crate) fn when_asked_to_end(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Before the thread has begun, so that nothing which is made after this call is left behind.
    let mut wishes = {
        let _within = runtime.enter();
        Wishes::new()?
    };
    std::thread::Builder::new().spawn(move || {
        if runtime.block_on(wishes.next()).is_ok() {
            work();
        }
    })?;
    Ok(())
}
