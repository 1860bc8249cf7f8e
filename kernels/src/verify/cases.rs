//! Reading what PyTorch computed.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

use super::VerifyError;
use crate::model::Config;

/// No case is near this; real models' cases would still fit.
const FILE_BYTES_MAX: u64 = 4 << 30;
/// Tokens of a case at most: it is computed many times over.
const TOKENS_MAX: usize = 1 << 16;

/// Inputs and right answers.
#[derive(Debug)]
pub(super) struct Cases {
    pub(super) name: String,
    /// Rows of equal length, at least two tokens each, all below the vocabulary.
    pub(super) tokens: Vec<Vec<u32>>,
    tensors: BTreeMap<String, Vec<f32>>,
    pub(super) expected: Value,
}

impl Cases {
    pub(super) fn read(folder: &Path, config: &Config) -> Result<Self, VerifyError> {
        let expected_path = folder.join("expected.json");
        let expected: Value =
            serde_json::from_str(&text(&expected_path)?).map_err(|error| wrong(&expected_path, error.to_string()))?;
        let path = folder.join("cases.safetensors");
        check_size(&path)?;
        let bytes = fs::read(&path).map_err(|error| wrong(&path, error.to_string()))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|error| wrong(&path, error.to_string()))?;
        let ids = file
            .tensor("input_ids")
            .map_err(|error| wrong(&path, error.to_string()))?;
        let tokens = rows(&ids, config.vocabulary).ok_or_else(|| {
            let reason = "input_ids are not whole numbers [batch, seq] below the vocabulary";
            wrong(&path, reason.to_owned())
        })?;
        let tensors = file
            .tensors()
            .into_iter()
            .filter(|(_, view)| view.dtype() == Dtype::F32);
        Ok(Self {
            name: expected.get("case").and_then(Value::as_str).unwrap_or("").to_owned(),
            tokens,
            tensors: tensors.map(|(name, view)| (name, numbers(view.data()))).collect(),
            expected,
        })
    }

    /// A recorded tensor.
    pub(super) fn tensor(&self, name: &str) -> Option<&[f32]> {
        self.tensors.get(name).map(Vec::as_slice)
    }

    /// The names of recorded tensors.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A number of `expected.json`.
    pub(super) fn number(&self, key: &str) -> Option<f64> {
        self.expected.get(key)?.as_f64()
    }

    /// A tolerance, `otherwise` where none is given.
    pub(super) fn tolerance(&self, key: &str, otherwise: f64) -> f64 {
        let given = self
            .expected
            .get("tolerance")
            .and_then(|tolerance| tolerance.get(key)?.as_f64());
        given.unwrap_or(otherwise)
    }

    /// The tokens that follow row `row` greedily.
    pub(super) fn greedy(&self, row: usize) -> Vec<u32> {
        let ids = self
            .expected
            .get("greedy")
            .and_then(|greedy| greedy.get("ids")?.get(row)?.as_array());
        let ids = ids.map(Vec::as_slice).unwrap_or_default();
        ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect()
    }
}

/// A text file of bounded size.
pub(super) fn text(path: &Path) -> Result<String, VerifyError> {
    check_size(path)?;
    fs::read_to_string(path).map_err(|error| wrong(path, error.to_string()))
}

pub(super) fn wrong(path: &Path, reason: String) -> VerifyError {
    VerifyError::Cases {
        file: path.display().to_string(),
        reason,
    }
}

fn check_size(path: &Path) -> Result<(), VerifyError> {
    let found = fs::metadata(path)
        .map_err(|error| wrong(path, error.to_string()))?
        .len();
    match found <= FILE_BYTES_MAX {
        true => Ok(()),
        false => Err(wrong(
            path,
            format!("{found} bytes is over the limit of {FILE_BYTES_MAX}"),
        )),
    }
}

fn rows(ids: &TensorView<'_>, vocabulary: usize) -> Option<Vec<Vec<u32>>> {
    let [_, seq] = *ids.shape() else { return None };
    if ids.dtype() != Dtype::I64 || seq < 2 {
        return None;
    }
    let one = |bytes: &[u8; 8]| {
        let id = u32::try_from(i64::from_le_bytes(*bytes)).ok()?;
        ((id as usize) < vocabulary).then_some(id)
    };
    let ids = ids.data().as_chunks().0.iter().map(one).collect::<Option<Vec<u32>>>()?;
    let fits = !ids.is_empty() && ids.len() <= TOKENS_MAX;
    fits.then(|| ids.chunks_exact(seq).map(<[u32]>::to_vec).collect())
}

fn numbers(bytes: &[u8]) -> Vec<f32> {
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect()
}
