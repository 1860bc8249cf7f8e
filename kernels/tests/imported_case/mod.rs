//! A golden model that was imported into part files, of every family.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::path::{Path, PathBuf};

use polder_kernels::device::Device;
use polder_kernels::model::Config;
use polder_kernels::stage::{Output, ServeStage, StageError};
use polder_kernels::weights::{ImportedModel, import};
use polder_protocol::layout::BlockRange;
use polder_protocol::work::Weights;

/// One of each kind.
pub(crate) const CASES: [&str; 18] = [
    "llama_rope_llama3",
    "llama_tied_sharded",
    "mistral_sliding",
    "ministral3_yarn",
    "qwen2_bias",
    "qwen3_qknorm",
    "smollm3_nope",
    "apertus_xielu",
    "nemotron_dense",
    "gemma3_text",
    "mixtral_moe",
    "qwen3_moe",
    "deepseek_v2_lite",
    "deepseek_v3",
    "mistral4_mla",
    "nemotron_h_moe",
    "deepseek_v3_fp8",
    "deepseek_v32_dsa",
];

pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) config: Config,
    pub(crate) model: ImportedModel,
    pub(crate) folder: tempfile::TempDir,
}

impl Case {
    pub(crate) fn import(name: &'static str) -> Self {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("source");
        std::fs::create_dir(&source).unwrap();
        for entry in std::fs::read_dir(golden).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            let file = path.file_name().unwrap();
            if file.to_str().unwrap().starts_with("model") || file == "config.json" {
                std::fs::copy(&path, source.join(file)).unwrap();
            }
        }
        std::fs::write(source.join("tokenizer.json"), polder_kernels::text::bytes()).unwrap();
        let model = import(&source, &folder.path().join("imported"), &mut |_| {});
        let model = model.unwrap_or_else(|error| panic!("{name}: {error:?}"));
        Self {
            name,
            config: Config::from_json(&model.config_json).unwrap(),
            model,
            folder,
        }
    }

    pub(crate) fn tokens(&self, count: u32) -> Vec<u32> {
        (0..count)
            .map(|i| (i * 37 + 5) % self.config.vocabulary as u32)
            .collect()
    }

    /// The whole model, with a session of 256 positions.
    pub(crate) fn stage(&self, weights: Weights) -> ServeStage {
        let range = BlockRange::whole(self.config.blocks);
        let stage = ServeStage::load(
            &self.model.config_json,
            range,
            &self.model.part_files,
            weights,
            &Device::cpu(),
        );
        let mut stage = stage.unwrap_or_else(|error| panic!("{}: {error}", self.name));
        stage.open_session(1, 256).unwrap();
        stage
    }
}

pub(crate) fn logits(output: Result<Output, StageError>) -> Vec<f32> {
    match output.unwrap() {
        Output::Logits(logits) => logits,
        Output::Hidden(_) => panic!("a whole model gives logits"),
    }
}
