//! Causal attention with grouped queries over a cache in pages, without a matrix of scores.

use cubecl::prelude::*;

use super::memory::{one_cube_each, size, small, units};
use super::{ChosenPositions, Cost, CubeError, Cubes, Floats, Places, UNITS};

/// What an attention is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values; divides `heads`.
    pub kv_heads: usize,
    /// Elements of one head, at most [`HEAD_DIM_MAX`].
    pub head_dim: usize,
    /// Positions that a query sees, itself included; `None` for all before it.
    pub window: Option<usize>,
    /// What scores are multiplied by.
    pub scale: f32,
}

/// What shared memory is for in the smallest of devices, two heads of it.
pub const HEAD_DIM_MAX: usize = 1_024;

/// One cube for each head of each query, whose session's pages begin in `tables` where `seen` says. Positions come in tiles
/// of one for each unit: the units score a position each, and then sum up an element of the answer each. What was summed up
/// is scaled whenever a tile has a larger score.
#[cube(launch)]
fn attend(
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    tables: &[u32],
    seen: &[u32],
    chosen: &[u32],
    out: &mut [f32],
    queries: u32,
    heads: u32,
    kv_heads: u32,
    window: u32,
    top: u32,
    scale: f32,
    #[comptime] head_dim: u32,
    #[comptime] page: u32,
    #[comptime] chooses: bool,
    #[comptime] units: u32,
) {
    let mut query = Shared::<[f32]>::new_slice(head_dim as usize);
    let mut sums = Shared::<[f32]>::new_slice(head_dim as usize);
    let mut scores = Shared::<[f32]>::new_slice(units as usize);
    // Where each position of a tile lies.
    let mut places = Shared::<[u32]>::new_slice(units as usize);
    let row = CUBE_POS as u32;
    if row < queries * heads {
        let head = row % heads;
        let mut visible = seen[(row / heads * 2u32) as usize];
        if comptime!(chooses) {
            // Those chosen, which are numbered from 0 on.
            if visible > top {
                visible = top;
            }
        }
        let table = seen[(row / heads * 2u32 + 1u32) as usize];
        let kv = head / (heads / kv_heads);
        let mut element = UNIT_POS;
        while element < head_dim {
            query[element as usize] = q[(row * head_dim + element) as usize] * scale;
            sums[element as usize] = 0.0f32;
            element += units;
        }
        sync_cube();
        let mut largest = f32::new(-1e30f32);
        let mut total = f32::new(0.0f32);
        let mut tile = 0u32.runtime();
        if visible > window {
            tile = visible - window;
        }
        while tile < visible {
            let other = tile + UNIT_POS;
            let mut score = f32::new(-1e30f32);
            if other < visible {
                score = f32::new(0.0f32);
                let mut position = other;
                if comptime!(chooses) {
                    position = chosen[(row / heads * top + other) as usize];
                }
                let place = tables[(table + position / page) as usize] * page + position % page;
                places[UNIT_POS as usize] = place;
                let key = (place * kv_heads + kv) * head_dim;
                for element in 0..head_dim {
                    score += query[element as usize] * keys[(key + element) as usize];
                }
            }
            scores[UNIT_POS as usize] = score;
            sync_cube();
            let mut count = visible - tile;
            if count > units {
                count = units.runtime();
            }
            let mut now = largest;
            for i in 0..count {
                let score = scores[i as usize];
                if score > now {
                    now = score;
                }
            }
            sync_cube();
            scores[UNIT_POS as usize] = (score - now).exp();
            sync_cube();
            let kept = (largest - now).exp();
            largest = now;
            total *= kept;
            for i in 0..count {
                total += scores[i as usize];
            }
            let mut element = UNIT_POS;
            while element < head_dim {
                let mut sum = sums[element as usize] * kept;
                for i in 0..count {
                    let value = (places[i as usize] * kv_heads + kv) * head_dim + element;
                    sum += scores[i as usize] * values[value as usize];
                }
                sums[element as usize] = sum;
                element += units;
            }
            sync_cube();
            tile += units;
        }
        let mut element = UNIT_POS;
        while element < head_dim {
            out[(row * head_dim + element) as usize] = sums[element as usize] / total;
            element += units;
        }
    }
}

impl Cubes {
    /// Attends from queries to all positions up to each of its own session, with the online softmax of Milakov and Gimelshein
    /// (2018): a prefill and the decoding of one position alike, and those of several sessions at once.
    ///
    /// # Shapes
    ///
    /// - `q`, the answer: `[rows of places, heads, head_dim]`
    /// - `keys`, `values`: `[pages, positions of a page, kv_heads, head_dim]`, where the rows' own were written with
    ///   [`Cubes::append`]
    ///
    /// # Errors
    ///
    /// [`CubeError`] for other shapes.
    pub fn attend(
        &self,
        shape: AttentionShape,
        q: &Floats,
        keys: &Floats,
        values: &Floats,
        places: &Places,
    ) -> Result<Floats, CubeError> {
        self.attend_as(shape, q, keys, values, places, None)
    }

    /// As [`Cubes::attend`], to chosen positions alone and whatever the window.
    ///
    /// # Errors
    ///
    /// As [`Cubes::attend`].
    pub fn attend_to_chosen(
        &self,
        shape: AttentionShape,
        q: &Floats,
        keys: &Floats,
        values: &Floats,
        places: &Places,
        chosen: &ChosenPositions,
    ) -> Result<Floats, CubeError> {
        let shape = AttentionShape { window: None, ..shape };
        self.attend_as(shape, q, keys, values, places, Some(chosen))
    }

    fn attend_as(
        &self,
        shape: AttentionShape,
        q: &Floats,
        keys: &Floats,
        values: &Floats,
        places: &Places,
        chosen: Option<&ChosenPositions>,
    ) -> Result<Floats, CubeError> {
        let AttentionShape {
            heads,
            kv_heads,
            head_dim,
            window,
            scale,
        } = shape;
        if window == Some(0) {
            return Err(CubeError::Range {
                what: "a window",
                value: 0,
                limit: "a position or more",
            });
        }
        if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(CubeError::Range {
                what: "heads",
                value: heads,
                limit: "a multiple of the key-value heads",
            });
        }
        if head_dim == 0 || head_dim > HEAD_DIM_MAX {
            return Err(CubeError::Range {
                what: "a head's width",
                value: head_dim,
                limit: "1 to 1,024",
            });
        }
        let queries = places.rows();
        q.check("queries", size("queries", &[queries, heads, head_dim])?)?;
        places.check(keys, size("a key", &[kv_heads, head_dim])?)?;
        values.check("values", keys.len())?;
        if let Some(chosen) = chosen {
            chosen.check(places)?;
        }
        let out = self.room(q.len());
        if queries > 0 {
            attend::launch(
                self.client(),
                one_cube_each(queries * heads),
                units(),
                q.argument(),
                keys.argument(),
                values.argument(),
                places.tables().argument(),
                places.seen().argument(),
                chosen.map_or(places.seen(), ChosenPositions::numbers).argument(),
                out.argument(),
                small(queries),
                small(heads),
                small(kv_heads),
                window.map_or(u32::MAX, small),
                chosen.map_or(0, |chosen| small(chosen.top())),
                scale,
                small(head_dim),
                small(places.page_positions()),
                chosen.is_some(),
                UNITS,
            );
        }
        Ok(out)
    }
}

impl Cost {
    /// Of [`Cubes::attend`] for queries of one session: each key and value read once, and what each query sees computed on.
    pub fn attend(shape: AttentionShape, queries: usize, position: usize) -> Self {
        let AttentionShape {
            heads,
            kv_heads,
            head_dim,
            ..
        } = shape;
        let window = shape.window.unwrap_or(usize::MAX);
        let seen: usize = (position + 1..=position + queries).map(|seen| seen.min(window)).sum();
        let out = queries * heads * head_dim;
        let cache = 2 * (position + queries).min(window.saturating_add(queries)) * kv_heads * head_dim;
        Self::new(4 * (out + cache), 4 * out, seen * heads * (4 * head_dim + 4) + 2 * out)
    }
}
