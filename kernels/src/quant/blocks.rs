//! What a block's bytes mean: units of 32 elements with integer values, scales and a minimum.

use half::f16;

use super::PackedType;

/// Elements of one unit, the smallest piece that products work on.
pub(super) const UNIT: usize = 32;

/// What the nibbles of IQ4_NL stand for: ggml's table, denser around zero.
pub(super) const UNEVEN: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// What the nibbles of MXFP4 stand for: twice the values of E2M1, so that they are whole.
pub(super) const TWICE_E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// 32 consecutive elements: `value[i] = scales[i / 16] · quants[i] + minima[i / 16]`.
///
/// With ggml's bit widths every product here is exact in f32, so the one rounding is that of the sum, as in ggml.
#[derive(Debug, Clone, Copy)]
pub(super) struct Unit {
    pub(super) quants: [i8; UNIT],
    pub(super) scales: [f32; 2],
    /// Equal, unless the type [has two](has_two_minima).
    pub(super) minima: [f32; 2],
}

/// Whether the two halves of a unit have minima of their own.
pub(super) const fn has_two_minima(ty: PackedType) -> bool {
    matches!(ty, PackedType::Q2K)
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
        PackedType::Iq4Nl => uniform(looked_up(&UNEVEN, &block[2..18]), half_at(block, 0), 0.0),
        PackedType::Mxfp4 => uniform(looked_up(&TWICE_E2M1, &block[1..17]), half_power(block[0]), 0.0),
        PackedType::Q2K => {
            let (d, d_minimum) = (half_at(block, 80), half_at(block, 82));
            let packed = [block[2 * index], block[2 * index + 1]];
            Unit {
                quants: two_bits(&block[16..80], index),
                scales: packed.map(|both| d * f32::from(both & 15)),
                minima: packed.map(|both| -d_minimum * f32::from(both >> 4)),
            }
        }
        PackedType::Q3K => {
            let mut quants = two_bits(&block[32..96], index);
            for (quant, byte) in quants.iter_mut().zip(&block[..32]) {
                *quant -= 4 * (1 - (byte >> index & 1) as i8);
            }
            let packed: &[u8; 12] = block[96..108].as_array().expect("the range has that length");
            let d = half_at(block, 108);
            Unit {
                quants,
                scales: [2 * index, 2 * index + 1].map(|half| d * f32::from(q3_scale(packed, half))),
                minima: [0.0; 2],
            }
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
        minima: [minimum; 2],
    }
}

/// Scale `index` of 16 of a Q3_K block: four lower bits in the first eight bytes, two upper ones in the last four.
#[inline(always)]
pub(super) fn q3_scale(packed: &[u8; 12], index: usize) -> i8 {
    let low = packed[index % 8] >> (index / 8 * 4) & 15;
    let high = packed[8 + index % 4] >> (index / 4 * 2) & 3;
    (low | high << 4) as i8 - 32
}

/// `2^(exponent − 128)`: half of what an E8M0 scale stands for.
#[inline(always)]
pub(super) fn half_power(exponent: u8) -> f32 {
    match exponent {
        // Below the least normal number.
        0 => f32::from_bits(0x0020_0000),
        1 => f32::from_bits(0x0040_0000),
        _ => f32::from_bits((u32::from(exponent) - 1) << 23),
    }
}

fn looked_up(table: &[i8; 16], bytes: &[u8]) -> [i8; UNIT] {
    nibbles(bytes).map(|nibble| table[nibble as usize & 15])
}

/// 32 bytes hold four units, two bits each, the lowest bits being the first unit's.
fn two_bits(bytes: &[u8], index: usize) -> [i8; UNIT] {
    let mut quants = [0; UNIT];
    for (quant, byte) in quants.iter_mut().zip(&bytes[index / 4 * 32..]) {
        *quant = (byte >> (index % 4 * 2) & 3) as i8;
    }
    quants
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
        minima: [0.0; 2],
    }
}
