//! Rotary positions.

use cubecl::prelude::*;

use super::memory::{one_unit_each, size, small, units};
use super::{Cost, CubeError, Cubes, Floats};

/// One unit for each pair.
#[cube(launch)]
fn rotate(x: &mut [f32], cosines: &[f32], sines: &[f32], heads: u32, pairs: u32, count: u32) {
    let index = ABSOLUTE_POS as u32;
    if index < count {
        let pair = index % pairs;
        let head = index / pairs;
        let turn = (head / heads * pairs + pair) as usize;
        let first = (head * pairs * 2 + pair) as usize;
        let second = first + pairs as usize;
        let (left, right) = (x[first], x[second]);
        x[first] = left * cosines[turn] - right * sines[turn];
        x[second] = right * cosines[turn] + left * sines[turn];
    }
}

impl Cubes {
    /// Rotates the pairs `(i, i + head_dim / 2)` of every head by its position's angles, in place (Su et al. 2021, RoFormer,
    /// in the order of pairs of GPT-NeoX).
    ///
    /// # Shapes
    ///
    /// - `x`: `[n, heads, head_dim]`; `cosines`, `sines`: `[n, head_dim / 2]`
    ///
    /// # Errors
    ///
    /// [`CubeError`] for other shapes.
    pub fn rotate(
        &self,
        x: &Floats,
        cosines: &Floats,
        sines: &Floats,
        heads: usize,
        head_dim: usize,
    ) -> Result<(), CubeError> {
        let pairs = head_dim / 2;
        let n = cosines.len().checked_div(pairs).unwrap_or(0);
        cosines.check("cosines", size("cosines", &[n, pairs])?)?;
        sines.check("sines", cosines.len())?;
        x.check("x", size("x", &[n, heads, head_dim])?)?;
        if !head_dim.is_multiple_of(2) {
            return Err(CubeError::Range {
                what: "a head's width",
                value: head_dim,
                limit: "an even number",
            });
        }
        let count = n * heads * pairs;
        if count > 0 {
            rotate::launch(
                self.client(),
                one_unit_each(count),
                units(),
                x.argument(),
                cosines.argument(),
                sines.argument(),
                small(heads),
                small(pairs),
                small(count),
            );
        }
        Ok(())
    }
}

impl Cost {
    /// Of [`Cubes::rotate`].
    pub const fn rotate(n: usize, heads: usize, head_dim: usize) -> Self {
        let all = n * heads * head_dim;
        Self::new(4 * all + 4 * n * head_dim, 4 * all, 3 * all)
    }
}
