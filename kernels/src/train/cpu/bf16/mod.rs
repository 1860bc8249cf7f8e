//! Products of matrices in bf16 with sums in f32, by the instructions that some processors have for them.
//!
//! Operands are f32 and are rounded while they are packed into tiles of 16 lines and 32 elements of each. A line is a row
//! of the left matrix or a column of the right one. Every sum runs over its elements in one order, whatever the number of
//! threads, so that repeats give the same bits; the two sets of instructions round at different places and do not give
//! each other's.

mod amx;
mod avx512;
mod buffers;
mod pack;
mod product;
mod tile;

pub(super) use product::product;

/// What multiplies tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Instructions {
    /// Whole tiles at once: Intel's AMX-BF16.
    Amx,
    /// Rows of tiles: AVX512-BF16, also AMD's since Zen 4.
    Avx512,
}

impl Instructions {
    /// The best that this machine has, where it has any.
    pub(super) fn detect() -> Option<Self> {
        Self::all().next()
    }

    /// Those that this machine has, the best first.
    fn all() -> impl Iterator<Item = Self> {
        let packs = is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512f");
        let all = [(Self::Amx, packs && amx::permitted()), (Self::Avx512, packs)];
        all.into_iter()
            .filter_map(|(instructions, there)| there.then_some(instructions))
    }
}

#[cfg(test)]
mod tests {
    use super::super::product::{Mode, View, ViewMut};
    use super::{Instructions, product};

    /// Numbers between -1 and 1 of which few are of bf16.
    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        let number = |i: usize| ((i * 7_919 + seed * 104_729) % 10_007) as f32 / 5_003.0 - 1.0;
        (0..count).map(number).collect()
    }

    fn rounded(value: f32) -> f64 {
        f64::from(half::bf16::from_f32(value).to_f32())
    }

    /// A matrix of `rows` and `cols`, stored by rows or by columns, with something between what is stored together.
    struct Stored {
        values: Vec<f32>,
        rows: usize,
        cols: usize,
        by_columns: bool,
    }

    impl Stored {
        const BETWEEN: usize = 3;

        fn new(rows: usize, cols: usize, by_columns: bool, seed: usize) -> Self {
            let (outer, inner) = if by_columns { (cols, rows) } else { (rows, cols) };
            Self {
                values: numbers(outer * (inner + Self::BETWEEN), seed),
                rows,
                cols,
                by_columns,
            }
        }

        fn view(&self) -> View<'_> {
            match self.by_columns {
                true => View::strided(&self.values, self.cols, self.rows, self.rows + Self::BETWEEN).transposed(),
                false => View::strided(&self.values, self.rows, self.cols, self.cols + Self::BETWEEN),
            }
        }

        fn at(&self, row: usize, col: usize) -> f64 {
            rounded(match self.by_columns {
                true => self.values[col * (self.rows + Self::BETWEEN) + row],
                false => self.values[row * (self.cols + Self::BETWEEN) + col],
            })
        }
    }

    #[test]
    fn products_are_those_of_rounded_elements() {
        if Instructions::detect().is_none() {
            println!("skipped: this processor has no AVX512-BF16");
        }
        let shapes = [
            (1, 1, 1),
            (3, 5, 7),
            (32, 32, 32),
            (33, 64, 31),
            (17, 1_050, 70),
            (130, 95, 34),
            (5, 0, 4),
        ];
        for instructions in Instructions::all() {
            for (rows, inner, cols) in shapes {
                for case in 0..8 {
                    let a = Stored::new(rows, inner, case & 1 == 1, 1);
                    let b = Stored::new(inner, cols, case & 2 == 2, 2);
                    let mode = if case & 4 == 4 { Mode::Add } else { Mode::Write };
                    let mut out = vec![1.5; rows * (cols + 2)];
                    let view = ViewMut::strided(&mut out, rows, cols, cols + 2);
                    product(instructions, view, mode, a.view(), b.view());
                    for (row, out) in out.chunks_exact(cols + 2).enumerate() {
                        assert_eq!(out[cols..], [1.5; 2], "what is between is left alone");
                        for (col, value) in out[..cols].iter().enumerate() {
                            let before = if mode == Mode::Add { 1.5 } else { 0.0 };
                            let products = (0..inner).map(|i| a.at(row, i) * b.at(i, col));
                            let right = before + products.clone().sum::<f64>();
                            let size = 1.5 + products.map(f64::abs).sum::<f64>();
                            let error = (f64::from(*value) - right).abs();
                            assert!(
                                error < 1e-5 * size,
                                "{instructions:?} {rows} {inner} {cols} {case}: {value} {right}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let (rows, inner, cols) = (300, 700, 450);
        let (a, b) = (numbers(rows * inner, 3), numbers(inner * cols, 4));
        for instructions in Instructions::all() {
            let with = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut out = vec![0.25; rows * cols];
                let view = ViewMut::new(&mut out, rows, cols);
                let (a, b) = (View::new(&a, rows, inner), View::new(&b, inner, cols));
                pool.install(|| product(instructions, view, Mode::Add, a, b));
                out
            };
            let one = with(1);
            assert!(with(3) == one && with(1) == one, "{instructions:?}");
        }
    }
}
