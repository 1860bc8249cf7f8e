//! FP8 weights as DeepSeek publishes them: E4M3 values, and one scale for every block of rows and columns.
//!
//! They are widened to f32, which holds every product of value and scale exactly as the published code computes it.

use std::path::Path;

use safetensors::Dtype;
use serde_json::Value;

use super::hugging_face::Shards;
use super::import::Tensors;
use super::{TensorSource, WeightsError};
use crate::model::json;
use crate::quant::PackedType;

/// After the name of a weight, that of its scales.
const SCALE: &str = "_scale_inv";

/// Tensors of which FP8 ones appear as f32.
pub(super) struct Scaled {
    shards: Shards,
    /// Rows and columns of a block, where the configuration says so.
    block: Option<[usize; 2]>,
}

impl Scaled {
    pub(super) fn new(shards: Shards, config_json: &str) -> Self {
        let config = json::parse(config_json).unwrap_or_default(); // Judged by the configuration.
        let block = config
            .get("quantization_config")
            .and_then(|config| config.get("weight_block_size"))
            .and_then(Value::as_array)
            .and_then(|sizes| {
                let size = |at: usize| usize::try_from(sizes.get(at)?.as_u64()?).ok().filter(|size| *size > 0);
                Some([size(0)?, size(1)?])
            });
        Self { shards, block }
    }

    fn widened(&self, name: &str) -> Option<Result<TensorSource, WeightsError>> {
        let (dtype, shape, bytes) = self.shards.file(name)?.raw(name)?;
        let scale_name = format!("{name}{SCALE}");
        let scale_file = self.shards.file(&scale_name)?;
        let (Dtype::F8_E4M3, &[rows, cols]) = (dtype, shape) else {
            return None;
        };
        let refused = |reason: &str| {
            Err(WeightsError::Feature {
                path: self.place().to_owned(),
                feature: format!("`{scale_name}` {reason}"),
            })
        };
        let (grid, scales) = match scales(scale_file, &scale_name) {
            Some(found) => found,
            None => return Some(refused("that is no matrix of F32, BF16 or F8_E8M0")),
        };
        let Some(block) = self.block_of([rows, cols], grid) else {
            return Some(refused("of a shape that no block size explains"));
        };
        let mut values = Vec::with_capacity(rows * cols * 4);
        for row in 0..rows {
            for col in 0..cols {
                let scale = scales[row / block[0] * grid[1] + col / block[1]];
                values.extend_from_slice(&(e4m3(bytes[row * cols + col]) * scale).to_le_bytes());
            }
        }
        Some(Ok(TensorSource {
            ty: PackedType::F32,
            shape: shape.to_vec(),
            bytes: values.into(),
        }))
    }

    /// The configuration's block, or the one power of two that gives so many blocks; the last one may be partial.
    fn block_of(&self, shape: [usize; 2], grid: [usize; 2]) -> Option<[usize; 2]> {
        let fits = |block: [usize; 2]| shape[0].div_ceil(block[0]) == grid[0] && shape[1].div_ceil(block[1]) == grid[1];
        if let Some(block) = self.block {
            return fits(block).then_some(block);
        }
        let one = |size: usize, blocks: usize| {
            (0..24)
                .map(|power| 1usize << power)
                .find(|block| blocks > 0 && size.div_ceil(*block) == blocks)
        };
        Some([one(shape[0], grid[0])?, one(shape[1], grid[1])?])
    }
}

impl Tensors for Scaled {
    fn names(&self) -> Vec<String> {
        let names = self.shards.names();
        let is_scale = |name: &String| {
            let weight = name.strip_suffix(SCALE);
            weight.is_some_and(|weight| self.shards.file(weight).is_some_and(|file| file.raw(weight).is_some()))
        };
        names.into_iter().filter(|name| !is_scale(name)).collect()
    }

    fn tensor(&self, name: &str) -> Result<TensorSource, WeightsError> {
        self.widened(name).unwrap_or_else(|| self.shards.tensor(name))
    }

    fn place(&self) -> &Path {
        self.shards.place()
    }
}

/// The grid of scales and their values.
fn scales(file: &super::PartFile, name: &str) -> Option<([usize; 2], Vec<f32>)> {
    if let Some((Dtype::F8_E8M0, &[rows, cols], bytes)) = file.raw(name) {
        // A power of two: 2^(byte − 127).
        let values = bytes.iter().map(|byte| 2f32.powi(i32::from(*byte) - 127));
        return Some(([rows, cols], values.collect()));
    }
    let source = file.tensor(name).ok()?;
    let [rows, cols] = *source.shape.as_slice() else {
        return None;
    };
    Some(([rows, cols], source.to_f32().ok()?))
}

/// One sign, four exponent bits with bias 7, three of mantissa; no infinity, and NaN where all bits but the sign are set.
fn e4m3(byte: u8) -> f32 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * mantissa * 2f32.powi(-9),
        _ => sign * (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

#[cfg(test)]
mod tests {
    use super::e4m3;

    #[test]
    fn bytes_have_the_values_of_the_format() {
        for (byte, value) in [
            (0x00, 0.0),
            (0x01, 0.001_953_125),
            (0x08, 0.015_625),
            (0x38, 1.0),
            (0xb9, -1.125),
            (0x7e, 448.0),
        ] {
            assert_eq!(e4m3(byte), value);
        }
        assert!(e4m3(0x7f).is_nan());
    }
}
