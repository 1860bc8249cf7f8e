//! What a model's bits per byte must be compared with.

use std::io;

/// The hardest that the compressor tries.
const LEVEL: i32 = 19;

/// Bits per byte of `text` under its own byte frequencies.
pub fn order_0_bits_per_byte(text: &[u8]) -> f32 {
    let mut counts = [0u64; 256];
    for byte in text {
        if let Some(count) = counts.get_mut(usize::from(*byte)) {
            *count += 1;
        }
    }
    let total = text.len() as f64;
    let share = |count: u64| count as f64 / total;
    let present = counts.iter().filter(|count| **count > 0);
    present.map(|count| -share(*count) * share(*count).log2()).sum::<f64>() as f32
}

/// Bits per byte of `text` after zstd at level 19, primed with `primer` as a dictionary.
///
/// # Errors
///
/// What zstd says.
pub fn compressor_bits_per_byte(text: &[u8], primer: &[u8]) -> io::Result<f32> {
    if text.is_empty() {
        return Ok(0.0);
    }
    let compressed = zstd::bulk::Compressor::with_dictionary(LEVEL, primer)?.compress(text)?;
    Ok(compressed.len() as f32 * 8.0 / text.len() as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_equally_frequent_bytes_take_one_bit_each() {
        assert_eq!(order_0_bits_per_byte(b"abababab"), 1.0);
        assert_eq!(order_0_bits_per_byte(b"aaaa"), 0.0);
        assert_eq!(order_0_bits_per_byte(b""), 0.0);
    }

    #[test]
    fn a_primed_compressor_knows_what_it_has_seen() {
        let primer = b"All human beings are born free and equal in dignity and rights. ".repeat(4);
        let text = b"All human beings are born free and equal in dignity and rights.";
        let primed = compressor_bits_per_byte(text, &primer).unwrap();
        let plain = compressor_bits_per_byte(text, b"").unwrap();
        assert!(primed * 2.0 < plain, "{primed} against {plain}");
    }
}
