//! Products of matrices that lie in slices, transposed or as parts of wider ones, without copies.

use gemm::Parallelism;

/// A matrix to read.
#[derive(Debug, Clone, Copy)]
pub(in crate::train) struct View<'a> {
    values: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// Rows of `cols` elements, each `stride` after the one before.
    pub(in crate::train) fn strided(values: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(fits(values.len(), rows, cols, stride), "a matrix beyond its values");
        Self {
            values,
            rows,
            cols,
            row_stride: stride,
            col_stride: 1,
        }
    }

    /// Rows without anything between them.
    pub(in crate::train) fn new(values: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(values, rows, cols, cols)
    }

    /// Columns for rows.
    pub(in crate::train) fn transposed(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl<'a> View<'a> {
    /// All that the view was made of; its elements are among them.
    pub(super) fn values(self) -> &'a [f32] {
        self.values
    }

    /// Rows and columns.
    pub(super) fn shape(self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// From one row to the next, and from one column to the next.
    pub(super) fn strides(self) -> (usize, usize) {
        (self.row_stride, self.col_stride)
    }
}

/// A matrix to write.
#[derive(Debug)]
pub(in crate::train) struct ViewMut<'a> {
    values: &'a mut [f32],
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<'a> ViewMut<'a> {
    /// Rows of `cols` elements, each `stride` after the one before.
    pub(in crate::train) fn strided(values: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(fits(values.len(), rows, cols, stride), "a matrix beyond its values");
        Self {
            values,
            rows,
            cols,
            stride,
        }
    }

    /// Rows without anything between them.
    pub(in crate::train) fn new(values: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::strided(values, rows, cols, cols)
    }
}

#[cfg(target_arch = "x86_64")]
impl<'a> ViewMut<'a> {
    /// Values, rows, columns, and from one row to the next.
    pub(super) fn into_parts(self) -> (&'a mut [f32], usize, usize, usize) {
        (self.values, self.rows, self.cols, self.stride)
    }
}

fn fits(len: usize, rows: usize, cols: usize, stride: usize) -> bool {
    rows == 0 || cols == 0 || (stride >= cols && (rows - 1) * stride + cols <= len)
}

/// What becomes of what was there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::train) enum Mode {
    /// It is written over.
    Write,
    /// It is added to.
    Add,
}

/// Who computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::train) enum Threads {
    All,
    /// The one that asks.
    Own,
}

/// `out = a · b`, or `out += a · b`.
pub(in crate::train) fn product(out: ViewMut<'_>, mode: Mode, a: View<'_>, b: View<'_>, threads: Threads) {
    assert!(
        a.rows == out.rows && b.cols == out.cols && a.cols == b.rows,
        "matrices that do not meet"
    );
    if out.rows == 0 || out.cols == 0 {
        return;
    }
    let stride = |stride: usize| isize::try_from(stride).unwrap_or(isize::MAX);
    let parallelism = match threads {
        Threads::All => Parallelism::Rayon(0),
        Threads::Own => Parallelism::None,
    };
    // SAFETY: the views' elements lie within their slices, as was asserted when they were made; `out` is borrowed alone.
    unsafe {
        gemm::gemm(
            out.rows,
            out.cols,
            a.cols,
            out.values.as_mut_ptr(),
            1,
            stride(out.stride),
            mode == Mode::Add,
            a.values.as_ptr(),
            stride(a.col_stride),
            stride(a.row_stride),
            b.values.as_ptr(),
            stride(b.col_stride),
            stride(b.row_stride),
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_meet_the_plain_loops_over_odd_shapes() {
        for (rows, inner, cols, more) in [
            (1, 1, 1, 0),
            (3, 5, 7, 2),
            (17, 33, 9, 1),
            (70, 64, 130, 5),
            (1, 40, 3, 0),
        ] {
            let number = |i: usize| ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0;
            let a: Vec<f32> = (0..rows * (inner + more)).map(number).collect();
            let b: Vec<f32> = (0..cols * inner).map(|i| number(i + 5)).collect();
            for threads in [Threads::All, Threads::Own] {
                let mut out = vec![1.0; rows * (cols + more)];
                let a_view = View::strided(&a, rows, inner, inner + more);
                let b_view = View::new(&b, cols, inner).transposed();
                for (mode, times) in [(Mode::Write, 1.0), (Mode::Add, 2.0)] {
                    let view = ViewMut::strided(&mut out, rows, cols, cols + more);
                    product(view, mode, a_view, b_view, threads);
                    for (row, values) in out.chunks(cols + more).enumerate() {
                        for (col, value) in values.iter().enumerate() {
                            let sum = |i: usize| a[row * (inner + more) + i] * b[col * inner + i];
                            let right = match col < cols {
                                true => times * (0..inner).map(sum).sum::<f32>(),
                                false => 1.0,
                            };
                            assert!((value - right).abs() < 1e-4, "{rows} {inner} {cols}: {value} {right}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "a matrix beyond its values")]
    fn a_matrix_beyond_its_values_is_refused() {
        View::strided(&[0.0; 10], 3, 4, 4);
    }
}
