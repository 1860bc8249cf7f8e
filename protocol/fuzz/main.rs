//! One program for all targets: its name says which one it runs.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

#[path = "choose.rs"]
mod choose;
mod targets;

fuzz_target!(|bytes: &[u8]| {
    static TARGET: OnceLock<choose::Target> = OnceLock::new();
    TARGET.get_or_init(|| choose::named_target(&targets::ALL))(bytes);
});
