//! Huge pages: good for a worker's weights, waste for a daemon.
//!
//! The allocator asks for pages of 2 MiB where the system gives them on request. A daemon holds some eight megabytes in
//! small pieces all over its heap, and each piece would take such a page: 56 MiB in place of 8.

/// Takes ordinary pages from here on; what this process starts inherits it.
pub(crate) fn take_small() {
    #[cfg(target_os = "linux")]
    set_small(true);
}

/// Takes huge pages again, whatever the parent does.
pub(crate) fn take_huge() {
    #[cfg(target_os = "linux")]
    set_small(false);
}

#[cfg(target_os = "linux")]
fn set_small(small: bool) {
    // An old kernel knows no such setting; then the daemon is larger and nothing else.
    if let Err(error) = rustix::thread::disable_transparent_huge_pages(small) {
        tracing::debug!(%error, "the size of pages stays as it is");
    }
}
