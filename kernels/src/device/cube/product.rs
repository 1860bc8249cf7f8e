//! Products with weights that are on the device as they are in their file: packed, halves or f32.

use cubecl::prelude::*;

use super::memory::{one_cube_each, size, small, units};
use super::{Cost, CubeError, Cubes, Floats, UNITS, Words};
use crate::quant::{DeviceBlocks, PackedMatrix};

/// Units that share an output.
const LANES: u32 = 16;
/// Rows of activations that a cube takes: each word of a weight is read and taken apart once for all of them.
const TILE: usize = 8;

/// A weight `[rows, cols]` = `[out, in]` on the device: the file's integers, in its file's bits or at most 8 of them, or the
/// file's floats.
#[derive(Debug, Clone)]
pub struct WeightOnDevice {
    /// See [`DeviceBlocks::quants`].
    quants: Words,
    /// See [`DeviceBlocks::scales`].
    scales: Words,
    rows: usize,
    cols: usize,
    word_elements: u32,
    fine: bool,
    brain: bool,
}

/// An f16's bits as f32, subnormal numbers too. Weights have no infinities.
#[cube]
fn half(bits: u32) -> f32 {
    let exponent = (bits >> 10u32) & 31u32;
    let mantissa = bits & 1_023u32;
    let mut value = f32::cast_from(mantissa) * 5.960_464_5e-8f32;
    if exponent > 0u32 {
        value = f32::reinterpret((exponent + 112u32) << 23u32 | mantissa << 13u32);
    }
    if (bits & 32_768u32) > 0u32 {
        value = -value;
    }
    value
}

/// One cube for `units / lanes` outputs of `tile` rows of activations.
#[cube(launch)]
fn multiply(
    x: &[f32],
    quants: &[u32],
    scales: &[u32],
    out: &mut [f32],
    n: u32,
    rows: u32,
    cols: u32,
    row_groups: u32,
    #[comptime] per_word: u32,
    #[comptime] fine: bool,
    #[comptime] brain: bool,
    #[comptime] tile: usize,
    #[comptime] lanes: u32,
    #[comptime] units: u32,
) {
    let mut shared = Shared::<[f32]>::new_slice(units as usize * tile);
    let mut sums = Array::<f32>::new(tile);
    #[unroll]
    for i in 0..tile {
        sums[i] = 0.0f32;
    }
    let outputs = comptime!(units / lanes);
    let group = CUBE_POS as u32;
    let row = group % row_groups * outputs + UNIT_POS / lanes;
    let first = group / row_groups * comptime!(tile as u32);
    let lane = UNIT_POS % lanes;
    if row < rows {
        let words = (cols + comptime!(per_word - 1u32)) / per_word;
        let mut word = lane;
        while word < words {
            let bits = quants[(row * words + word) as usize];
            let mut scale = f32::new(1.0f32);
            let mut minimum = f32::new(0.0f32);
            if comptime!(per_word > 2u32) {
                let unit = (row * words + word) / comptime!(32u32 / per_word);
                if comptime!(fine) {
                    // Two scales, one for each half of the unit, and the minimum.
                    let second = word % comptime!(32u32 / per_word) / comptime!(16u32 / per_word);
                    scale = f32::reinterpret(scales[(unit * 3u32 + second) as usize]);
                    minimum = f32::reinterpret(scales[(unit * 3u32 + 2u32) as usize]);
                } else {
                    scale = half(scales[unit as usize] & 65_535u32);
                    minimum = half(scales[unit as usize] >> 16u32);
                }
            }
            #[unroll]
            for e in 0..per_word {
                let mut weight = minimum;
                if comptime!(per_word == 8u32) {
                    weight += scale * f32::cast_from((bits >> (e * 4u32)) & 15u32);
                }
                if comptime!(per_word == 4u32) {
                    // Bytes are kept with 128 added.
                    let byte = (bits >> (e * 8u32)) & 255u32;
                    weight += scale * (f32::cast_from(byte) - 128.0f32);
                }
                if comptime!(per_word == 2u32) {
                    let own = (bits >> (e * 16u32)) & 65_535u32;
                    if comptime!(brain) {
                        weight = f32::reinterpret(own << 16u32);
                    } else {
                        weight = half(own);
                    }
                }
                if comptime!(per_word == 1u32) {
                    weight = f32::reinterpret(bits);
                }
                let mut column = word * per_word + e;
                if comptime!(per_word == 2u32) {
                    // A row of an odd number of halves ends with a zero, which anything finite may be multiplied by.
                    if column >= cols {
                        column = cols - 1u32;
                    }
                }
                #[unroll]
                for i in 0..tile {
                    // Rows beyond the last are the last again, and not written.
                    let mut at = first + i as u32;
                    if at >= n {
                        at = n - 1u32;
                    }
                    sums[i] += weight * x[(at * cols + column) as usize];
                }
            }
            word += lanes;
        }
    }
    #[unroll]
    for i in 0..tile {
        shared[UNIT_POS as usize * tile + i] = sums[i];
    }
    sync_cube();
    // The first lane of each output adds up in order; with several rows, lanes take turns.
    if row < rows {
        let mut i = lane;
        while i < comptime!(tile as u32) {
            if first + i < n {
                let from = UNIT_POS - lane;
                let mut sum = 0.0f32;
                for other in 0..lanes {
                    sum += shared[(from + other) as usize * tile + i as usize];
                }
                out[((first + i) * rows + row) as usize] = sum;
            }
            i += lanes;
        }
    }
}

impl WeightOnDevice {
    /// Outputs.
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub const fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes on the device.
    pub const fn bytes(&self) -> usize {
        let scales = if self.word_elements > 2 { self.scales.len() } else { 0 };
        4 * (self.quants.len() + scales)
    }
}

impl Cubes {
    /// Brings a weight to the device as it is stored. Its integers, scales or floats are laid out anew, and not one is
    /// changed.
    ///
    /// # Errors
    ///
    /// [`CubeError`] for types that [cannot be laid out](DeviceBlocks::holds), and for what has 2³² elements or more.
    pub fn upload_weight(&self, matrix: &PackedMatrix) -> Result<WeightOnDevice, CubeError> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        size("a weight", &[rows, cols])?;
        let Some(blocks) = DeviceBlocks::of(matrix) else {
            return Err(CubeError::Type { ty: matrix.ty().name() });
        };
        let quants = self.upload(&blocks.quants);
        Ok(WeightOnDevice {
            // Floats have no scales; a kernel must still be given something.
            scales: match blocks.scales.is_empty() {
                true => quants.clone(),
                false => self.upload(&blocks.scales),
            },
            quants,
            rows,
            cols,
            word_elements: blocks.word_elements,
            fine: blocks.fine,
            brain: blocks.brain,
        })
    }

    /// Brings a weight `[rows, cols]` of f32 to the device.
    ///
    /// # Errors
    ///
    /// [`CubeError`] where `values` are not so many, or 2³² or more.
    pub fn upload_floats(&self, values: &[f32], rows: usize, cols: usize) -> Result<WeightOnDevice, CubeError> {
        let floats = self.upload(values);
        floats.check("a weight", size("a weight", &[rows, cols])?)?;
        let words = floats.as_words();
        Ok(WeightOnDevice {
            quants: words.clone(),
            scales: words,
            rows,
            cols,
            word_elements: 1,
            fine: false,
            brain: false,
        })
    }

    /// `x · wᵀ`, for one row of activations (a matrix-vector product) or many.
    ///
    /// # Shapes
    ///
    /// - `x`: `[n, cols]`; the answer: `[n, rows]`
    ///
    /// # Errors
    ///
    /// [`CubeError`] for other shapes.
    pub fn multiply(&self, x: &Floats, weight: &WeightOnDevice) -> Result<Floats, CubeError> {
        let n = x.len() / weight.cols.max(1);
        x.check("activations", size("activations", &[n, weight.cols])?)?;
        let out = self.room(size("products", &[n, weight.rows])?);
        if !out.is_empty() {
            let tile = if n == 1 { 1 } else { TILE };
            let row_groups = weight.rows.div_ceil((UNITS / LANES) as usize);
            multiply::launch(
                self.client(),
                one_cube_each(row_groups * n.div_ceil(tile)),
                units(),
                x.argument(),
                weight.quants.argument(),
                weight.scales.argument(),
                out.argument(),
                small(n),
                small(weight.rows),
                small(weight.cols),
                small(row_groups),
                weight.word_elements,
                weight.fine,
                weight.brain,
                tile,
                LANES,
                UNITS,
            );
        }
        Ok(out)
    }
}

impl Cost {
    /// Of [`Cubes::multiply`] with `n` rows.
    pub const fn multiply(weight: &WeightOnDevice, n: usize) -> Self {
        let (rows, cols) = (weight.rows, weight.cols);
        Self::new(
            weight.bytes() + 4 * n * cols,
            4 * n * rows,
            2 * rows * cols + 2 * n * rows * cols,
        )
    }
}
