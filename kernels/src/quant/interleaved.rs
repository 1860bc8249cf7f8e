//! Rows side by side: how weights lie in memory while they are multiplied.
//!
//! A vector register takes the same columns of several rows at once, so each of its lanes is one output: nothing is
//! summed across lanes, a row's sum does not depend on its neighbours, and each loaded weight serves many activations.
//! The bits of every product are those of the plain loops here, whichever instructions compute them and however many
//! activations there are: a row's units are added in order, each with one fused multiply-add.
//!
//! Packed types: groups of 16 rows; of each unit of 32 columns eight times four columns of all rows, `[8, 16, 4]`.
//! Plain floats: groups of 32 rows, column by column, `[cols, 32]`.

use std::cell::RefCell;
use std::ops::Range;

use half::{bf16, f16};

use super::activations::Activations;
use super::blocks::UNIT;
use super::dot::Path;
#[cfg(target_arch = "aarch64")]
use super::interleaved_neon as vectors;
#[cfg(target_arch = "x86_64")]
use super::interleaved_simd as vectors;
use super::lay::lay_group;
use super::{PackedType, QuantError};
use crate::team;

/// Rows of a group of packed rows: the 32-bit lanes of a 512-bit register.
pub(super) const GROUP: usize = 16;
/// Rows of a group of plain floats: two registers, whose sums hide each other's latency.
pub(super) const FLOAT_GROUP: usize = 32;

/// 64 bytes that begin a cache line.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u8; 64]);

/// How the elements of a group are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// One byte each, 128 above its value; one scale.
    Bytes,
    /// Four bits each, 8 above its value; one scale.
    CentredNibbles,
    /// Four bits each; a scale and a minimum.
    Nibbles,
    /// Half precision.
    Half,
    /// The upper half of an f32.
    Brain,
}

impl Kind {
    /// How a type is kept; `None` where its rows are multiplied as they are.
    pub(super) const fn of(ty: PackedType) -> Option<Self> {
        Some(match ty {
            PackedType::Q8_0 => Self::Bytes,
            PackedType::Q4_0 => Self::CentredNibbles,
            PackedType::Q4_1 => Self::Nibbles,
            PackedType::F16 => Self::Half,
            PackedType::BF16 => Self::Brain,
            _ => return None,
        })
    }

    /// Cache lines of one unit of a group; of one column where elements are floats.
    pub(super) const fn lines(self) -> usize {
        match self {
            Self::Bytes => 8,
            Self::CentredNibbles | Self::Nibbles => 4,
            Self::Half | Self::Brain => 1,
        }
    }

    /// Half-precision numbers of one unit of a group: scales, then minima.
    pub(super) const fn scales(self) -> usize {
        match self {
            Self::Bytes | Self::CentredNibbles => GROUP,
            Self::Nibbles => 2 * GROUP,
            Self::Half | Self::Brain => 0,
        }
    }

    pub(super) const fn is_float(self) -> bool {
        matches!(self, Self::Half | Self::Brain)
    }

    pub(super) const fn group(self) -> usize {
        if self.is_float() { FLOAT_GROUP } else { GROUP }
    }
}

/// A matrix with its rows side by side. Rows beyond the last are zero.
#[derive(Debug)]
pub(super) struct Interleaved {
    kind: Kind,
    rows: usize,
    cols: usize,
    /// `[groups, units, kind.lines()]`, or `[groups, cols, 1]` for floats.
    quants: Vec<Line>,
    /// `[groups, units, kind.scales()]`.
    scales: Vec<u16>,
}

/// A group, for the loops.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group<'a> {
    pub(super) kind: Kind,
    pub(super) quants: &'a [Line],
    pub(super) scales: &'a [u16],
}

/// Where the outputs of a product go: `[n, rows]`, of which every piece writes columns of its own.
#[derive(Debug, Clone, Copy)]
pub(super) struct Out {
    pub(super) start: *mut f32,
    pub(super) rows: usize,
}
// SAFETY: every piece writes columns of its own.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Interleaved {
    /// Lays out `bytes`, which are `rows` rows of `cols` elements; `None` where the type is not laid out so.
    pub(super) fn new(ty: PackedType, rows: usize, cols: usize, bytes: &[u8]) -> Result<Option<Self>, QuantError> {
        let Some(kind) = Kind::of(ty) else { return Ok(None) };
        let row_bytes = ty.row_bytes(cols)?;
        if Some(bytes.len()) != row_bytes.checked_mul(rows) || cols == 0 {
            return Err(QuantError::Length {
                ty,
                rows,
                cols,
                expected: ty.matrix_bytes(rows, cols)?,
                found: bytes.len(),
            });
        }
        let mut laid = Self::zeroed(kind, rows, cols, Buffers::default());
        let (line_count, scale_count) = laid.group_sizes();
        let quants = Pieces(laid.quants.as_mut_ptr());
        let scales = Pieces(laid.scales.as_mut_ptr());
        team::in_pieces(laid.groups(), |group| {
            // SAFETY: both vectors have room for all groups, and each group is written by one piece.
            let (quants, scales) = unsafe {
                (
                    std::slice::from_raw_parts_mut(quants.at(group * line_count), line_count),
                    std::slice::from_raw_parts_mut(scales.at(group * scale_count), scale_count),
                )
            };
            lay_group(
                kind,
                &bytes[group * kind.group() * row_bytes..],
                row_bytes,
                quants,
                scales,
            );
        });
        Ok(Some(laid))
    }

    /// As [`Interleaved::new`] for a few rows, on this thread, in memory that was used before.
    fn of_few(kind: Kind, rows: usize, cols: usize, row_bytes: usize, bytes: &[u8], buffers: Buffers) -> Self {
        let mut laid = Self::zeroed(kind, rows, cols, buffers);
        let (line_count, scale_count) = laid.group_sizes();
        let groups = bytes.chunks(kind.group() * row_bytes);
        let quants = laid.quants.chunks_exact_mut(line_count);
        if scale_count == 0 {
            for (bytes, quants) in groups.zip(quants) {
                lay_group(kind, bytes, row_bytes, quants, &mut []);
            }
        } else {
            let scales = laid.scales.chunks_exact_mut(scale_count);
            for ((bytes, quants), scales) in groups.zip(quants).zip(scales) {
                lay_group(kind, bytes, row_bytes, quants, scales);
            }
        }
        laid
    }

    fn zeroed(kind: Kind, rows: usize, cols: usize, mut buffers: Buffers) -> Self {
        let groups = rows.div_ceil(kind.group());
        let units = if kind.is_float() { cols } else { cols / UNIT };
        buffers.0.resize(groups * units * kind.lines(), Line([0; 64]));
        buffers.1.resize(groups * units * kind.scales(), 0);
        Self {
            kind,
            rows,
            cols,
            quants: buffers.0,
            scales: buffers.1,
        }
    }

    /// Lines and scales of a group.
    const fn group_sizes(&self) -> (usize, usize) {
        let units = if self.kind.is_float() {
            self.cols
        } else {
            self.cols / UNIT
        };
        (units * self.kind.lines(), units * self.kind.scales())
    }

    pub(super) const fn cols(&self) -> usize {
        self.cols
    }

    pub(super) const fn groups(&self) -> usize {
        self.rows.div_ceil(self.kind.group())
    }

    fn group(&self, group: usize) -> Group<'_> {
        let units = if self.kind.is_float() {
            self.cols
        } else {
            self.cols / UNIT
        };
        let (lines, scales) = (units * self.kind.lines(), units * self.kind.scales());
        Group {
            kind: self.kind,
            quants: &self.quants[group * lines..][..lines],
            scales: &self.scales[group * scales..][..scales],
        }
    }

    /// `out[i, r] = rows[r] · x[i]` for the rows of some groups.
    ///
    /// # Safety
    ///
    /// `out` has room for `[n, rows]`, and nobody else writes these groups' columns. The processor has what `path` needs.
    pub(super) unsafe fn multiply(&self, path: Path, groups: Range<usize>, x: Factor<'_>, n: usize, out: Out) {
        match x.rounded {
            _ if self.kind.is_float() => {
                // SAFETY: the caller's promise.
                unsafe { self.float_groups(path, groups, x.floats, n, out) }
            }
            // SAFETY: the caller's promise.
            Some(x) => groups.for_each(|group| unsafe { self.packed_group(path, group, x, n, out) }),
            None => unreachable!("activations of packed weights are rounded"),
        }
    }

    unsafe fn packed_group(&self, path: Path, index: usize, x: &Activations, n: usize, out: Out) {
        let group = self.group(index);
        let rows = (self.rows - index * GROUP).min(GROUP);
        // SAFETY: the caller's promise; the group's first row is below `rows`.
        unsafe {
            let start = out.start.add(index * GROUP);
            #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
            if let Some(run) = vectors::packed(path, self.kind) {
                return run(group, rows, x, n, start, out.rows);
            }
            let _ = path;
            for i in 0..n {
                let sums = packed_sums(group, x, i);
                std::ptr::copy_nonoverlapping(sums.as_ptr(), start.add(i * out.rows), rows);
            }
        }
    }

    unsafe fn float_groups(&self, path: Path, groups: Range<usize>, x: &[f32], n: usize, out: Out) {
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        if let Some(run) = vectors::floats(path, self.kind) {
            // SAFETY: the caller's promise.
            return unsafe { run(self, groups, x, n, out) };
        }
        let _ = path;
        for index in groups {
            let group = self.group(index);
            let rows = self.rows_of(index);
            for (i, x) in x.chunks_exact(self.cols).take(n).enumerate() {
                let sums = float_sums(group, x);
                // SAFETY: the caller's promise; the group's first row is below `rows`.
                unsafe {
                    let to = out.start.add(i * out.rows + index * FLOAT_GROUP);
                    std::ptr::copy_nonoverlapping(sums.as_ptr(), to, rows);
                }
            }
        }
    }

    /// Rows of a group of floats that are there.
    pub(super) fn rows_of(&self, group: usize) -> usize {
        (self.rows - group * FLOAT_GROUP).min(FLOAT_GROUP)
    }

    /// The elements of a group of floats, `[cols, 32]`.
    pub(super) fn floats_of(&self, group: usize) -> &[Line] {
        self.group(group).quants
    }
}

/// What a matrix was laid out in, to be used again.
#[derive(Debug, Default)]
struct Buffers(Vec<Line>, Vec<u16>);

/// Rows as they are stored, laid out a few at a time on the way to their product.
///
/// That takes longer than the product of one activation, but no memory: the first tokens of a process do not wait until
/// all of a model has been copied.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stored<'a> {
    pub(super) kind: Kind,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_bytes: usize,
    pub(super) bytes: &'a [u8],
}

impl Stored<'_> {
    /// Groups that are laid out together: those of floats hide latencies four at a time.
    const TOGETHER: usize = 4;

    pub(super) const fn groups(&self) -> usize {
        self.rows.div_ceil(self.kind.group())
    }

    /// As [`Interleaved::multiply`].
    ///
    /// # Safety
    ///
    /// As there.
    pub(super) unsafe fn multiply(&self, path: Path, groups: Range<usize>, x: Factor<'_>, n: usize, out: Out) {
        thread_local! {
            static BUFFERS: RefCell<Buffers> = RefCell::default();
        }
        let mut buffers = BUFFERS.take();
        for start in groups.clone().step_by(Self::TOGETHER) {
            let count = Self::TOGETHER.min(groups.end - start);
            let first = start * self.kind.group();
            let rows = (self.rows - first).min(count * self.kind.group());
            let bytes = &self.bytes[first * self.row_bytes..][..rows * self.row_bytes];
            let few = Interleaved::of_few(self.kind, rows, self.cols, self.row_bytes, bytes, buffers);
            // SAFETY: the caller's promise: `first` is below the rows of `out`.
            unsafe {
                let start = out.start.add(first);
                few.multiply(path, 0..count, x, n, Out { start, ..out });
            }
            buffers = Buffers(few.quants, few.scales);
        }
        BUFFERS.set(buffers);
    }
}

/// The other factor of a product, `[n, cols]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Factor<'a> {
    /// For packed weights; there where any of the weights is packed.
    pub(super) rounded: Option<&'a Activations>,
    pub(super) floats: &'a [f32],
}

struct Pieces<T>(*mut T);
// SAFETY: every piece takes a part of its own.
unsafe impl<T: Send> Sync for Pieces<T> {}

impl<T> Pieces<T> {
    /// # Safety
    ///
    /// There are so many elements.
    unsafe fn at(&self, index: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(index) }
    }
}

/// The definition for packed types: the rows of a group times activation row `i`.
fn packed_sums(group: Group<'_>, x: &Activations, i: usize) -> [f32; GROUP] {
    let x = x.row(i);
    let kind = group.kind;
    let mut sums = [0.0f32; GROUP];
    let units = group.quants.chunks_exact(kind.lines());
    for (at, (lines, scales)) in units.zip(group.scales.chunks_exact(kind.scales())).enumerate() {
        let mut whole = [0i32; GROUP];
        for (k, line) in lines.iter().enumerate() {
            for (byte, weight) in line.0.iter().enumerate() {
                let (row, column) = (byte / 4, 4 * k + byte % 4);
                let whole = &mut whole[row];
                match kind {
                    Kind::Bytes => *whole += (i32::from(*weight) - 128) * i32::from(x.quants[at][column]),
                    _ => {
                        let offset = if kind == Kind::Nibbles { 0 } else { 8 };
                        *whole += (i32::from(*weight & 15) - offset) * i32::from(x.quants[at][column]);
                        *whole += (i32::from(*weight >> 4) - offset) * i32::from(x.quants[at][16 + column]);
                    }
                }
            }
        }
        for row in 0..GROUP {
            let number = |index: usize| f16::from_bits(scales[index]).to_f32();
            if kind == Kind::Nibbles {
                sums[row] = number(GROUP + row).mul_add(x.sums[at], sums[row]);
            }
            sums[row] = (whole[row] as f32).mul_add(number(row) * x.scales[at], sums[row]);
        }
    }
    sums
}

/// The definition for plain floats: the rows of a group times one activation row.
fn float_sums(group: Group<'_>, x: &[f32]) -> [f32; FLOAT_GROUP] {
    let mut sums = [0.0f32; FLOAT_GROUP];
    for (line, x) in group.quants.iter().zip(x) {
        for (sum, bytes) in sums.iter_mut().zip(line.0.as_chunks::<2>().0) {
            let weight = match group.kind {
                Kind::Brain => bf16::from_le_bytes(*bytes).to_f32(),
                _ => f16::from_le_bytes(*bytes).to_f32(),
            };
            *sum = weight.mul_add(*x, *sum);
        }
    }
    sums
}
