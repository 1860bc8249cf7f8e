//! A packed matrix and its products.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use memmap2::Mmap;
use rayon::prelude::*;

use super::activations::Activations;
use super::dot::{Path, multiply_float_rows, multiply_rows};
use super::interleaved::{Factor, Interleaved, Kind, Out, Stored};
use super::{PackedType, QuantError, widen};
use crate::team;

/// Multiplications below which a product stays on one thread: telling another takes about as long as this many.
const PARALLEL_PRODUCTS_MIN: usize = 50_000;
/// Pieces per thread, so that a thread that the system interrupts does not hold up the rest.
const PIECES_PER_THREAD: usize = 4;

/// Bytes of a mapped file, or bytes in memory. Cloning shares them.
#[derive(Clone)]
pub struct PackedBytes(Source);

#[derive(Clone)]
enum Source {
    Mapped { map: Arc<Mmap>, range: Range<usize> }, // The range lies within the map.
    Owned { bytes: Arc<[u8]>, range: Range<usize> }, // As above.
}

impl PackedBytes {
    /// Bytes `range` of `map`; `None` where the map does not have them.
    pub fn mapped(map: Arc<Mmap>, range: Range<usize>) -> Option<Self> {
        map.get(range.clone())?;
        Some(Self(Source::Mapped { map, range }))
    }

    /// A part of these bytes, shared; `None` where they do not have it.
    fn part(&self, part: Range<usize>) -> Option<Self> {
        self.get(part.clone())?;
        let within = |range: &Range<usize>| range.start + part.start..range.start + part.end;
        Some(Self(match &self.0 {
            Source::Mapped { map, range } => Source::Mapped {
                map: Arc::clone(map),
                range: within(range),
            },
            Source::Owned { bytes, range } => Source::Owned {
                bytes: Arc::clone(bytes),
                range: within(range),
            },
        }))
    }
}

impl From<Vec<u8>> for PackedBytes {
    fn from(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self(Source::Owned {
            bytes: bytes.into(),
            range,
        })
    }
}

impl Deref for PackedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Source::Mapped { map, range } => &map[range.clone()],
            Source::Owned { bytes, range } => &bytes[range.clone()],
        }
    }
}

impl fmt::Debug for PackedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match &self.0 {
            Source::Mapped { .. } => "mapped",
            Source::Owned { .. } => "owned",
        };
        write!(f, "PackedBytes({place}, {} bytes)", self.len())
    }
}

/// A weight `[rows, cols]` = `[out, in]` in a packed type, multiplied as it is.
///
/// The bytes are exactly `rows` rows of whole blocks.
#[derive(Debug, Clone)]
pub struct PackedMatrix {
    ty: PackedType,
    rows: usize,
    cols: usize,
    row_bytes: usize,
    bytes: PackedBytes,
    /// The rows side by side, once there were some products; see [`super::interleaved`]. Clones share them.
    interleaved: Arc<Laid>,
}

#[derive(Debug)]
struct Laid {
    cell: OnceLock<Interleaved>,
    /// Products until the rows are laid out for good.
    patience: AtomicU32,
}

impl Default for Laid {
    fn default() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        // The weights of a model take turns, so that none of its tokens waits for all of them.
        let turn = COUNT.fetch_add(1, Ordering::Relaxed) % 16;
        Self {
            cell: OnceLock::new(),
            patience: AtomicU32::new(2 + turn),
        }
    }
}

/// Weights whose rows are side by side, or will be.
#[derive(Clone, Copy)]
enum SideBySide<'a> {
    Laid(&'a Interleaved),
    Stored(Stored<'a>),
}

impl SideBySide<'_> {
    const fn groups(&self) -> usize {
        match self {
            Self::Laid(laid) => laid.groups(),
            Self::Stored(stored) => stored.groups(),
        }
    }

    /// # Safety
    ///
    /// As [`Interleaved::multiply`].
    unsafe fn multiply(&self, path: Path, groups: Range<usize>, x: Factor<'_>, n: usize, out: Out) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::Laid(laid) => laid.multiply(path, groups, x, n, out),
                Self::Stored(stored) => stored.multiply(path, groups, x, n, out),
            }
        }
    }
}

/// One product of several that share an input: a weight, and where its outputs `[n, rows]` go.
pub type Product<'a> = (&'a PackedMatrix, &'a mut [f32]);

impl PackedMatrix {
    /// Checks that `bytes` are `rows` rows of `cols` elements.
    ///
    /// # Errors
    ///
    /// [`QuantError`] where they are not.
    pub fn new(ty: PackedType, rows: usize, cols: usize, bytes: PackedBytes) -> Result<Self, QuantError> {
        let row_bytes = ty.row_bytes(cols)?;
        let expected = ty.matrix_bytes(rows, cols)?;
        if bytes.len() != expected {
            return Err(QuantError::Length {
                ty,
                rows,
                cols,
                expected,
                found: bytes.len(),
            });
        }
        Ok(Self {
            ty,
            rows,
            cols,
            row_bytes,
            bytes,
            interleaved: Arc::default(),
        })
    }

    /// Rows `first .. first + count`, sharing the bytes; `None` where there are not so many.
    pub fn part(&self, first: usize, count: usize) -> Option<Self> {
        let end = first.checked_add(count)?;
        let bytes = self
            .bytes
            .part(first.checked_mul(self.row_bytes)?..end.checked_mul(self.row_bytes)?)?;
        (end <= self.rows).then(|| Self {
            ty: self.ty,
            rows: count,
            cols: self.cols,
            row_bytes: self.row_bytes,
            bytes,
            interleaved: Arc::default(),
        })
    }

    /// How elements are stored.
    pub const fn ty(&self) -> PackedType {
        self.ty
    }

    /// Outputs.
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub const fn cols(&self) -> usize {
        self.cols
    }

    /// The packed rows.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// `out[i, r] = Σ_c w[r, c] · x[i, c]`, with activations rounded to int8 per 32 unless the type is a plain float.
    ///
    /// The sums have one fixed order, so every machine computes the same bits.
    ///
    /// # Shapes
    ///
    /// - `x`: `[n, cols]`, row-major
    /// - `out`: `[n, rows]`, row-major
    ///
    /// # Panics
    ///
    /// When `x` or `out` is of another size.
    pub fn multiply(&self, x: &[f32], n: usize, out: &mut [f32]) {
        self.multiply_by(Path::best(), x, n, out);
    }

    /// As [`PackedMatrix::multiply`], with 15 bits of each activation in place of 7: what rounding left over is rounded
    /// once more and multiplied too. Weights are read once, so a product that waits for memory takes no longer.
    ///
    /// # Panics
    ///
    /// When `x` or `out` is of another size.
    pub fn multiply_finely(&self, x: &[f32], n: usize, out: &mut [f32]) {
        if self.ty.is_float() {
            return self.multiply(x, n, out);
        }
        let mut both = x.to_vec();
        both.extend(Activations::round(x, self.cols).rest(x));
        let mut sums = vec![0.0; 2 * out.len()];
        self.multiply(&both, 2 * n, &mut sums);
        let (coarse, fine) = sums.split_at(out.len());
        for ((out, coarse), fine) in out.iter_mut().zip(coarse).zip(fine) {
            *out = coarse + fine;
        }
    }

    /// All values, row-major.
    pub fn widen(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.cols];
        if self.cols == 0 {
            return values;
        }
        let rows = self.bytes.par_chunks_exact(self.row_bytes);
        rows.zip(values.par_chunks_exact_mut(self.cols))
            .for_each(|(row, values)| {
                widen(self.ty, row, values).expect("the constructor checked the length of rows");
            });
        values
    }

    /// The values of one row, such as a token's embedding.
    ///
    /// # Panics
    ///
    /// When there is no such row, or `out` is not `cols` long.
    pub fn widen_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(out.len(), self.cols, "one row has {} elements", self.cols);
        let bytes = &self.bytes[row * self.row_bytes..][..self.row_bytes];
        widen(self.ty, bytes, out).expect("the constructor checked the length of rows");
    }

    /// [`PackedMatrix::multiply`] for several weights of one input, in one go: activations are rounded once, and threads
    /// meet once.
    ///
    /// # Panics
    ///
    /// When `x` or an `out` is of another size.
    pub fn multiply_together(x: &[f32], n: usize, products: &mut [Product<'_>]) {
        Self::together_by(Path::best(), x, n, products);
    }

    fn multiply_by(&self, path: Path, x: &[f32], n: usize, out: &mut [f32]) {
        Self::together_by(path, x, n, &mut [(self, out)]);
    }

    fn together_by(path: Path, x: &[f32], n: usize, products: &mut [Product<'_>]) {
        let mut rounded: Option<Activations> = None;
        let mut jobs = Vec::with_capacity(products.len());
        let mut multiplications = 0;
        for (matrix, out) in products.iter_mut() {
            let Self { rows, cols, .. } = **matrix;
            assert_eq!(Some(x.len()), n.checked_mul(cols), "x is [{n}, {cols}]");
            assert_eq!(Some(out.len()), n.checked_mul(rows), "out is [{n}, {rows}]");
            if out.is_empty() || cols == 0 {
                out.fill(0.0);
                continue;
            }
            if !matrix.ty.is_float() && rounded.is_none() {
                rounded = Some(Activations::round(x, cols));
            }
            match matrix.interleaved() {
                Some(weights) => {
                    multiplications += n * rows * cols;
                    let start = out.as_mut_ptr();
                    jobs.push((weights, Out { start, rows }));
                }
                None => matrix.row_by_row(path, x, rounded.as_ref(), n, out),
            }
        }
        let factor = Factor {
            rounded: rounded.as_ref(),
            floats: x,
        };
        strips(path, &jobs, factor, n, multiplications);
    }

    /// The rows side by side; `None` where this type is multiplied as it lies.
    fn interleaved(&self) -> Option<SideBySide<'_>> {
        let kind = Kind::of(self.ty)?;
        if let Some(laid) = self.interleaved.cell.get() {
            return Some(SideBySide::Laid(laid));
        }
        let patience = &self.interleaved.patience;
        if patience.load(Ordering::Relaxed) > 0 {
            patience.store(patience.load(Ordering::Relaxed).saturating_sub(1), Ordering::Relaxed);
            return Some(SideBySide::Stored(Stored {
                kind,
                rows: self.rows,
                cols: self.cols,
                row_bytes: self.row_bytes,
                bytes: &self.bytes,
            }));
        }
        let laid = self.interleaved.cell.get_or_init(|| {
            let laid = Interleaved::new(self.ty, self.rows, self.cols, &self.bytes);
            laid.expect("the constructor checked the length")
                .expect("the type has a kind")
        });
        Some(SideBySide::Laid(laid))
    }

    fn row_by_row(&self, path: Path, x: &[f32], rounded: Option<&Activations>, n: usize, out: &mut [f32]) {
        let piece = |rows: &[u8], out: &mut [f32]| match rounded.filter(|_| !self.ty.is_float()) {
            Some(activations) => multiply_rows(path, self.ty, rows, self.row_bytes, activations, n, out),
            None => multiply_float_rows(path, rows, self.row_bytes, x, n, out),
        };
        if n == 1 {
            self.in_pieces(n, out, piece);
        } else {
            // Computed as [rows, n], so that a piece of rows is one piece of memory.
            let mut transposed = vec![0.0; out.len()];
            self.in_pieces(n, &mut transposed, piece);
            for (i, out) in out.chunks_exact_mut(self.rows).enumerate() {
                for (out, value) in out.iter_mut().zip(transposed[i..].iter().step_by(n)) {
                    *out = *value;
                }
            }
        }
    }

    /// Calls `piece` with rows and their outputs, on all threads where the work is worth it.
    fn in_pieces(&self, n: usize, out: &mut [f32], piece: impl Fn(&[u8], &mut [f32]) + Sync) {
        let products = self.rows.saturating_mul(self.cols).saturating_mul(n);
        let threads = rayon::current_num_threads();
        if products < PARALLEL_PRODUCTS_MIN || threads == 1 {
            piece(&self.bytes, out);
            return;
        }
        let rows = self.rows.div_ceil(threads * PIECES_PER_THREAD);
        let pieces = self.bytes.par_chunks(rows * self.row_bytes);
        pieces
            .zip(out.par_chunks_mut(rows * n))
            .for_each(|(rows, out)| piece(rows, out));
    }
}

/// Does products in strips of rows, on all threads where the work is worth it.
fn strips(path: Path, jobs: &[(SideBySide<'_>, Out)], x: Factor<'_>, n: usize, multiplications: usize) {
    let groups: usize = jobs.iter().map(|(weights, _)| weights.groups()).sum();
    let alone = multiplications < PARALLEL_PRODUCTS_MIN;
    let pieces = if alone { 1 } else { team::threads() * PIECES_PER_THREAD };
    // Groups of floats are worked on four at a time where there is one activation.
    let strip = groups
        .div_ceil(pieces)
        .next_multiple_of(if groups >= 4 * pieces { 4 } else { 1 });
    let mut list = Vec::with_capacity(pieces + jobs.len());
    for (job, (weights, _)) in jobs.iter().enumerate() {
        let groups = weights.groups();
        let starts = (0..groups).step_by(strip);
        list.extend(starts.map(|start| (job, start..groups.min(start + strip))));
    }
    let run = |index: usize| {
        let Some((job, groups)) = list.get(index) else { return };
        let Some((weights, out)) = jobs.get(*job) else { return };
        // SAFETY: lengths were checked; strips of one weight have columns of their own, and `out` is borrowed until all are
        // done; `path` is one that this processor has.
        unsafe { weights.multiply(path, groups.clone(), x, n, *out) };
    };
    match alone {
        true => (0..list.len()).for_each(run),
        false => team::in_pieces(list.len(), run),
    }
}

#[cfg(test)]
mod tests {
    use super::super::narrow;
    use super::*;

    #[test]
    fn a_product_is_close_to_that_of_the_widened_matrix() {
        for ty in PackedType::ALL {
            for (rows, cols, n) in [(1, 256, 1), (3, 512, 2), (17, 256, 5), (192, 768, 9)] {
                let matrix = matrix(ty, rows, cols);
                let x = noise(n * cols, 7);
                let mut out = vec![0.0; n * rows];
                matrix.multiply(&x, n, &mut out);
                let weights = matrix.widen();
                for (i, x) in x.chunks_exact(cols).enumerate() {
                    for (r, weights) in weights.chunks_exact(cols).enumerate() {
                        let exact: f64 = weights.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                        let size: f64 = weights.iter().map(|w| f64::from(w * w)).sum::<f64>().sqrt();
                        // Activations within 1 are off by at most 1/254 each, with random signs; six deviations.
                        let tolerance = if ty.is_float() { 1e-5 } else { 6.0 / 254.0 / 3f64.sqrt() } * size + 1e-6;
                        let found = f64::from(out[i * rows + r]);
                        assert!(
                            (found - exact).abs() <= tolerance,
                            "{ty} [{rows}, {cols}]: {found} for {exact}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn every_path_gives_the_same_bits() {
        for ty in PackedType::ALL {
            for (rows, cols, n) in [
                (1, 256, 1),
                (5, 768, 3),
                (33, 512, 4),
                (7, 256, 11),
                (171, 256, 1),
                (90, 256, 31),
            ] {
                let matrix = matrix(ty, rows, cols);
                let x = noise(n * cols, 3);
                let bits = |path| {
                    let mut out = vec![0.0; n * rows];
                    matrix.multiply_by(path, &x, n, &mut out);
                    out.iter().map(|value| value.to_bits()).collect::<Vec<_>>()
                };
                let scalar = bits(Path::Scalar);
                for path in vector_paths() {
                    assert_eq!(bits(path), scalar, "{path:?}: {ty} [{rows}, {cols}] by {n}");
                }
            }
        }
    }

    #[test]
    fn the_largest_products_do_not_overflow() {
        // Blocks of −128 · 1.0, times activations that round to ±127.
        let mut bytes = Vec::new();
        for _ in 0..16 * 4 {
            bytes.extend(half::f16::ONE.to_le_bytes());
            bytes.extend([0x80; 32]);
        }
        let matrix = PackedMatrix::new(PackedType::Q8_0, 16, 128, bytes.into()).unwrap();
        for sign in [1.0, -1.0] {
            let x = [127.0 * sign; 128];
            for path in vector_paths().into_iter().chain([Path::Scalar]) {
                let mut out = [0.0; 16];
                matrix.multiply_by(path, &x, 1, &mut out);
                assert_eq!(out, [-128.0 * 127.0 * 128.0 * sign; 16], "{path:?}");
            }
        }
    }

    /// What this machine has beside the plain loops.
    fn vector_paths() -> Vec<Path> {
        match Path::best() {
            Path::Scalar => vec![],
            #[cfg(target_arch = "x86_64")]
            Path::Vnni => vec![Path::Vnni, Path::Avx2],
            #[cfg(target_arch = "aarch64")]
            Path::NeonDot => vec![Path::NeonDot, Path::Neon],
            #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
            one => vec![one],
        }
    }

    #[test]
    fn batching_changes_no_bit() {
        let matrix = matrix(PackedType::Q4_1, 40, 288);
        let x = noise(6 * 288, 5);
        let mut together = vec![0.0; 6 * 40];
        matrix.multiply(&x, 6, &mut together);
        for (x, together) in x.chunks_exact(288).zip(together.chunks_exact(40)) {
            let mut alone = vec![0.0; 40];
            matrix.multiply(x, 1, &mut alone);
            assert_eq!(alone, together);
        }
    }

    #[test]
    fn rows_as_stored_and_side_by_side_give_the_same_bits() {
        for ty in PackedType::ALL {
            for n in [1, 5] {
                let matrix = matrix(ty, 150, 256);
                let x = noise(n * 256, 9);
                let mut first = vec![0.0; n * 150];
                matrix.multiply(&x, n, &mut first);
                for _ in 0..20 {
                    let mut again = vec![0.0; n * 150];
                    matrix.multiply(&x, n, &mut again);
                    assert_eq!(again, first, "{ty}");
                }
                assert_eq!(matrix.interleaved.cell.get().is_some(), Kind::of(ty).is_some());
            }
        }
    }

    #[test]
    fn weights_of_one_input_multiply_as_each_does_alone() {
        let types = [
            PackedType::Q4_1,
            PackedType::F16,
            PackedType::Q4K,
            PackedType::Q8_0,
            PackedType::F32,
        ];
        for n in [1, 3] {
            let x = noise(n * 256, 5);
            let matrices = types.map(|ty| matrix(ty, 37, 256));
            let mut outs = matrices.each_ref().map(|_| vec![0.0; n * 37]);
            let mut products: Vec<Product<'_>> = matrices.iter().zip(outs.iter_mut().map(|out| &mut out[..])).collect();
            PackedMatrix::multiply_together(&x, n, &mut products);
            for (matrix, out) in matrices.iter().zip(&outs) {
                let mut alone = vec![0.0; n * 37];
                matrix.multiply(&x, n, &mut alone);
                assert_eq!(alone, *out, "{}", matrix.ty());
            }
        }
    }

    #[test]
    fn a_broken_activation_breaks_the_output() {
        let mut x = noise(64, 1);
        x[3] = f32::NAN;
        for ty in [PackedType::Q4_1, PackedType::Q8_0, PackedType::F32] {
            let mut out = [0.0; 4];
            matrix(ty, 4, 64).multiply(&x, 1, &mut out);
            assert!(out.iter().all(|value| value.is_nan()));
        }
    }

    #[test]
    fn lying_lengths_are_refused() {
        let new = |rows, cols, bytes: usize| PackedMatrix::new(PackedType::Q8_0, rows, cols, vec![0; bytes].into());
        assert!(new(2, 32, 68).is_ok());
        assert!(new(2, 32, 67).is_err());
        assert!(new(2, 33, 68).is_err());
        assert!(new(usize::MAX, 64, 68).is_err());
    }

    /// A matrix of the type with plausible scales: random bytes for the types that we do not write.
    fn matrix(ty: PackedType, rows: usize, cols: usize) -> PackedMatrix {
        let values = noise(rows * cols, 11);
        let bytes = narrow(ty, &values).unwrap_or_else(|_| {
            let noise = noise(ty.matrix_bytes(rows, cols).unwrap(), 13);
            let mut bytes: Vec<u8> = noise.iter().map(|value| ((value + 1.0) * 127.9) as u8).collect();
            let halves: &[usize] = match ty {
                PackedType::Q5_0 => &[0],
                PackedType::Q6K => &[208],
                _ => &[0, 2],
            };
            for (b, block) in bytes.chunks_exact_mut(ty.block_bytes()).enumerate() {
                for at in halves {
                    let scale = half::f16::from_f32(0.01 + 0.001 * (b % 7) as f32);
                    block[*at..*at + 2].copy_from_slice(&scale.to_le_bytes());
                }
            }
            bytes
        });
        PackedMatrix::new(ty, rows, cols, bytes.into()).unwrap()
    }

    /// Values within ±1 from a small generator.
    fn noise(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }
}
