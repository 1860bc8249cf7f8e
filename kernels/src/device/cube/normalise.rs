//! The residual addition and the RMS norm behind it, in one pass.

use cubecl::prelude::*;

use super::memory::{one_cube_each, size, small, units};
use super::{Cost, CubeError, Cubes, Floats, UNITS};

/// Sums `own` over the units of a cube; every unit gets it.
#[cube]
pub(super) fn sum_of_cube(own: f32, sums: &mut Shared<[f32]>, #[comptime] units: u32) -> f32 {
    sums[UNIT_POS as usize] = own;
    sync_cube();
    let mut step = comptime!(units / 2).runtime();
    while step > 0 {
        if UNIT_POS < step {
            sums[UNIT_POS as usize] += sums[(UNIT_POS + step) as usize];
        }
        sync_cube();
        step /= 2u32;
    }
    sums[0]
}

/// One cube for each row.
#[cube(launch)]
fn add_and_normalise(
    x: &mut [f32],
    added: &[f32],
    gain: &[f32],
    normed: &mut [f32],
    rows: u32,
    cols: u32,
    epsilon: f32,
    #[comptime] adds: bool,
    #[comptime] units: u32,
) {
    let mut sums = Shared::<[f32]>::new_slice(units as usize);
    let row = CUBE_POS as u32;
    if row < rows {
        let first = row * cols;
        let mut own = 0.0f32;
        let mut column = UNIT_POS;
        while column < cols {
            let at = (first + column) as usize;
            let mut value = x[at];
            if comptime!(adds) {
                value += added[at];
                x[at] = value;
            }
            own += value * value;
            column += units;
        }
        let squares = sum_of_cube(own, &mut sums, units);
        let scale = 1.0f32 / (squares / f32::cast_from(cols) + epsilon).sqrt();
        let mut column = UNIT_POS;
        while column < cols {
            let at = (first + column) as usize;
            normed[at] = x[at] * scale * gain[column as usize];
            column += units;
        }
    }
}

impl Cubes {
    /// `x ← x + added`, where there is something to add, and `normed ← x / √(mean(x²) + epsilon) · gain`, row by row
    /// (Zhang and Sennrich 2019, RMSNorm).
    ///
    /// # Shapes
    ///
    /// - `x`, `added`, the answer: `[rows, cols]`; `gain`: `[cols]`
    ///
    /// # Errors
    ///
    /// [`CubeError`] for other shapes.
    pub fn add_and_normalise(
        &self,
        x: &Floats,
        added: Option<&Floats>,
        gain: &Floats,
        epsilon: f32,
    ) -> Result<Floats, CubeError> {
        let cols = gain.len();
        let rows = x.len().checked_div(cols).unwrap_or(0);
        x.check("x", size("x", &[rows, cols])?)?;
        if let Some(added) = added {
            added.check("what is added", x.len())?;
        }
        let normed = self.room(x.len());
        if rows > 0 {
            add_and_normalise::launch(
                self.client(),
                one_cube_each(rows),
                units(),
                x.argument(),
                added.unwrap_or(gain).argument(),
                gain.argument(),
                normed.argument(),
                small(rows),
                small(cols),
                epsilon,
                added.is_some(),
                UNITS,
            );
        }
        Ok(normed)
    }
}

impl Cost {
    /// Of [`Cubes::add_and_normalise`].
    pub const fn add_and_normalise(rows: usize, cols: usize, adds: bool) -> Self {
        let n = rows * cols;
        match adds {
            true => Self::new(8 * n + 4 * cols, 8 * n, 5 * n + 4 * rows),
            false => Self::new(4 * n + 4 * cols, 4 * n, 4 * n + 4 * rows),
        }
    }
}
