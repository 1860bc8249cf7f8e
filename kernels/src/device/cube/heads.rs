//! Products of each head with a weight of its own, and columns of rows: what attention over latents needs besides.

use cubecl::prelude::*;

use super::memory::{one_unit_each, size, small, units};
use super::{Cost, CubeError, Cubes, Floats};

/// Some columns of rows `[rows, width]`.
#[derive(Debug, Clone, Copy)]
pub struct Columns<'a> {
    /// The rows.
    pub of: &'a Floats,
    /// Elements of a row.
    pub width: usize,
    /// The first column.
    pub first: usize,
}

/// One unit for each element of the answer.
#[cube(launch)]
fn multiply_heads(
    x: &[f32],
    weight: &[f32],
    out: &mut [f32],
    heads: u32,
    x_width: u32,
    cols: u32,
    rows: u32,
    out_width: u32,
    count: u32,
) {
    let at = ABSOLUTE_POS as u32;
    if at < count {
        let row = at % rows;
        let head = at / rows;
        let from = head * x_width;
        let own = head % heads * cols;
        let mut sum = f32::new(0.0f32);
        for column in 0..cols {
            sum += x[(from + column) as usize] * weight[((own + column) * rows + row) as usize];
        }
        out[(head * out_width + row) as usize] = sum;
    }
}

/// One unit for each element that is copied.
#[cube(launch)]
fn copy_columns(
    source: &[f32],
    target: &mut [f32],
    source_width: u32,
    source_first: u32,
    target_width: u32,
    target_first: u32,
    columns: u32,
    count: u32,
) {
    let at = ABSOLUTE_POS as u32;
    if at < count {
        let (row, column) = (at / columns, at % columns);
        let value = source[(row * source_width + source_first + column) as usize];
        target[(row * target_width + target_first + column) as usize] = value;
    }
}

impl Cubes {
    /// Multiplies the first `cols` elements of each head with the head's own weight, into the first `rows` elements of each
    /// head of `out`, which is other memory.
    ///
    /// # Shapes
    ///
    /// - `x`: `[n, heads, x_width]`; `weight`: `[heads, cols, rows]`; `out`: `[n, heads, out_width]`
    ///
    /// # Errors
    ///
    /// [`CubeError`] for other shapes.
    pub fn multiply_heads(
        &self,
        (x, x_width): (&Floats, usize),
        weight: &Floats,
        [heads, cols, rows]: [usize; 3],
        (out, out_width): (&Floats, usize),
    ) -> Result<(), CubeError> {
        weight.check("the heads' weight", size("the heads' weight", &[heads, cols, rows])?)?;
        let n = x.len() / (heads * x_width).max(1);
        x.check("x", size("x", &[n, heads, x_width])?)?;
        out.check("products", size("products", &[n, heads, out_width])?)?;
        if cols > x_width || rows > out_width {
            return Err(CubeError::Range {
                what: "a head's weight",
                value: cols.max(rows),
                limit: "the widths of its input and its output",
            });
        }
        let count = n * heads * rows;
        if count > 0 {
            multiply_heads::launch(
                self.client(),
                one_unit_each(count),
                units(),
                x.argument(),
                weight.argument(),
                out.argument(),
                small(heads),
                small(x_width),
                small(cols),
                small(rows),
                small(out_width),
                small(count),
            );
        }
        Ok(())
    }

    /// Copies `columns` columns of `rows` rows, from the first of `source` on to the first of `target` on, which is other
    /// memory.
    ///
    /// # Errors
    ///
    /// [`CubeError`] where either has fewer rows or columns.
    pub fn copy_columns(
        &self,
        source: Columns<'_>,
        target: Columns<'_>,
        rows: usize,
        columns: usize,
    ) -> Result<(), CubeError> {
        for (what, side) in [("a copy's source", source), ("a copy's target", target)] {
            side.of.check(what, size(what, &[rows, side.width])?)?;
            if side.first.saturating_add(columns) > side.width {
                return Err(CubeError::Range {
                    what,
                    value: side.first.saturating_add(columns),
                    limit: "the width of its rows",
                });
            }
        }
        let count = rows * columns;
        if count > 0 {
            copy_columns::launch(
                self.client(),
                one_unit_each(count),
                units(),
                source.of.argument(),
                target.of.argument(),
                small(source.width),
                small(source.first),
                small(target.width),
                small(target.first),
                small(columns),
                small(count),
            );
        }
        Ok(())
    }
}

impl Cost {
    /// Of [`Cubes::multiply_heads`] for `n` rows and a weight `[heads, cols, rows]`.
    pub const fn multiply_heads(n: usize, [heads, cols, rows]: [usize; 3]) -> Self {
        let weight = heads * cols * rows;
        Self::new(4 * (weight + n * heads * cols), 4 * n * heads * rows, 2 * n * weight)
    }
}
