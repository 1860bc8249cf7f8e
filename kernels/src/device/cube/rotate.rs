//! Rotary positions.

use cubecl::prelude::*;

use super::memory::{one_unit_each, size, small, units};
use super::{Cost, CubeError, Cubes, Floats};

/// Cosines and sines of some rows' positions, for one rotation.
#[derive(Debug, Clone)]
pub struct Turns {
    /// `[rows, pairs]` each.
    pub cosines: Floats,
    /// As the cosines.
    pub sines: Floats,
    /// Pairs of a head that turn.
    pub pairs: usize,
    /// Whether pairs are `(2i, 2i + 1)`; otherwise `(i, i + pairs)`.
    pub interleaved: bool,
}

/// Which elements of a row are rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rotated {
    /// Heads of a row.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// The first of each head that turns.
    pub first: usize,
}

/// One unit for each pair.
#[cube(launch)]
fn rotate(
    x: &mut [f32],
    cosines: &[f32],
    sines: &[f32],
    heads: u32,
    head_dim: u32,
    first: u32,
    pairs: u32,
    count: u32,
    #[comptime] interleaved: bool,
) {
    let index = ABSOLUTE_POS as u32;
    if index < count {
        let pair = index % pairs;
        let head = index / pairs;
        let turn = (head / heads * pairs + pair) as usize;
        let start = head * head_dim + first;
        let left_at = if comptime!(interleaved) {
            start + pair * 2u32
        } else {
            start + pair
        };
        let right_at = if comptime!(interleaved) {
            left_at + 1u32
        } else {
            left_at + pairs
        };
        let (left, right) = (x[left_at as usize], x[right_at as usize]);
        x[left_at as usize] = left * cosines[turn] - right * sines[turn];
        x[right_at as usize] = right * cosines[turn] + left * sines[turn];
    }
}

impl Cubes {
    /// Rotates pairs of every head by its row's angles, in place (Su et al. 2021, RoFormer).
    ///
    /// # Shapes
    ///
    /// - `x`: `[rows of turns, heads, head_dim]`, of which `2 · pairs` elements of each head turn, from the first on
    ///
    /// # Errors
    ///
    /// [`CubeError`] for other shapes.
    pub fn rotate(&self, x: &Floats, turns: &Turns, rotated: Rotated) -> Result<(), CubeError> {
        let Rotated { heads, head_dim, first } = rotated;
        let pairs = turns.pairs;
        let n = turns.cosines.len().checked_div(pairs).unwrap_or(0);
        turns.cosines.check("cosines", size("cosines", &[n, pairs])?)?;
        turns.sines.check("sines", turns.cosines.len())?;
        x.check("x", size("x", &[n, heads, head_dim])?)?;
        if first.saturating_add(pairs.saturating_mul(2)) > head_dim {
            return Err(CubeError::Range {
                what: "pairs that turn",
                value: pairs,
                limit: "half of what a head has from the first on",
            });
        }
        let count = n * heads * pairs;
        if count > 0 {
            rotate::launch(
                self.client(),
                one_unit_each(count),
                units(),
                x.argument(),
                turns.cosines.argument(),
                turns.sines.argument(),
                small(heads),
                small(head_dim),
                small(first),
                small(pairs),
                small(count),
                turns.interleaved,
            );
        }
        Ok(())
    }
}

impl Cost {
    /// Of [`Cubes::rotate`] for `n` rows of `heads` heads.
    pub const fn rotate(n: usize, heads: usize, pairs: usize) -> Self {
        let all = 2 * n * heads * pairs;
        Self::new(4 * all + 8 * n * pairs, 4 * all, 3 * all)
    }
}
