//! What a model's files say of it, without converting them.

use std::collections::BTreeMap;
use std::path::Path;

use super::gguf::GgufFile;
use super::{PartFile, WeightsError, import};
use crate::model::Config;

/// A model in figures.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// What its files call it.
    pub name: String,
    /// The family, such as `llama`.
    pub architecture: String,
    /// Elements of all tensors.
    pub parameters: u64,
    /// Tensors and bytes by type of element.
    pub types: BTreeMap<String, TypeTotal>,
    /// Blocks.
    pub blocks: u32,
    /// Width of activations.
    pub hidden: usize,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// The longest context in tokens.
    pub context_tokens_max: u32,
    /// Languages that its files name; empty where they name none.
    pub languages: Vec<String>,
}

/// The tensors of one type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TypeTotal {
    /// How many.
    pub tensors: u64,
    /// Their bytes in the file.
    pub bytes: u64,
}

/// Describes the model at `path`: a Hugging Face folder or a GGUF file.
///
/// # Errors
///
/// [`WeightsError`], as of [`import()`](super::import()).
pub fn inspect(path: &Path) -> Result<Summary, WeightsError> {
    let source = import::open(path)?;
    let config = Config::from_json(&source.config_json).map_err(|error| WeightsError::Config {
        path: source.config_path.clone(),
        source: error,
    })?;
    let mut types = BTreeMap::<String, TypeTotal>::new();
    let mut parameters = 0u64;
    for name in source.tensors.names() {
        let tensor = source.tensors.tensor(&name)?;
        let total = types.entry(tensor.ty.name().to_owned()).or_default();
        total.tensors += 1;
        total.bytes += tensor.bytes.len() as u64;
        parameters += tensor.shape.iter().map(|size| *size as u64).product::<u64>();
    }
    let languages = match path.is_file() {
        true => GgufFile::open(path)?
            .texts("general.languages")?
            .unwrap_or_default()
            .iter()
            .map(|text| (*text).to_owned())
            .collect(),
        false => Vec::new(),
    };
    Ok(Summary {
        name: source.name,
        architecture: config.family.to_owned(),
        parameters,
        types,
        blocks: config.blocks,
        hidden: config.hidden,
        vocabulary: config.vocabulary,
        context_tokens_max: config.context_tokens_max,
        languages,
    })
}

impl Summary {
    /// The figures of part files that are already imported.
    ///
    /// # Errors
    ///
    /// [`WeightsError`] of a file that cannot be read, or of a configuration that is not accepted.
    pub fn of_parts(name: &str, config_json: &str, files: &[PartFile]) -> Result<Self, WeightsError> {
        let path = files.first().map(|file| file.path().to_owned()).unwrap_or_default();
        let config = Config::from_json(config_json).map_err(|source| WeightsError::Config { path, source })?;
        let mut types = BTreeMap::<String, TypeTotal>::new();
        let mut parameters = 0u64;
        for file in files {
            for tensor_name in file.names() {
                let tensor = file.tensor(tensor_name)?;
                let total = types.entry(tensor.ty.name().to_owned()).or_default();
                total.tensors += 1;
                total.bytes += tensor.bytes.len() as u64;
                if !(config.tied && tensor_name == super::part_file::OUTPUT) {
                    parameters += tensor.shape.iter().map(|size| *size as u64).product::<u64>();
                }
            }
        }
        Ok(Self {
            name: name.to_owned(),
            architecture: config.family.to_owned(),
            parameters,
            types,
            blocks: config.blocks,
            hidden: config.hidden,
            vocabulary: config.vocabulary,
            context_tokens_max: config.context_tokens_max,
            languages: Vec::new(),
        })
    }
}
