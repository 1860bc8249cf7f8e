//! Sums of squares of many vectors, scaled on the way, in an order that is always the same.

use cubecl::prelude::*;

use super::memory::{one_cube_each, size, small, units};
use super::normalise::sum_of_cube;
use super::{Cost, CubeError, Cubes, Floats, UNITS};

/// Elements that a unit sums up: enough to make the sums few, and few enough to keep f32 exact to some ulps.
const EACH: usize = 64;
/// Elements of one partial sum.
const PIECE: usize = EACH * UNITS as usize;

/// One cube for each piece.
#[cube(launch)]
fn square_sums(
    values: &mut [f32],
    sums: &mut [f32],
    count: u32,
    pieces: u32,
    first: u32,
    share: f32,
    #[comptime] each: u32,
    #[comptime] units: u32,
) {
    let mut shared = Shared::<[f32]>::new_slice(units as usize);
    let piece = CUBE_POS as u32;
    if piece < pieces {
        let mut own = 0.0f32;
        let mut at = piece * (each * units) + UNIT_POS;
        for _ in 0..each {
            if at < count {
                let value = values[at as usize] * share;
                values[at as usize] = value;
                own += value * value;
            }
            at += units;
        }
        let sum = sum_of_cube(own, &mut shared, units);
        if UNIT_POS == 0 {
            sums[(first + piece) as usize] = sum;
        }
    }
}

/// Sums of squares that are being made on a device.
#[derive(Debug)]
pub struct SquareSums<'a> {
    cubes: &'a Cubes,
    sums: Floats,
    made: usize,
}

impl<'a> SquareSums<'a> {
    /// The room that vectors of these lengths need.
    pub fn room(lengths: impl Iterator<Item = usize>) -> usize {
        lengths.map(|length| length.div_ceil(PIECE)).sum()
    }

    /// Room for so many partial sums.
    pub fn new(cubes: &'a Cubes, room: usize) -> Self {
        Self {
            cubes,
            sums: cubes.room(room.max(1)),
            made: 0,
        }
    }

    /// Multiplies a vector by `share`, in place, and adds the sum of its squares.
    ///
    /// # Errors
    ///
    /// [`CubeError`] where there is no room left.
    pub fn add(&mut self, values: &Floats, share: f32) -> Result<(), CubeError> {
        let count = size("a vector", &[values.len()])?;
        let pieces = count.div_ceil(PIECE);
        if self.made + pieces > self.sums.len() {
            return Err(CubeError::Length {
                what: "the partial sums",
                found: self.sums.len(),
                expected: self.made + pieces,
            });
        }
        if pieces > 0 {
            square_sums::launch(
                self.cubes.client(),
                one_cube_each(pieces),
                units(),
                values.argument(),
                self.sums.argument(),
                small(count),
                small(pieces),
                small(self.made),
                share,
                small(EACH),
                UNITS,
            );
        }
        self.made += pieces;
        Ok(())
    }

    /// The partial sums, in the order of the vectors: their own sum is for a wider type than f32.
    ///
    /// # Errors
    ///
    /// [`CubeError::Device`] where the driver failed.
    pub fn read(self) -> Result<Vec<f32>, CubeError> {
        let mut sums = self.cubes.read(&self.sums)?;
        sums.truncate(self.made);
        Ok(sums)
    }
}

impl Cost {
    /// Of [`SquareSums::add`].
    pub const fn square_sums(count: usize) -> Self {
        Self::new(4 * count, 4 * (count + count.div_ceil(PIECE)), 3 * count)
    }
}
