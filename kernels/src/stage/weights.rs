//! The weights of a stage, from the part files that hold them.

use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
use polder_protocol::layout::{BlockRange, Layout, PartLayout, TensorLayout};
use polder_protocol::work::Weights;
use safetensors::{Dtype, SafeTensors};

use super::StageError;
use super::cpu::Matrix;
use crate::model::Config;
use crate::quant::{PackedBytes, PackedMatrix, PackedType};

/// What a stage holds.
#[derive(Debug)]
pub(super) struct StageWeights {
    /// Present at the first stage, and at the last one of a model whose projection is its embedding.
    pub(super) embedding: Option<Matrix>,
    /// In order.
    pub(super) blocks: Vec<BlockWeights>,
    /// Present at the last stage.
    pub(super) head: Option<HeadWeights>,
}

/// One block.
#[derive(Debug)]
pub(super) struct BlockWeights {
    pub(super) attention_norm: Vec<f32>,
    pub(super) q: Matrix,
    pub(super) k: Matrix,
    pub(super) v: Matrix,
    pub(super) o: Matrix,
    pub(super) mlp_norm: Vec<f32>,
    pub(super) gate: Matrix,
    pub(super) up: Matrix,
    pub(super) down: Matrix,
}

/// The final norm and the projection.
#[derive(Debug)]
pub(super) struct HeadWeights {
    pub(super) norm: Vec<f32>,
    /// `None` where it is the embedding.
    pub(super) projection: Option<Matrix>,
}

impl StageWeights {
    /// Reads the parts of `range`.
    ///
    /// The last stage of a model whose projection is its embedding finds it, unless it is also the first, in the head's
    /// file (as `lm_head.weight` or `model.embed_tokens.weight`), or in the embedding's file, given after its own.
    pub(super) fn read<P: AsRef<Path>>(
        config: &Config,
        layout: &Layout,
        range: BlockRange,
        files: &[P],
        form: Weights,
    ) -> Result<Self, StageError> {
        let mut parts: Vec<u32> = range.parts(config.blocks).collect();
        let borrows = config.tied && range.has_head(config.blocks) && !range.has_embedding();
        if borrows && files.len() == parts.len() + 1 {
            parts.push(0);
        }
        if files.len() != parts.len() {
            return Err(StageError::PartCount {
                expected: parts.len(),
                found: files.len(),
            });
        }
        let mut weights = Self {
            embedding: None,
            blocks: Vec::new(),
            head: None,
        };
        for (part, file) in parts.iter().zip(files) {
            let Some(tensors) = layout.parts.get(*part as usize) else {
                continue; // The range fits the model, so its parts are there.
            };
            let mut reader = PartReader::open(file.as_ref(), tensors, form)?;
            if *part == 0 {
                weights.embedding = Some(reader.matrix()?);
            } else if *part <= config.blocks {
                weights.blocks.push(reader.block()?);
            } else {
                let norm = reader.vector()?;
                let projection = match config.tied {
                    false => Some(reader.matrix()?),
                    true if borrows && !parts.contains(&0) => Some(reader.borrowed(config)?),
                    true => None,
                };
                weights.head = Some(HeadWeights { norm, projection });
            }
        }
        Ok(weights)
    }

    /// Bytes that the matrices take.
    pub(super) fn bytes(&self) -> u64 {
        let blocks = self.blocks.iter().flat_map(|block| {
            [
                &block.q,
                &block.k,
                &block.v,
                &block.o,
                &block.gate,
                &block.up,
                &block.down,
            ]
        });
        let head = self.head.iter().filter_map(|head| head.projection.as_ref());
        blocks.chain(&self.embedding).chain(head).map(Matrix::bytes).sum()
    }
}

/// One part file, and the tensors that it must hold, in order.
struct PartReader<'a> {
    file: String,
    map: Arc<Mmap>,
    tensors: std::slice::Iter<'a, TensorLayout>,
    form: Weights,
}

impl<'a> PartReader<'a> {
    fn open(file: &Path, part: &'a PartLayout, form: Weights) -> Result<Self, StageError> {
        let name = file.display().to_string();
        let unreadable = |error: std::io::Error| StageError::File {
            file: name.clone(),
            reason: error.to_string(),
        };
        let open = std::fs::File::open(file).map_err(unreadable)?;
        // SAFETY: part files are content-addressed and never written again; the daemon that named this one owns it.
        let map = unsafe { Mmap::map(&open) }.map_err(unreadable)?;
        Ok(Self {
            file: name,
            map: Arc::new(map),
            tensors: part.tensors.iter(),
            form,
        })
    }

    fn wrong(&self, reason: impl Into<String>) -> StageError {
        StageError::File {
            file: self.file.clone(),
            reason: reason.into(),
        }
    }

    fn block(&mut self) -> Result<BlockWeights, StageError> {
        Ok(BlockWeights {
            attention_norm: self.vector()?,
            q: self.matrix()?,
            k: self.matrix()?,
            v: self.matrix()?,
            o: self.matrix()?,
            mlp_norm: self.vector()?,
            gate: self.matrix()?,
            up: self.matrix()?,
            down: self.matrix()?,
        })
    }

    fn vector(&mut self) -> Result<Vec<f32>, StageError> {
        Ok(self.next()?.widen())
    }

    fn matrix(&mut self) -> Result<Matrix, StageError> {
        let packed = self.next()?;
        Ok(self.in_form(packed))
    }

    /// The embedding, kept in the head's file for a stage that holds the head alone.
    fn borrowed(&self, config: &Config) -> Result<Matrix, StageError> {
        let names = ["lm_head.weight", "model.embed_tokens.weight"];
        let tensors = self.tensors()?;
        let Some(name) = names.into_iter().find(|name| tensors.tensor(name).is_ok()) else {
            return Err(self.wrong(
                "holds no projection: the model's projection is its embedding, and that part's file was not given",
            ));
        };
        let layout = TensorLayout {
            name: name.to_owned(),
            // A checked configuration has sizes within 32 bits.
            shape: vec![config.vocabulary as u32, config.hidden as u32],
        };
        Ok(self.in_form(self.read(&layout)?))
    }

    fn in_form(&self, packed: PackedMatrix) -> Matrix {
        match self.form {
            Weights::Packed => Matrix::as_stored(packed),
            Weights::F32 => Matrix::widened(&packed),
        }
    }

    fn tensors(&self) -> Result<SafeTensors<'_>, StageError> {
        SafeTensors::deserialize(&self.map).map_err(|error| self.wrong(error.to_string()))
    }

    /// The next tensor of the layout.
    fn next(&mut self) -> Result<PackedMatrix, StageError> {
        match self.tensors.next() {
            Some(layout) => self.read(layout),
            None => Err(self.wrong("has too few tensors in its layout")),
        }
    }

    /// A tensor, checked against its layout; a vector is one row.
    fn read(&self, layout: &TensorLayout) -> Result<PackedMatrix, StageError> {
        let (rows, cols) = match layout.shape.as_slice() {
            [cols] => (1, *cols as usize),
            [rows, cols] => (*rows as usize, *cols as usize),
            _ => return Err(self.wrong(format!("`{}` has neither one nor two dimensions", layout.name))),
        };
        let malformed = |error: safetensors::SafeTensorError| self.wrong(error.to_string());
        let (_, metadata) = SafeTensors::read_metadata(&self.map).map_err(malformed)?;
        let tensors = self.tensors()?;
        let tensor = tensors.tensor(&layout.name).map_err(malformed)?;
        let packed = metadata
            .metadata()
            .as_ref()
            .and_then(|entries| entries.get(&format!("packed.{}", layout.name)));
        let (ty, shape) = match packed {
            Some(text) => {
                let mut words = text.split_whitespace();
                let ty: PackedType = words
                    .next()
                    .unwrap_or_default()
                    .parse()
                    .map_err(|error| self.wrong(format!("`{}`: {error}", layout.name)))?;
                (ty, words.map(|word| word.parse().unwrap_or(0)).collect::<Vec<u32>>())
            }
            None => {
                let ty = match tensor.dtype() {
                    Dtype::F32 => PackedType::F32,
                    Dtype::F16 => PackedType::F16,
                    Dtype::BF16 => PackedType::BF16,
                    other => return Err(self.wrong(format!("`{}` is in {other:?}, which is not read", layout.name))),
                };
                let shape = tensor.shape().iter().map(|dim| u32::try_from(*dim).unwrap_or(0));
                (ty, shape.collect())
            }
        };
        if shape != layout.shape {
            return Err(self.wrong(format!(
                "`{}` has shape {shape:?}, and the configuration asks for {:?}",
                layout.name, layout.shape
            )));
        }
        // The view lies within the map, so the difference of addresses is its place in it.
        let start = (tensor.data().as_ptr() as usize).saturating_sub(self.map.as_ptr() as usize);
        let range = start..start.saturating_add(tensor.data().len());
        let bytes =
            PackedBytes::mapped(self.map.clone(), range).ok_or_else(|| self.wrong("is shorter than it says"))?;
        PackedMatrix::new(ty, rows, cols, bytes).map_err(|error| self.wrong(format!("`{}`: {error}", layout.name)))
    }
}
