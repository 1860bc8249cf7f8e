//! The gradients of attention over whole sequences.

use cubecl::prelude::*;

use super::tiles::{add_products, clear, first_key, load_rows, products, sees, store_rows};

/// `deltas[b, h, s] = d_out[b, s, h, :] · out[b, s, h, :]`, one unit each.
#[cube(launch)]
pub(super) fn deltas(out: &[f32], d_out: &[f32], deltas: &mut [f32], count: u32, seq: u32, heads: u32, value: u32) {
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
pub(super) fn query_gradients(
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
        clear(&mut held, comptime!(groups * tile));
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
        let mut keys = first_key(first, window, tile);
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
            add_products(&mut held, &slopes, &k_tile, false, width, tile, units);
            sync_cube();
            keys += tile;
        }
        store_rows(&held, d_q, first, seq, row_base, heads, width, tile, units);
    }
}

/// The gradients of keys and values, one cube for each tile of them: it goes through all queries that see it, of all
/// heads that share it.
#[cube(launch)]
pub(super) fn key_gradients(
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
        clear(&mut held_k, comptime!(key_groups * tile));
        let mut held_v = Array::<f32>::new(comptime!((value_groups * tile) as usize));
        clear(&mut held_v, comptime!(value_groups * tile));
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
                add_products(&mut held_v, &shares, &d_tile, true, value, tile, units);
                add_products(&mut held_k, &slopes, &q_tile, true, width, tile, units);
                sync_cube();
                rows += tile;
            }
        }
        store_rows(&held_k, d_k, first, seq, kv_base, kv_heads, width, tile, units);
        store_rows(&held_v, d_v, first, seq, kv_base, kv_heads, value, tile, units);
    }
}
