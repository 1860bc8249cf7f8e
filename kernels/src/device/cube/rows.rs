//! Sums, factors and choices of rows.

use cubecl::prelude::*;

use super::memory::{one_unit_each, size, small, units};
use super::{Cost, CubeError, Cubes, Floats, Words};

/// Some rows of several.
#[derive(Debug)]
pub struct PickedRows {
    numbers: Words,
    /// Of how many.
    of: usize,
}

/// One unit for each element; `added` begins anew when it has ended.
#[cube(launch)]
fn add(x: &mut [f32], added: &[f32], width: u32, count: u32) {
    let at = ABSOLUTE_POS as u32;
    if at < count {
        x[at as usize] += added[(at % width) as usize];
    }
}

/// One unit for each element.
#[cube(launch)]
fn clear(x: &mut [f32], count: u32) {
    if ABSOLUTE_POS < count as usize {
        x[ABSOLUTE_POS] = 0.0f32;
    }
}

/// One unit for each element.
#[cube(launch)]
fn scale_rows(x: &mut [f32], factors: &[f32], width: u32, count: u32) {
    let at = ABSOLUTE_POS as u32;
    if at < count {
        x[at as usize] *= factors[(at / width) as usize];
    }
}

/// One unit for each element.
#[cube(launch)]
fn gather(x: &[f32], numbers: &[u32], out: &mut [f32], width: u32, count: u32) {
    let at = ABSOLUTE_POS as u32;
    if at < count {
        out[at as usize] = x[(numbers[(at / width) as usize] * width + at % width) as usize];
    }
}

/// One unit for each element.
#[cube(launch)]
fn add_to_rows(made: &[f32], numbers: &[u32], factors: &[f32], x: &mut [f32], width: u32, count: u32) {
    let at = ABSOLUTE_POS as u32;
    if at < count {
        let row = at / width;
        x[(numbers[row as usize] * width + at % width) as usize] += factors[row as usize] * made[at as usize];
    }
}

impl Cubes {
    /// `x ← x + added`, to each row where `added` is one row: a bias.
    ///
    /// # Errors
    ///
    /// [`CubeError`] where `x` is not a whole number of times as long.
    pub fn add(&self, x: &Floats, added: &Floats) -> Result<(), CubeError> {
        let (count, width) = (size("x", &[x.len()])?, added.len());
        x.check("x", count.checked_div(width).unwrap_or(0) * width)?;
        if count > 0 {
            add::launch(
                self.client(),
                one_unit_each(count),
                units(),
                x.argument(),
                added.argument(),
                small(width),
                small(count),
            );
        }
        Ok(())
    }

    /// `count` zeros.
    ///
    /// # Errors
    ///
    /// [`CubeError`] for 2³² or more.
    pub fn zeros(&self, count: usize) -> Result<Floats, CubeError> {
        let out = self.room(size("zeros", &[count])?);
        if count > 0 {
            clear::launch(
                self.client(),
                one_unit_each(count),
                units(),
                out.argument(),
                small(count),
            );
        }
        Ok(out)
    }

    /// Multiplies each row by its factor.
    ///
    /// # Shapes
    ///
    /// - `x`: `[rows, width]`; `factors`: `[rows]`
    ///
    /// # Errors
    ///
    /// [`CubeError`] for other shapes.
    pub fn scale_rows(&self, x: &Floats, factors: &Floats) -> Result<(), CubeError> {
        let (count, rows) = (size("x", &[x.len()])?, factors.len());
        let width = count.checked_div(rows).unwrap_or(0);
        x.check("x", rows * width)?;
        if count > 0 {
            scale_rows::launch(
                self.client(),
                one_unit_each(count),
                units(),
                x.argument(),
                factors.argument(),
                small(width),
                small(count),
            );
        }
        Ok(())
    }

    /// Brings to the device which of `of` rows are meant.
    ///
    /// # Errors
    ///
    /// [`CubeError`] for a row that is not among them.
    pub fn pick(&self, rows: &[usize], of: usize) -> Result<PickedRows, CubeError> {
        let numbers = rows.iter().map(|row| match *row < of {
            true => size("a row", &[*row]).map(small),
            false => Err(CubeError::Range {
                what: "a row",
                value: *row,
                limit: "below the number of rows",
            }),
        });
        Ok(PickedRows {
            numbers: self.upload(&numbers.collect::<Result<Vec<_>, _>>()?),
            of,
        })
    }

    /// The rows that were picked, as memory of their own.
    ///
    /// # Shapes
    ///
    /// - `x`: `[rows, width]`; the answer: `[picked, width]`
    ///
    /// # Errors
    ///
    /// [`CubeError`] for other shapes.
    pub fn gather(&self, x: &Floats, picked: &PickedRows) -> Result<Floats, CubeError> {
        let width = size("x", &[x.len()])?.checked_div(picked.of).unwrap_or(0);
        x.check("x", picked.of * width)?;
        let out = self.room(size("rows", &[picked.numbers.len(), width])?);
        if !out.is_empty() {
            gather::launch(
                self.client(),
                one_unit_each(out.len()),
                units(),
                x.argument(),
                picked.numbers.argument(),
                out.argument(),
                small(width),
                small(out.len()),
            );
        }
        Ok(out)
    }

    /// Adds to each row that was picked what was made of it, times a factor. No row may have been picked twice: who of the two
    /// comes first would be left to chance.
    ///
    /// # Shapes
    ///
    /// - `x`: `[rows, width]`; `made`: `[picked, width]`; `factors`: `[picked]`
    ///
    /// # Errors
    ///
    /// [`CubeError`] for other shapes.
    pub fn add_to_rows(
        &self,
        x: &Floats,
        made: &Floats,
        factors: &Floats,
        picked: &PickedRows,
    ) -> Result<(), CubeError> {
        let width = size("x", &[x.len()])?.checked_div(picked.of).unwrap_or(0);
        x.check("x", picked.of * width)?;
        made.check("rows", size("rows", &[picked.numbers.len(), width])?)?;
        factors.check("factors", picked.numbers.len())?;
        if !made.is_empty() {
            add_to_rows::launch(
                self.client(),
                one_unit_each(made.len()),
                units(),
                made.argument(),
                picked.numbers.argument(),
                factors.argument(),
                x.argument(),
                small(width),
                small(made.len()),
            );
        }
        Ok(())
    }
}

impl Cost {
    /// Of [`Cubes::add`] for `count` elements and as many to add as `width`.
    pub const fn add(count: usize, width: usize) -> Self {
        Self::new(4 * (count + width), 4 * count, count)
    }

    /// Of [`Cubes::scale_rows`].
    pub const fn scale_rows(rows: usize, width: usize) -> Self {
        Self::new(4 * rows * (width + 1), 4 * rows * width, rows * width)
    }

    /// Of [`Cubes::gather`] for so many picked rows.
    pub const fn gather(rows: usize, width: usize) -> Self {
        Self::new(4 * rows * (width + 1), 4 * rows * width, 0)
    }

    /// Of [`Cubes::add_to_rows`] for so many picked rows.
    pub const fn add_to_rows(rows: usize, width: usize) -> Self {
        Self::new(8 * rows * (width + 1), 4 * rows * width, 2 * rows * width)
    }
}
