//! Every reader of the node's own small headers and files survives its committed corpus, with the stable toolchain and in
//! every run of the tests. The same readers run under libFuzzer from `node/fuzz`.

#[path = "../../protocol/fuzz/replay.rs"]
mod replay;

use std::path::Path;

use polder_node::untrusted::{READERS, honest};

const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus");

#[test]
fn every_reader_survives_its_corpus() {
    replay::all(Path::new(CORPUS), &READERS);
}

/// A change of a format shows here: `POLDER_WRITE_SEEDS=1 cargo test -p polder-node --test corpus` writes new ones.
#[test]
fn what_honest_peers_send_is_in_the_corpus() {
    replay::honest(Path::new(CORPUS), &READERS, honest());
}
