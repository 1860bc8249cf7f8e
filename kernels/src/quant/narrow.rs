//! f32 to packed rows, rounding as ggml's reference quantisation does.

use half::{bf16, f16};

use super::narrow_k::{narrow_q2, narrow_q3, narrow_q6, narrow_scaled};
use super::narrow_table::{narrow_mxfp4, narrow_uneven};
use super::{PackedType, QuantError};

/// Packs `values` into blocks of `ty`.
///
/// # Errors
///
/// [`QuantError::PartialBlock`] for a partial last block.
pub fn narrow(ty: PackedType, values: &[f32]) -> Result<Vec<u8>, QuantError> {
    let mut bytes = Vec::with_capacity(ty.row_bytes(values.len())?);
    match ty {
        PackedType::F32 => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        PackedType::F16 => bytes.extend(values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes())),
        PackedType::BF16 => bytes.extend(values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes())),
        PackedType::Q8_0 => each(values, &mut bytes, narrow_q8_0),
        PackedType::Q4_0 => each(values, &mut bytes, narrow_q4_0),
        PackedType::Q4_1 => each(values, &mut bytes, narrow_q4_1),
        PackedType::Q5_0 => each(values, &mut bytes, narrow_q5_0),
        PackedType::Q5_1 => each(values, &mut bytes, narrow_q5_1),
        PackedType::Iq4Nl => each(values, &mut bytes, narrow_uneven),
        PackedType::Mxfp4 => each(values, &mut bytes, narrow_mxfp4),
        PackedType::Q2K => each(values, &mut bytes, narrow_q2),
        PackedType::Q3K => each(values, &mut bytes, narrow_q3),
        PackedType::Q4K => each(values, &mut bytes, |block, bytes| narrow_scaled(block, 4, bytes)),
        PackedType::Q5K => each(values, &mut bytes, |block, bytes| narrow_scaled(block, 5, bytes)),
        PackedType::Q6K => each(values, &mut bytes, narrow_q6),
    }
    Ok(bytes)
}

/// Packs whole blocks, which the caller has checked.
fn each<const ELEMENTS: usize>(values: &[f32], bytes: &mut Vec<u8>, pack: impl Fn(&[f32; ELEMENTS], &mut Vec<u8>)) {
    values.as_chunks().0.iter().for_each(|block| pack(block, bytes));
}

fn narrow_q8_0(block: &[f32; 32], bytes: &mut Vec<u8>) {
    let largest = block.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let scale = largest / 127.0;
    let inverse = inverse_or_zero(scale);
    bytes.extend(f16::from_f32(scale).to_le_bytes());
    bytes.extend(
        block
            .iter()
            .flat_map(|value| ((value * inverse).round() as i8).to_le_bytes()),
    );
}

fn narrow_q4_0(block: &[f32; 32], bytes: &mut Vec<u8>) {
    // The value of largest size, sign included, becomes exactly −8 scales: the code that has no positive twin.
    let largest = largest_by_size(block);
    let scale = largest / -8.0;
    let inverse = inverse_or_zero(scale);
    bytes.extend(f16::from_f32(scale).to_le_bytes());
    push_nibbles(block, |value| value * inverse + 8.5, bytes);
}

fn narrow_q4_1(block: &[f32; 32], bytes: &mut Vec<u8>) {
    let least = block.iter().fold(f32::INFINITY, |least, value| least.min(*value));
    let largest = block
        .iter()
        .fold(f32::NEG_INFINITY, |largest, value| largest.max(*value));
    let scale = (largest - least) / 15.0;
    let inverse = inverse_or_zero(scale);
    bytes.extend(f16::from_f32(scale).to_le_bytes());
    bytes.extend(f16::from_f32(least).to_le_bytes());
    push_nibbles(block, |value| (value - least) * inverse + 0.5, bytes);
}

fn narrow_q5_0(block: &[f32; 32], bytes: &mut Vec<u8>) {
    // As for four bits: the value of largest size becomes exactly −16 scales.
    let largest = largest_by_size(block);
    let scale = largest / -16.0;
    let inverse = inverse_or_zero(scale);
    bytes.extend(f16::from_f32(scale).to_le_bytes());
    push_fives(block, |value| value * inverse + 16.5, bytes);
}

fn narrow_q5_1(block: &[f32; 32], bytes: &mut Vec<u8>) {
    let least = block.iter().fold(f32::INFINITY, |least, value| least.min(*value));
    let largest = block
        .iter()
        .fold(f32::NEG_INFINITY, |largest, value| largest.max(*value));
    let scale = (largest - least) / 31.0;
    let inverse = inverse_or_zero(scale);
    bytes.extend(f16::from_f32(scale).to_le_bytes());
    bytes.extend(f16::from_f32(least).to_le_bytes());
    push_fives(block, |value| (value - least) * inverse + 0.5, bytes);
}

/// Fifth bits of all 32, then nibbles.
fn push_fives(block: &[f32; 32], code: impl Fn(f32) -> f32, bytes: &mut Vec<u8>) {
    let codes = block.map(|value| (code(value) as u8).min(31)); // A cast from float saturates.
    let fifths = codes
        .iter()
        .rev()
        .fold(0u32, |bits, code| bits << 1 | u32::from(code >> 4));
    bytes.extend(fifths.to_le_bytes());
    let (low, high) = codes.split_at(16);
    bytes.extend(low.iter().zip(high).map(|(low, high)| low & 15 | (high & 15) << 4));
}

fn push_nibbles(block: &[f32; 32], code: impl Fn(f32) -> f32, bytes: &mut Vec<u8>) {
    let nibble = |value| (code(value) as u8).min(15); // A cast from float saturates.
    let (low, high) = block.split_at(16);
    bytes.extend(
        low.iter()
            .zip(high)
            .map(|(low, high)| nibble(*low) | nibble(*high) << 4),
    );
}

/// The value of largest size, sign included.
pub(super) fn largest_by_size(values: &[f32]) -> f32 {
    let larger = |largest: f32, value: &f32| if value.abs() > largest.abs() { *value } else { largest };
    values.iter().fold(0.0, larger)
}

pub(super) fn inverse_or_zero(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

#[cfg(test)]
mod tests {
    use super::super::widen;
    use super::*;

    #[test]
    fn packing_is_off_by_at_most_one_step() {
        let values: Vec<f32> = (0..256).map(|i| ((i * 37 % 101) as f32 - 50.0) / 17.0).collect();
        // Half a step of rounding, and as much again where the code range ends or the f16 scale is rounded.
        for (ty, step) in [
            (PackedType::Q8_0, 3.0 / 127.0),
            (PackedType::Q4_0, 3.0 / 8.0),
            (PackedType::Q4_1, 6.0 / 15.0),
            (PackedType::Q5_0, 3.0 / 16.0),
            (PackedType::Q5_1, 6.0 / 31.0),
            (PackedType::Iq4Nl, 3.0 / 8.0),
            (PackedType::Mxfp4, 3.0 / 3.0),
            (PackedType::Q2K, 6.0 / 3.0),
            (PackedType::Q3K, 3.0 / 4.0),
            (PackedType::Q4K, 6.0 / 15.0),
            (PackedType::Q5K, 6.0 / 31.0),
            (PackedType::Q6K, 3.0 / 32.0),
        ] {
            let bytes = narrow(ty, &values).unwrap();
            let mut back = vec![0.0; values.len()];
            widen(ty, &bytes, &mut back).unwrap();
            for (value, back) in values.iter().zip(&back) {
                assert!((value - back).abs() <= step, "{ty}: {value} became {back}");
            }
        }
    }

    /// The relative error of each type on values like those of weights: normal, of differing widths.
    #[test]
    fn more_bits_and_more_scales_are_nearer() {
        let values = normal_values(64 * 256);
        let error = |ty: PackedType| {
            let mut back = vec![0.0; values.len()];
            widen(ty, &narrow(ty, &values).unwrap(), &mut back).unwrap();
            let square =
                |values: &mut dyn Iterator<Item = f32>| values.map(|value| f64::from(value * value)).sum::<f64>();
            let difference = square(&mut values.iter().zip(&back).map(|(value, back)| value - back));
            (difference / square(&mut values.iter().copied())).sqrt()
        };
        for (ty, most) in [
            (PackedType::Q8_0, 0.0075),
            (PackedType::Q6K, 0.021),
            (PackedType::Q5K, 0.041),
            (PackedType::Q5_1, 0.045),
            (PackedType::Q5_0, 0.053),
            (PackedType::Q4K, 0.081),
            (PackedType::Q4_1, 0.094),
            (PackedType::Iq4Nl, 0.09),
            (PackedType::Q4_0, 0.107),
            (PackedType::Mxfp4, 0.15),
            (PackedType::Q3K, 0.17),
            (PackedType::Q2K, 0.33),
        ] {
            let found = error(ty);
            println!("{ty:5} relative error {found:.4}");
            assert!(found < most, "{ty}: {found}");
        }
        assert!(error(PackedType::Q4K) < error(PackedType::Q4_1));
        assert!(error(PackedType::Q5K) < error(PackedType::Q5_1));
    }

    /// Sums of twelve uniform values, from a fixed sequence.
    fn normal_values(count: usize) -> Vec<f32> {
        let mut state = 1u64;
        let mut uniform = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32
        };
        let mut normal = || (0..12).map(|_| uniform()).sum::<f32>() - 6.0;
        (0..count)
            .map(|i| normal() * (1.0 + (i / 1024 % 4) as f32) * 0.02)
            .collect()
    }

    #[test]
    fn a_block_of_zeros_stays_zero() {
        for ty in PackedType::ALL {
            let mut back = [1.0; 256];
            widen(ty, &narrow(ty, &[0.0; 256]).unwrap(), &mut back).unwrap();
            assert_eq!(back, [0.0; 256], "{ty}");
        }
    }
}
