//! What a block's bytes mean: units of 32 elements with integer values, scales and a minimum.

use half::f16;

use super::PackedType;

/// Elements of one unit, the smallest piece that products work on.
pub(super) const UNIT: usize = 32;

/// 32 consecutive elements: `value[i] = scale[i / 16] · quants[i] + minimum`.
///
/// With ggml's bit widths every product here is exact in f32, so the one rounding is that of the sum, as in ggml.
#[derive(Debug, Clone, Copy)]
pub(super) struct Unit {
    pub(super) quants: [i8; UNIT],
    pub(super) scales: [f32; 2],
    pub(super) minimum: f32,
}

/// Units in one block of a type that is not a plain float.
pub(super) const fn units_per_block(ty: PackedType) -> usize {
    ty.block_elements() / UNIT
}

/// Unit `index` of a block. `block` has exactly [`PackedType::block_bytes`] bytes, and `ty` is no plain float.
pub(super) fn unit(ty: PackedType, block: &[u8], index: usize) -> Unit {
    debug_assert_eq!(block.len(), ty.block_bytes());
    match ty {
        PackedType::Q8_0 => {
            let mut quants = [0; UNIT];
            for (quant, byte) in quants.iter_mut().zip(&block[2..34]) {
                *quant = i8::from_le_bytes([*byte]);
            }
            uniform(quants, half_at(block, 0), 0.0)
        }
        PackedType::Q4_0 => {
            let d = half_at(block, 0);
            uniform(nibbles(&block[2..18]), d, -8.0 * d)
        }
        PackedType::Q4_1 => uniform(nibbles(&block[4..20]), half_at(block, 0), half_at(block, 2)),
        PackedType::Q5_0 => {
            let d = half_at(block, 0);
            uniform(with_fifth_bits(nibbles(&block[6..22]), &block[2..6]), d, -16.0 * d)
        }
        PackedType::Q5_1 => {
            let quants = with_fifth_bits(nibbles(&block[8..24]), &block[4..8]);
            uniform(quants, half_at(block, 0), half_at(block, 2))
        }
        PackedType::Q4K => k_unit(block, index, halves_of_chunk(&block[16..144], index)),
        PackedType::Q5K => {
            let mut quants = halves_of_chunk(&block[48..176], index);
            for (quant, byte) in quants.iter_mut().zip(&block[16..48]) {
                *quant |= ((byte >> index & 1) << 4) as i8;
            }
            k_unit(block, index, quants)
        }
        PackedType::Q6K => q6_unit(block, index),
        PackedType::F32 | PackedType::F16 | PackedType::BF16 => unreachable!("plain floats have no units"),
    }
}

/// The 6-bit scale and minimum of sub-block `index` of 8, from the 12 bytes of a Q4_K or Q5_K block.
#[inline(always)]
pub(super) fn k_scale_and_minimum(packed: &[u8; 12], index: usize) -> (u8, u8) {
    if index < 4 {
        (packed[index] & 63, packed[index + 4] & 63)
    } else {
        (
            packed[index + 4] & 15 | packed[index - 4] >> 6 << 4,
            packed[index + 4] >> 4 | packed[index] >> 6 << 4,
        )
    }
}

fn uniform(quants: [i8; UNIT], scale: f32, minimum: f32) -> Unit {
    Unit {
        quants,
        scales: [scale; 2],
        minimum,
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Low nibbles are elements 0 to 15, high nibbles 16 to 31.
fn nibbles(bytes: &[u8]) -> [i8; UNIT] {
    let mut quants = [0; UNIT];
    for (i, byte) in bytes.iter().enumerate() {
        quants[i] = (byte & 15) as i8;
        quants[i + 16] = (byte >> 4) as i8;
    }
    quants
}

/// Bit `i` of four little-endian bytes is the fifth bit of element `i`.
fn with_fifth_bits(mut quants: [i8; UNIT], bits: &[u8]) -> [i8; UNIT] {
    for (i, quant) in quants.iter_mut().enumerate() {
        *quant |= ((bits[i / 8] >> (i % 8) & 1) << 4) as i8;
    }
    quants
}

/// 32 bytes hold two units: the low nibbles the even one, the high nibbles the odd one.
fn halves_of_chunk(bytes: &[u8], index: usize) -> [i8; UNIT] {
    let mut quants = [0; UNIT];
    for (quant, byte) in quants.iter_mut().zip(&bytes[index / 2 * 32..]) {
        *quant = (byte >> (4 * (index % 2)) & 15) as i8;
    }
    quants
}

fn k_unit(block: &[u8], index: usize, quants: [i8; UNIT]) -> Unit {
    let mut packed = [0; 12];
    packed.copy_from_slice(&block[4..16]);
    let (scale, minimum) = k_scale_and_minimum(&packed, index);
    uniform(
        quants,
        half_at(block, 0) * f32::from(scale),
        -half_at(block, 2) * f32::from(minimum),
    )
}

/// 128 elements share 64 bytes of nibbles and 32 bytes of upper bits.
fn q6_unit(block: &[u8], index: usize) -> Unit {
    let (half, quarter) = (index / 4, index % 4);
    let low = &block[half * 64 + quarter % 2 * 32..];
    let high = &block[128 + half * 32..];
    let mut quants = [0; UNIT];
    for (i, quant) in quants.iter_mut().enumerate() {
        let nibble = low[i] >> (quarter / 2 * 4) & 15;
        let upper = high[i] >> (quarter * 2) & 3;
        *quant = (nibble | upper << 4) as i8 - 32;
    }
    let d = half_at(block, 208);
    let scale = |i: usize| d * f32::from(i8::from_le_bytes([block[192 + index * 2 + i]]));
    Unit {
        quants,
        scales: [scale(0), scale(1)],
        minimum: 0.0,
    }
}
