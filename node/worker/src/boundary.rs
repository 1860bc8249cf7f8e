//! How activations and their gradients are written between stages: f32, bf16, or blockwise int8.

use polder_protocol::run::Boundary;

/// Values that share one scale in [`Boundary::Int8`].
const BLOCK: usize = 256;

/// Writes values. `Int8` is, per 256 values, a scale (f32) and one signed byte each.
pub(crate) fn write(values: &[f32], boundary: Boundary) -> Vec<u8> {
    match boundary {
        Boundary::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        Boundary::Bf16 => values.iter().flat_map(|value| bf16(*value).to_le_bytes()).collect(),
        Boundary::Int8 => values.chunks(BLOCK).flat_map(int8_block).collect(),
    }
}

/// Reads values; `None` for bytes that are no whole values.
pub(crate) fn read(bytes: &[u8], boundary: Boundary) -> Option<Vec<f32>> {
    match boundary {
        Boundary::F32 => {
            let (values, rest) = bytes.as_chunks::<4>();
            rest.is_empty()
                .then(|| values.iter().map(|value| f32::from_le_bytes(*value)).collect())
        }
        Boundary::Bf16 => {
            let (values, rest) = bytes.as_chunks::<2>();
            let widen = |value: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*value)) << 16);
            rest.is_empty().then(|| values.iter().map(widen).collect())
        }
        Boundary::Int8 => {
            let mut values = Vec::with_capacity(bytes.len());
            for block in bytes.chunks(BLOCK + 4) {
                let (scale, block) = block.split_first_chunk::<4>()?;
                let scale = f32::from_le_bytes(*scale);
                values.extend(block.iter().map(|byte| f32::from(byte.cast_signed()) * scale));
            }
            Some(values)
        }
    }
}

/// The upper half of an f32, rounded to the nearest, to the even of two.
fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let quiet = u32::from(value.is_nan()) << 22;
    let carry = if value.is_nan() { 0 } else { 0x7fff + (bits >> 16 & 1) };
    // The upper 16 bits always fit.
    u16::try_from((bits | quiet).wrapping_add(carry) >> 16).unwrap_or(u16::MAX)
}

fn int8_block(block: &[f32]) -> Vec<u8> {
    let largest = block.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let scale = largest / 127.0;
    let mut bytes = scale.to_le_bytes().to_vec();
    bytes.extend(block.iter().map(|value| {
        let steps = if scale > 0.0 { (value / scale).round() } else { 0.0 };
        // Casting saturates, and makes zero of what is no number.
        (steps as i8).cast_unsigned()
    }));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_back_as_near_as_their_form_allows() {
        let values: Vec<f32> = (0..600u16).map(|index| (f32::from(index) - 300.0) / 7.0).collect();
        for (boundary, bytes, error) in [
            (Boundary::F32, 2_400, 0.0),
            // Half of the last of eight bits, for values up to 64.
            (Boundary::Bf16, 1_200, 0.125),
            (Boundary::Int8, 612, 0.18),
        ] {
            let written = write(&values, boundary);
            assert_eq!(written.len(), bytes);
            let read = read(&written, boundary).unwrap();
            for (ours, theirs) in values.iter().zip(&read) {
                assert!((ours - theirs).abs() <= error, "{boundary:?}: {ours} became {theirs}");
            }
        }
    }

    #[test]
    fn half_a_value_is_none() {
        assert_eq!(read(&[0; 5], Boundary::F32), None);
        assert_eq!(read(&[0; 3], Boundary::Bf16), None);
        assert_eq!(read(&[0; 3], Boundary::Int8), None);
    }
}
