//! Positions that queries choose to attend to: their scores, and the choice on its way to the device (DeepSeek-AI 2025,
//! DeepSeek Sparse Attention).

use std::ops::Range;

use cubecl::prelude::*;

use super::memory::{one_unit_each, size, small, units};
use super::{Cost, CubeError, Cubes, Floats, Places, Words};

/// The heads that score positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScoredHeads {
    /// How many.
    pub heads: usize,
    /// Elements of a head's query, and of the key that all heads share.
    pub head_dim: usize,
}

/// Of each row some positions.
#[derive(Debug)]
pub struct ChosenPositions {
    /// `[rows, top]`
    numbers: Words,
    /// As many as a row that sees so many has chosen; all others have all that they see.
    top: usize,
    /// What each row sees, which the choice was checked against.
    visible: Vec<usize>,
}

impl ChosenPositions {
    pub(super) const fn numbers(&self) -> &Words {
        &self.numbers
    }

    pub(super) const fn top(&self) -> usize {
        self.top
    }

    /// Whether they are of these rows.
    pub(super) fn check(&self, places: &Places) -> Result<(), CubeError> {
        match self.visible == places.visible() {
            true => Ok(()),
            false => Err(CubeError::Length {
                what: "rows that chose",
                found: self.visible.len(),
                expected: places.rows(),
            }),
        }
    }
}

/// One unit for each position of each row.
#[cube(launch)]
fn score_positions(
    q: &[f32],
    weights: &[f32],
    keys: &[f32],
    tables: &[u32],
    seen: &[u32],
    out: &mut [f32],
    first: u32,
    heads: u32,
    head_dim: u32,
    page: u32,
    most: u32,
    scale: f32,
    count: u32,
) {
    let at = ABSOLUTE_POS as u32;
    if at < count {
        let row = first + at / most;
        let position = at % most;
        let table = seen[(row * 2u32 + 1u32) as usize];
        let mut score = f32::new(0.0f32);
        if position < seen[(row * 2u32) as usize] {
            let place = tables[(table + position / page) as usize] * page + position % page;
            for head in 0..heads {
                let query = (row * heads + head) * head_dim;
                let mut product = f32::new(0.0f32);
                for element in 0..head_dim {
                    product += q[(query + element) as usize] * keys[(place * head_dim + element) as usize];
                }
                if product > 0.0f32 {
                    score += weights[(row * heads + head) as usize] * (product * scale);
                }
            }
        }
        out[at as usize] = score;
    }
}

impl Cubes {
    /// `Σ_h w_h · max(q_h · k, 0) / √(heads · head_dim)` of each position that a row sees, and zero behind it.
    ///
    /// # Shapes
    ///
    /// - `q`: `[rows of places, heads, head_dim]`; `weights`: `[rows of places, heads]`
    /// - `keys`: `[pages, positions of a page, head_dim]`
    /// - the answer: `[rows, most]`, `most` being the positions that any row of the places sees
    ///
    /// # Errors
    ///
    /// [`CubeError`] for other shapes.
    pub fn score_positions(
        &self,
        shape: ScoredHeads,
        q: &Floats,
        weights: &Floats,
        keys: &Floats,
        places: &Places,
        rows: Range<usize>,
    ) -> Result<Floats, CubeError> {
        let ScoredHeads { heads, head_dim } = shape;
        let all = places.rows();
        q.check("queries", size("queries", &[all, heads, head_dim])?)?;
        weights.check("the heads' weights", size("the heads' weights", &[all, heads])?)?;
        places.check(keys, head_dim)?;
        if rows.end > all {
            return Err(CubeError::Length {
                what: "rows",
                found: all,
                expected: rows.end,
            });
        }
        let most = places.visible().iter().copied().max().unwrap_or(0);
        let out = self.room(size("scores", &[rows.len(), most])?);
        if !out.is_empty() {
            score_positions::launch(
                self.client(),
                one_unit_each(out.len()),
                units(),
                q.argument(),
                weights.argument(),
                keys.argument(),
                places.tables().argument(),
                places.seen().argument(),
                out.argument(),
                small(rows.start),
                small(heads),
                small(head_dim),
                small(places.page_positions()),
                small(most),
                1.0 / ((heads * head_dim) as f32).sqrt(),
                small(out.len()),
            );
        }
        Ok(out)
    }

    /// Brings to the device which positions each row of the places chose.
    ///
    /// # Errors
    ///
    /// [`CubeError`] where a row chose none or one that it does not see, or where some chose fewer than the most and fewer
    /// than they see.
    pub fn choose(&self, chosen: &[Vec<usize>], places: &Places) -> Result<ChosenPositions, CubeError> {
        let visible = places.visible();
        if chosen.len() != visible.len() {
            return Err(CubeError::Length {
                what: "rows that chose",
                found: chosen.len(),
                expected: visible.len(),
            });
        }
        let top = chosen.iter().map(Vec::len).max().unwrap_or(0);
        let mut numbers = vec![0; size("chosen positions", &[chosen.len(), top.max(1)])?];
        for ((chosen, visible), numbers) in chosen.iter().zip(visible).zip(numbers.chunks_exact_mut(top.max(1))) {
            if chosen.is_empty() || chosen.len() < top.min(*visible) || chosen.iter().any(|at| at >= visible) {
                return Err(CubeError::Range {
                    what: "a row that chose positions",
                    value: chosen.len(),
                    limit: "as many as the others of those that it sees",
                });
            }
            for (number, chosen) in numbers.iter_mut().zip(chosen) {
                *number = small(*chosen);
            }
        }
        Ok(ChosenPositions {
            numbers: self.upload(&numbers),
            top,
            visible: visible.to_vec(),
        })
    }
}

impl Cost {
    /// Of [`Cubes::score_positions`] for queries of one session.
    pub const fn score_positions(shape: ScoredHeads, queries: usize, position: usize) -> Self {
        let ScoredHeads { heads, head_dim } = shape;
        let seen = queries * position + queries * (queries + 1) / 2;
        let most = position + queries;
        Self::new(
            4 * (most * head_dim + queries * heads * (head_dim + 1)),
            4 * queries * most,
            seen * heads * (2 * head_dim + 3),
        )
    }
}
