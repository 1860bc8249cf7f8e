//! Packed weights in the layout that our kernels for graphics devices read: whole words.

use super::blocks::{UNIT, has_two_minima, unit, units_per_block};
use super::{PackedMatrix, PackedType};

/// A packed matrix in words: the integers of its blocks in order, and the scales apart from them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceBlocks {
    /// Eight integers of four bits to a word, the lowest bits first; or four bytes, each with 128 added.
    pub quants: Vec<u32>,
    /// Of each unit of 32 elements one word, an f16 scale below an f16 minimum; or if [`DeviceBlocks::fine`] three f32:
    /// the scales of the unit's halves, and the minimum.
    pub scales: Vec<u32>,
    /// Whether integers have four bits.
    pub nibbles: bool,
    /// Whether scales are f32.
    pub fine: bool,
}

impl DeviceBlocks {
    /// Whether a type can be laid out: not plain floats, and not Q2_K, whose units have two minima.
    pub const fn holds(ty: PackedType) -> bool {
        !ty.is_float() && !has_two_minima(ty)
    }

    /// The bytes that so many elements of a type take laid out, at most.
    pub const fn bytes_max(ty: PackedType, elements: u64) -> u64 {
        let quants = if has_nibbles(ty) { elements / 2 } else { elements };
        quants + elements / UNIT as u64 * 12
    }

    /// Lays a matrix out. `None` where the type [cannot be](Self::holds).
    pub fn of(matrix: &PackedMatrix) -> Option<Self> {
        if !Self::holds(matrix.ty()) {
            return None;
        }
        // Two f16 where these hold scale and minimum exactly: not those of Q4_0 and Q5_0 whose multiple is too large.
        Self::lay(matrix, false).or_else(|| Self::lay(matrix, true))
    }

    /// `None` where f16 do not hold the scales.
    fn lay(matrix: &PackedMatrix, fine: bool) -> Option<Self> {
        let ty = matrix.ty();
        let nibbles = has_nibbles(ty);
        let units = matrix.rows() * (matrix.cols() / UNIT);
        let mut laid = Self {
            quants: Vec::with_capacity(units * if nibbles { 4 } else { 8 }),
            scales: Vec::with_capacity(units * if fine { 3 } else { 1 }),
            nibbles,
            fine,
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

/// Whether a type's integers have four bits.
const fn has_nibbles(ty: PackedType) -> bool {
    matches!(ty, PackedType::Q4_0 | PackedType::Q4_1 | PackedType::Q4K)
}
