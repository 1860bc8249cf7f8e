//! A golden case: a tiny model, and what PyTorch computes with it.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use polder_kernels::model::{Config, layout};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

pub(crate) struct Golden {
    pub(crate) config_json: String,
    pub(crate) config: Config,
    pub(crate) expected: Value,
    pub(crate) part_files: Vec<PathBuf>,
    /// By Hugging Face name, widened.
    pub(crate) weights: BTreeMap<String, Vec<f32>>,
    cases: BTreeMap<String, Vec<f32>>,
    pub(crate) tokens: Vec<Vec<u32>>,
    _folder: tempfile::TempDir,
}

impl Golden {
    pub(crate) fn open(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let config_json = std::fs::read_to_string(folder.join("config.json")).unwrap();
        let config = Config::from_json(&config_json).unwrap();
        let expected = serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
        let mut shards: Vec<Vec<u8>> = Vec::new();
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let file = path.file_name().unwrap().to_str().unwrap();
            if file.starts_with("model") && file.ends_with(".safetensors") {
                shards.push(std::fs::read(&path).unwrap());
            }
        }
        let out = tempfile::tempdir().unwrap();
        let shards: Vec<SafeTensors<'_>> = shards
            .iter()
            .map(|bytes| SafeTensors::deserialize(bytes).unwrap())
            .collect();
        let find = |name: &str| shards.iter().find_map(|shard| shard.tensor(name).ok()).unwrap();
        let mut weights = BTreeMap::new();
        let mut part_files = Vec::new();
        for (index, part) in layout(&config).parts.iter().enumerate() {
            let views: Vec<(&str, TensorView<'_>)> = part
                .tensors
                .iter()
                .map(|tensor| (tensor.name.as_str(), find(&tensor.name)))
                .collect();
            weights.extend(views.iter().map(|(name, view)| ((*name).to_owned(), widen(view))));
            let file = out.path().join(format!("part-{index}.safetensors"));
            safetensors::serialize_to_file(views, None, &file).unwrap();
            part_files.push(file);
        }
        let bytes = std::fs::read(folder.join("cases.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let ids = tensors.tensor("input_ids").unwrap();
        let row = ids.shape()[1];
        let ids: Vec<u32> = ids
            .data()
            .chunks_exact(8)
            .map(|bytes| u32::try_from(i64::from_le_bytes(bytes.try_into().unwrap())).unwrap())
            .collect();
        let cases = tensors
            .tensors()
            .into_iter()
            .filter(|(_, view)| view.dtype() == Dtype::F32);
        Self {
            cases: cases.map(|(name, view)| (name, widen(&view))).collect(),
            tokens: ids.chunks_exact(row).map(<[u32]>::to_vec).collect(),
            config_json,
            config,
            expected,
            part_files,
            weights,
            _folder: out,
        }
    }

    /// A recorded tensor.
    pub(crate) fn case(&self, name: &str) -> &[f32] {
        &self.cases[name]
    }

    /// A recorded tensor's rows of one sequence.
    pub(crate) fn case_of(&self, name: &str, sequence: usize) -> &[f32] {
        let all = self.case(name);
        let one = all.len() / self.tokens.len();
        &all[sequence * one..][..one]
    }

    pub(crate) fn tolerance(&self, name: &str) -> f32 {
        self.expected["tolerance"][name].as_f64().unwrap() as f32
    }

    pub(crate) fn greedy(&self, sequence: usize) -> Vec<u32> {
        let ids = self.expected["greedy"]["ids"][sequence].as_array().unwrap();
        ids.iter().map(|id| id.as_u64().unwrap() as u32).collect()
    }

    /// Parameters per part as state blobs hold them.
    pub(crate) fn parameters(&self) -> Vec<Vec<f32>> {
        let parts = layout(&self.config).parts;
        parts
            .iter()
            .map(|part| {
                part.tensors
                    .iter()
                    .flat_map(|tensor| self.weights[&tensor.name].clone())
                    .collect()
            })
            .collect()
    }
}

pub(crate) fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

pub(crate) fn largest(values: &[f32]) -> f32 {
    values.iter().map(|value| value.abs()).fold(0.0, f32::max)
}

fn widen(view: &TensorView<'_>) -> Vec<f32> {
    match view.dtype() {
        Dtype::F32 => view
            .data()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect(),
        Dtype::BF16 => view
            .data()
            .chunks_exact(2)
            .map(|b| half::bf16::from_le_bytes(b.try_into().unwrap()).to_f32())
            .collect(),
        other => panic!("{other:?}"),
    }
}
