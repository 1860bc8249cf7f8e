//! Attention over whole sequences.

use cubecl::prelude::*;

use super::tiles::{clear, first_key, load_rows, products, sees};

/// Below every score, and finite.
const NEVER: f32 = -1e30;

/// One cube for each tile of queries of each head.
#[cube(launch)]
pub(super) fn attend(
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
        clear(&mut held, comptime!(groups * tile));
        let mut scores = Array::<f32>::new(comptime!(each as usize));
        let row = UNIT_POS / comptime!(tile / each);
        let column = UNIT_POS % comptime!(tile / each) * each;
        let mut keys = first_key(first, window, tile);
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
