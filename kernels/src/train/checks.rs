//! What is looked at before anything is computed: ranges, sizes, numbers.

use std::path::Path;

use burn::tensor::{Tensor, Transaction};
use polder_protocol::layout::{BlockRange, Layout};

use super::{TrainError, files};
use crate::model::{Config, layout};

/// The values of a tensor, on the host.
pub(super) fn numbers<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>, TrainError> {
    tensor.try_into_vec_as::<f32>().map_err(|error| TrainError::Device {
        reason: error.to_string(),
    })
}

/// The values of several tensors, on the host: the device is waited for once.
pub(super) fn all_numbers(tensors: impl IntoIterator<Item = Tensor<1>>) -> Result<Vec<Vec<f32>>, TrainError> {
    let failed = |reason: String| TrainError::Device { reason };
    let mut tensors = tensors.into_iter().peekable();
    if tensors.peek().is_none() {
        return Ok(Vec::new());
    }
    let transaction = tensors.fold(Transaction::default(), |transaction, tensor| {
        transaction.register(tensor)
    });
    let data = transaction.try_execute().map_err(|error| failed(error.to_string()))?;
    data.into_iter()
        .map(|data| data.try_into_vec::<f32>().map_err(|error| failed(error.to_string())))
        .collect()
}

/// Refuses numbers that are not finite; `what` names them.
pub(super) fn finite(values: &[f32], what: &'static str) -> Result<(), TrainError> {
    match values.iter().all(|value| value.is_finite()) {
        true => Ok(()),
        false => Err(TrainError::NotFinite { what }),
    }
}

/// The layout of a model of which `range` can be trained.
pub(super) fn checked_layout(config: &Config, range: BlockRange) -> Result<Layout, TrainError> {
    if !range.fits(config.blocks) {
        return Err(TrainError::Range {
            first: range.first,
            end: range.end,
            blocks: config.blocks,
        });
    }
    if config.tied && range != BlockRange::whole(config.blocks) {
        return Err(TrainError::TiedStages);
    }
    Ok(layout(config))
}

/// Refuses parameters of other sizes than the layout's.
pub(super) fn check_sizes(layout: &Layout, range: BlockRange, parameters: &[Vec<f32>]) -> Result<(), TrainError> {
    let parts = range.parts(layout.blocks());
    if parameters.len() != parts.len() {
        return Err(TrainError::PartCount {
            expected: parts.len(),
            found: parameters.len(),
        });
    }
    for (part, values) in parts.zip(parameters) {
        let expected = layout.parts.get(part as usize).and_then(|part| part.elements());
        if expected != Some(values.len()) {
            return Err(TrainError::PartSize {
                part,
                expected: expected.unwrap_or(0),
                found: values.len(),
            });
        }
    }
    Ok(())
}

/// Reads the parameters of `range`, part by part.
pub(super) fn read_parts<P: AsRef<Path>>(
    layout: &Layout,
    range: BlockRange,
    part_files: &[P],
) -> Result<Vec<Vec<f32>>, TrainError> {
    let parts = range.parts(layout.blocks());
    if part_files.len() != parts.len() {
        return Err(TrainError::PartCount {
            expected: parts.len(),
            found: part_files.len(),
        });
    }
    let elements = |part: u32| {
        layout
            .parts
            .get(part as usize)
            .and_then(|part| part.elements())
            .unwrap_or(0)
    };
    parts
        .zip(part_files)
        .map(|(part, file)| files::read(file.as_ref(), elements(part)))
        .collect()
}
