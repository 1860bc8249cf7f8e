//! Every family against PyTorch's numbers: what `polder model verify` does, for each case beside this file.
//!
//! `POLDER_GOLDEN` names another folder of cases, all of which are then verified too.

use std::path::{Path, PathBuf};

use polder_kernels::device::Device;
use polder_kernels::verify::verify;

macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                meets_pytorch(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(stringify!($name)));
            }
        )*
    };
}

cases!(
    llama_rope_llama3,
    llama_tied_sharded,
    mistral_sliding,
    ministral3_yarn,
    qwen2_bias,
    qwen3_qknorm,
    smollm3_nope,
    apertus_xielu,
    nemotron_dense,
    gemma3_text,
    mixtral_moe,
    qwen3_moe,
    deepseek_v2_lite,
    deepseek_v3,
    mistral4_mla,
    nemotron_h_moe,
    deepseek_v3_fp8,
    deepseek_v32_dsa,
);

#[test]
fn every_case_of_another_folder_meets_pytorch() {
    let Some(folder) = std::env::var_os("POLDER_GOLDEN").map(PathBuf::from) else {
        println!("skipped: POLDER_GOLDEN names no folder");
        return;
    };
    for entry in std::fs::read_dir(folder).unwrap() {
        let case = entry.unwrap().path();
        if case.join("cases.safetensors").exists() {
            meets_pytorch(&case);
        }
    }
}

#[test]
fn another_model_than_the_recorded_one_is_outside_the_tolerances() {
    let (folder, case) = copy("llama_rope_llama3");
    let text = std::fs::read_to_string(case.join("config.json")).unwrap();
    std::fs::write(
        case.join("config.json"),
        text.replace("\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": 1e-03"),
    )
    .unwrap();
    let report = verify(&case, &Device::cpu()).unwrap();
    let outside = |name: &str| {
        report
            .quantities
            .iter()
            .any(|quantity| quantity.name == name && !quantity.passed)
    };
    assert!(outside("config.v5.json") && outside("hidden.1") && outside("logits") && outside("gradient norms"));
    assert!(!outside("hidden.0") && !outside("stages forward") && !report.passed());
    drop(folder);
}

#[test]
fn cases_that_are_cut_or_missing_are_named() {
    let (folder, case) = copy("llama_rope_llama3");
    let cases = case.join("cases.safetensors");
    let bytes = std::fs::read(&cases).unwrap();
    std::fs::write(&cases, &bytes[..bytes.len() / 2]).unwrap();
    let error = verify(&case, &Device::cpu()).unwrap_err().to_string();
    assert!(error.contains("cases.safetensors"), "{error}");
    std::fs::remove_file(case.join("expected.json")).unwrap();
    let error = verify(&case, &Device::cpu()).unwrap_err().to_string();
    assert!(error.contains("expected.json"), "{error}");
    drop(folder);
}

/// A case that may be changed.
fn copy(name: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let case = folder.path().join(name);
    std::fs::create_dir(&case).unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    for entry in std::fs::read_dir(golden).unwrap() {
        let path = entry.unwrap().path();
        std::fs::write(case.join(path.file_name().unwrap()), std::fs::read(&path).unwrap()).unwrap();
    }
    (folder, case)
}

fn meets_pytorch(case: &Path) {
    if !case.exists() {
        println!("skipped: {} is not here", case.display());
        return;
    }
    let report = verify(case, &Device::cpu()).unwrap_or_else(|error| panic!("{}: {error:?}", case.display()));
    for quantity in &report.quantities {
        let mark = if quantity.passed { ' ' } else { '!' };
        println!(
            "{mark} {:45} {:9.2e} of {:8.1e} {}",
            quantity.name,
            quantity.largest,
            quantity.tolerance,
            quantity.measure.words()
        );
    }
    assert!(report.passed(), "{}", case.display());
}
