//! Activations in int8: blocks of 256 that share a scale, in the numbers of the wire's int8 codec.

use cubecl::prelude::*;
use polder_protocol::codec::INT8_BLOCK;

use super::memory::{one_cube_each, one_unit_each, size, small, units};
use super::{Cost, CubeError, Cubes, Floats, UNITS, Words};

/// Quantised numbers on the device: four bytes to a word, the first lowest, and a scale for each 256.
#[derive(Debug, Clone)]
pub struct Int8OnDevice {
    /// `⌈len / 4⌉` words; bytes beyond the last element are zero.
    pub bytes: Words,
    /// `⌈len / 256⌉` scales; a value is `scale · byte`.
    pub scales: Floats,
    len: usize,
}

/// One cube for each block, one unit for each word of it.
#[cube(launch)]
fn quantise(x: &[f32], bytes: &mut [u32], scales: &mut [f32], count: u32, #[comptime] units: u32) {
    let mut largest = Shared::<[f32]>::new_slice(units as usize);
    let block = CUBE_POS as u32;
    let first = block * comptime!(4u32 * units) + UNIT_POS * 4u32;
    let mut own = f32::new(0.0f32);
    #[unroll]
    for i in 0..4u32 {
        if first + i < count {
            let magnitude = x[(first + i) as usize].abs();
            if magnitude > own {
                own = magnitude;
            }
        }
    }
    largest[UNIT_POS as usize] = own;
    sync_cube();
    let mut all = f32::new(0.0f32);
    for i in 0..units {
        let magnitude = largest[i as usize];
        if magnitude > all {
            all = magnitude;
        }
    }
    let scale = all / 127.0f32;
    if first < count {
        let mut word = 0u32.runtime();
        #[unroll]
        for i in 0..4u32 {
            if first + i < count && scale > 0.0f32 {
                let value = x[(first + i) as usize];
                // Halves up: a cast drops the fraction.
                let mut steps = u32::cast_from(value.abs() / scale + 0.5f32);
                if steps > 127u32 {
                    steps = 127u32.runtime();
                }
                if value < 0.0f32 {
                    steps = (256u32 - steps) & 255u32;
                }
                word |= steps << comptime!(8u32 * i);
            }
        }
        bytes[(first / 4u32) as usize] = word;
        if UNIT_POS == 0 {
            scales[block as usize] = scale;
        }
    }
}

/// One unit for each element.
#[cube(launch)]
fn dequantise(bytes: &[u32], scales: &[f32], out: &mut [f32], count: u32, #[comptime] block: u32) {
    let at = ABSOLUTE_POS as u32;
    if at < count {
        let byte = (bytes[(at / 4u32) as usize] >> (at % 4u32 * 8u32)) & 255u32;
        let mut value = f32::cast_from(byte);
        if byte > 127u32 {
            value -= 256.0f32;
        }
        out[at as usize] = value * scales[(at / block) as usize];
    }
}

impl Cubes {
    /// Quantises: `scale = max |x| / 127` of each block of 256, the last of which may be shorter, and
    /// `byte = round(x / scale)`, as [`polder_protocol::codec::Form::Int8`]. Division is not exact on every device, so a
    /// scale may be off by its last bit, and a byte by one where it is next to a half.
    ///
    /// # Errors
    ///
    /// [`CubeError`] for 2³² elements or more.
    pub fn quantise(&self, x: &Floats) -> Result<Int8OnDevice, CubeError> {
        let len = size("activations", &[x.len()])?;
        let made = Int8OnDevice {
            bytes: self.room(len.div_ceil(4)),
            scales: self.room(len.div_ceil(INT8_BLOCK)),
            len,
        };
        // One unit takes four elements of a block.
        const { assert!(UNITS as usize * 4 == INT8_BLOCK) };
        if len > 0 {
            quantise::launch(
                self.client(),
                one_cube_each(len.div_ceil(INT8_BLOCK)),
                units(),
                x.argument(),
                made.bytes.argument(),
                made.scales.argument(),
                small(len),
                UNITS,
            );
        }
        Ok(made)
    }

    /// Widens what [`Cubes::quantise`] made.
    pub fn dequantise(&self, quantised: &Int8OnDevice) -> Floats {
        let out = self.room(quantised.len);
        if quantised.len > 0 {
            dequantise::launch(
                self.client(),
                one_unit_each(quantised.len),
                units(),
                quantised.bytes.argument(),
                quantised.scales.argument(),
                out.argument(),
                small(quantised.len),
                small(INT8_BLOCK),
            );
        }
        out
    }
}

impl Cost {
    /// Of [`Cubes::quantise`].
    pub const fn quantise(count: usize) -> Self {
        let blocks = count.div_ceil(INT8_BLOCK);
        Self::new(4 * count, count.div_ceil(4) * 4 + 4 * blocks, 3 * count + blocks)
    }

    /// Of [`Cubes::dequantise`].
    pub const fn dequantise(count: usize) -> Self {
        let blocks = count.div_ceil(INT8_BLOCK);
        Self::new(count.div_ceil(4) * 4 + 4 * blocks, 4 * count, count)
    }
}
