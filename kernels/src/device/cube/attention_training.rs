//! Causal attention in training, forward and backward, without a matrix of scores.
//!
//! Tiles of queries meet tiles of keys in shared memory, and what each unit sums up it holds in registers. The backward
//! computes scores again from the logarithms of their sums (Dao et al. 2022, FlashAttention; Dao 2023 for the order of
//! loops). Every sum belongs to one cube and has one order: no atomics, so the same bits each time.

use cubecl::prelude::*;

use super::memory::{one_cube_each, one_unit_each, size, small, units};
use super::tiles::{load_rows, products, sees};
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

/// Below every score, and finite.
const NEVER: f32 = -1e30;

/// One cube for each tile of queries of each head.
#[cube(launch)]
fn forward(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &mut [f32],
    sums: &mut [f32],
    cubes: u32,
    seq: u32,
    heads: u32,
    kv_heads: u32,
    window: u32,
    scale: f32,
    #[comptime] width: u32,
    #[comptime] value: u32,
    #[comptime] tile: u32,
    #[comptime] units: u32,
) {
    let each = comptime!(tile * tile / units);
    let groups = comptime!(value.div_ceil(units));
    let mut q_tile = Shared::<[f32]>::new_slice(comptime!((tile * (width + 1)) as usize));
    let mut k_tile = Shared::<[f32]>::new_slice(comptime!((tile * (width + 1)) as usize));
    let mut shares = Shared::<[f32]>::new_slice(comptime!((tile * tile) as usize));
    let mut kept = Shared::<[f32]>::new_slice(comptime!(tile as usize));
    let mut largest = Shared::<[f32]>::new_slice(comptime!(tile as usize));
    let mut totals = Shared::<[f32]>::new_slice(comptime!(tile as usize));
    let cube = CUBE_POS as u32;
    if cube < cubes {
        let tiles = (seq + comptime!(tile - 1)) / tile;
        let first = cube % tiles * tile;
        let head = cube / tiles % heads;
        let batch = cube / tiles / heads;
        let kv = head / (heads / kv_heads);
        let q_base = (batch * seq * heads + head) * width;
        load_rows(q, &mut q_tile, first, seq, q_base, heads * width, width, tile, units);
        if UNIT_POS < tile {
            largest[UNIT_POS as usize] = f32::new(comptime!(NEVER));
            totals[UNIT_POS as usize] = 0.0f32;
        }
        let mut held = Array::<f32>::new(comptime!((groups * tile) as usize));
        #[unroll]
        for i in 0..comptime!(groups * tile) {
            held[i as usize] = 0.0f32;
        }
        let mut scores = Array::<f32>::new(comptime!(each as usize));
        let row = UNIT_POS / comptime!(tile / each);
        let column = UNIT_POS % comptime!(tile / each) * each;
        let mut keys = 0u32;
        if window > 0 && first + 1 > window {
            keys = (first + 1 - window) / tile * tile;
        }
        let mut end = first + tile;
        if end > seq {
            end = seq;
        }
        let k_base = (batch * seq * kv_heads + kv) * width;
        let v_base = (batch * seq * kv_heads + kv) * value;
        while keys < end {
            load_rows(k, &mut k_tile, keys, seq, k_base, kv_heads * width, width, tile, units);
            sync_cube();
            products(&q_tile, &k_tile, row, column, &mut scores, each, width);
            #[unroll]
            for i in 0..each {
                let mut score = f32::new(comptime!(NEVER));
                if sees(first + row, keys + column + i, window) {
                    score = scores[i as usize] * scale;
                }
                shares[(row * tile + column + i) as usize] = score;
            }
            sync_cube();
            if UNIT_POS < tile {
                let own = UNIT_POS * tile;
                let before = largest[UNIT_POS as usize];
                let mut now = before;
                for j in 0..tile {
                    let score = shares[(own + j) as usize];
                    if score > now {
                        now = score;
                    }
                }
                let factor = (before - now).exp();
                let mut total = totals[UNIT_POS as usize] * factor;
                for j in 0..tile {
                    let score = shares[(own + j) as usize];
                    let mut share = 0.0f32;
                    if score > f32::new(comptime!(NEVER)) {
                        share = (score - now).exp();
                    }
                    shares[(own + j) as usize] = share;
                    total += share;
                }
                largest[UNIT_POS as usize] = now;
                totals[UNIT_POS as usize] = total;
                kept[UNIT_POS as usize] = factor;
            }
            sync_cube();
            #[unroll]
            for group in 0..groups {
                let element = UNIT_POS + comptime!(group * units);
                if element < value {
                    #[unroll]
                    for i in 0..tile {
                        held[comptime!((group * tile + i) as usize)] *= kept[i as usize];
                    }
                    for j in 0..tile {
                        if keys + j < end {
                            let factor = v[(v_base + (keys + j) * kv_heads * value + element) as usize];
                            #[unroll]
                            for i in 0..tile {
                                held[comptime!((group * tile + i) as usize)] +=
                                    shares[(i * tile + j) as usize] * factor;
                            }
                        }
                    }
                }
            }
            sync_cube();
            keys += tile;
        }
        #[unroll]
        for group in 0..groups {
            let element = UNIT_POS + comptime!(group * units);
            if element < value {
                #[unroll]
                for i in 0..tile {
                    if first + i < seq {
                        let at = ((batch * seq + first + i) * heads + head) * value + element;
                        out[at as usize] = held[comptime!((group * tile + i) as usize)] / totals[i as usize];
                    }
                }
            }
        }
        if UNIT_POS < tile && first + UNIT_POS < seq {
            let at = (batch * heads + head) * seq + first + UNIT_POS;
            sums[at as usize] = largest[UNIT_POS as usize] + totals[UNIT_POS as usize].ln();
        }
    }
}

/// `deltas[b, h, s] = d_out[b, s, h, :] · out[b, s, h, :]`, one unit each.
#[cube(launch)]
fn deltas(out: &[f32], d_out: &[f32], deltas: &mut [f32], count: u32, seq: u32, heads: u32, value: u32) {
    let at = ABSOLUTE_POS as u32;
    if at < count {
        let position = at % seq;
        let head = at / seq % heads;
        let batch = at / seq / heads;
        let row = ((batch * seq + position) * heads + head) * value;
        let mut sum = 0.0f32;
        for element in 0..value {
            sum += out[(row + element) as usize] * d_out[(row + element) as usize];
        }
        deltas[at as usize] = sum;
    }
}

/// The gradient of the queries, one cube for each tile of them.
#[cube(launch)]
fn query_gradients(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    d_out: &[f32],
    sums: &[f32],
    deltas: &[f32],
    d_q: &mut [f32],
    cubes: u32,
    seq: u32,
    heads: u32,
    kv_heads: u32,
    window: u32,
    scale: f32,
    #[comptime] width: u32,
    #[comptime] value: u32,
    #[comptime] tile: u32,
    #[comptime] units: u32,
) {
    let each = comptime!(tile * tile / units);
    let groups = comptime!(width.div_ceil(units));
    let mut q_tile = Shared::<[f32]>::new_slice(comptime!((tile * (width + 1)) as usize));
    let mut k_tile = Shared::<[f32]>::new_slice(comptime!((tile * (width + 1)) as usize));
    let mut v_tile = Shared::<[f32]>::new_slice(comptime!((tile * (value + 1)) as usize));
    let mut d_tile = Shared::<[f32]>::new_slice(comptime!((tile * (value + 1)) as usize));
    let mut slopes = Shared::<[f32]>::new_slice(comptime!((tile * tile) as usize));
    let cube = CUBE_POS as u32;
    if cube < cubes {
        let tiles = (seq + comptime!(tile - 1)) / tile;
        let first = cube % tiles * tile;
        let head = cube / tiles % heads;
        let batch = cube / tiles / heads;
        let kv = head / (heads / kv_heads);
        let row_base = batch * seq * heads + head;
        let kv_base = batch * seq * kv_heads + kv;
        load_rows(
            q,
            &mut q_tile,
            first,
            seq,
            row_base * width,
            heads * width,
            width,
            tile,
            units,
        );
        load_rows(
            d_out,
            &mut d_tile,
            first,
            seq,
            row_base * value,
            heads * value,
            value,
            tile,
            units,
        );
        let mut held = Array::<f32>::new(comptime!((groups * tile) as usize));
        #[unroll]
        for i in 0..comptime!(groups * tile) {
            held[i as usize] = 0.0f32;
        }
        let mut scores = Array::<f32>::new(comptime!(each as usize));
        let mut slants = Array::<f32>::new(comptime!(each as usize));
        let row = UNIT_POS / comptime!(tile / each);
        let column = UNIT_POS % comptime!(tile / each) * each;
        let query = first + row;
        let mut sum = 0.0f32;
        let mut delta = 0.0f32;
        if query < seq {
            let at = (batch * heads + head) * seq + query;
            sum = sums[at as usize];
            delta = deltas[at as usize];
        }
        let mut keys = 0u32;
        if window > 0 && first + 1 > window {
            keys = (first + 1 - window) / tile * tile;
        }
        let mut end = first + tile;
        if end > seq {
            end = seq;
        }
        while keys < end {
            load_rows(
                k,
                &mut k_tile,
                keys,
                seq,
                kv_base * width,
                kv_heads * width,
                width,
                tile,
                units,
            );
            load_rows(
                v,
                &mut v_tile,
                keys,
                seq,
                kv_base * value,
                kv_heads * value,
                value,
                tile,
                units,
            );
            sync_cube();
            products(&q_tile, &k_tile, row, column, &mut scores, each, width);
            products(&d_tile, &v_tile, row, column, &mut slants, each, value);
            #[unroll]
            for i in 0..each {
                let mut slope = 0.0f32;
                if query < seq && sees(query, keys + column + i, window) {
                    let share = (scores[i as usize] * scale - sum).exp();
                    slope = share * (slants[i as usize] - delta) * scale;
                }
                slopes[(row * tile + column + i) as usize] = slope;
            }
            sync_cube();
            #[unroll]
            for group in 0..groups {
                let element = UNIT_POS + comptime!(group * units);
                if element < width {
                    for j in 0..tile {
                        let factor = k_tile[(j * comptime!(width + 1) + element) as usize];
                        #[unroll]
                        for i in 0..tile {
                            held[comptime!((group * tile + i) as usize)] += slopes[(i * tile + j) as usize] * factor;
                        }
                    }
                }
            }
            sync_cube();
            keys += tile;
        }
        #[unroll]
        for group in 0..groups {
            let element = UNIT_POS + comptime!(group * units);
            if element < width {
                #[unroll]
                for i in 0..tile {
                    if first + i < seq {
                        let at = (row_base + (first + i) * heads) * width + element;
                        d_q[at as usize] = held[comptime!((group * tile + i) as usize)];
                    }
                }
            }
        }
    }
}

/// The gradients of keys and values, one cube for each tile of them: it goes through all queries that see it, of all
/// heads that share it.
#[cube(launch)]
fn key_gradients(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    d_out: &[f32],
    sums: &[f32],
    deltas: &[f32],
    d_k: &mut [f32],
    d_v: &mut [f32],
    cubes: u32,
    seq: u32,
    heads: u32,
    kv_heads: u32,
    window: u32,
    scale: f32,
    #[comptime] width: u32,
    #[comptime] value: u32,
    #[comptime] tile: u32,
    #[comptime] units: u32,
) {
    let each = comptime!(tile * tile / units);
    let key_groups = comptime!(width.div_ceil(units));
    let value_groups = comptime!(value.div_ceil(units));
    let mut q_tile = Shared::<[f32]>::new_slice(comptime!((tile * (width + 1)) as usize));
    let mut k_tile = Shared::<[f32]>::new_slice(comptime!((tile * (width + 1)) as usize));
    let mut v_tile = Shared::<[f32]>::new_slice(comptime!((tile * (value + 1)) as usize));
    let mut d_tile = Shared::<[f32]>::new_slice(comptime!((tile * (value + 1)) as usize));
    let mut shares = Shared::<[f32]>::new_slice(comptime!((tile * tile) as usize));
    let mut slopes = Shared::<[f32]>::new_slice(comptime!((tile * tile) as usize));
    let cube = CUBE_POS as u32;
    if cube < cubes {
        let tiles = (seq + comptime!(tile - 1)) / tile;
        let first = cube % tiles * tile;
        let kv = cube / tiles % kv_heads;
        let batch = cube / tiles / kv_heads;
        let sharers = heads / kv_heads;
        let kv_base = batch * seq * kv_heads + kv;
        load_rows(
            k,
            &mut k_tile,
            first,
            seq,
            kv_base * width,
            kv_heads * width,
            width,
            tile,
            units,
        );
        load_rows(
            v,
            &mut v_tile,
            first,
            seq,
            kv_base * value,
            kv_heads * value,
            value,
            tile,
            units,
        );
        let mut held_k = Array::<f32>::new(comptime!((key_groups * tile) as usize));
        #[unroll]
        for i in 0..comptime!(key_groups * tile) {
            held_k[i as usize] = 0.0f32;
        }
        let mut held_v = Array::<f32>::new(comptime!((value_groups * tile) as usize));
        #[unroll]
        for i in 0..comptime!(value_groups * tile) {
            held_v[i as usize] = 0.0f32;
        }
        let mut scores = Array::<f32>::new(comptime!(each as usize));
        let mut slants = Array::<f32>::new(comptime!(each as usize));
        let row = UNIT_POS / comptime!(tile / each);
        let column = UNIT_POS % comptime!(tile / each) * each;
        let mut end = seq;
        if window > 0 && first + comptime!(tile - 1) + window < seq {
            end = first + comptime!(tile - 1) + window;
        }
        for member in 0..sharers {
            let head = kv * sharers + member;
            let row_base = batch * seq * heads + head;
            let mut rows = first;
            while rows < end {
                load_rows(
                    q,
                    &mut q_tile,
                    rows,
                    seq,
                    row_base * width,
                    heads * width,
                    width,
                    tile,
                    units,
                );
                load_rows(
                    d_out,
                    &mut d_tile,
                    rows,
                    seq,
                    row_base * value,
                    heads * value,
                    value,
                    tile,
                    units,
                );
                sync_cube();
                products(&q_tile, &k_tile, row, column, &mut scores, each, width);
                products(&d_tile, &v_tile, row, column, &mut slants, each, value);
                let query = rows + row;
                let mut sum = 0.0f32;
                let mut delta = 0.0f32;
                if query < seq {
                    let at = (batch * heads + head) * seq + query;
                    sum = sums[at as usize];
                    delta = deltas[at as usize];
                }
                #[unroll]
                for i in 0..each {
                    let mut share = 0.0f32;
                    let mut slope = 0.0f32;
                    if query < seq && sees(query, first + column + i, window) {
                        share = (scores[i as usize] * scale - sum).exp();
                        slope = share * (slants[i as usize] - delta) * scale;
                    }
                    shares[(row * tile + column + i) as usize] = share;
                    slopes[(row * tile + column + i) as usize] = slope;
                }
                sync_cube();
                #[unroll]
                for group in 0..value_groups {
                    let element = UNIT_POS + comptime!(group * units);
                    if element < value {
                        for j in 0..tile {
                            let factor = d_tile[(j * comptime!(value + 1) + element) as usize];
                            #[unroll]
                            for i in 0..tile {
                                held_v[comptime!((group * tile + i) as usize)] +=
                                    shares[(j * tile + i) as usize] * factor;
                            }
                        }
                    }
                }
                #[unroll]
                for group in 0..key_groups {
                    let element = UNIT_POS + comptime!(group * units);
                    if element < width {
                        for j in 0..tile {
                            let factor = q_tile[(j * comptime!(width + 1) + element) as usize];
                            #[unroll]
                            for i in 0..tile {
                                held_k[comptime!((group * tile + i) as usize)] +=
                                    slopes[(j * tile + i) as usize] * factor;
                            }
                        }
                    }
                }
                sync_cube();
                rows += tile;
            }
        }
        #[unroll]
        for i in 0..tile {
            if first + i < seq {
                let position = kv_base + (first + i) * kv_heads;
                #[unroll]
                for group in 0..key_groups {
                    let element = UNIT_POS + comptime!(group * units);
                    if element < width {
                        d_k[(position * width + element) as usize] = held_k[comptime!((group * tile + i) as usize)];
                    }
                }
                #[unroll]
                for group in 0..value_groups {
                    let element = UNIT_POS + comptime!(group * units);
                    if element < value {
                        d_v[(position * value + element) as usize] = held_v[comptime!((group * tile + i) as usize)];
                    }
                }
            }
        }
    }
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
            forward::launch(
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
