//! From f32 to tiles.

use core::arch::x86_64::{
    __m512bh, __m512i, __mmask16, _mm512_cvtne2ps_pbh, _mm512_maskz_loadu_ps, _mm512_permutexvar_epi16,
    _mm512_set_epi16, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_storeu_si512,
    _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use super::super::product::View;
use super::tile::{ELEMENTS, LINES, Side, Tile};

/// A matrix as lines: the rows of a left one or the columns of a right one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operand<'a> {
    pub(super) side: Side,
    values: &'a [f32],
    pub(super) lines: usize,
    /// Elements of a line.
    pub(super) elements: usize,
    order: Order,
}

/// What lies side by side in memory.
#[derive(Debug, Clone, Copy)]
enum Order {
    /// A line's elements; the next line begins so much later.
    Elements(usize),
    /// All lines' values of one element; the next element's begin so much later.
    Lines(usize),
}

impl<'a> Operand<'a> {
    /// The rows of a left matrix.
    pub(super) fn left(view: View<'a>) -> Self {
        Self::new(Side::Left, view)
    }

    /// The columns of a right matrix.
    pub(super) fn right(view: View<'a>) -> Self {
        Self::new(Side::Right, view.transposed())
    }

    /// Of a matrix whose rows are lines.
    fn new(side: Side, view: View<'a>) -> Self {
        let order = match view.strides() {
            (row, 1) => Order::Elements(row),
            (1, col) => Order::Lines(col),
            strides => unreachable!("{strides:?}: rows or columns lie without anything between"),
        };
        let (lines, elements) = view.shape();
        Self {
            side,
            values: view.values(),
            lines,
            elements,
            order,
        }
    }

    /// Tiles of a panel: of sixteen lines.
    pub(super) fn steps(&self) -> usize {
        self.elements.div_ceil(ELEMENTS)
    }

    /// Packs the lines from `first` on into as many panels as `tiles` has room for; what is beyond the matrix is zero.
    ///
    /// # Safety
    ///
    /// The machine has AVX-512F, BW and BF16.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn pack(&self, tiles: &mut [Tile], first: usize) {
        let steps = self.steps();
        let panels = tiles.len() / steps;
        match self.order {
            Order::Elements(stride) => {
                for (panel, tiles) in tiles.chunks_exact_mut(steps).enumerate() {
                    for (step, tile) in tiles.iter_mut().enumerate() {
                        // SAFETY: as the caller's.
                        unsafe { self.by_elements(tile, first + panel * LINES, step, stride) };
                    }
                }
            }
            // One element's values of all panels are neighbours.
            Order::Lines(stride) => {
                for step in 0..steps {
                    for panel in 0..panels {
                        let tile = &mut tiles[panel * steps + step];
                        // SAFETY: as the caller's.
                        unsafe { self.by_lines(tile, first + panel * LINES, step, stride) };
                    }
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn by_elements(&self, tile: &mut Tile, first: usize, step: usize, stride: usize) {
        let mut rows = [_mm512_setzero_si512(); LINES];
        let start = step * ELEMENTS;
        let count = (self.elements - start).min(ELEMENTS);
        let (low, high) = (mask(count), mask(count.saturating_sub(LINES)));
        for (line, row) in (first..self.lines).zip(&mut rows) {
            let values = &self.values[line * stride + start..][..count];
            // SAFETY: masks leave out what lies beyond `values`.
            *row = unsafe {
                let low = _mm512_maskz_loadu_ps(low, values.as_ptr());
                let high = _mm512_maskz_loadu_ps(high, values.as_ptr().wrapping_add(LINES));
                core::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
            };
        }
        if self.side == Side::Right {
            transpose(&mut rows);
        }
        store(tile, &rows);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn by_lines(&self, tile: &mut Tile, first: usize, step: usize, stride: usize) {
        let mut rows = [_mm512_setzero_si512(); LINES];
        let count = self.lines.saturating_sub(first).min(LINES);
        let lines = mask(count);
        let load = |element: usize| {
            let values = match element < self.elements {
                true => &self.values[element * stride + first..][..count],
                false => return _mm512_setzero_ps(),
            };
            // SAFETY: the mask leaves out what lies beyond `values`.
            unsafe { _mm512_maskz_loadu_ps(lines, values.as_ptr()) }
        };
        // Word 2 i of the result is the first element of line i, word 2 i + 1 the second.
        let pairs = interleaving();
        for (pair, row) in rows.iter_mut().enumerate() {
            let element = step * ELEMENTS + 2 * pair;
            if count == 0 || element >= self.elements {
                break;
            }
            let both = _mm512_cvtne2ps_pbh(load(element + 1), load(element));
            // SAFETY: both are 512 bits of anything.
            let both = unsafe { core::mem::transmute::<__m512bh, __m512i>(both) };
            *row = _mm512_permutexvar_epi16(pairs, both);
        }
        if self.side == Side::Left {
            transpose(&mut rows);
        }
        store(tile, &rows);
    }
}

/// The first `count` of sixteen.
fn mask(count: usize) -> __mmask16 {
    match count {
        0..LINES => (1 << count) - 1,
        _ => !0,
    }
}

#[target_feature(enable = "avx512f")]
fn interleaving() -> __m512i {
    _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
        16, 0,
    )
}

#[target_feature(enable = "avx512f")]
fn store(tile: &mut Tile, rows: &[__m512i; LINES]) {
    for (to, row) in tile.0.iter_mut().zip(rows) {
        // SAFETY: a row has 64 bytes.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), *row) };
    }
}

/// Rows of sixteen pairs for columns: pairs are exchanged within lanes of four rows, then the lanes.
#[target_feature(enable = "avx512f")]
fn transpose(rows: &mut [__m512i; LINES]) {
    let mut fours = [_mm512_setzero_si512(); LINES];
    for (to, from) in fours.as_chunks_mut::<4>().0.iter_mut().zip(rows.as_chunks::<4>().0) {
        let low = _mm512_unpacklo_epi32(from[0], from[1]);
        let high = _mm512_unpackhi_epi32(from[0], from[1]);
        let low_next = _mm512_unpacklo_epi32(from[2], from[3]);
        let high_next = _mm512_unpackhi_epi32(from[2], from[3]);
        *to = [
            _mm512_unpacklo_epi64(low, low_next),
            _mm512_unpackhi_epi64(low, low_next),
            _mm512_unpacklo_epi64(high, high_next),
            _mm512_unpackhi_epi64(high, high_next),
        ];
    }
    for column in 0..4 {
        let [a, b, c, d] = [0, 4, 8, 12].map(|row| fours[row + column]);
        let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (even_next, odd_next) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
        rows[column] = _mm512_shuffle_i32x4::<0x88>(even, even_next);
        rows[column + 8] = _mm512_shuffle_i32x4::<0xdd>(even, even_next);
        rows[column + 4] = _mm512_shuffle_i32x4::<0x88>(odd, odd_next);
        rows[column + 12] = _mm512_shuffle_i32x4::<0xdd>(odd, odd_next);
    }
}
