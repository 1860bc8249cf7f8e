//! A GGUF file in a memory map, and its metadata with errors that name the file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use super::architecture::{self, Architecture};
use super::{Gguf, GgufError};
use crate::quant::PackedBytes;
use crate::weights::{TensorSource, WeightsError, source};

/// A mapped GGUF file.
pub(in super::super) struct GgufFile {
    pub(super) path: PathBuf,
    pub(super) map: Arc<Mmap>,
    pub(super) header: Gguf,
}

impl GgufFile {
    pub(in super::super) fn open(path: &Path) -> Result<Self, WeightsError> {
        let map = source::map(path)?;
        let header = Gguf::parse(&map).map_err(at(path))?;
        Ok(Self {
            path: path.to_owned(),
            map,
            header,
        })
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>, WeightsError> {
        self.header.text(&self.map, key).map_err(at(&self.path))
    }

    pub(in super::super) fn texts(&self, key: &str) -> Result<Option<Vec<&str>>, WeightsError> {
        self.header.texts(&self.map, key).map_err(at(&self.path))
    }

    pub(super) fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, WeightsError> {
        self.header.numbers(&self.map, key).map_err(at(&self.path))
    }

    pub(super) fn whole(&self, key: &str) -> Result<Option<u64>, WeightsError> {
        self.header.whole(key).map_err(at(&self.path))
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, WeightsError> {
        self.header.number(key).map_err(at(&self.path))
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, WeightsError> {
        self.header.flag(key).map_err(at(&self.path))
    }

    pub(super) fn missing(&self, key: &str) -> WeightsError {
        self.wrong(GgufError::Missing { key: key.to_owned() })
    }

    pub(super) fn wrong(&self, source: GgufError) -> WeightsError {
        at(&self.path)(source)
    }

    pub(super) fn feature(&self, feature: impl Into<String>) -> WeightsError {
        WeightsError::Feature {
            path: self.path.clone(),
            feature: feature.into(),
        }
    }

    pub(super) fn missing_tensor(&self, tensor: &str) -> WeightsError {
        WeightsError::MissingTensor {
            path: self.path.clone(),
            tensor: tensor.to_owned(),
        }
    }

    /// A tensor by its ggml name, as it stands in the file.
    pub(super) fn tensor(&self, ggml: &str) -> Result<TensorSource, WeightsError> {
        let missing = || self.missing_tensor(ggml);
        let entry = self.header.tensors().get(ggml).ok_or_else(missing)?;
        let bytes = PackedBytes::mapped(Arc::clone(&self.map), entry.range.clone()).ok_or_else(missing)?;
        Ok(TensorSource {
            ty: entry.ty,
            shape: entry.shape.clone(),
            bytes,
        })
    }

    /// The architecture, if it is one that is read.
    pub(super) fn architecture(&self) -> Result<Architecture, WeightsError> {
        let name = self.text("general.architecture")?;
        let name = name.ok_or_else(|| self.missing("general.architecture"))?;
        architecture::named(name).ok_or_else(|| WeightsError::Architecture {
            path: self.path.clone(),
            architecture: name.chars().take(64).collect(),
        })
    }
}

/// For `map_err`: which file.
fn at(path: &Path) -> impl FnOnce(GgufError) -> WeightsError {
    let path = path.to_owned();
    move |source| WeightsError::Gguf { path, source }
}
