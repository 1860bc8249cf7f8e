//! One program for all targets: its name says which one it runs.
#![no_main]

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook};
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

#[path = "../../protocol/fuzz/choose.rs"]
mod choose;
mod targets;

thread_local! {
    /// What was said of the latest panic.
    static LATEST: RefCell<String> = const { RefCell::new(String::new()) };
}

fuzz_target!(|bytes: &[u8]| {
    static TARGET: OnceLock<choose::Target> = OnceLock::new();
    let target = TARGET.get_or_init(|| {
        // libFuzzer's own hook ends the program at any panic, also at those of libraries that are contained where the
        // libraries are called. Only what reaches this place is a failure.
        set_hook(Box::new(|panic| LATEST.set(panic.to_string())));
        choose::named_target(&targets::ALL)
    });
    if catch_unwind(AssertUnwindSafe(|| target(bytes))).is_err() {
        eprintln!("{}", LATEST.take());
        std::process::abort();
    }
});
