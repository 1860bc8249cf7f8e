//! f32 to the block formats of 256 elements: scales are searched for, so that the squared error is small.
//!
//! Layouts are ggml's. Where a byte could be chosen in several ways, the choice is ours: files of other programs differ in
//! single codes and are read alike.

use half::f16;

use super::narrow::{inverse_or_zero, largest_by_size};

const BLOCK: usize = 256;
const SUB_BLOCK: usize = 32;
/// Elements of a sub-block of the types with sixteen of them.
const SMALL: usize = 16;
/// Candidates of an inverse scale, a twentieth of a step apart.
const CANDIDATES: i32 = 20;

/// Packs one block with 8 scales and 8 minima of 6 bits: Q4_K where codes have 4 `bits`, Q5_K where they have 5.
pub(super) fn narrow_scaled(block: &[f32; BLOCK], bits: u32, bytes: &mut Vec<u8>) {
    let top = ((1u32 << bits) - 1) as f32;
    let mut fits = [(0f32, 0f32); 8];
    for (fit, values) in fits.iter_mut().zip(block.as_chunks::<SUB_BLOCK>().0) {
        *fit = scale_and_minimum(values, top);
    }
    let largest = |of: fn(&(f32, f32)) -> f32| fits.iter().map(of).fold(0f32, f32::max);
    let d = f16::from_f32(largest(|fit| fit.0) / 63.0);
    let d_minimum = f16::from_f32(largest(|fit| fit.1) / 63.0);
    let six_bits = |value: f32, unit: f16| (value * inverse_or_zero(unit.to_f32())).round().clamp(0.0, 63.0) as u8;

    let mut packed = [0u8; 12];
    let mut codes = [0u8; BLOCK];
    for (index, (fit, values)) in fits.iter().zip(block.as_chunks::<SUB_BLOCK>().0).enumerate() {
        let (scale, minimum) = (six_bits(fit.0, d), six_bits(fit.1, d_minimum));
        put_scale_and_minimum(&mut packed, index, scale, minimum);
        let inverse = inverse_or_zero(d.to_f32() * f32::from(scale));
        let minimum = d_minimum.to_f32() * f32::from(minimum);
        for (code, value) in codes[index * SUB_BLOCK..].iter_mut().zip(values) {
            *code = ((value + minimum) * inverse).round().clamp(0.0, top) as u8;
        }
    }
    bytes.extend(d.to_le_bytes());
    bytes.extend(d_minimum.to_le_bytes());
    bytes.extend(packed);
    if bits == 5 {
        // Bit `i` of byte `j` is the fifth bit of element `j` of sub-block `i`.
        bytes.extend((0..SUB_BLOCK).map(|j| (0..8).fold(0u8, |byte, i| byte | codes[i * SUB_BLOCK + j] >> 4 << i)));
    }
    for pair in codes.as_chunks::<{ 2 * SUB_BLOCK }>().0 {
        bytes.extend((0..SUB_BLOCK).map(|j| pair[j] & 15 | (pair[SUB_BLOCK + j] & 15) << 4));
    }
}

/// Packs one block with 16 scales of 8 bits and codes of 6: Q6_K.
pub(super) fn narrow_q6(block: &[f32; BLOCK], bytes: &mut Vec<u8>) {
    let mut fits = [0f32; 16];
    for (fit, values) in fits.iter_mut().zip(block.as_chunks::<16>().0) {
        *fit = symmetric_scale(values, 32.0);
    }
    // The scale of largest size becomes exactly −128 units: the code that has no positive twin.
    let d = f16::from_f32(largest_by_size(&fits) / -128.0);
    let inverse = inverse_or_zero(d.to_f32());
    let mut scales = [0i8; 16];
    let mut low = [0u8; BLOCK / 2];
    let mut high = [0u8; BLOCK / 4];
    for (index, (fit, values)) in fits.iter().zip(block.as_chunks::<16>().0).enumerate() {
        let scale = (fit * inverse).round().clamp(-128.0, 127.0);
        scales[index] = scale as i8;
        let inverse = inverse_or_zero(d.to_f32() * scale);
        for (i, value) in values.iter().enumerate() {
            let code = ((value * inverse).round().clamp(-32.0, 31.0) as i8 + 32) as u8;
            // 128 elements share 64 bytes of nibbles and 32 bytes of upper bits, as four rows of 32.
            let element = index * 16 + i;
            let (half, quarter, column) = (element / 128, element / 32 % 4, element % 32);
            low[half * 64 + quarter % 2 * 32 + column] |= (code & 15) << (quarter / 2 * 4);
            high[half * 32 + column] |= (code >> 4) << (quarter * 2);
        }
    }
    bytes.extend(low);
    bytes.extend(high);
    bytes.extend(scales.iter().flat_map(|scale| scale.to_le_bytes()));
    bytes.extend(d.to_le_bytes());
}

/// Packs one block with 16 scales and 16 minima of 4 bits and codes of 2: Q2_K.
pub(super) fn narrow_q2(block: &[f32; BLOCK], bytes: &mut Vec<u8>) {
    let mut fits = [(0f32, 0f32); 16];
    for (fit, values) in fits.iter_mut().zip(block.as_chunks::<SMALL>().0) {
        *fit = scale_and_minimum(values, 3.0);
    }
    let largest = |of: fn(&(f32, f32)) -> f32| fits.iter().map(of).fold(0f32, f32::max);
    let d = f16::from_f32(largest(|fit| fit.0) / 15.0);
    let d_minimum = f16::from_f32(largest(|fit| fit.1) / 15.0);
    let four_bits = |value: f32, unit: f16| (value * inverse_or_zero(unit.to_f32())).round().clamp(0.0, 15.0) as u8;
    let mut codes = [0u8; BLOCK];
    for (index, (fit, values)) in fits.iter().zip(block.as_chunks::<SMALL>().0).enumerate() {
        let (scale, minimum) = (four_bits(fit.0, d), four_bits(fit.1, d_minimum));
        bytes.push(scale | minimum << 4);
        let inverse = inverse_or_zero(d.to_f32() * f32::from(scale));
        let minimum = d_minimum.to_f32() * f32::from(minimum);
        for (code, value) in codes[index * SMALL..].iter_mut().zip(values) {
            *code = ((value + minimum) * inverse).round().clamp(0.0, 3.0) as u8;
        }
    }
    push_two_bits(&codes, bytes);
    bytes.extend(d.to_le_bytes());
    bytes.extend(d_minimum.to_le_bytes());
}

/// Packs one block with 16 scales of 6 bits and codes of 3: Q3_K.
pub(super) fn narrow_q3(block: &[f32; BLOCK], bytes: &mut Vec<u8>) {
    let mut fits = [0f32; 16];
    for (fit, values) in fits.iter_mut().zip(block.as_chunks::<SMALL>().0) {
        *fit = symmetric_scale(values, 4.0);
    }
    // The scale of largest size becomes exactly −32 units: the code that has no positive twin.
    let d = f16::from_f32(largest_by_size(&fits) / -32.0);
    let inverse = inverse_or_zero(d.to_f32());
    let (mut codes, mut scales, mut upper) = ([0u8; BLOCK], [0u8; 12], [0u8; 32]);
    for (index, (fit, values)) in fits.iter().zip(block.as_chunks::<SMALL>().0).enumerate() {
        let scale = (fit * inverse).round().clamp(-32.0, 31.0);
        let stored = (scale as i8 + 32) as u8;
        scales[index % 8] |= (stored & 15) << (index / 8 * 4);
        scales[8 + index % 4] |= stored >> 4 << (index / 4 * 2);
        let inverse = inverse_or_zero(d.to_f32() * scale);
        for (i, value) in values.iter().enumerate() {
            let code = ((value * inverse).round().clamp(-4.0, 3.0) as i8 + 4) as u8;
            let element = index * SMALL + i;
            codes[element] = code & 3;
            upper[element % 32] |= code >> 2 << (element / 32);
        }
    }
    bytes.extend(upper);
    push_two_bits(&codes, bytes);
    bytes.extend(scales);
    bytes.extend(d.to_le_bytes());
}

/// 128 codes share 32 bytes, as four rows of 32.
fn push_two_bits(codes: &[u8; BLOCK], bytes: &mut Vec<u8>) {
    for half in codes.as_chunks::<128>().0 {
        bytes.extend((0..32).map(|j| (0..4).fold(0u8, |byte, i| byte | half[i * 32 + j] << (2 * i))));
    }
}

/// The scale `s` and the minimum `m`, neither negative, for which `s·q − m` with whole `q` from 0 to `top` is near the
/// values: for each of some inverse scales the codes, and for the codes the weighted least squares.
fn scale_and_minimum<const N: usize>(values: &[f32; N], top: f32) -> (f32, f32) {
    let least = values.iter().copied().fold(0f32, f32::min);
    let largest = values.iter().copied().fold(0f32, f32::max);
    if largest - least < f32::MIN_POSITIVE {
        return (0.0, 0.0);
    }
    // Large weights matter more, and small ones still matter.
    let mean_square = values.iter().map(|value| value * value).sum::<f32>() / N as f32;
    let weights = values.map(|value| mean_square.sqrt() + value.abs());
    let mut best = ((largest - least) / top, -least);
    let mut best_error = f32::INFINITY;
    for step in -CANDIDATES / 2..=CANDIDATES / 2 {
        let inverse = (top + step as f32 / 10.0) / (largest - least);
        let codes = values.map(|value| ((value - least) * inverse).round().clamp(0.0, top));
        let (mut w, mut wq, mut wqq, mut wx, mut wqx) = (0f32, 0f32, 0f32, 0f32, 0f32);
        for ((weight, code), value) in weights.iter().zip(&codes).zip(values) {
            w += weight;
            wq += weight * code;
            wqq += weight * code * code;
            wx += weight * value;
            wqx += weight * code * value;
        }
        let determinant = w * wqq - wq * wq;
        if determinant <= 0.0 {
            continue;
        }
        let mut scale = (w * wqx - wq * wx) / determinant;
        let mut offset = (wqq * wx - wq * wqx) / determinant;
        if offset > 0.0 {
            (scale, offset) = (wqx / wqq, 0.0);
        }
        let error = |(weight, code, value): (&f32, &f32, &f32)| {
            let difference = scale * code + offset - value;
            weight * difference * difference
        };
        let all = weights.iter().zip(&codes).zip(values);
        let error: f32 = all.map(|((weight, code), value)| error((weight, code, value))).sum();
        if scale > 0.0 && error < best_error {
            (best, best_error) = ((scale, -offset), error);
        }
    }
    best
}

/// The scale, of either sign, for which whole multiples from −`end` up to below `end` are near the values.
fn symmetric_scale(values: &[f32; SMALL], end: f32) -> f32 {
    let extreme = largest_by_size(values);
    if extreme.abs() < f32::MIN_POSITIVE {
        return 0.0;
    }
    let mut best = 0.0;
    let mut best_gain = 0.0;
    for step in -CANDIDATES / 2..=CANDIDATES / 2 {
        let inverse = -(end + step as f32 / 10.0) / extreme;
        let (mut wqq, mut wqx) = (0f32, 0f32);
        for value in values {
            let code = (value * inverse).round().clamp(-end, end - 1.0);
            let weight = value * value;
            wqq += weight * code * code;
            wqx += weight * code * value;
        }
        // With the best scale for these codes, the error is Σ w·x² − gain.
        if wqq > 0.0 && wqx * wqx / wqq > best_gain {
            (best, best_gain) = (wqx / wqq, wqx * wqx / wqq);
        }
    }
    if best == 0.0 { extreme / -end } else { best }
}

/// As `blocks::k_scale_and_minimum` reads them.
fn put_scale_and_minimum(packed: &mut [u8; 12], index: usize, scale: u8, minimum: u8) {
    if index < 4 {
        packed[index] |= scale;
        packed[index + 4] |= minimum;
    } else {
        packed[index + 4] = scale & 15 | (minimum & 15) << 4;
        packed[index - 4] |= scale >> 4 << 6;
        packed[index] |= minimum >> 4 << 6;
    }
}

#[cfg(test)]
mod tests {
    use super::super::blocks::k_scale_and_minimum;
    use super::*;

    #[test]
    fn six_bit_scales_are_read_back() {
        let pairs: [(u8, u8); 8] = std::array::from_fn(|i| ((i * 9 % 64) as u8, (63 - i * 7) as u8));
        let mut packed = [0; 12];
        for (index, (scale, minimum)) in pairs.iter().enumerate() {
            put_scale_and_minimum(&mut packed, index, *scale, *minimum);
        }
        for (index, pair) in pairs.iter().enumerate() {
            assert_eq!(k_scale_and_minimum(&packed, index), *pair);
        }
    }

    #[test]
    fn values_on_a_grid_are_found_again() {
        let values: [f32; SUB_BLOCK] = std::array::from_fn(|i| (i % 16) as f32 * 0.25 - 1.0);
        let (scale, minimum) = scale_and_minimum(&values, 15.0);
        assert!(
            (scale - 0.25).abs() < 1e-6 && (minimum - 1.0).abs() < 1e-5,
            "{scale} {minimum}"
        );
    }
}
