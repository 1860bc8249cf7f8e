//! The forms that write every element: f32, blockwise int8, and a sign with a three-bit exponent.

use alloc::vec::Vec;

use super::{DecodeError, INT8_BLOCK};

/// Reads a little-endian f32 from the front; zero at the end of the bytes, which checked lengths rule out.
pub(super) fn split_f32(bytes: &[u8]) -> (f32, &[u8]) {
    match bytes.split_first_chunk() {
        Some((first, rest)) => (f32::from_le_bytes(*first), rest),
        None => (0.0, &[]),
    }
}

fn magnitude_max(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |max, value| {
        let magnitude = value.abs();
        if magnitude > max { magnitude } else { max }
    })
}

/// The nearest whole number of a magnitude, halves up. Saturates.
fn round_up_half(magnitude: f32) -> i32 {
    // A cast drops the fraction: no rounding mode, no library.
    (magnitude + 0.5) as i32
}

pub(super) fn encode_raw(values: &[f32], out: &mut Vec<u8>) {
    for value in values {
        out.extend_from_slice(&value.to_le_bytes());
    }
}

pub(super) fn check_raw(tensor: usize, body: &[u8]) -> Result<(), DecodeError> {
    let finite = body.chunks_exact(4).all(|bytes| split_f32(bytes).0.is_finite());
    if finite {
        Ok(())
    } else {
        Err(DecodeError::NotFinite { tensor })
    }
}

pub(super) fn decode_raw(body: &[u8], out: &mut [f32]) {
    for (value, bytes) in out.iter_mut().zip(body.chunks_exact(4)) {
        *value = split_f32(bytes).0;
    }
}

/// `scale = max |v| / 127`, `byte = round(v / scale)`: the error is at most half a scale.
pub(super) fn encode_int8(values: &[f32], out: &mut Vec<u8>) {
    for block in values.chunks(INT8_BLOCK) {
        let scale = magnitude_max(block) / 127.0;
        out.extend_from_slice(&scale.to_le_bytes());
        for value in block {
            // A block of denormals may have a scale of zero: then all of it is zero.
            let steps = if scale > 0.0 {
                round_up_half(value.abs() / scale).min(127)
            } else {
                0
            };
            let signed = if *value < 0.0 { -steps } else { steps };
            out.push((signed as i8).to_le_bytes()[0]);
        }
    }
}

pub(super) fn check_int8(tensor: usize, body: &[u8]) -> Result<(), DecodeError> {
    for block in body.chunks(INT8_BLOCK + 4) {
        let (scale, _) = split_f32(block);
        // 128 is the largest magnitude of a signed byte.
        if !(scale >= 0.0 && (scale * 128.0).is_finite()) {
            return Err(DecodeError::NotFinite { tensor });
        }
    }
    Ok(())
}

pub(super) fn decode_int8(body: &[u8], out: &mut [f32]) {
    for (values, block) in out.chunks_mut(INT8_BLOCK).zip(body.chunks(INT8_BLOCK + 4)) {
        let (scale, steps) = split_f32(block);
        for (value, step) in values.iter_mut().zip(steps) {
            *value = scale * f32::from(i8::from_le_bytes([*step]));
        }
    }
}

/// What the three exponent bits stand for, as a share of the scale. Powers of two: products with them are exact.
const E3M0_SHARES: [f32; 8] = [0.0, 0.015_625, 0.031_25, 0.062_5, 0.125, 0.25, 0.5, 1.0];

/// Half way between two neighbours of [`E3M0_SHARES`]: from here on the upper one is nearer.
const E3M0_MIDDLES: [f32; 7] = [0.007_812_5, 0.023_437_5, 0.046_875, 0.093_75, 0.187_5, 0.375, 0.75];

fn e3m0_bits(value: f32, scale: f32) -> u8 {
    let magnitude = value.abs();
    let mut exponent = 0;
    for middle in E3M0_MIDDLES {
        exponent += u8::from(magnitude >= middle * scale);
    }
    // One pattern for zero, so that equal values have equal bytes.
    let negative = value < 0.0 && exponent > 0;
    u8::from(negative) << 3 | exponent
}

pub(super) fn encode_e3m0(values: &[f32], out: &mut Vec<u8>) {
    let scale = magnitude_max(values);
    out.extend_from_slice(&scale.to_le_bytes());
    let bits = |value: f32| if scale > 0.0 { e3m0_bits(value, scale) } else { 0 };
    for pair in values.chunks(2) {
        match pair {
            [low, high] => out.push(bits(*low) | bits(*high) << 4),
            [low] => out.push(bits(*low)),
            _ => {}
        }
    }
}

pub(super) fn check_e3m0(tensor: usize, elements: usize, body: &[u8]) -> Result<(), DecodeError> {
    let (scale, bits) = split_f32(body);
    if !(scale >= 0.0 && scale.is_finite()) {
        return Err(DecodeError::NotFinite { tensor });
    }
    let negative_zero = bits.iter().any(|byte| byte & 0x0f == 0x08 || byte & 0xf0 == 0x80);
    let padding = elements % 2 == 1 && bits.last().is_some_and(|byte| byte & 0xf0 != 0);
    if negative_zero || padding {
        return Err(DecodeError::Padding { tensor });
    }
    Ok(())
}

pub(super) fn decode_e3m0(body: &[u8], out: &mut [f32]) {
    let (scale, bits) = split_f32(body);
    let mut table = [0.0; 16];
    let (positive, negative) = table.split_at_mut(8);
    for ((positive, negative), share) in positive.iter_mut().zip(negative).zip(E3M0_SHARES) {
        *positive = scale * share;
        *negative = -(scale * share);
    }
    let value = |nibble: u8| table.get(usize::from(nibble)).copied().unwrap_or(0.0);
    for (pair, byte) in out.chunks_mut(2).zip(bits) {
        match pair {
            [low, high] => (*low, *high) = (value(byte & 0x0f), value(byte >> 4)),
            [low] => *low = value(byte & 0x0f),
            _ => {}
        }
    }
}
