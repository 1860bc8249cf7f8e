//! A weight on the device, in pieces that its driver can bind.

use burn::tensor::{Tensor, TensorData};
use rayon::prelude::*;

use crate::device::Device;
use crate::stage::StageError;
use crate::stage::cpu::Matrix;

/// A weight `[rows, cols]` = `[out, in]` in f32, cut between rows.
#[derive(Debug)]
pub(super) struct Weight(Vec<Tensor<2>>); // Never empty.

impl Weight {
    /// Widens and uploads.
    pub(super) fn upload(matrix: &Matrix, device: &Device) -> Result<Self, StageError> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let row_bytes = cols as u64 * 4;
        let limit = device.buffer_bytes_max();
        let rows_max = usize::try_from(limit / row_bytes.max(1)).unwrap_or(usize::MAX);
        if rows_max == 0 {
            return Err(StageError::DeviceBuffer {
                what: "a row of a weight",
                bytes: row_bytes,
                limit,
            });
        }
        let pieces = (0..rows).step_by(rows_max.min(rows.max(1))).map(|first| {
            let count = rows_max.min(rows - first);
            let mut values = vec![0.0; count * cols];
            let rows = values.par_chunks_exact_mut(cols).zip(first..first + count);
            rows.for_each(|(values, row)| matrix.row(row, values));
            Tensor::from_data(TensorData::new(values, [count, cols]), device.tensors())
        });
        Ok(Self(pieces.collect()))
    }

    /// `x · wᵀ`: `[n, cols]` to `[n, rows]`.
    pub(super) fn multiply(&self, x: &Tensor<2>) -> Tensor<2> {
        let product = |piece: &Tensor<2>| x.clone().matmul(piece.clone().transpose());
        match self.0.as_slice() {
            [whole] => product(whole),
            pieces => Tensor::cat(pieces.iter().map(product).collect(), 1),
        }
    }
}
