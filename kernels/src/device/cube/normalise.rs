//! The residual addition and the norm behind it, in one pass.

use cubecl::prelude::*;

use super::memory::{one_cube_each, size, small, units};
use super::{Cost, CubeError, Cubes, Floats, UNITS};

/// A norm over the last axis, on the device.
#[derive(Debug, Clone)]
pub struct NormOnDevice {
    /// `[width]`
    pub gain: Floats,
    /// `[width]`; where there is one, the mean is taken away first (`LayerNorm`), otherwise not (`RMSNorm`).
    pub bias: Option<Floats>,
    /// Added to the mean square.
    pub epsilon: f32,
}

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
    bias: &[f32],
    normed: &mut [f32],
    rows: u32,
    cols: u32,
    epsilon: f32,
    #[comptime] adds: bool,
    #[comptime] centred: bool,
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
            if comptime!(centred) {
                own += value;
            } else {
                own += value * value;
            }
            column += units;
        }
        let mut mean = f32::new(0.0f32);
        let mut squares = sum_of_cube(own, &mut sums, units);
        if comptime!(centred) {
            mean = squares / f32::cast_from(cols);
            let mut spread = f32::new(0.0f32);
            let mut column = UNIT_POS;
            while column < cols {
                let off = x[(first + column) as usize] - mean;
                spread += off * off;
                column += units;
            }
            // Everybody has read the first sum.
            sync_cube();
            squares = sum_of_cube(spread, &mut sums, units);
        }
        let scale = 1.0f32 / (squares / f32::cast_from(cols) + epsilon).sqrt();
        let mut column = UNIT_POS;
        while column < cols {
            let at = (first + column) as usize;
            let mut value = (x[at] - mean) * scale * gain[column as usize];
            if comptime!(centred) {
                value += bias[column as usize];
            }
            normed[at] = value;
            column += units;
        }
    }
}

impl Cubes {
    /// `x ← x + added`, where there is something to add, and `normed ← x / √(mean(x²) + epsilon) · gain`, row by row
    /// (Zhang and Sennrich 2019, RMSNorm), or with `x − mean(x)` in place of `x`, and `+ bias` (Ba et al. 2016, LayerNorm).
    ///
    /// # Shapes
    ///
    /// - `x`, `added`, the answer: `[rows, cols]`, `cols` being the norm's width
    ///
    /// # Errors
    ///
    /// [`CubeError`] for other shapes.
    pub fn add_and_normalise(
        &self,
        x: &Floats,
        added: Option<&Floats>,
        norm: &NormOnDevice,
    ) -> Result<Floats, CubeError> {
        let NormOnDevice { gain, bias, epsilon } = norm;
        let cols = gain.len();
        let rows = x.len().checked_div(cols).unwrap_or(0);
        x.check("x", size("x", &[rows, cols])?)?;
        if let Some(added) = added {
            added.check("what is added", x.len())?;
        }
        if let Some(bias) = bias {
            bias.check("a norm's bias", cols)?;
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
                bias.as_ref().unwrap_or(gain).argument(),
                normed.argument(),
                small(rows),
                small(cols),
                *epsilon,
                added.is_some(),
                bias.is_some(),
                UNITS,
            );
        }
        Ok(normed)
    }
}

impl Cost {
    /// Of [`Cubes::add_and_normalise`].
    pub const fn add_and_normalise(norm: &NormOnDevice, rows: usize, adds: bool) -> Self {
        let cols = norm.gain.len();
        let (n, adds, centred) = (rows * cols, adds as usize, norm.bias.is_some() as usize);
        Self::new(
            4 * n * (1 + adds) + 4 * cols * (1 + centred),
            4 * n * (1 + adds),
            n * (4 + adds + 4 * centred) + 4 * rows,
        )
    }
}
