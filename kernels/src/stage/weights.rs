//! The weights of a stage, from the part files that hold them.

use std::path::Path;

use polder_protocol::layout::{BlockRange, PartLayout, TensorLayout};
use polder_protocol::work::Weights;

use super::StageError;
use super::cpu::{
    Dense, ExpertWeights, GroupedWeights, LatentWeights, LoadedMixer, LoadedNorm, LoadedSublayer, MambaWeights, Matrix,
    MlpWeights,
};
use crate::model::describe::{Block, Linear, Mixer, Norm, Slot};
use crate::model::{Config, layout};
use crate::quant::PackedMatrix;
use crate::weights::{PartFile, Tensors};

/// What a stage holds.
#[derive(Debug)]
pub(super) struct StageWeights {
    /// Present at the first stage, and at the last one of a model whose projection is its embedding.
    pub(super) embedding: Option<Matrix>,
    /// In order.
    pub(super) blocks: Vec<Vec<LoadedSublayer>>,
    /// Present at the last stage.
    pub(super) head: Option<HeadWeights>,
    bytes: u64,
}

/// The final norm and the projection.
#[derive(Debug)]
pub(super) struct HeadWeights {
    pub(super) norm: LoadedNorm,
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
        range: BlockRange,
        files: &[P],
        form: Weights,
    ) -> Result<Self, StageError> {
        let mut parts: Vec<u32> = range.parts(config.blocks).collect();
        if borrows(config, range) && files.len() == parts.len() + 1 {
            parts.push(0);
        }
        if files.len() != parts.len() {
            return Err(StageError::PartCount {
                expected: parts.len(),
                found: files.len(),
            });
        }
        let open = |file: &P| PartFile::open(file.as_ref()).map_err(StageError::part);
        let files = files.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let sources = files.iter().map(|file| file as &dyn Tensors);
        Self::from_sources(config, range, &parts.into_iter().zip(sources).collect::<Vec<_>>(), form)
    }

    /// Reads the parts of `range` from one source of all tensors.
    pub(super) fn from_tensors(
        config: &Config,
        range: BlockRange,
        tensors: &dyn Tensors,
        form: Weights,
    ) -> Result<Self, StageError> {
        let borrowed = borrows(config, range).then_some(0);
        let parts = range.parts(config.blocks).chain(borrowed);
        Self::from_sources(
            config,
            range,
            &parts.map(|part| (part, tensors)).collect::<Vec<_>>(),
            form,
        )
    }

    fn from_sources(
        config: &Config,
        range: BlockRange,
        sources: &[(u32, &dyn Tensors)],
        form: Weights,
    ) -> Result<Self, StageError> {
        let layout = layout(config);
        let mut weights = Self {
            embedding: None,
            blocks: Vec::new(),
            head: None,
            bytes: 0,
        };
        for (part, tensors) in sources {
            let Some(own) = layout.parts.get(*part as usize) else {
                continue; // The range fits the model, so its parts are there.
            };
            let reader = PartReader::new(own, *tensors, form);
            if *part == 0 {
                weights.embedding = Some(reader.matrix(Slot(0))?);
            } else if let Some(block) = config.description.get(*part as usize - 1) {
                weights.blocks.push(reader.block(block)?);
            } else {
                let projection = match &config.head.projection {
                    Some(linear) => Some(reader.dense(linear)?.weight),
                    None if borrows(config, range) && !sources.iter().any(|(part, _)| *part == 0) => {
                        Some(reader.borrowed(config)?)
                    }
                    None => None,
                };
                weights.head = Some(HeadWeights {
                    norm: reader.norm(&config.head.norm)?,
                    projection,
                });
            }
        }
        let matrices = weights.embedding.iter();
        let head = weights.head.iter().filter_map(|head| head.projection.as_ref());
        let blocks = weights.blocks.iter().flatten().map(|sublayer| sublayer.mixer.bytes());
        weights.bytes = matrices.chain(head).map(Matrix::bytes).chain(blocks).sum();
        Ok(weights)
    }

    /// Bytes that the matrices take.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Whether a stage needs the embedding for its projection alone.
fn borrows(config: &Config, range: BlockRange) -> bool {
    config.tied && range.has_head(config.blocks) && !range.has_embedding()
}

/// One part's tensors, asked for by their place in its layout.
pub(super) struct PartReader<'a> {
    layout: &'a PartLayout,
    tensors: &'a dyn Tensors,
    form: Weights,
}

impl<'a> PartReader<'a> {
    pub(super) fn new(layout: &'a PartLayout, tensors: &'a dyn Tensors, form: Weights) -> Self {
        Self { layout, tensors, form }
    }

    pub(super) fn block(&self, block: &Block) -> Result<Vec<LoadedSublayer>, StageError> {
        let sublayers = block.0.iter().map(|sublayer| {
            Ok(LoadedSublayer {
                norm: self.norm(&sublayer.norm)?,
                mixer: self.mixer(&sublayer.mixer)?,
                after: sublayer.after.as_ref().map(|norm| self.norm(norm)).transpose()?,
            })
        });
        sublayers.collect()
    }

    fn mixer(&self, mixer: &Mixer) -> Result<LoadedMixer, StageError> {
        Ok(match mixer {
            Mixer::Attention(shape) => LoadedMixer::Attention(Box::new(GroupedWeights::read(self, shape)?)),
            Mixer::Latent(shape) => LoadedMixer::Latent(Box::new(LatentWeights::read(self, shape)?)),
            Mixer::Mlp(shape) => LoadedMixer::Mlp(Box::new(MlpWeights::read(self, shape)?)),
            Mixer::Experts(shape) => LoadedMixer::Experts(Box::new(ExpertWeights::read(self, shape)?)),
            Mixer::Mamba(shape) => LoadedMixer::Mamba(Box::new(MambaWeights::read(self, shape)?)),
        })
    }

    pub(super) fn dense(&self, linear: &Linear) -> Result<Dense, StageError> {
        Ok(Dense {
            weight: self.in_form(self.rows(linear)?),
            bias: linear.bias.map(|bias| self.vector(bias)).transpose()?,
        })
    }

    /// A layer's weight in f32, `[rows, cols]`.
    pub(super) fn widened(&self, linear: &Linear) -> Result<Vec<f32>, StageError> {
        Ok(self.rows(linear)?.widen())
    }

    pub(super) fn norm(&self, norm: &Norm) -> Result<LoadedNorm, StageError> {
        let bias = norm.bias.map(|bias| self.vector(bias)).transpose()?;
        Ok(LoadedNorm::new(norm.kind, self.vector(norm.gain)?, bias))
    }

    /// All elements of a tensor, in f32.
    pub(super) fn vector(&self, slot: Slot) -> Result<Vec<f32>, StageError> {
        Ok(self.packed(slot)?.widen())
    }

    pub(super) fn matrix(&self, slot: Slot) -> Result<Matrix, StageError> {
        Ok(self.in_form(self.packed(slot)?))
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

    fn rows(&self, linear: &Linear) -> Result<PackedMatrix, StageError> {
        let whole = self.packed(linear.weight)?;
        if linear.first_row == 0 && whole.rows() == linear.rows {
            return Ok(whole);
        }
        let part = whole.part(linear.first_row, linear.rows);
        part.ok_or_else(|| StageError::Part {
            reason: "lacks the rows of an expert".to_owned(),
        })
    }

    fn packed(&self, slot: Slot) -> Result<PackedMatrix, StageError> {
        match self.layout.tensors.get(slot.0) {
            Some(layout) => self.read(layout),
            None => Err(StageError::Part {
                reason: "is asked for a tensor beyond its layout".to_owned(),
            }),
        }
    }

    /// A tensor, checked against its layout; a vector is one row.
    fn read(&self, layout: &TensorLayout) -> Result<PackedMatrix, StageError> {
        let source = self.tensors.tensor(&layout.name).map_err(StageError::part)?;
        let wrong = |reason: String| StageError::Part {
            reason: format!("{}: `{}` {reason}", self.tensors.place().display(), layout.name),
        };
        let same = source.shape.len() == layout.shape.len()
            && source
                .shape
                .iter()
                .zip(&layout.shape)
                .all(|(found, asked)| *found == *asked as usize);
        if !same {
            let (found, asked) = (&source.shape, &layout.shape);
            return Err(wrong(format!(
                "has shape {found:?}, and the configuration asks for {asked:?}"
            )));
        }
        source.packed().map_err(|error| wrong(error.to_string()))
    }
}
