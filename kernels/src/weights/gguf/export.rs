//! From part files to a GGUF file.
//!
//! What was written is read again and compared before it gets its name: the configuration must mean the same model, and
//! the tokenizer must cut some difficult texts alike. What GGUF has no word for is refused, never left out.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;

use serde_json::Value;

use super::architecture::{self, Architecture};
use super::places::{Form, Place, Places, Up};
use super::writer::{GgufWriter, Pieces};
use super::{describe, model, rows, tokenizer_writer};
use crate::model::{Config, json, layout};
use crate::quant::{PackedBytes, PackedType, narrow};
use crate::text::Tokenizer;
use crate::weights::part_file::rows_and_cols;
use crate::weights::{Exported, PartFile, TensorSource, WeightsError, source};

/// Writes `model` as the GGUF file `out`, which must not be there yet. Matrices keep their types, packed ones too;
/// vectors become F32, as ggml asks for.
///
/// # Errors
///
/// [`WeightsError`] names the file and what is wrong with it; [`WeightsError::Feature`] what GGUF cannot say.
pub fn export_gguf(model: &Exported<'_>, name: &str, out: &Path) -> Result<(), WeightsError> {
    if out.exists() {
        return Err(WeightsError::AlreadyThere { path: out.to_owned() });
    }
    let mut partial = out.file_name().unwrap_or_default().to_owned();
    partial.push(format!(".partial-{}.gguf", process::id()));
    let partial = out.with_file_name(partial);
    let written = Export::new(model, out)
        .and_then(|export| export.write(name, &partial).and_then(|()| export.compare(&partial)))
        .and_then(|()| fs::rename(&partial, out).map_err(WeightsError::io("make", out)));
    if written.is_err() {
        let _ = fs::remove_file(&partial); // The first error is the one to tell.
    }
    written
}

struct Export<'a> {
    model: &'a Exported<'a>,
    /// To name in errors.
    out: &'a Path,
    config: Config,
    json: Value,
    architecture: Architecture,
    tokenizer_json: String,
    tokenizer: Tokenizer,
}

impl<'a> Export<'a> {
    fn new(model: &'a Exported<'a>, out: &'a Path) -> Result<Self, WeightsError> {
        let config = Config::from_json(model.config_json).map_err(|source| WeightsError::Config {
            path: out.to_owned(),
            source,
        })?;
        let architecture = architecture::of(&config).ok_or_else(|| WeightsError::Architecture {
            path: out.to_owned(),
            architecture: config.family.to_owned(),
        })?;
        let tokenizer_json = source::read_text(model.tokenizer_json)?;
        let tokenizer = Tokenizer::from_bytes(tokenizer_json.as_bytes()).map_err(|error| WeightsError::Tokenizer {
            path: model.tokenizer_json.to_owned(),
            reason: error.to_string(),
        })?;
        Ok(Self {
            model,
            out,
            config,
            json: json::parse(model.config_json).unwrap_or_default(), // It was just read.
            architecture,
            tokenizer_json,
            tokenizer,
        })
    }

    fn write(&self, name: &str, path: &Path) -> Result<(), WeightsError> {
        let files = self.files()?;
        let mut writer = GgufWriter::default();
        writer.text("general.architecture", self.architecture.name);
        writer.text("general.name", name);
        writer.whole("general.quantization_version", 2);
        describe::describe(&mut writer, self.architecture, &self.config, &self.json)
            .map_err(|feature| self.feature(feature))?;
        tokenizer_writer::describe(
            &mut writer,
            self.out,
            &self.tokenizer_json,
            self.config.vocabulary,
            self.model,
        )?;
        let places = Places {
            architecture: self.architecture,
            config: &self.config,
        };
        let mut parameters = Parameters::default();
        for (part, file) in layout(&self.config).parts.iter().zip(&files) {
            for tensor in &part.tensors {
                let place = places.of(&tensor.name).ok_or_else(|| WeightsError::UnknownTensor {
                    path: file.path().to_owned(),
                    tensor: tensor.name.clone(),
                })?;
                match place.form {
                    Form::Parameter { .. } => parameters.add(place.ggml, file, &tensor.name)?,
                    _ => self.tensor(&mut writer, file, &tensor.name, place)?,
                }
            }
        }
        for (key, values) in parameters.0 {
            writer.numbers(&key, &values);
        }
        writer.write(path)
    }

    fn files(&self) -> Result<Vec<PartFile>, WeightsError> {
        let parts = layout(&self.config).parts;
        if parts.len() != self.model.part_files.len() {
            return Err(WeightsError::MissingFile {
                path: PathBuf::from(format!("part {}", self.model.part_files.len())),
                hint: "there must be one file per part: embedding, blocks, head",
            });
        }
        let files = self.model.part_files.iter().zip(&parts).map(|(path, part)| {
            let file = PartFile::open(path)?;
            file.check(part).map(|()| file)
        });
        files.collect()
    }

    fn tensor<'w>(
        &self,
        writer: &mut GgufWriter<'w>,
        file: &'w PartFile,
        name: &str,
        place: Place,
    ) -> Result<(), WeightsError> {
        let found = file.tensor(name)?;
        match place.form {
            Form::Same if found.shape.len() > 1 => {
                writer.tensor(place.ggml, found.ty, found.shape, found.bytes);
            }
            // ggml wants vectors in F32.
            Form::Same | Form::Parameter { .. } => {
                let shape = found.shape.clone();
                self.numbers(writer, file, name, place.ggml, shape, |value| value)?;
            }
            Form::Whole => {
                let shape = found.shape.clone();
                self.numbers(writer, file, name, place.ggml, shape, |gain| gain + 1.0)?;
            }
            Form::Decay { heads } => {
                let rate = |value: f32| -f64::from(value).exp() as f32;
                self.numbers(writer, file, name, place.ggml, vec![heads, 1], rate)?;
            }
            Form::Reshaped { ggml, .. } => self.numbers(writer, file, name, place.ggml, ggml, |value| value)?,
            Form::Interleaved { heads } => {
                let found = match found.shape.len() {
                    1 => as_f32(file, name, &found)?,
                    _ => found,
                };
                let rows = found.shape.first().copied().unwrap_or(0);
                let moved = rows::halves_together(&found.bytes, rows, heads);
                let bytes = moved.ok_or_else(|| self.feature("heads of an odd width"))?.into();
                writer.tensor(place.ggml, found.ty, found.shape, bytes);
            }
            Form::Expert { index: 0, experts } => self.stack(writer, file, name, place.ggml, &found, experts)?,
            Form::Expert { .. } => {} // In the stack of the first.
            Form::Latent(up) => self.way_up(writer, file, name, &place, up)?,
        }
        Ok(())
    }

    /// Writes numbers as F32.
    fn numbers(
        &self,
        writer: &mut GgufWriter<'_>,
        file: &PartFile,
        name: &str,
        ggml: String,
        shape: Vec<usize>,
        change: impl Fn(f32) -> f32,
    ) -> Result<(), WeightsError> {
        let values = file.tensor(name)?.to_f32();
        let values = values.map_err(WeightsError::quant(file.path(), name))?;
        let bytes: Vec<u8> = values
            .into_iter()
            .flat_map(|value| change(value).to_le_bytes())
            .collect();
        writer.tensor(ggml, PackedType::F32, shape, bytes.into());
        Ok(())
    }

    /// Stacks the matrices of all experts, which must have one type.
    fn stack<'w>(
        &self,
        writer: &mut GgufWriter<'w>,
        file: &'w PartFile,
        first: &str,
        ggml: String,
        found: &TensorSource,
        experts: usize,
    ) -> Result<(), WeightsError> {
        let names = (0..experts).map(|expert| first.replacen(".experts.0.", &format!(".experts.{expert}."), 1));
        let names: Vec<String> = names.collect();
        for name in &names {
            if file.tensor(name)?.ty != found.ty {
                return Err(self.feature(format!("experts of several types in `{ggml}`")));
            }
        }
        let [rows, cols] = rows_and_cols(&found.shape);
        let pieces = names
            .into_iter()
            .map(|name| file.tensor(&name).map(|tensor| tensor.bytes));
        let length = found.bytes.len() * experts;
        writer.pieces(ggml, found.ty, vec![experts, rows, cols], length, Box::new(pieces));
        Ok(())
    }

    /// Writes keys turned, and values, each as they are made; packed ones are widened, since rows become columns.
    fn way_up<'w>(
        &self,
        writer: &mut GgufWriter<'w>,
        file: &'w PartFile,
        name: &str,
        place: &Place,
        up: Up,
    ) -> Result<(), WeightsError> {
        let found = file.tensor(name)?;
        let ty = match found.is_packed() {
            true => PackedType::F32,
            false => found.ty,
        };
        let width = ty.block_bytes();
        let half = |which: usize| -> Pieces<'w> {
            let (found, path, name) = (found.clone(), file.path().to_owned(), name.to_owned());
            Box::new(std::iter::once_with(move || {
                let missing = || WeightsError::MissingTensor {
                    path: path.clone(),
                    tensor: name.clone(),
                };
                let bytes: PackedBytes = match found.is_packed() {
                    true => {
                        let values = found.to_f32().map_err(WeightsError::quant(&path, &name))?;
                        values
                            .into_iter()
                            .flat_map(f32::to_le_bytes)
                            .collect::<Vec<u8>>()
                            .into()
                    }
                    false => found.bytes.clone(),
                };
                let halves = rows::up_apart(&bytes, up, width).ok_or_else(missing)?;
                let half = halves.into_iter().nth(which).ok_or_else(missing)?;
                Ok(PackedBytes::from(half))
            }))
        };
        let shapes = [[up.heads, up.rank, up.nope], [up.heads, up.value, up.rank]];
        for (which, (ggml, shape)) in [place.ggml.clone(), place.of_values()]
            .into_iter()
            .zip(shapes)
            .enumerate()
        {
            let length = shape.iter().product::<usize>() * width;
            writer.pieces(ggml, ty, shape.to_vec(), length, half(which));
        }
        Ok(())
    }

    /// Whether the written file means the same model.
    fn compare(&self, path: &Path) -> Result<(), WeightsError> {
        let read = model::open(path)?;
        let mut config = Config::from_json(&read.config_json).map_err(|source| WeightsError::Config {
            path: path.to_owned(),
            source,
        })?;
        // None of these changes a number.
        config.family = self.config.family;
        config.initializer_range = self.config.initializer_range;
        config.further.clone_from(&self.config.further);
        if config != self.config {
            return Err(self.feature("something of this model's configuration that GGUF has no word for"));
        }
        let tokenizer = Tokenizer::from_bytes(&read.tokenizer_json).map_err(|error| WeightsError::Tokenizer {
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
        for text in PROBES {
            let cut = |tokenizer: &Tokenizer| tokenizer.encode_bare(text).ok();
            if cut(&tokenizer) != cut(&self.tokenizer) {
                return Err(self.feature("a tokenizer that cuts text in a way that GGUF has no name for"));
            }
        }
        Ok(())
    }

    fn feature(&self, feature: impl Into<String>) -> WeightsError {
        WeightsError::Feature {
            path: self.out.to_owned(),
            feature: feature.into(),
        }
    }
}

/// Numbers that are metadata, by key, block after block.
#[derive(Default)]
struct Parameters(Vec<(String, Vec<f32>)>);

impl Parameters {
    fn add(&mut self, key: String, file: &PartFile, name: &str) -> Result<(), WeightsError> {
        let values = file.tensor(name)?.to_f32();
        let values = values.map_err(WeightsError::quant(file.path(), name))?;
        match self.0.iter_mut().find(|(known, _)| *known == key) {
            Some((_, list)) => list.extend(values),
            None => self.0.push((key, values)),
        }
        Ok(())
    }
}

fn as_f32(file: &PartFile, name: &str, found: &TensorSource) -> Result<TensorSource, WeightsError> {
    let values = found.to_f32().map_err(WeightsError::quant(file.path(), name))?;
    let bytes = narrow(PackedType::F32, &values).map_err(WeightsError::quant(file.path(), name))?;
    Ok(TensorSource {
        ty: PackedType::F32,
        shape: found.shape.clone(),
        bytes: bytes.into(),
    })
}

/// Texts on which tokenizers differ: contractions, digits, scripts, spaces, lines, composed letters, symbols.
const PROBES: [&str; 8] = [
    "The polder's dry; it'll stay so, they've said.",
    "In 1953, 12345678 m³ — 3.14159 and 1,000,000",
    "Ångström, žluťoučký kůň, ελληνικά, Українська, 語, العربية, हिन्दी",
    "  two spaces\n\n\nlines\r\n\ttabs   \n",
    "e\u{301}t\u{e9} and 🙂🙃👩‍👩‍👧",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # comment",
    "CamelCaseWords ALLCAPS DON'T won't I'M",
    "</s><|im_end|>!!!???...///",
];
