//! Every fuzz target survives its committed corpus, with the stable toolchain and in every run of the tests. The same
//! targets run under libFuzzer from `kernels/fuzz`.

#[path = "../../protocol/fuzz/replay.rs"]
mod replay;
#[path = "../fuzz/targets/mod.rs"]
mod targets;

use std::fs;
use std::path::Path;

use polder_kernels::weights::{PartFile, import};

const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus");

#[test]
fn every_target_survives_its_corpus() {
    replay::all(Path::new(CORPUS), &targets::ALL);
}

/// What the other inputs are changed from.
#[test]
fn the_honest_model_is_imported() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = Path::new(CORPUS);
    let model = folder.path().join("model.gguf");
    fs::copy(corpus.join("import_gguf/honest-0"), &model).unwrap();
    let imported = import(&model, &folder.path().join("out"), &mut |_| {}).unwrap();
    assert_eq!(imported.part_files.len(), 3);
    for index in 0..6 {
        let path = corpus.join(format!("part_file/honest-{index}"));
        let tensors = PartFile::open(&path).unwrap();
        for name in tensors.names() {
            tensors.tensor(name).unwrap().to_f32().unwrap();
        }
    }
}
