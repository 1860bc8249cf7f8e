//! Tiles of a few rows in shared memory, and their products: what the kernels of attention in training are made of.

use cubecl::prelude::*;

/// Brings rows `first` on of a matrix into a tile, zeros where there are no more than `count`. Row 0 begins at `base`, and
/// the next `stride` elements on. Rows of a tile are an element apart from each other, so that units that read a column
/// read different banks.
#[cube]
pub(super) fn load_rows(
    source: &[f32],
    tile: &mut Shared<[f32]>,
    first: u32,
    count: u32,
    base: u32,
    stride: u32,
    #[comptime] width: u32,
    #[comptime] rows: u32,
    #[comptime] units: u32,
) {
    let mut at = UNIT_POS;
    while at < comptime!(rows * width) {
        let row = at / width;
        let column = at % width;
        let mut value = 0.0f32;
        if first + row < count {
            value = source[(base + (first + row) * stride + column) as usize];
        }
        tile[(row * comptime!(width + 1) + column) as usize] = value;
        at += units;
    }
}

/// `out[i] = a[row, :] · b[column + i, :]`
#[cube]
pub(super) fn products(
    a: &Shared<[f32]>,
    b: &Shared<[f32]>,
    row: u32,
    column: u32,
    out: &mut Array<f32>,
    #[comptime] each: u32,
    #[comptime] width: u32,
) {
    #[unroll]
    for i in 0..each {
        out[i as usize] = 0.0f32;
    }
    let pitch = comptime!(width + 1);
    for element in 0..width {
        let factor = a[(row * pitch + element) as usize];
        #[unroll]
        for i in 0..each {
            out[i as usize] += factor * b[((column + i) * pitch + element) as usize];
        }
    }
}

/// Whether a query sees a key; a window of 0 is none.
#[cube]
pub(super) fn sees(query: u32, key: u32, window: u32) -> bool {
    key <= query && (window == 0u32 || key + window > query)
}

/// The first key of the first tile that a tile of queries from `first` on sees.
#[cube]
pub(super) fn first_key(first: u32, window: u32, #[comptime] tile: u32) -> u32 {
    let mut keys = 0u32;
    if window > 0 && first + 1 > window {
        keys = (first + 1 - window) / tile * tile;
    }
    keys
}

/// Begins sums of `count` numbers.
#[cube]
pub(super) fn clear(held: &mut Array<f32>, #[comptime] count: u32) {
    #[unroll]
    for i in 0..count {
        held[i as usize] = 0.0f32;
    }
}

/// `held[i] += Σ weights[i, j] · values[j, element]` over the rows `j` of a tile, for each of this unit's elements; with
/// `turned`, `weights[j, i]`.
#[cube]
pub(super) fn add_products(
    held: &mut Array<f32>,
    weights: &Shared<[f32]>,
    values: &Shared<[f32]>,
    #[comptime] turned: bool,
    #[comptime] width: u32,
    #[comptime] tile: u32,
    #[comptime] units: u32,
) {
    #[unroll]
    for group in 0..comptime!(width.div_ceil(units)) {
        let element = UNIT_POS + comptime!(group * units);
        if element < width {
            for j in 0..tile {
                let factor = values[(j * comptime!(width + 1) + element) as usize];
                #[unroll]
                for i in 0..tile {
                    let mut at = i * tile + j;
                    if comptime!(turned) {
                        at = j * tile + i;
                    }
                    held[comptime!((group * tile + i) as usize)] += weights[at as usize] * factor;
                }
            }
        }
    }
}

/// Writes what units hold of a tile of rows, the first being `first` of `count`. Row 0 is the matrix's row `base`, and the
/// next is `stride` rows on.
#[cube]
pub(super) fn store_rows(
    held: &Array<f32>,
    out: &mut [f32],
    first: u32,
    count: u32,
    base: u32,
    stride: u32,
    #[comptime] width: u32,
    #[comptime] tile: u32,
    #[comptime] units: u32,
) {
    #[unroll]
    for group in 0..comptime!(width.div_ceil(units)) {
        let element = UNIT_POS + comptime!(group * units);
        if element < width {
            #[unroll]
            for i in 0..tile {
                if first + i < count {
                    let at = (base + (first + i) * stride) * width + element;
                    out[at as usize] = held[comptime!((group * tile + i) as usize)];
                }
            }
        }
    }
}
