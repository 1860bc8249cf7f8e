//! Products with f32 weights: one loop for one position and for many, so that both give the same bits.

#![expect(
    clippy::needless_range_loop,
    reason = "indices name the rows and columns of a tile in registers"
)]

use super::lanes::{Lanes, Level, on_every_level};
use crate::team;

/// Rows of a weight that one task takes: 32 rows of 2,048 fill a quarter of a second-level cache.
const STRIP_ROWS: usize = 32;
/// Multiplications below which a product stays on one thread: waking another takes about as long as this many.
const PARALLEL_PRODUCTS_MIN: usize = 50_000;

/// A weight `[rows, cols]` = `[out, in]` in f32.
#[derive(Debug, Clone)]
pub(super) struct Plain {
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// `rows · cols` elements, row-major.
    pub(super) data: Vec<f32>,
}

/// One product of several that share an input.
pub(super) struct Product<'a> {
    /// What to multiply by.
    pub(super) weight: &'a Plain,
    /// `[n, rows]`.
    pub(super) out: &'a mut [f32],
}

/// `out[i, r] = Σ_c w[r, c] · x[i, c]` for each weight, on all threads where the work is worth it.
///
/// # Shapes
///
/// - `x`: `[n, cols]`, every `out`: `[n, rows]`, row-major
pub(super) fn multiply(x: &[f32], n: usize, products: &mut [Product<'_>]) {
    let level = Level::best();
    let mut work = 0;
    let mut strips = Vec::new();
    for product in products.iter_mut() {
        let Plain { rows, cols, data } = product.weight;
        assert_eq!(x.len(), n * cols);
        assert_eq!(product.out.len(), n * rows);
        assert_eq!(data.len(), rows * cols);
        work += n * rows * cols;
        let out = Out(product.out.as_mut_ptr());
        let strip_rows = if n == 1 { strip_rows_of_one(*rows) } else { STRIP_ROWS };
        strips.extend((0..*rows).step_by(strip_rows).map(|first| Strip {
            weight: product.weight,
            first,
            end: (first + strip_rows).min(*rows),
            out,
        }));
    }
    let run = |strip: &Strip<'_>| {
        // SAFETY: lengths are asserted above; strips of one product write disjoint columns of `out`, which is borrowed
        // mutably until all of them are done.
        unsafe {
            strip_product(
                level,
                x.as_ptr(),
                n,
                strip.weight.data.as_ptr(),
                strip.weight.cols,
                strip.first,
                strip.end,
                strip.out.0,
                strip.weight.rows,
            );
        }
    };
    if work < PARALLEL_PRODUCTS_MIN {
        strips.iter().for_each(run);
    } else {
        team::in_pieces(strips.len(), |index| strips.get(index).into_iter().for_each(run));
    }
}

/// A single position is bound by memory and by waking threads: few, long pieces.
fn strip_rows_of_one(rows: usize) -> usize {
    rows.div_ceil(team::threads() * 3).max(STRIP_ROWS)
}

struct Strip<'a> {
    weight: &'a Plain,
    first: usize,
    end: usize,
    out: Out,
}

#[derive(Clone, Copy)]
struct Out(*mut f32);
// SAFETY: every strip writes columns of its own.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

on_every_level! {
    /// Rows `first..end` of a weight against `n` rows of `x`; writes `out[i, first..end]` of `[n, rows]`.
    #[expect(clippy::too_many_arguments, reason = "a kernel's arguments are plain numbers and pointers")]
    unsafe fn strip_product(
        x: *const f32, n: usize, weight: *const f32, cols: usize, first: usize, end: usize, out: *mut f32, rows: usize,
    ) = strip_body
}

#[inline(always)]
#[expect(
    clippy::too_many_arguments,
    reason = "a kernel's arguments are plain numbers and pointers"
)]
unsafe fn strip_body<L: Lanes>(
    x: *const f32,
    n: usize,
    weight: *const f32,
    cols: usize,
    first: usize,
    end: usize,
    out: *mut f32,
    rows: usize,
) {
    let mut i = 0;
    // SAFETY: every index stays within `[n, cols]`, `[rows, cols]` and `[n, rows]`.
    unsafe {
        while i < n {
            let many = if L::TILE == 4 && n - i >= 4 {
                4
            } else if n - i >= 2 {
                2
            } else {
                1
            };
            let mut r = first;
            while r < end {
                let (x, weight, out) = (x.add(i * cols), weight.add(r * cols), out.add(i * rows + r));
                let tall = end - r;
                r += match (many, tall) {
                    (4, 4..) => tile::<L, 4, 4>(x, weight, cols, out, rows),
                    (4, _) => tile::<L, 4, 1>(x, weight, cols, out, rows),
                    (2, 2..) => tile::<L, 2, 2>(x, weight, cols, out, rows),
                    (2, _) => tile::<L, 2, 1>(x, weight, cols, out, rows),
                    (_, 4..) => tile::<L, 1, 4>(x, weight, cols, out, rows),
                    _ => tile::<L, 1, 1>(x, weight, cols, out, rows),
                };
            }
            i += many;
        }
    }
}

/// `X` rows of `x` against `W` rows of a weight; returns `W`.
#[inline(always)]
unsafe fn tile<L: Lanes, const X: usize, const W: usize>(
    x: *const f32,
    weight: *const f32,
    cols: usize,
    out: *mut f32,
    rows: usize,
) -> usize {
    // SAFETY: the caller gives `X` rows and `W` rows of `cols` elements, and room for their products.
    unsafe {
        let mut sums = [[L::splat(0.0); W]; X];
        let whole = cols - cols % 16;
        let mut at = 0;
        while at < whole {
            let mut right = [L::splat(0.0); W];
            for w in 0..W {
                right[w] = L::load(weight.add(w * cols + at));
            }
            for i in 0..X {
                let left = L::load(x.add(i * cols + at));
                for w in 0..W {
                    sums[i][w] = L::multiply_add(left, right[w], sums[i][w]);
                }
            }
            at += 16;
        }
        if whole < cols {
            for i in 0..X {
                let left = L::load_some(x.add(i * cols + whole), cols - whole);
                for w in 0..W {
                    let right = L::load_some(weight.add(w * cols + whole), cols - whole);
                    sums[i][w] = L::multiply_add(left, right, sums[i][w]);
                }
            }
        }
        for i in 0..X {
            for w in 0..W {
                *out.add(i * rows + w) = L::sum(sums[i][w]);
            }
        }
    }
    W
}

#[cfg(test)]
mod tests {
    use super::*;
    use polder_protocol::rng::Random;

    #[test]
    fn products_meet_the_plain_loop_for_odd_shapes() {
        let mut random = Random::from_seed(7);
        for (n, rows, cols) in [
            (1, 1, 1),
            (1, 7, 19),
            (3, 5, 16),
            (6, 33, 40),
            (9, 70, 131),
            (2, 400, 576),
        ] {
            let x = numbers(&mut random, n * cols);
            let weight = Plain {
                rows,
                cols,
                data: numbers(&mut random, rows * cols),
            };
            let (mut out, mut right) = (vec![0.0; n * rows], vec![0.0; n * rows]);
            multiply(
                &x,
                n,
                &mut [Product {
                    weight: &weight,
                    out: &mut out,
                }],
            );
            polder_reference::matmul(&mut right, &x, &weight.data, cols);
            let error = out.iter().zip(&right).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(error < 1e-4, "{n} {rows} {cols}: {error}");
        }
    }

    #[test]
    fn one_position_and_many_give_equal_bits_on_every_level() {
        let mut random = Random::from_seed(8);
        let (n, rows, cols) = (7, 37, 75);
        let x = numbers(&mut random, n * cols);
        let data = numbers(&mut random, rows * cols);
        let run = |level, first: usize, n: usize| {
            let mut out = vec![0.0; n * rows];
            // SAFETY: the lengths are those of the shapes.
            unsafe {
                let x = x[first * cols..].as_ptr();
                strip_product(level, x, n, data.as_ptr(), cols, 0, rows, out.as_mut_ptr(), rows);
            }
            out
        };
        let whole = run(Level::Portable, 0, n);
        for level in Level::all() {
            assert_eq!(run(level, 0, n), whole, "{level:?}");
            let singly: Vec<f32> = (0..n).flat_map(|i| run(level, i, 1)).collect();
            assert_eq!(singly, whole, "{level:?}");
        }
    }

    fn numbers(random: &mut Random, count: usize) -> Vec<f32> {
        (0..count).map(|_| random.unit_f32() - 0.5).collect()
    }
}
