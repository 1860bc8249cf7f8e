//! Keeps the pipe of replies clean: what a library prints to standard output goes to standard error instead.

use std::fs::File;
use std::io;

/// Takes standard output for replies; from then on, whatever is printed goes to standard error.
#[cfg(unix)]
pub(crate) fn take_output() -> io::Result<File> {
    use std::os::fd::AsFd;

    let replies = io::stdout().as_fd().try_clone_to_owned()?;
    rustix::stdio::dup2_stdout(io::stderr())?;
    Ok(File::from(replies))
}

/// Takes standard output for replies.
#[cfg(windows)]
pub(crate) fn take_output() -> io::Result<File> {
    use std::os::windows::io::AsHandle;

    Ok(File::from(io::stdout().as_handle().try_clone_to_owned()?))
}
