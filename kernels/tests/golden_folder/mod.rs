//! A golden case as a folder that was published in one type.

use std::fs;
use std::path::{Path, PathBuf};

use polder_kernels::quant::{PackedType, narrow};
use polder_kernels::weights::{PartFile, PartWriter};
use serde_json::Value;

/// Where a golden case lies.
fn source(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case)
}

/// Its `config.json`.
pub(crate) fn config(case: &str) -> Value {
    serde_json::from_slice(&fs::read(source(case).join("config.json")).unwrap()).unwrap()
}

/// Writes its tensors in `ty`, each under all `names` that its own name becomes, with this configuration and tokenizer.
pub(crate) fn write(
    case: &str,
    ty: PackedType,
    config: &Value,
    tokenizer: &[u8],
    names: impl Fn(&str) -> Vec<String>,
    folder: &Path,
) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fs::write(folder.join("tokenizer.json"), tokenizer).unwrap();
    let mut writer = PartWriter::new();
    writer.note("format", "pt");
    for entry in fs::read_dir(source(case)).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if !name.starts_with("model") || !name.ends_with(".safetensors") {
            continue;
        }
        let file = PartFile::open(&path).unwrap();
        for name in file.names() {
            let tensor = file.tensor(name).unwrap();
            let bytes = narrow(ty, &tensor.to_f32().unwrap()).unwrap();
            for name in names(name) {
                writer.tensor(&name, ty, &tensor.shape, bytes.clone());
            }
        }
    }
    writer.write(&folder.join("model.safetensors")).unwrap();
}
