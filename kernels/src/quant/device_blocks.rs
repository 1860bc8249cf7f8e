//! Weights in the layout that our kernels for graphics devices read: whole words.

use super::blocks::{UNIT, has_two_minima, unit, units_per_block};
use super::{PackedMatrix, PackedType};

/// A matrix in words: the integers of its blocks in order, and the scales apart from them; or its floats.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceBlocks {
    /// Eight integers of four bits to a word, the lowest bits first; or four bytes, each with 128 added; or two floats of 16
    /// bits, each row rounded up to whole words with a zero; or one f32.
    pub quants: Vec<u32>,
    /// Of each unit of 32 elements one word, an f16 scale below an f16 minimum; or if [`DeviceBlocks::fine`] three f32:
    /// the scales of the unit's halves, and the minimum. Floats have none.
    pub scales: Vec<u32>,
    /// How many elements a word has: 8, 4, 2 or 1.
    pub word_elements: u32,
    /// Whether scales are f32.
    pub fine: bool,
    /// Whether floats of 16 bits are the upper halves of f32.
    pub brain: bool,
}

impl DeviceBlocks {
    /// Whether a type can be laid out: not Q2_K, whose units have two minima.
    pub const fn holds(ty: PackedType) -> bool {
        !has_two_minima(ty)
    }

    /// The bytes that a matrix of a type takes laid out, at most.
    pub const fn bytes_max(ty: PackedType, rows: usize, cols: usize) -> u64 {
        let words = rows as u64 * (cols as u64).div_ceil(word_elements(ty) as u64);
        let units = if ty.is_float() {
            0
        } else {
            rows as u64 * (cols / UNIT) as u64
        };
        4 * words + 12 * units
    }

    /// Lays a matrix out. `None` where the type [cannot be](Self::holds).
    pub fn of(matrix: &PackedMatrix) -> Option<Self> {
        match matrix.ty() {
            ty if !Self::holds(ty) => None,
            ty if ty.is_float() => Some(Self::floats(matrix)),
            // Two f16 where these hold scale and minimum exactly: not those of Q4_0 and Q5_0 whose multiple is too large.
            _ => Self::lay(matrix, false).or_else(|| Self::lay(matrix, true)),
        }
    }

    fn floats(matrix: &PackedMatrix) -> Self {
        let ty = matrix.ty();
        let row_bytes = (matrix.cols() * ty.block_bytes()).max(1);
        let words = |row: &[u8]| -> Vec<u32> {
            let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte));
            row.chunks(4).map(word).collect()
        };
        Self {
            quants: matrix.bytes().chunks_exact(row_bytes).flat_map(words).collect(),
            scales: Vec::new(),
            word_elements: word_elements(ty),
            fine: false,
            brain: matches!(ty, PackedType::BF16),
        }
    }

    /// `None` where f16 do not hold the scales.
    fn lay(matrix: &PackedMatrix, fine: bool) -> Option<Self> {
        let ty = matrix.ty();
        let word_elements = word_elements(ty);
        let nibbles = word_elements == 8;
        let units = matrix.rows() * (matrix.cols() / UNIT);
        let mut laid = Self {
            quants: Vec::with_capacity(units * if nibbles { 4 } else { 8 }),
            scales: Vec::with_capacity(units * if fine { 3 } else { 1 }),
            word_elements,
            fine,
            brain: false,
        };
        for block in matrix.bytes().chunks_exact(ty.block_bytes()) {
            for index in 0..units_per_block(ty) {
                let unit = unit(ty, block, index);
                if nibbles {
                    laid.quants.extend(unit.quants.chunks_exact(8).map(|eight| {
                        let places = eight.iter().enumerate();
                        places.fold(0, |word, (place, quant)| word | (*quant as u32 & 15) << (4 * place))
                    }));
                } else {
                    laid.quants.extend(unit.quants.chunks_exact(4).map(|four| {
                        let places = four.iter().enumerate();
                        places.fold(0, |word, (place, quant)| {
                            word | ((i32::from(*quant) + 128) as u32) << (8 * place)
                        })
                    }));
                }
                let ([scale, second], [minimum, _]) = (unit.scales, unit.minima);
                if fine {
                    laid.scales.extend([scale, second, minimum].map(f32::to_bits));
                } else {
                    let [low, high] = [scale, minimum].map(half::f16::from_f32);
                    if scale != second || low.to_f32() != scale || high.to_f32() != minimum {
                        return None;
                    }
                    laid.scales
                        .push(u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16);
                }
            }
        }
        Some(laid)
    }
}

/// How many elements a word has.
const fn word_elements(ty: PackedType) -> u32 {
    match ty {
        PackedType::Q4_0 | PackedType::Q4_1 | PackedType::Q4K => 8,
        PackedType::F16 | PackedType::BF16 => 2,
        PackedType::F32 => 1,
        _ => 4,
    }
}
