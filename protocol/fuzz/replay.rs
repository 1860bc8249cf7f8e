//! Fuzz targets over their committed corpora, with the stable toolchain. The tests of all packages share this file.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::fs;
use std::path::Path;

/// A target and its name.
type Named<'a> = (&'a str, fn(&[u8]));

/// Gives each target all of its corpus, a folder of the target's name in `corpus`.
pub(crate) fn all(corpus: &Path, targets: &[Named<'_>]) {
    for (name, target) in targets {
        let mut inputs = 0;
        for entry in fs::read_dir(corpus.join(name)).unwrap_or_else(|error| panic!("corpus of {name}: {error}")) {
            let path = entry.unwrap().path();
            println!("{}", path.display());
            target(&fs::read(path).unwrap());
            inputs += 1;
        }
        assert!(inputs > 0, "{name} has no corpus");
    }
}

/// Holds what honest peers send, some inputs for each target, against the corpus. With `POLDER_WRITE_SEEDS=1` in the
/// environment it is written there first.
pub(crate) fn honest(corpus: &Path, targets: &[Named<'_>], honest: Vec<(&str, Vec<Vec<u8>>)>) {
    let names: Vec<&str> = honest.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, targets.iter().map(|(name, _)| *name).collect::<Vec<_>>());
    for (name, inputs) in honest {
        for (index, bytes) in inputs.into_iter().enumerate() {
            let path = corpus.join(name).join(format!("honest-{index}"));
            if std::env::var_os("POLDER_WRITE_SEEDS").is_some() {
                fs::create_dir_all(corpus.join(name)).unwrap();
                fs::write(&path, &bytes).unwrap();
            }
            let kept = fs::read(&path).unwrap_or_default();
            assert!(kept == bytes, "{} is not what is sent now", path.display());
        }
    }
}
