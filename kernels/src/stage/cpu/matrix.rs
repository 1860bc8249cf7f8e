//! A weight as it is kept: widened, or packed.

use super::product::{Plain, Product, multiply};
use crate::quant::{PackedMatrix, PackedType};

/// A weight `[rows, cols]` = `[out, in]`.
#[derive(Debug)]
pub(in crate::stage) enum Matrix {
    /// In f32.
    Plain(PlainMatrix),
    /// As in its file.
    Packed(PackedMatrix),
}

/// A weight in f32.
#[derive(Debug)]
pub(in crate::stage) struct PlainMatrix(Plain);

impl PlainMatrix {
    /// `[rows, cols]`
    #[cfg(feature = "gpu")]
    pub(in crate::stage) fn values(&self) -> &[f32] {
        &self.0.data
    }
}

impl Matrix {
    /// Widens.
    pub(in crate::stage) fn widened(packed: &PackedMatrix) -> Self {
        Self::Plain(PlainMatrix(Plain {
            rows: packed.rows(),
            cols: packed.cols(),
            data: packed.widen(),
        }))
    }

    /// Keeps what is packed; f32 is not.
    pub(in crate::stage) fn as_stored(packed: PackedMatrix) -> Self {
        match packed.ty() {
            PackedType::F32 => Self::widened(&packed),
            _ => Self::Packed(packed),
        }
    }

    /// Outputs.
    pub(in crate::stage) const fn rows(&self) -> usize {
        match self {
            Self::Plain(plain) => plain.0.rows,
            Self::Packed(packed) => packed.rows(),
        }
    }

    /// Bytes that the weight takes.
    pub(in crate::stage) fn bytes(&self) -> u64 {
        let bytes = match self {
            Self::Plain(plain) => plain.0.data.len() * 4,
            Self::Packed(packed) => packed.bytes().len(),
        };
        bytes as u64
    }

    /// Inputs.
    pub(in crate::stage) fn cols(&self) -> usize {
        match self {
            Self::Plain(plain) => plain.0.cols,
            Self::Packed(packed) => packed.cols(),
        }
    }

    /// Writes the embeddings of tokens, `[seq, cols]`, multiplied by `scale`.
    pub(in crate::stage) fn rows_of(&self, tokens: &[u32], scale: f32, out: &mut [f32]) {
        for (token, out) in tokens.iter().zip(out.chunks_exact_mut(self.cols())) {
            self.row(*token as usize, out);
        }
        if scale != 1.0 {
            out.iter_mut().for_each(|x| *x *= scale);
        }
    }

    /// Writes row `row`, such as a token's embedding.
    pub(in crate::stage) fn row(&self, row: usize, out: &mut [f32]) {
        match self {
            Self::Plain(PlainMatrix(plain)) => out.copy_from_slice(&plain.data[row * plain.cols..][..plain.cols]),
            Self::Packed(packed) => packed.widen_row(row, out),
        }
    }
}

/// `out[i, r] = Σ_c w[r, c] · x[i, c]` with 15 bits of each activation where the weight is packed: for logits, in which
/// no later sum evens out what rounding takes, and for activations with outliers.
pub(super) fn product_finely(x: &[f32], n: usize, matrix: &Matrix, out: &mut [f32]) {
    match matrix {
        Matrix::Plain(PlainMatrix(weight)) => multiply(x, n, &mut [Product { weight, out }]),
        Matrix::Packed(packed) => packed.multiply_finely(x, n, out),
    }
}

/// As [`products`], for any number of weights.
pub(super) fn products_of(x: &[f32], n: usize, pairs: Vec<(&Matrix, &mut [f32])>) {
    let (mut plain, mut packed) = (Vec::new(), Vec::new());
    for (matrix, out) in pairs {
        match matrix {
            Matrix::Plain(PlainMatrix(weight)) => plain.push(Product { weight, out }),
            Matrix::Packed(weight) => packed.push((weight, out)),
        }
    }
    if !packed.is_empty() {
        PackedMatrix::multiply_together(x, n, &mut packed);
    }
    if !plain.is_empty() {
        multiply(x, n, &mut plain);
    }
}

/// `out[i, r] = Σ_c w[r, c] · x[i, c]` for each weight and its `out`.
///
/// # Shapes
///
/// - `x`: `[n, cols]`, every `out`: `[n, rows]`, row-major
pub(super) fn products<const COUNT: usize>(x: &[f32], n: usize, pairs: [(&Matrix, &mut [f32]); COUNT]) {
    products_of(x, n, pairs.into_iter().collect());
}
