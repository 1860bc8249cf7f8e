//! Packed rows to f32.

use half::{bf16, f16};

use super::blocks::{UNIT, unit, units_per_block};
use super::{PackedType, QuantError};

/// Writes the exact values of `bytes` to `out`, as ggml's dequantisation does.
///
/// # Errors
///
/// [`QuantError`] where `bytes` are not exactly `out.len()` elements.
pub fn widen(ty: PackedType, bytes: &[u8], out: &mut [f32]) -> Result<(), QuantError> {
    let expected = ty.row_bytes(out.len())?;
    if bytes.len() != expected {
        return Err(QuantError::Length {
            ty,
            rows: 1,
            cols: out.len(),
            expected,
            found: bytes.len(),
        });
    }
    match ty {
        PackedType::F32 => {
            for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*raw);
            }
        }
        PackedType::F16 => {
            for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = f16::from_le_bytes(*raw).to_f32();
            }
        }
        PackedType::BF16 => {
            for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = bf16::from_le_bytes(*raw).to_f32();
            }
        }
        _ => {
            let blocks = bytes.chunks_exact(ty.block_bytes());
            for (block, values) in blocks.zip(out.chunks_exact_mut(ty.block_elements())) {
                for index in 0..units_per_block(ty) {
                    let unit = unit(ty, block, index);
                    for (i, value) in values[index * UNIT..][..UNIT].iter_mut().enumerate() {
                        *value = unit.scales[i / 16] * f32::from(unit.quants[i]) + unit.minima[i / 16];
                    }
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn q4_1_nibbles_are_low_half_then_high_half() {
        let mut block = Vec::new();
        block.extend(f16::from_f32(0.5).to_le_bytes());
        block.extend(f16::from_f32(-1.0).to_le_bytes());
        block.extend((0..16u8).map(|i| i | (15 - i) << 4));
        let mut values = [0.0; 32];
        widen(PackedType::Q4_1, &block, &mut values).unwrap();
        for i in 0..16 {
            assert_eq!(values[i], 0.5 * i as f32 - 1.0);
            assert_eq!(values[16 + i], 0.5 * (15 - i) as f32 - 1.0);
        }
    }

    #[test]
    fn q6_k_joins_nibbles_and_upper_bits_under_sixteen_scales() {
        let mut block = vec![0u8; 210];
        block[0] = 0x5a; // Elements 0 (low nibble) and 64 (high nibble).
        block[128] = 0b11_10_01_00; // Upper bits of elements 0, 32, 64 and 96.
        for (i, scale) in block[192..208].iter_mut().enumerate() {
            *scale = (i as i8 - 8).to_le_bytes()[0];
        }
        block[208..].copy_from_slice(&f16::from_f32(2.0).to_le_bytes());
        let mut values = [0.0; 256];
        widen(PackedType::Q6K, &block, &mut values).unwrap();
        assert_eq!(values[0], 2.0 * -8.0 * (10.0 - 32.0));
        assert_eq!(values[32], 2.0 * -6.0 * (16.0 - 32.0));
        assert_eq!(values[64], 2.0 * -4.0 * (5.0 + 32.0 - 32.0));
        assert_eq!(values[96], 2.0 * -2.0 * (48.0 - 32.0));
        assert_eq!(values[255], 2.0 * 7.0 * -32.0);
    }

    #[test]
    fn q4_k_scales_and_minima_have_six_bits() {
        let mut block = vec![0u8; 144];
        block[0..2].copy_from_slice(&f16::from_f32(1.0).to_le_bytes());
        block[2..4].copy_from_slice(&f16::from_f32(1.0).to_le_bytes());
        block[4] = 0b01_100001; // Scale 0 is 33; the upper bits of scale 4 are 01.
        block[8] = 0b10_000011; // Minimum 0 is 3; the upper bits of minimum 4 are 10.
        block[12] = 0x5f; // The lower bits: scale 4 is 31, minimum 4 is 37.
        block[16] = 0x02;
        block[16 + 64] = 0x01;
        let mut values = [0.0; 256];
        widen(PackedType::Q4K, &block, &mut values).unwrap();
        assert_eq!(values[0], 33.0 * 2.0 - 3.0);
        assert_eq!(values[1], -3.0);
        assert_eq!(values[128], 31.0 - 37.0);
    }

    #[test]
    fn q3_k_joins_two_bits_and_an_upper_one_under_sixteen_scales() {
        let mut block = vec![0u8; 110];
        block[0] = 0b1000_0001; // Upper bits of elements 0 and 224.
        block[32] = 0b11_00_00_10; // Lower bits of elements 0, 32, 64 and 96.
        block[96] = 0x5f; // Lower bits of scale 0 (15) and of scale 8 (5).
        block[96 + 8] = 0b01_10_00_11; // Upper bits of scales 0, 4, 8 and 12.
        block[108..].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        let mut values = [0.0; 256];
        widen(PackedType::Q3K, &block, &mut values).unwrap();
        assert_eq!(values[0], 0.5 * (63.0 - 32.0) * (2.0 + 4.0 - 4.0));
        assert_eq!(values[96], 0.5 * -32.0 * (3.0 - 4.0));
        assert_eq!(values[128], 0.5 * (37.0 - 32.0) * -4.0);
        assert_eq!(values[224], 0.0);
    }

    #[test]
    fn q2_k_has_a_scale_and_a_minimum_for_sixteen() {
        let mut block = vec![0u8; 84];
        block[0] = 0x32; // Elements 0 to 15: scale 2, minimum 3.
        block[1] = 0x0f; // Elements 16 to 31.
        block[16] = 0b00_00_00_11;
        block[32] = 0b00_00_00_01;
        block[80..82].copy_from_slice(&f16::from_f32(0.25).to_le_bytes());
        block[82..].copy_from_slice(&f16::from_f32(2.0).to_le_bytes());
        let mut values = [0.0; 256];
        widen(PackedType::Q2K, &block, &mut values).unwrap();
        assert_eq!(values[0], 0.25 * 2.0 * 3.0 - 6.0);
        assert_eq!(values[1], -6.0);
        assert_eq!(values[16], 0.25 * 15.0);
    }

    #[test]
    fn mxfp4_has_powers_of_two_down_to_the_least() {
        let mut block = vec![0u8; 17];
        block[0] = 127;
        block[1] = 0x9f; // −6, then −0.5.
        let mut values = [0.0; 32];
        widen(PackedType::Mxfp4, &block, &mut values).unwrap();
        assert_eq!([values[0], values[16]], [-6.0, -0.5]);
        block[0] = 0;
        widen(PackedType::Mxfp4, &block, &mut values).unwrap();
        assert_eq!(values[0], -12.0 * 2f32.powi(-126) / 4.0);
    }

    #[test]
    fn bytes_of_another_length_are_refused() {
        let mut values = [0.0; 32];
        assert!(widen(PackedType::Q8_0, &[0; 33], &mut values).is_err());
        assert!(widen(PackedType::Q8_0, &[0; 35], &mut values).is_err());
    }
}
