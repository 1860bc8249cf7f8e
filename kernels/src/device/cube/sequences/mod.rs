//! Causal attention in training, forward and backward, without a matrix of scores.
//!
//! Tiles of queries meet tiles of keys in shared memory, and what each unit sums up it holds in registers. The backward
//! computes scores again from the logarithms of their sums (Dao et al. 2022, FlashAttention; Dao 2023 for the order of
//! loops). Every sum belongs to one cube and has one order: no atomics, so the same bits each time.

mod backward;
mod forward;
mod tiles;

use backward::{deltas, key_gradients, query_gradients};
use forward::attend;

use super::memory::{one_cube_each, one_unit_each, size, small, units};
use super::{Cost, CubeError, Cubes, Floats, UNITS};

/// The sizes of an attention over whole sequences.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SequenceAttention {
    /// Sequences.
    pub batch: usize,
    /// Positions of each.
    pub seq: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a head's queries and keys.
    pub width: usize,
    /// Elements of a head's values.
    pub value: usize,
    /// Positions that a query sees, itself included; `None` for all before it.
    pub window: Option<usize>,
    /// What scores are multiplied by.
    pub scale: f32,
}

/// What a forward gives.
#[derive(Debug, Clone)]
pub struct Attended {
    /// `[batch, seq, heads, value]`
    pub out: Floats,
    /// The logarithm of the sum of each row's exponentials, `[batch, heads, seq]`: what the backward begins with.
    pub sums: Floats,
}

impl Cubes {
    /// Whether heads of these widths fit the device's shared memory.
    pub fn attends_sequences(&self, width: usize, value: usize) -> bool {
        self.tile(width, value).is_some()
    }

    /// Rows of a tile: a unit then computes four scores, or one.
    fn tile(&self, width: usize, value: usize) -> Option<u32> {
        let limit = self.client().properties().hardware.max_shared_memory_size;
        let bytes = |tile: usize| 4 * tile * (2 * (width + 1) + 2 * (value + 1) + 2 * tile + 3);
        // Beyond, a unit sums up more than its registers hold.
        if width == 0 || value == 0 || width > WIDTH_MAX || value > WIDTH_MAX {
            return None;
        }
        [16, 8].into_iter().find(|tile| bytes(*tile) <= limit).map(small)
    }

    /// Attends from each position of each sequence to those up to it, with the online softmax of Milakov and Gimelshein
    /// (2018).
    ///
    /// # Shapes
    ///
    /// - `q`: `[batch, seq, heads, width]`; `k`: `[batch, seq, kv_heads, width]`; `v`: `[batch, seq, kv_heads, value]`
    ///
    /// # Errors
    ///
    /// [`CubeError`] for other shapes, and for heads that are too wide for the device.
    pub fn attend_sequences(
        &self,
        shape: &SequenceAttention,
        q: &Floats,
        k: &Floats,
        v: &Floats,
    ) -> Result<Attended, CubeError> {
        let tile = self.check_sequences(shape, q, k, v)?;
        let SequenceAttention { batch, seq, heads, .. } = *shape;
        let rows = size("rows of scores", &[batch, seq, heads])?;
        let attended = Attended {
            out: self.room(size("the answer", &[rows, shape.value])?),
            sums: self.room(rows),
        };
        let cubes = batch * heads * seq.div_ceil(tile as usize);
        if rows > 0 {
            attend::launch(
                self.client(),
                one_cube_each(cubes),
                units(),
                q.argument(),
                k.argument(),
                v.argument(),
                attended.out.argument(),
                attended.sums.argument(),
                small(cubes),
                small(seq),
                small(heads),
                small(shape.kv_heads),
                shape.window.map_or(0, small),
                shape.scale,
                small(shape.width),
                small(shape.value),
                tile,
                UNITS,
            );
        }
        Ok(attended)
    }

    /// The gradients of queries, keys and values from that of the answer, `[batch, seq, heads, value]`.
    ///
    /// # Errors
    ///
    /// [`CubeError`] for other shapes than the forward's.
    pub fn attend_sequences_backward(
        &self,
        shape: &SequenceAttention,
        (q, k, v): (&Floats, &Floats, &Floats),
        attended: &Attended,
        d_out: &Floats,
    ) -> Result<[Floats; 3], CubeError> {
        let tile = self.check_sequences(shape, q, k, v)?;
        let SequenceAttention {
            batch,
            seq,
            heads,
            kv_heads,
            ..
        } = *shape;
        let rows = size("rows of scores", &[batch, seq, heads])?;
        attended.sums.check("the sums", rows)?;
        attended
            .out
            .check("the answer", size("the answer", &[rows, shape.value])?)?;
        d_out.check("the answer's gradient", attended.out.len())?;
        let gradients = [q, k, v].map(|values| self.room(values.len()));
        if rows == 0 {
            return Ok(gradients);
        }
        let [d_q, d_k, d_v] = &gradients;
        let of_rows: Floats = self.room(rows);
        deltas::launch(
            self.client(),
            one_unit_each(rows),
            units(),
            attended.out.argument(),
            d_out.argument(),
            of_rows.argument(),
            small(rows),
            small(seq),
            small(heads),
            small(shape.value),
        );
        let window = shape.window.map_or(0, small);
        let tiles = seq.div_ceil(tile as usize);
        query_gradients::launch(
            self.client(),
            one_cube_each(batch * heads * tiles),
            units(),
            q.argument(),
            k.argument(),
            v.argument(),
            d_out.argument(),
            attended.sums.argument(),
            of_rows.argument(),
            d_q.argument(),
            small(batch * heads * tiles),
            small(seq),
            small(heads),
            small(kv_heads),
            window,
            shape.scale,
            small(shape.width),
            small(shape.value),
            tile,
            UNITS,
        );
        key_gradients::launch(
            self.client(),
            one_cube_each(batch * kv_heads * tiles),
            units(),
            q.argument(),
            k.argument(),
            v.argument(),
            d_out.argument(),
            attended.sums.argument(),
            of_rows.argument(),
            d_k.argument(),
            d_v.argument(),
            small(batch * kv_heads * tiles),
            small(seq),
            small(heads),
            small(kv_heads),
            window,
            shape.scale,
            small(shape.width),
            small(shape.value),
            tile,
            UNITS,
        );
        Ok(gradients)
    }

    fn check_sequences(&self, shape: &SequenceAttention, q: &Floats, k: &Floats, v: &Floats) -> Result<u32, CubeError> {
        let SequenceAttention {
            batch,
            seq,
            heads,
            kv_heads,
            width,
            value,
            ..
        } = *shape;
        if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(CubeError::Range {
                what: "heads",
                value: heads,
                limit: "a multiple of the key-value heads",
            });
        }
        let tile = self.tile(width, value).ok_or(CubeError::Range {
            what: "a head's width",
            value: width.max(value),
            limit: "1 to 256, and within the device's shared memory",
        })?;
        // Positions and windows are added to each other.
        size("a sequence", &[seq.saturating_add(shape.window.unwrap_or(0)), 2])?;
        q.check("queries", size("queries", &[batch, seq, heads, width])?)?;
        k.check("keys", size("keys", &[batch, seq, kv_heads, width])?)?;
        v.check("values", size("values", &[batch, seq, kv_heads, value])?)?;
        Ok(tile)
    }
}

/// Four elements of a head for each unit.
const WIDTH_MAX: usize = 256;

impl Cost {
    /// Of [`Cubes::attend_sequences`]: each number read once, and what each query sees computed on.
    pub fn attend_sequences(shape: &SequenceAttention) -> Self {
        let [q, k, v, out, rows] = shape.elements();
        let seen = shape.seen();
        Self::new(
            4 * (q + k + v),
            4 * (out + rows),
            seen * (2 * shape.width + 2 * shape.value + 4) + out + rows,
        )
    }

    /// Of [`Cubes::attend_sequences_backward`]: scores are computed twice.
    pub fn attend_sequences_backward(shape: &SequenceAttention) -> Self {
        let [q, k, v, out, rows] = shape.elements();
        let seen = shape.seen();
        Self::new(
            4 * (q + k + v + 2 * out + rows),
            4 * (q + k + v + rows),
            seen * (8 * shape.width + 6 * shape.value + 10) + 2 * out,
        )
    }
}

impl SequenceAttention {
    /// Of queries, keys, values, answer and rows.
    fn elements(&self) -> [usize; 5] {
        let positions = self.batch * self.seq;
        let (q, kv) = (positions * self.heads, positions * self.kv_heads);
        [q * self.width, kv * self.width, kv * self.value, q * self.value, q]
    }

    /// Pairs of a query and a key that it sees.
    fn seen(&self) -> usize {
        let window = self.window.unwrap_or(self.seq);
        let of_head: usize = (1..=self.seq).map(|visible| visible.min(window)).sum();
        self.batch * self.heads * of_head
    }
}
