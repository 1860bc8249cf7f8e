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
