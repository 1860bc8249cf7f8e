//! The sparse form: the largest `k` of each 4,096 elements, with 2-bit values from a codebook of the tensor.
//!
//! Values of magnitude at least the mean are told from the smaller ones, for each sign: four bins, and the codebook
//! holds the mean of each. (Bins of equal width around the mean, as others use, put small values of both signs into one
//! bin, and top-k has few values near zero to put there.)

use alloc::vec::Vec;

use super::dense::split_f32;
use super::{DecodeError, TOPK_CHUNK};

/// Four f32.
pub(super) const CODEBOOK_BYTES: usize = 16;

const fn index_bytes(k: u16) -> usize {
    (k as usize * 3).div_ceil(2)
}

const fn code_bytes(k: u16) -> usize {
    (k as usize).div_ceil(4)
}

/// Bytes of one chunk: 12-bit indices and 2-bit codes, each padded to a whole byte.
pub(super) const fn chunk_bytes(k: u16) -> usize {
    index_bytes(k) + code_bytes(k)
}

/// Appends a tensor. `k` is 1 to 4,096.
pub(super) fn encode(values: &[f32], k: u16, out: &mut Vec<u8>) {
    let kept = usize::from(k);
    let mut chosen: Vec<u16> = Vec::with_capacity(values.len().div_ceil(TOPK_CHUNK).saturating_mul(kept));
    let mut order: Vec<u16> = Vec::with_capacity(TOPK_CHUNK);
    for chunk in values.chunks(TOPK_CHUNK) {
        choose(chunk, kept, &mut order);
        chosen.extend_from_slice(&order);
    }
    let codebook = Codebook::of(values, &chosen, kept);
    for mean in codebook.means {
        out.extend_from_slice(&mean.to_le_bytes());
    }
    for (chunk, indices) in values.chunks(TOPK_CHUNK).zip(chosen.chunks(kept)) {
        for pair in indices.chunks(2) {
            match pair {
                [a, b] => out.extend_from_slice(&pack(*a, *b)),
                [a] => out.extend_from_slice(&pack(*a, 0)[..2]),
                _ => {}
            }
        }
        for four in indices.chunks(4) {
            let mut byte = 0;
            for (place, index) in four.iter().enumerate() {
                let code = chunk.get(usize::from(*index)).map_or(0, |value| codebook.code(*value));
                byte |= code << (2 * place);
            }
            out.push(byte);
        }
    }
}

/// Leaves in `order` the `kept` indices of largest magnitude, ascending; the lower index wins a tie. A short chunk is
/// padded with zeros, which lose against every element.
fn choose(chunk: &[f32], kept: usize, order: &mut Vec<u16>) {
    order.clear();
    // 4,096 fits.
    order.extend(0..TOPK_CHUNK as u16);
    // Magnitudes of finite numbers are ordered as their bits are. Elements come before padding.
    let rank = |index: u16| {
        let bits = chunk
            .get(usize::from(index))
            .map_or(0, |value| value.abs().to_bits().saturating_add(1));
        (core::cmp::Reverse(bits), index)
    };
    if kept < order.len() {
        order.select_nth_unstable_by_key(kept, |index| rank(*index));
        order.truncate(kept);
    }
    order.sort_unstable();
}

const fn pack(a: u16, b: u16) -> [u8; 3] {
    let [a_low, a_high] = a.to_le_bytes();
    let [b_low, b_high] = (b << 4).to_le_bytes();
    [a_low, a_high | b_low, b_high]
}

const fn unpack(bytes: [u8; 3]) -> [u16; 2] {
    let [first, middle, last] = bytes;
    [
        u16::from_le_bytes([first, middle & 0x0f]),
        u16::from_le_bytes([middle >> 4 | last << 4, last >> 4]),
    ]
}

struct Codebook {
    /// Magnitudes from here on have the codes of large values.
    middle: f32,
    /// Mean of: large negative, small negative, small positive, large positive.
    means: [f32; 4],
}

impl Codebook {
    fn of(values: &[f32], chosen: &[u16], kept: usize) -> Self {
        let chosen_values = || {
            values
                .chunks(TOPK_CHUNK)
                .zip(chosen.chunks(kept))
                .flat_map(|(chunk, indices)| indices.iter().filter_map(|index| chunk.get(usize::from(*index))))
        };
        // Sums of many f32 in f64: still + and ÷ in a fixed order, but without losing the small ones.
        let (mut sum, mut count) = (0.0f64, 0.0f64);
        for value in chosen_values() {
            sum += f64::from(value.abs());
            count += 1.0;
        }
        let middle = if count > 0.0 { (sum / count) as f32 } else { 0.0 };
        let mut codebook = Self {
            middle,
            means: [0.0; 4],
        };
        let mut bins = [(0.0f64, 0.0f64); 4];
        for value in chosen_values() {
            if let Some((sum, count)) = bins.get_mut(usize::from(codebook.code(*value))) {
                *sum += f64::from(*value);
                *count += 1.0;
            }
        }
        for (mean, (sum, count)) in codebook.means.iter_mut().zip(bins) {
            *mean = if count > 0.0 { (sum / count) as f32 } else { 0.0 };
        }
        codebook
    }

    fn code(&self, value: f32) -> u8 {
        let large = value.abs() >= self.middle;
        match (value < 0.0, large) {
            (true, true) => 0,
            (true, false) => 1,
            (false, false) => 2,
            (false, true) => 3,
        }
    }
}

/// Indices of one chunk, as they are written.
fn indices(bytes: &[u8], k: u16) -> impl Iterator<Item = u16> {
    bytes
        .chunks(3)
        .flat_map(|three| match *three {
            [first, middle, last] => unpack([first, middle, last]),
            [first, middle] => unpack([first, middle, 0]),
            _ => [0, 0],
        })
        .take(usize::from(k))
}

/// Codes of one chunk, as they are written.
fn codes(bytes: &[u8], k: u16) -> impl Iterator<Item = u8> {
    bytes
        .iter()
        .flat_map(|byte| [byte & 3, byte >> 2 & 3, byte >> 4 & 3, byte >> 6])
        .take(usize::from(k))
}

/// Checks a body of exactly the tensor's length: finite codebook, strictly ascending indices (12 bits cannot exceed
/// 4,095), nothing said of padding.
pub(super) fn check(tensor: usize, elements: usize, k: u16, body: &[u8]) -> Result<(), DecodeError> {
    let Some((codebook, chunks)) = body.split_at_checked(CODEBOOK_BYTES) else {
        return Err(DecodeError::TooLarge);
    };
    if !codebook.chunks_exact(4).all(|bytes| split_f32(bytes).0.is_finite()) {
        return Err(DecodeError::NotFinite { tensor });
    }
    for (number, chunk) in chunks.chunks_exact(chunk_bytes(k)).enumerate() {
        let length = elements
            .saturating_sub(number.saturating_mul(TOPK_CHUNK))
            .min(TOPK_CHUNK);
        let (index_part, code_part) = chunk.split_at_checked(index_bytes(k)).ok_or(DecodeError::TooLarge)?;
        let mut previous = None;
        for (index, code) in indices(index_part, k).zip(codes(code_part, k)) {
            if previous.is_some_and(|previous| previous >= index) {
                return Err(DecodeError::Indices { tensor, chunk: number });
            }
            previous = Some(index);
            if usize::from(index) >= length && code != 0 {
                return Err(DecodeError::Padding { tensor });
            }
        }
        let half_index_set = k % 2 == 1 && index_part.last().is_some_and(|byte| byte & 0xf0 != 0);
        let spare_codes_set = match (k % 4, code_part.last()) {
            (0, _) | (_, None) => false,
            (used, Some(byte)) => byte >> (2 * used) != 0,
        };
        if half_index_set || spare_codes_set {
            return Err(DecodeError::Padding { tensor });
        }
    }
    Ok(())
}

/// Writes a checked body over `out`; what was not kept is zero.
pub(super) fn decode(body: &[u8], k: u16, out: &mut [f32]) {
    out.fill(0.0);
    let Some((codebook, chunks)) = body.split_at_checked(CODEBOOK_BYTES) else {
        return;
    };
    let mut means = [0.0; 4];
    for (mean, bytes) in means.iter_mut().zip(codebook.chunks_exact(4)) {
        *mean = split_f32(bytes).0;
    }
    for (values, chunk) in out.chunks_mut(TOPK_CHUNK).zip(chunks.chunks_exact(chunk_bytes(k))) {
        let Some((index_part, code_part)) = chunk.split_at_checked(index_bytes(k)) else {
            return;
        };
        for (index, code) in indices(index_part, k).zip(codes(code_part, k)) {
            if let (Some(value), Some(mean)) = (values.get_mut(usize::from(index)), means.get(usize::from(code))) {
                *value = *mean;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_indices_of_12_bits_survive_three_bytes() {
        for (a, b) in [(0, 0), (1, 4095), (4095, 1), (0x0abc, 0x0def), (4095, 4095)] {
            assert_eq!(unpack(pack(a, b)), [a, b]);
        }
    }

    #[test]
    fn the_largest_are_chosen_and_the_lower_index_wins_a_tie() {
        let mut order = Vec::new();
        choose(&[1.0, -3.0, 2.0, 2.0, -2.0], 3, &mut order);
        assert_eq!(order, [1, 2, 3]);
    }

    #[test]
    fn small_values_of_two_signs_never_share_a_bin() {
        let values = [-4.0, -1.0, 1.0, 4.0, 3.0];
        let codebook = Codebook::of(&values, &[0, 1, 2, 3, 4], 5);
        assert_eq!(codebook.means, [-4.0, -1.0, 1.0, 3.5]);
    }
}
