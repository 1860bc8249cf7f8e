//! One program for all targets: its name says which one it runs. What they do stands in `polder_node::untrusted`, since
//! the readers are private otherwise.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use polder_node::untrusted::READERS;

#[path = "../../protocol/fuzz/choose.rs"]
mod choose;

fuzz_target!(|bytes: &[u8]| {
    static TARGET: OnceLock<choose::Target> = OnceLock::new();
    TARGET.get_or_init(|| choose::named_target(&READERS))(bytes);
});
