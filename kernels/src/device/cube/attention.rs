//! Causal attention with grouped queries over a preallocated cache, without a matrix of scores.

use cubecl::prelude::*;

use super::memory::{one_cube_each, one_unit_each, size, small, units};
use super::{Cost, CubeError, Cubes, Floats, UNITS};

/// The sizes of an attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values; divides `heads`.
    pub kv_heads: usize,
    /// Elements of one head, at most 1,024.
    pub head_dim: usize,
}

/// What shared memory is for in the smallest of devices, two heads of it.
const HEAD_DIM_MAX: usize = 1_024;

/// Copies `count` elements from `from` on to `to` on.
#[cube(launch)]
fn copy(source: &[f32], target: &mut [f32], from: u32, to: u32, count: u32) {
    if ABSOLUTE_POS < count as usize {
        target[ABSOLUTE_POS + to as usize] = source[ABSOLUTE_POS + from as usize];
    }
}

/// One cube for each head of each query. Positions come in tiles of one for each unit: the units score a position each,
/// and then sum up an element of the answer each. What was summed up is scaled whenever a tile has a larger score.
#[cube(launch)]
fn attend(
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    out: &mut [f32],
    queries: u32,
    position: u32,
    heads: u32,
    kv_heads: u32,
    scale: f32,
    #[comptime] head_dim: u32,
    #[comptime] units: u32,
) {
    let mut query = Shared::<[f32]>::new_slice(head_dim as usize);
    let mut sums = Shared::<[f32]>::new_slice(head_dim as usize);
    let mut scores = Shared::<[f32]>::new_slice(units as usize);
    let row = CUBE_POS as u32;
    if row < queries * heads {
        let head = row % heads;
        let visible = position + row / heads + 1u32;
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
        let mut tile = 0u32;
        while tile < visible {
            let other = tile + UNIT_POS;
            let mut score = f32::new(-1e30f32);
            if other < visible {
                score = f32::new(0.0f32);
                let key = (other * kv_heads + kv) * head_dim;
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
                    let value = ((tile + i) * kv_heads + kv) * head_dim + element;
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
    /// Writes keys or values of positions `position ..` into a cache.
    ///
    /// # Shapes
    ///
    /// - `new`: `[n, width]`; `cache`: `[capacity, width]`
    ///
    /// # Errors
    ///
    /// [`CubeError`] where the cache has no room for them.
    pub fn append(&self, new: &Floats, cache: &Floats, position: usize, width: usize) -> Result<(), CubeError> {
        let first = size("a position", &[position, width])?;
        let whole = width > 0 && new.len().is_multiple_of(width);
        if !whole || first.checked_add(new.len()).is_none_or(|end| end > cache.len()) {
            return Err(CubeError::Length {
                what: "a cache",
                found: cache.len(),
                expected: first.saturating_add(new.len()),
            });
        }
        size("a cache", &[cache.len()])?;
        if !new.is_empty() {
            copy::launch(
                self.client(),
                one_unit_each(new.len()),
                units(),
                new.argument(),
                cache.argument(),
                0,
                small(first),
                small(new.len()),
            );
        }
        Ok(())
    }

    /// Copies `count` elements from `first` on.
    ///
    /// # Errors
    ///
    /// [`CubeError`] where there are fewer.
    pub fn part(&self, values: &Floats, first: usize, count: usize) -> Result<Floats, CubeError> {
        if first.checked_add(count).is_none_or(|end| end > values.len()) {
            return Err(CubeError::Length {
                what: "a part's whole",
                found: values.len(),
                expected: first.saturating_add(count),
            });
        }
        size("a part's whole", &[values.len()])?;
        let out = self.room(count);
        if count > 0 {
            copy::launch(
                self.client(),
                one_unit_each(count),
                units(),
                values.argument(),
                out.argument(),
                small(first),
                0,
                small(count),
            );
        }
        Ok(out)
    }

    /// Attends from queries at `position ..` to all positions up to each, with the online softmax of Milakov and
    /// Gimelshein (2018): a prefill and the decoding of one position alike.
    ///
    /// # Shapes
    ///
    /// - `q`, the answer: `[queries, heads, head_dim]`
    /// - `keys`, `values`: `[capacity, kv_heads, head_dim]`, of which `position + queries` are written
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
        position: usize,
    ) -> Result<Floats, CubeError> {
        let AttentionShape {
            heads,
            kv_heads,
            head_dim,
        } = shape;
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
        let queries = q.len() / size("a query", &[heads, head_dim])?.max(1);
        q.check("queries", size("queries", &[queries, heads, head_dim])?)?;
        let width = size("a key", &[kv_heads, head_dim])?;
        let read = size("keys", &[position.saturating_add(queries), width])?;
        if read > keys.len() {
            return Err(CubeError::Length {
                what: "keys",
                found: keys.len(),
                expected: read,
            });
        }
        values.check("values", size("keys", &[keys.len()])?)?;
        let out = self.room(q.len());
        if queries > 0 {
            attend::launch(
                self.client(),
                one_cube_each(queries * heads),
                units(),
                q.argument(),
                keys.argument(),
                values.argument(),
                out.argument(),
                small(queries),
                small(position),
                small(heads),
                small(kv_heads),
                1.0 / (head_dim as f32).sqrt(),
                small(head_dim),
                UNITS,
            );
        }
        Ok(out)
    }
}

impl Cost {
    /// Of [`Cubes::append`].
    pub const fn append(count: usize) -> Self {
        Self::new(4 * count, 4 * count, 0)
    }

    /// Of [`Cubes::attend`]: each key and value read once, and what each query sees computed on.
    pub const fn attend(shape: AttentionShape, queries: usize, position: usize) -> Self {
        let AttentionShape {
            heads,
            kv_heads,
            head_dim,
        } = shape;
        let seen = queries * position + queries * (queries + 1) / 2;
        let out = queries * heads * head_dim;
        let cache = 2 * (position + queries) * kv_heads * head_dim;
        Self::new(4 * (out + cache), 4 * out, seen * heads * (4 * head_dim + 4) + 2 * out)
    }
}
