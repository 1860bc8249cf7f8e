//! Every reader of the node's own small headers and files survives its committed corpus, with the stable toolchain and in
//! every run of the tests. The same readers run under libFuzzer from `node/fuzz`.

use std::fs;
use std::path::{Path, PathBuf};

use polder_node::untrusted::{READERS, honest};

fn folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

#[test]
fn every_reader_survives_its_corpus() {
    for (name, reader) in READERS {
        let mut inputs = 0;
        for entry in fs::read_dir(folder(name)).unwrap_or_else(|error| panic!("corpus of {name}: {error}")) {
            let path = entry.unwrap().path();
            println!("{}", path.display());
            reader(&fs::read(path).unwrap());
            inputs += 1;
        }
        assert!(inputs > 0, "{name} has no corpus");
    }
}

/// A change of a format shows here: `POLDER_WRITE_SEEDS=1 cargo test -p polder-node --test corpus` writes new ones.
#[test]
fn what_honest_peers_send_is_in_the_corpus() {
    let names = |all: &mut dyn Iterator<Item = &'static str>| all.collect::<Vec<_>>();
    assert_eq!(
        names(&mut honest().iter().map(|(name, _)| *name)),
        names(&mut READERS.iter().map(|(name, _)| *name))
    );
    for (name, inputs) in honest() {
        for (index, bytes) in inputs.into_iter().enumerate() {
            let path = folder(name).join(format!("honest-{index}"));
            if std::env::var_os("POLDER_WRITE_SEEDS").is_some() {
                fs::create_dir_all(folder(name)).unwrap();
                fs::write(&path, &bytes).unwrap();
            }
            let kept = fs::read(&path).unwrap_or_default();
            assert!(kept == bytes, "{} is not what is sent now", path.display());
        }
    }
}
