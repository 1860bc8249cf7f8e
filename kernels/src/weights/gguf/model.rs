//! A model in a GGUF file, as its Hugging Face folder would have it: configuration, names, shapes and order of rows.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use polder_protocol::layout::Layout;

use super::GgufFile;
use super::architecture::Architecture;
use super::places::{Form, Place, Places, Up};
use super::rope::DIVISORS;
use super::tokenizer::{self, GgufTokenizer};
use super::{config, rows};
use crate::model::{Config, layout};
use crate::quant::{PackedBytes, PackedType};
use crate::weights::import::{ModelSource, Tensors};
use crate::weights::{TensorSource, WeightsError};

/// Opens a GGUF file as a model.
pub(in super::super) fn open(path: &Path) -> Result<ModelSource, WeightsError> {
    let file = GgufFile::open(path)?;
    let json = config::read(&file)?;
    let config_json = serde_json::to_string_pretty(&json).unwrap_or_default();
    let config = Config::from_json(&config_json).map_err(|source| WeightsError::Config {
        path: path.to_owned(),
        source,
    })?;
    let tensors = GgufTensors {
        architecture: file.architecture()?,
        layout: layout(&config),
        config,
        file,
    };
    tensors.all_known()?;
    let GgufTokenizer {
        json,
        chat_template,
        end_tokens,
        begin_token,
    } = tokenizer::build(&tensors.file)?;
    Ok(ModelSource {
        name: model_name(path),
        config_path: path.to_owned(),
        config_json,
        tokenizer_json: json,
        chat_template,
        end_tokens,
        begin_token,
        tensors: Box::new(tensors),
    })
}

struct GgufTensors {
    file: GgufFile,
    architecture: Architecture,
    config: Config,
    layout: Layout,
}

impl Tensors for GgufTensors {
    fn names(&self) -> Vec<String> {
        self.of_the_model().map(str::to_owned).collect()
    }

    fn tensor(&self, name: &str) -> Result<TensorSource, WeightsError> {
        let place = self.places().of(name);
        let place = place.ok_or_else(|| self.file.missing_tensor(name))?;
        self.read(name, &place)
    }

    fn place(&self) -> &Path {
        &self.file.path
    }
}

impl GgufTensors {
    const fn places(&self) -> Places<'_> {
        Places {
            architecture: self.architecture,
            config: &self.config,
        }
    }

    fn of_the_model(&self) -> impl Iterator<Item = &str> {
        let tensors = self.layout.parts.iter().flat_map(|part| &part.tensors);
        tensors.map(|tensor| tensor.name.as_str())
    }

    /// Refuses a tensor that is none of this model's.
    fn all_known(&self) -> Result<(), WeightsError> {
        let mut known = BTreeSet::new();
        for place in self.of_the_model().filter_map(|name| self.places().of(name)) {
            if let Form::Latent(_) = place.form {
                known.extend([place.of_values(), place.of_both()]);
            }
            known.insert(place.ggml);
        }
        if self.architecture.divisors {
            known.insert(DIVISORS.to_owned()); // In the configuration.
        }
        let blocks = self.config.blocks;
        // Blocks behind the last predict further tokens, which nothing here drafts with yet.
        let further = |name: &str| {
            let block = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
            block.is_some_and(|(block, _)| block.parse::<u32>().is_ok_and(|block| block >= blocks))
        };
        match self
            .file
            .header
            .tensors()
            .keys()
            .find(|name| !known.contains(*name) && !further(name))
        {
            None => Ok(()),
            Some(name) => Err(WeightsError::UnknownTensor {
                path: self.file.path.clone(),
                tensor: name.clone(),
            }),
        }
    }

    fn read(&self, name: &str, place: &Place) -> Result<TensorSource, WeightsError> {
        match &place.form {
            Form::Same => self.found(name, &place.ggml),
            Form::Interleaved { heads } => {
                let found = self.found(name, &place.ggml)?;
                let rows = found.shape.first().copied().unwrap_or(0);
                let bytes = rows::halves_apart(&found.bytes, rows, *heads);
                let bytes = bytes.ok_or_else(|| self.shape(&place.ggml, &[*heads, 2], &found.shape))?;
                Ok(TensorSource {
                    bytes: bytes.into(),
                    ..found
                })
            }
            Form::Whole => {
                let found = self.found(name, &place.ggml)?;
                let gains = self.numbers(&place.ggml, &found)?;
                Ok(of_numbers(gains.map(|gain| gain - 1.0), found.shape))
            }
            Form::Expert { index, experts } => self.expert(name, place, *index, *experts),
            Form::Latent(up) => self.way_up(name, place, *up),
            Form::Decay { heads } => {
                let found = self.found(name, &place.ggml)?;
                let shape = vec![*heads];
                if found.shape.iter().product::<usize>() != *heads {
                    return Err(self.shape(&place.ggml, &[*heads, 1], &found.shape));
                }
                let rates: Vec<f32> = self.numbers(&place.ggml, &found)?.collect();
                if rates.iter().any(|rate| !(rate.is_finite() && *rate < 0.0)) {
                    return Err(self
                        .file
                        .feature(format!("`{}` with rates that do not decay", place.ggml)));
                }
                Ok(of_numbers(rates.iter().map(|rate| f64::from(-rate).ln() as f32), shape))
            }
            Form::Reshaped { folder, ggml } => {
                let found = self.found(name, &place.ggml)?;
                if found.shape != *ggml && found.shape != *folder {
                    return Err(self.shape(&place.ggml, ggml, &found.shape));
                }
                let numbers = self.numbers(&place.ggml, &found)?;
                Ok(of_numbers(numbers, folder.clone()))
            }
            Form::Parameter { block, shape } => {
                let value = match self.file.header.is_list(&place.ggml) {
                    true => self
                        .file
                        .numbers(&place.ggml)?
                        .and_then(|list| list.get(*block).copied()),
                    false => self.file.number(&place.ggml)?,
                };
                let value = value.filter(|value| value.is_finite());
                let value = value.ok_or_else(|| self.file.missing(&place.ggml))?;
                Ok(of_numbers(std::iter::once(value as f32), shape.clone()))
            }
        }
    }

    /// A tensor of the file; where it is missing, the error says what the model calls it.
    fn found(&self, name: &str, ggml: &str) -> Result<TensorSource, WeightsError> {
        match self.file.header.tensors().contains_key(ggml) {
            true => self.file.tensor(ggml),
            false => Err(self.file.missing_tensor(name)),
        }
    }

    /// One matrix of a stack: whole packed rows, where they are.
    fn expert(&self, name: &str, place: &Place, index: usize, experts: usize) -> Result<TensorSource, WeightsError> {
        let ggml = &place.ggml;
        let missing = || self.file.missing_tensor(name);
        let entry = self.file.header.tensors().get(ggml).ok_or_else(missing)?;
        let [stacked, rows, cols] = *entry.shape.as_slice() else {
            return Err(self.shape(ggml, &[experts, 0, 0], &entry.shape));
        };
        if stacked != experts {
            return Err(self.shape(ggml, &[experts, rows, cols], &entry.shape));
        }
        let each = entry.ty.matrix_bytes(rows, cols);
        let each = each.map_err(WeightsError::quant(&self.file.path, ggml))?;
        // Within the tensor, whose bytes are `experts` times `each`.
        let start = entry.range.start + index * each;
        let range = start..start + each;
        let bytes = PackedBytes::mapped(Arc::clone(&self.file.map), range).ok_or_else(missing)?;
        Ok(TensorSource {
            ty: entry.ty,
            shape: vec![rows, cols],
            bytes,
        })
    }

    /// Keys are stored turned, so rows that are packed cannot stay so: such a tensor becomes F32, and loses nothing.
    fn way_up(&self, name: &str, place: &Place, up: Up) -> Result<TensorSource, WeightsError> {
        let both = place.of_both();
        if self.file.header.tensors().contains_key(&both) {
            return self.file.tensor(&both);
        }
        let (of_keys, of_values) = (&place.ggml, &place.of_values());
        let (keys, values) = (self.found(name, of_keys)?, self.found(name, of_values)?);
        for (ggml, found, expected) in [
            (of_keys, &keys, [up.heads, up.rank, up.nope]),
            (of_values, &values, [up.heads, up.value, up.rank]),
        ] {
            if found.shape != expected {
                return Err(self.shape(ggml, &expected, &found.shape));
            }
        }
        let shape = vec![up.heads * (up.nope + up.value), up.rank];
        let (ty, joined) = if keys.ty == values.ty && !keys.is_packed() {
            let width = keys.ty.block_bytes();
            (keys.ty, rows::up_joined(&keys.bytes, &values.bytes, up, width))
        } else {
            let bytes_of = |ggml: &str, found: &TensorSource| -> Result<Vec<u8>, WeightsError> {
                Ok(self.numbers(ggml, found)?.flat_map(f32::to_le_bytes).collect())
            };
            let (keys, values) = (bytes_of(of_keys, &keys)?, bytes_of(of_values, &values)?);
            (PackedType::F32, rows::up_joined(&keys, &values, up, size_of::<f32>()))
        };
        let bytes = joined.ok_or_else(|| self.file.missing_tensor(name))?.into();
        Ok(TensorSource { ty, shape, bytes })
    }

    fn numbers(&self, ggml: &str, found: &TensorSource) -> Result<impl Iterator<Item = f32> + use<>, WeightsError> {
        let values = found.to_f32().map_err(WeightsError::quant(&self.file.path, ggml))?;
        Ok(values.into_iter())
    }

    fn shape(&self, ggml: &str, expected: &[usize], found: &[usize]) -> WeightsError {
        WeightsError::Shape {
            path: self.file.path.clone(),
            tensor: ggml.to_owned(),
            expected: expected.to_vec(),
            found: found.to_vec(),
        }
    }
}

fn of_numbers(numbers: impl Iterator<Item = f32>, shape: Vec<usize>) -> TensorSource {
    let bytes: Vec<u8> = numbers.flat_map(f32::to_le_bytes).collect();
    TensorSource {
        ty: PackedType::F32,
        shape,
        bytes: bytes.into(),
    }
}

/// The file's name without `.gguf`.
fn model_name(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default();
    stem.to_string_lossy().into_owned()
}
