//! The weights of a stage, from the part files that hold them.

use std::path::Path;

use polder_protocol::layout::{BlockRange, Layout, PartLayout, TensorLayout};
use polder_protocol::work::Weights;

use super::StageError;
use super::cpu::Matrix;
use crate::model::Config;
use crate::quant::PackedMatrix;
use crate::weights::PartFile;

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
    /// file as `lm_head.weight`, or in the embedding's file, given after its own.
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
    file: PartFile,
    tensors: std::slice::Iter<'a, TensorLayout>,
    form: Weights,
}

impl<'a> PartReader<'a> {
    fn open(file: &Path, part: &'a PartLayout, form: Weights) -> Result<Self, StageError> {
        Ok(Self {
            file: PartFile::open(file).map_err(StageError::part)?,
            tensors: part.tensors.iter(),
            form,
        })
    }

    fn wrong(&self, name: &str, reason: String) -> StageError {
        StageError::Part {
            reason: format!("{}: `{name}` {reason}", self.file.path().display()),
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
        let layout = TensorLayout {
            name: "lm_head.weight".to_owned(),
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

    /// The next tensor of the layout.
    fn next(&mut self) -> Result<PackedMatrix, StageError> {
        match self.tensors.next() {
            Some(layout) => self.read(layout),
            None => Err(self.wrong("", "is beyond the part's layout".to_owned())),
        }
    }

    /// A tensor, checked against its layout; a vector is one row.
    fn read(&self, layout: &TensorLayout) -> Result<PackedMatrix, StageError> {
        let source = self.file.tensor(&layout.name).map_err(StageError::part)?;
        let same = source.shape.len() == layout.shape.len()
            && source
                .shape
                .iter()
                .zip(&layout.shape)
                .all(|(found, asked)| *found == *asked as usize);
        if !same {
            let (found, asked) = (&source.shape, &layout.shape);
            return Err(self.wrong(
                &layout.name,
                format!("has shape {found:?}, and the configuration asks for {asked:?}"),
            ));
        }
        source
            .packed()
            .map_err(|error| self.wrong(&layout.name, error.to_string()))
    }
}
