//! Whoever asks this process to end: a person with Ctrl-C, the system, or a terminal that closes.

use std::io;

/// Waits until somebody asks this process to end.
///
/// # Errors
///
/// That the system does not tell of signals.
pub(crate) async fn asked_to_end() -> io::Result<()> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let (mut terminate, mut hang_up) = (signal(SignalKind::terminate())?, signal(SignalKind::hangup())?);
        tokio::select! {
            pressed = tokio::signal::ctrl_c() => pressed,
            _ = terminate.recv() => Ok(()),
            _ = hang_up.recv() => Ok(()),
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await
}

/// Does `work` on a thread of its own once somebody asks this process to end.
///
/// # Errors
///
/// That there is no thread to wait on.
pub(crate) fn when_asked_to_end(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().spawn(move || {
        if runtime.block_on(asked_to_end()).is_ok() {
            work();
        }
    })?;
    Ok(())
}
