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
fn the_honest_models_are_imported() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = Path::new(CORPUS);
    let model = folder.path().join("model.gguf");
    fs::copy(corpus.join("import_gguf/honest-0"), &model).unwrap();
    let imported = import(&model, &folder.path().join("out"), &mut |_| {}).unwrap();
    assert_eq!(imported.part_files.len(), 3);
    for (name, parts) in [("mixture", 3), ("latent", 3), ("hybrid", 5)] {
        fs::copy(corpus.join(format!("import_gguf/honest-{name}")), &model).unwrap();
        let imported = import(&model, &folder.path().join(name), &mut |_| {});
        let imported = imported.unwrap_or_else(|error| panic!("{name}: {error:?}"));
        assert_eq!(imported.part_files.len(), parts, "{name}");
    }
    for index in 0..6 {
        let path = corpus.join(format!("part_file/honest-{index}"));
        let tensors = PartFile::open(&path).unwrap();
        for name in tensors.names() {
            tensors.tensor(name).unwrap().to_f32().unwrap();
        }
    }
}

/// A fuzzer for every run of the tests: metadata of stacks, latents and Mamba with a few bytes changed.
#[test]
fn models_with_a_few_bytes_changed_are_imported_or_refused() {
    let import_gguf = targets::ALL.iter().find(|(name, _)| *name == "import_gguf").unwrap().1;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: usize| {
        // Xorshift: any spread will do.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as usize % below
    };
    for name in ["mixture", "latent", "hybrid"] {
        let honest = fs::read(Path::new(CORPUS).join(format!("import_gguf/honest-{name}"))).unwrap();
        // The header alone: what weights hold is nobody's concern.
        let header = honest.len().min(3_600);
        for _ in 0..CHANGED {
            let mut bytes = honest.clone();
            for _ in 0..=random(3) {
                let at = random(header);
                bytes[at] = match random(4) {
                    0 => 0,
                    1 => 0xff,
                    2 => bytes[at].wrapping_add(1),
                    _ => random(256) as u8,
                };
            }
            import_gguf(&bytes);
        }
    }
}

/// A few seconds' worth.
const CHANGED: usize = 400;
