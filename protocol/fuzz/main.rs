//! One program for all targets: its name says which one it runs.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

mod targets;

fuzz_target!(|bytes: &[u8]| {
    static TARGET: OnceLock<fn(&[u8])> = OnceLock::new();
    let target = TARGET.get_or_init(|| {
        let program = std::env::args().next().unwrap_or_default();
        let name = program.rsplit(['/', '\\']).next().unwrap_or_default();
        let known = targets::ALL.iter().find(|(known, _)| *known == name);
        known.expect("the program is named after a target").1
    });
    target(bytes);
});
