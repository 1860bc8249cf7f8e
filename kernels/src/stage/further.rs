//! The module that predicts one token further (multi-token prediction).

use polder_protocol::work::Weights;

use super::StageError;
use super::cpu::{Dense, LoadedNorm, LoadedSublayer, Matrix};
use super::weights::PartReader;
use crate::model::Further;
use crate::weights::Tensors;

/// The weights of the module.
#[derive(Debug)]
pub(super) struct FurtherWeights {
    pub(super) embedding: Matrix,
    pub(super) embedding_norm: LoadedNorm,
    pub(super) hidden_norm: LoadedNorm,
    pub(super) join: Dense,
    pub(super) block: Vec<LoadedSublayer>,
    pub(super) norm: LoadedNorm,
    pub(super) projection: Dense,
}

impl FurtherWeights {
    pub(super) fn read(further: &Further, tensors: &dyn Tensors, form: Weights) -> Result<Self, StageError> {
        let reader = PartReader::new(&further.layout, tensors, form);
        Ok(Self {
            embedding: reader.matrix(further.embedding)?,
            embedding_norm: reader.norm(&further.embedding_norm)?,
            hidden_norm: reader.norm(&further.hidden_norm)?,
            join: reader.dense(&further.join)?,
            block: reader.block(&further.block)?,
            norm: reader.norm(&further.norm)?,
            projection: reader.dense(&further.projection)?,
        })
    }
}
