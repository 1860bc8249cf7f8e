//! The wire's sparse form: the largest 64 of each 4,096 elements, two bits for each, and what is then still owed.

use cubecl::prelude::*;
use polder_protocol::codec::TOPK_CHUNK;

use super::memory::{one_cube_each, size, small, units};
use super::{Cost, CubeError, Cubes, Floats, UNITS, Words};

/// Elements kept of each chunk.
const KEPT: usize = 64;
/// Words of a chunk on the wire: 64 indices of 12 bits, then 64 codes of 2.
const CHUNK_WORDS: usize = 28;

/// Where an element stands: above all padding, and among the others as its magnitude.
#[cube]
fn rank(values: &[f32], at: u32, count: u32) -> u32 {
    let mut rank = 0u32.runtime();
    if at < count {
        rank = (u32::reinterpret(values[at as usize]) & 0x7fff_ffffu32) + 1u32;
    }
    rank
}

/// One cube for each chunk, one run of 64 elements for each unit. The rank of the last that is kept is found bit by bit,
/// and of those of this very rank the first are kept.
#[cube(launch)]
fn select(
    values: &[f32],
    indices: &mut [u32],
    chosen: &mut [f32],
    count: u32,
    #[comptime] kept: u32,
    #[comptime] run: u32,
    #[comptime] units: u32,
) {
    let mut counts = Shared::<[u32]>::new_slice(units as usize);
    let mut equals = Shared::<[u32]>::new_slice(units as usize);
    let chunk = CUBE_POS as u32;
    let start = chunk * comptime!(run * units);
    if start < count {
        let first = start + UNIT_POS * run;
        let mut least = 0u32.runtime();
        for step in 0..32u32 {
            let candidate = least | (1u32 << (31u32 - step));
            let mut own = 0u32.runtime();
            for i in 0..run {
                if rank(values, first + i, count) >= candidate {
                    own += 1u32;
                }
            }
            counts[UNIT_POS as usize] = own;
            sync_cube();
            let mut all = 0u32.runtime();
            for i in 0..units {
                all += counts[i as usize];
            }
            if all >= kept {
                least = candidate;
            }
            sync_cube();
        }
        let mut above = 0u32.runtime();
        let mut equal = 0u32.runtime();
        for i in 0..run {
            let rank = rank(values, first + i, count);
            if rank > least {
                above += 1u32;
            }
            if rank == least {
                equal += 1u32;
            }
        }
        counts[UNIT_POS as usize] = above;
        equals[UNIT_POS as usize] = equal;
        sync_cube();
        // Before this unit's run: those above, and those of the last rank.
        let mut all_above = 0u32.runtime();
        let mut above_before = 0u32.runtime();
        let mut equal_before = 0u32.runtime();
        for i in 0..units {
            all_above += counts[i as usize];
            if i < UNIT_POS {
                above_before += counts[i as usize];
                equal_before += equals[i as usize];
            }
        }
        let room = kept - all_above;
        let mut taken = equal_before;
        if taken > room {
            taken = room;
        }
        let mut place = chunk * kept + above_before + taken;
        for i in 0..run {
            let rank = rank(values, first + i, count);
            let mut keeps = rank > least;
            if rank == least && equal_before < room {
                keeps = true.runtime();
            }
            if rank == least {
                equal_before += 1u32;
            }
            if keeps {
                indices[place as usize] = UNIT_POS * run + i;
                let mut value = f32::new(0.0f32);
                if first + i < count {
                    value = values[(first + i) as usize];
                }
                chosen[place as usize] = value;
                place += 1u32;
            }
        }
    }
}

/// The code of a value in a codebook; zero for padding.
#[cube]
fn code_of(value: f32, middle: f32) -> u32 {
    let mut code = 2u32.runtime();
    if value < 0.0f32 {
        code = 1u32.runtime();
    }
    if value.abs() >= middle {
        if value < 0.0f32 {
            code = 0u32.runtime();
        } else {
            code = 3u32.runtime();
        }
    }
    code
}

/// One cube for each chunk, one unit for each element that was kept and each word that is written.
#[cube(launch)]
fn pack(
    values: &mut [f32],
    indices: &[u32],
    chosen: &[f32],
    codebook: &[f32],
    words: &mut [u32],
    count: u32,
    chunks: u32,
    #[comptime] kept: u32,
    #[comptime] chunk_elements: u32,
) {
    let chunk = CUBE_POS as u32;
    if chunk < chunks {
        let middle = codebook[4];
        let at = chunk * chunk_elements + indices[(chunk * kept + UNIT_POS) as usize];
        if at < count {
            let value = chosen[(chunk * kept + UNIT_POS) as usize];
            values[at as usize] = value - codebook[code_of(value, middle) as usize];
        }
        // 32 bits of a row of 12-bit indices begin at bit 32 u.
        if UNIT_POS < 24u32 {
            let mut word = 0u32.runtime();
            let index = UNIT_POS * 32u32 / 12u32;
            let skipped = UNIT_POS * 32u32 % 12u32;
            word |= indices[(chunk * kept + index) as usize] >> skipped;
            for i in 1..4u32 {
                let shift = i * 12u32 - skipped;
                if shift < 32u32 && index + i < kept {
                    word |= indices[(chunk * kept + index + i) as usize] << shift;
                }
            }
            words[(chunk * 28u32 + UNIT_POS) as usize] = word;
        }
        if UNIT_POS >= 24u32 && UNIT_POS < 28u32 {
            let first = (UNIT_POS - 24u32) * 16u32;
            let mut word = 0u32.runtime();
            for i in 0..16u32 {
                let place = chunk * kept + first + i;
                if chunk * chunk_elements + indices[place as usize] < count {
                    word |= code_of(chosen[place as usize], middle) << (i * 2u32);
                }
            }
            words[(chunk * 28u32 + UNIT_POS) as usize] = word;
        }
    }
}

impl Cubes {
    /// Writes a tensor as [`polder_protocol::codec::Form::TopkQ2`] with k = 64 does, bit for bit, and leaves of `values`
    /// what is still owed: the values less what the bytes say. The codebook is made on the host, of one element in 64:
    /// its sums are in f64, which graphics devices need not have.
    ///
    /// # Errors
    ///
    /// [`CubeError`] where the device fails, and for 2³² elements or more.
    pub fn encode_sparsely(&self, values: &Floats) -> Result<Vec<u8>, CubeError> {
        let count = size("a tensor", &[values.len()])?;
        let chunks = count.div_ceil(TOPK_CHUNK);
        size("a tensor", &[chunks, TOPK_CHUNK])?;
        let indices: Words = self.room(chunks * KEPT);
        let chosen: Floats = self.room(chunks * KEPT);
        const { assert!(TOPK_CHUNK.is_multiple_of(UNITS as usize) && KEPT == UNITS as usize) };
        if chunks == 0 {
            return Ok(vec![0; 16]);
        }
        select::launch(
            self.client(),
            one_cube_each(chunks),
            units(),
            values.argument(),
            indices.argument(),
            chosen.argument(),
            small(count),
            small(KEPT),
            small(TOPK_CHUNK) / UNITS,
            UNITS,
        );
        let kept = self.read(&chosen)?;
        let places = self.read(&indices)?;
        // Padding is not a value.
        let inside = places.iter().enumerate();
        let inside = inside.map(|(i, place)| i / KEPT * TOPK_CHUNK + (*place as usize) < count);
        let kept: Vec<f32> = kept
            .iter()
            .zip(inside)
            .filter_map(|(value, inside)| inside.then_some(*value))
            .collect();
        let (middle, means) = codebook(&kept);
        let [a, b, c, d] = means;
        let words: Words = self.room(chunks * CHUNK_WORDS);
        pack::launch(
            self.client(),
            one_cube_each(chunks),
            units(),
            values.argument(),
            indices.argument(),
            chosen.argument(),
            self.upload(&[a, b, c, d, middle]).argument(),
            words.argument(),
            small(count),
            small(chunks),
            small(KEPT),
            small(TOPK_CHUNK),
        );
        let mut bytes: Vec<u8> = means.iter().flat_map(|mean| mean.to_le_bytes()).collect();
        bytes.extend(self.read(&words)?.iter().flat_map(|word| word.to_le_bytes()));
        Ok(bytes)
    }
}

/// The mean magnitude, and the means of: large negative, small negative, small positive, large positive values.
fn codebook(kept: &[f32]) -> (f32, [f32; 4]) {
    let mean = |sum: f64, count: f64| if count > 0.0 { (sum / count) as f32 } else { 0.0 };
    let sum = kept.iter().fold(0.0, |sum, value| sum + f64::from(value.abs()));
    let middle = mean(sum, kept.len() as f64);
    let mut bins = [(0.0, 0.0); 4];
    for value in kept {
        let (sum, count) = match (*value < 0.0, value.abs() >= middle) {
            (true, true) => &mut bins[0],
            (true, false) => &mut bins[1],
            (false, false) => &mut bins[2],
            (false, true) => &mut bins[3],
        };
        *sum += f64::from(*value);
        *count += 1.0;
    }
    (middle, bins.map(|(sum, count)| mean(sum, count)))
}

impl Cost {
    /// Of [`Cubes::encode_sparsely`]: the selection looks at each element's bits 33 times, from a cache if there is one,
    /// and makes no floating-point operation; what is owed takes one for each element kept.
    pub const fn encode_sparsely(count: usize) -> Self {
        let chunks = count.div_ceil(TOPK_CHUNK);
        let kept = chunks * KEPT;
        Self::new(4 * count + 8 * kept, 12 * kept + 4 * CHUNK_WORDS * chunks, kept)
    }
}
