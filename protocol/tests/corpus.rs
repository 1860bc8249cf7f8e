//! Every fuzz target survives its committed corpus, with the stable toolchain and in every run of the tests. The same
//! targets run under libFuzzer from `protocol/fuzz`.

#[path = "../fuzz/replay.rs"]
mod replay;
#[path = "../fuzz/seeds.rs"]
mod seeds;
#[path = "../fuzz/targets/mod.rs"]
mod targets;

use std::path::Path;

const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus");

#[test]
fn every_target_survives_its_corpus() {
    replay::all(Path::new(CORPUS), &targets::ALL);
}

/// A change of a format shows here: `POLDER_WRITE_SEEDS=1 cargo test -p polder-protocol --test corpus` writes new ones.
#[test]
fn what_honest_peers_send_is_in_the_corpus() {
    replay::honest(Path::new(CORPUS), &targets::ALL, seeds::all());
}
