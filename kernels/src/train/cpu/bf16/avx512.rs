//! Squares of the output by products of pairs, sixteen columns at once.

use core::arch::x86_64::{
    __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps,
    _mm512_storeu_ps,
};

use super::super::product::Mode;
use super::tile::{Factors, LINES, SQUARE, Tile};

/// Rows whose sums are in registers together: with two times sixteen columns, half of the registers.
const ROWS: usize = 8;

/// Writes or adds a square of 32 rows, each `stride` after the one before, and 32 columns.
///
/// # Safety
///
/// The machine has AVX-512F and BF16, and `out` points to such a square.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn square(out: *mut f32, stride: usize, mode: Mode, factors: Factors<'_>) {
    for first in (0..SQUARE).step_by(ROWS) {
        let left = factors.left[first / LINES];
        let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
        let place = |row: usize, half: usize| out.wrapping_add((first + row) * stride + half * LINES);
        if mode == Mode::Add {
            for (row, sums) in sums.iter_mut().enumerate() {
                for (half, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: within the caller's square.
                    *sum = unsafe { _mm512_loadu_ps(place(row, half)) };
                }
            }
        }
        for ((left, right), right_next) in left.iter().zip(factors.right[0]).zip(factors.right[1]) {
            for pair in 0..LINES {
                let columns = [row(right, pair), row(right_next, pair)];
                for (row, sums) in sums.iter_mut().enumerate() {
                    let elements = &left.0[first % LINES + row];
                    let both = u32::from(elements[2 * pair]) | u32::from(elements[2 * pair + 1]) << 16;
                    let both = pairs(_mm512_set1_epi32(both.cast_signed()));
                    for (sum, columns) in sums.iter_mut().zip(columns) {
                        *sum = _mm512_dpbf16_ps(*sum, both, columns);
                    }
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            for (half, sum) in sums.into_iter().enumerate() {
                // SAFETY: within the caller's square.
                unsafe { _mm512_storeu_ps(place(row, half), sum) };
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn row(tile: &Tile, row: usize) -> __m512bh {
    // SAFETY: a row has 64 bytes.
    pairs(unsafe { _mm512_loadu_si512(tile.0[row].as_ptr().cast()) })
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn pairs(words: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits of anything.
    unsafe { core::mem::transmute(words) }
}
