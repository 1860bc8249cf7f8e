//! f32 to the block formats whose nibbles stand for numbers of a table.

use half::f16;

use super::blocks::{TWICE_E2M1, UNEVEN, half_power};
use super::narrow::{inverse_or_zero, largest_by_size};

const BLOCK: usize = 32;
/// Candidates of a scale on each side of the first guess.
const CANDIDATES: i32 = 8;

/// Packs one block of IQ4_NL: of some scales the one with the least squared error.
pub(super) fn narrow_uneven(block: &[f32; BLOCK], bytes: &mut Vec<u8>) {
    let extreme = largest_by_size(block);
    let mut best = (0f32, f32::INFINITY);
    for step in -CANDIDATES..=CANDIDATES {
        // The value of largest size becomes the end of the table that is further from zero, or nearly so.
        let guess = extreme / (f32::from(UNEVEN[0]) + step as f32 * 2.0);
        let (mut squares, mut products) = (0f32, 0f32);
        for value in block {
            let near = f32::from(UNEVEN[nearest(&UNEVEN, value * inverse_or_zero(guess))]);
            // Large weights matter more.
            squares += value * value * near * near;
            products += value * value * near * value;
        }
        if squares <= 0.0 {
            continue;
        }
        let scale = f16::from_f32(products / squares).to_f32();
        let error = squared_error(block, &UNEVEN, scale);
        if error < best.1 {
            best = (scale, error);
        }
    }
    bytes.extend(f16::from_f32(best.0).to_le_bytes());
    push_codes(block, &UNEVEN, best.0, bytes);
}

/// Packs one block of MXFP4: the exponent under which the largest value is just within reach, or the one above it.
pub(super) fn narrow_mxfp4(block: &[f32; BLOCK], bytes: &mut Vec<u8>) {
    let largest = block.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    // The exponent of an f32 is its bits 23 to 30; the largest number, 6, has exponent 2.
    let exponent = ((largest.to_bits() >> 23) as u8).saturating_sub(2);
    let candidates = [exponent, exponent.saturating_add(1).min(254)];
    let error = |exponent: u8| squared_error(block, &TWICE_E2M1, half_power(exponent));
    let [first, second] = candidates.map(error);
    let exponent = if second < first { candidates[1] } else { candidates[0] };
    bytes.push(exponent);
    push_codes(block, &TWICE_E2M1, half_power(exponent), bytes);
}

fn squared_error(block: &[f32; BLOCK], table: &[i8; 16], scale: f32) -> f32 {
    let inverse = inverse_or_zero(scale);
    let error = |value: &f32| value - scale * f32::from(table[nearest(table, value * inverse)]);
    block.iter().map(|value| error(value).powi(2)).sum()
}

fn push_codes(block: &[f32; BLOCK], table: &[i8; 16], scale: f32, bytes: &mut Vec<u8>) {
    let inverse = inverse_or_zero(scale);
    let code = |value: &f32| nearest(table, value * inverse) as u8;
    let (low, high) = block.split_at(BLOCK / 2);
    bytes.extend(low.iter().zip(high).map(|(low, high)| code(low) | code(high) << 4));
}

/// The place of the nearest number, the first of several.
fn nearest(table: &[i8; 16], value: f32) -> usize {
    let mut best = (0, f32::INFINITY);
    for (index, number) in table.iter().enumerate() {
        let distance = (value - f32::from(*number)).abs();
        if distance < best.1 {
            best = (index, distance);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::super::{PackedType, widen};
    use super::*;

    #[test]
    fn numbers_of_the_tables_come_back_exactly() {
        for (ty, table, scale) in [
            (PackedType::Iq4Nl, UNEVEN, 0.25),
            (PackedType::Mxfp4, TWICE_E2M1, 2f32.powi(-7)),
        ] {
            let block: [f32; BLOCK] = std::array::from_fn(|i| scale * f32::from(table[i * 7 % 16]));
            let mut bytes = Vec::new();
            match ty {
                PackedType::Iq4Nl => narrow_uneven(&block, &mut bytes),
                _ => narrow_mxfp4(&block, &mut bytes),
            }
            let mut back = [0.0; BLOCK];
            widen(ty, &bytes, &mut back).unwrap();
            assert_eq!(back, block, "{ty}");
        }
    }

    #[test]
    fn the_least_and_largest_numbers_pack() {
        for value in [f32::MIN_POSITIVE, 1e-40, f32::MAX, 0.0] {
            let mut bytes = Vec::new();
            narrow_mxfp4(&[value; BLOCK], &mut bytes);
            let mut back = [0.0; BLOCK];
            widen(PackedType::Mxfp4, &bytes, &mut back).unwrap();
            assert!(back.iter().all(|back| back.is_finite()), "{value}");
        }
    }
}
