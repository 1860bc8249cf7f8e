//! The products of [`super::interleaved`] with NEON, and with its dot products of bytes. Same order, same bits.
//!
//! Everything below the entry points is `inline(always)`, so that it is compiled once per instruction set and kind.

#![expect(
    clippy::needless_range_loop,
    reason = "indices name the rows and columns of a tile in registers"
)]

use std::arch::aarch64::*;
use std::ops::Range;

use super::activations::Activations;
use super::dot::Path;
use super::interleaved::{FLOAT_GROUP, GROUP, Group, Interleaved, Kind, Out};
use super::neon::{add_dots, widened_halves};

pub(super) type Packed = unsafe fn(Group<'_>, usize, &Activations, usize, *mut f32, usize);
pub(super) type Floats = unsafe fn(&Interleaved, Range<usize>, &[f32], usize, Out);

/// The product of a group of packed rows; `None` where there is only the plain loop.
///
/// It takes the group, how many of its rows there are, activations, how many rows of them, where the first output goes,
/// and how far the next activation's outputs are.
pub(super) fn packed(path: Path, kind: Kind) -> Option<Packed> {
    Some(match (path, kind) {
        (Path::NeonDot, Kind::Bytes) => packed_dot::<BYTES>,
        (Path::NeonDot, Kind::CentredNibbles) => packed_dot::<CENTRED>,
        (Path::NeonDot, Kind::Nibbles) => packed_dot::<NIBBLES>,
        (Path::Neon, Kind::Bytes) => packed_neon::<BYTES>,
        (Path::Neon, Kind::CentredNibbles) => packed_neon::<CENTRED>,
        (Path::Neon, Kind::Nibbles) => packed_neon::<NIBBLES>,
        _ => return None,
    })
}

/// The product of groups of plain floats; `None` where there is only the plain loop.
pub(super) fn floats(path: Path, kind: Kind) -> Option<Floats> {
    Some(match (path, kind) {
        (Path::Neon | Path::NeonDot, Kind::Half) => floats_neon::<false>,
        (Path::Neon | Path::NeonDot, Kind::Brain) => floats_neon::<true>,
        _ => return None,
    })
}

const BYTES: u8 = 0;
const CENTRED: u8 = 1;
const NIBBLES: u8 = 2;

/// # Safety
///
/// The processor has what [`Path::NeonDot`] needs; there is room for the outputs.
#[target_feature(enable = "dotprod")]
unsafe fn packed_dot<const KIND: u8>(
    group: Group<'_>,
    rows: usize,
    x: &Activations,
    n: usize,
    out: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe { packed_group::<KIND, true>(group, rows, x, n, out, stride) }
}

/// # Safety
///
/// There is room for the outputs.
unsafe fn packed_neon<const KIND: u8>(
    group: Group<'_>,
    rows: usize,
    x: &Activations,
    n: usize,
    out: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe { packed_group::<KIND, false>(group, rows, x, n, out, stride) }
}

#[inline(always)]
unsafe fn packed_group<const KIND: u8, const DOT: bool>(
    group: Group<'_>,
    rows: usize,
    x: &Activations,
    n: usize,
    out: *mut f32,
    stride: usize,
) {
    let mut i = 0;
    // SAFETY: the caller's promise; `i + many` stays within `n`. Whole and scaled sums of a tile fill 16 of 32 registers.
    unsafe {
        while i < n {
            let out = out.add(i * stride);
            i += match n - i {
                4.. => tile::<KIND, DOT, 4, 2>(group, rows, x, i, out, stride),
                2.. => tile::<KIND, DOT, 2, 4>(group, rows, x, i, out, stride),
                _ => tile::<KIND, DOT, 1, 4>(group, rows, x, i, out, stride),
            };
        }
    }
}

/// One group times `N` activation rows from `first`, `4 · R` rows at a time; returns `N`.
#[inline(always)]
unsafe fn tile<const KIND: u8, const DOT: bool, const N: usize, const R: usize>(
    group: Group<'_>,
    rows: usize,
    x: &Activations,
    first: usize,
    out: *mut f32,
    stride: usize,
) -> usize {
    // SAFETY: the caller has the instructions. A group has `units` units of lines and scales, an activation row as many
    // units of 32 quants; the constructors made them so.
    unsafe {
        let units = x.units();
        let quants = x.quants_from(first);
        let (scales, sums) = (x.scales_from(first), x.sums_from(first));
        let cols = units * 32;
        let per_unit = group.kind.lines();
        let numbers_per_unit = group.kind.scales();
        let low = vdupq_n_u8(15);
        for part in 0..4 / R {
            let begin = 4 * R * part;
            let mut totals = [[vdupq_n_f32(0.0); R]; N];
            for unit in 0..units {
                let mut whole = [[vdupq_n_s32(0); R]; N];
                let lines = group.quants.as_ptr().add(unit * per_unit);
                for k in 0..per_unit {
                    let bytes = lines.add(k).cast::<u8>().add(4 * begin);
                    for r in 0..R {
                        let raw = vld1q_u8(bytes.add(16 * r));
                        if KIND == BYTES {
                            let weights = vreinterpretq_s8_u8(veorq_u8(raw, vdupq_n_u8(128)));
                            for i in 0..N {
                                let x = four(quants.add(i * cols + unit * 32 + 4 * k));
                                whole[i][r] = add_dots::<DOT>(whole[i][r], weights, x);
                            }
                        } else {
                            let lower = centred::<KIND>(vandq_u8(raw, low));
                            let upper = centred::<KIND>(vshrq_n_u8::<4>(raw));
                            for i in 0..N {
                                let at = quants.add(i * cols + unit * 32 + 4 * k);
                                whole[i][r] = add_dots::<DOT>(whole[i][r], lower, four(at));
                                whole[i][r] = add_dots::<DOT>(whole[i][r], upper, four(at.add(16)));
                            }
                        }
                    }
                }
                let numbers = group.scales.as_ptr().add(unit * numbers_per_unit + begin);
                for r in 0..R {
                    let scale = widened_halves(vld1_u16(numbers.add(4 * r)));
                    if KIND == NIBBLES {
                        let minimum = widened_halves(vld1_u16(numbers.add(GROUP + 4 * r)));
                        for i in 0..N {
                            let sum = vdupq_n_f32(*sums.add(i * units + unit));
                            totals[i][r] = vfmaq_f32(totals[i][r], minimum, sum);
                        }
                    }
                    for i in 0..N {
                        let scale = vmulq_f32(scale, vdupq_n_f32(*scales.add(i * units + unit)));
                        totals[i][r] = vfmaq_f32(totals[i][r], vcvtq_f32_s32(whole[i][r]), scale);
                    }
                }
            }
            for i in 0..N {
                let mut values = [0.0f32; GROUP];
                for r in 0..R {
                    vst1q_f32(values.as_mut_ptr().add(4 * r), totals[i][r]);
                }
                let many = rows.saturating_sub(begin).min(4 * R);
                let to = out.add(i * stride + begin.min(rows));
                std::ptr::copy_nonoverlapping(values.as_ptr(), to, many);
            }
        }
    }
    N
}

/// Four activations beside each of four rows.
#[inline(always)]
unsafe fn four(at: *const i8) -> int8x16_t {
    // SAFETY: the caller points to four and has the instructions.
    unsafe { vreinterpretq_s8_s32(vdupq_n_s32(at.cast::<i32>().read_unaligned())) }
}

#[inline(always)]
unsafe fn centred<const KIND: u8>(nibbles: uint8x16_t) -> int8x16_t {
    // SAFETY: the caller has the instructions.
    unsafe {
        let weights = vreinterpretq_s8_u8(nibbles);
        match KIND {
            CENTRED => vsubq_s8(weights, vdupq_n_s8(8)),
            _ => weights,
        }
    }
}

/// # Safety
///
/// There is room for the outputs.
unsafe fn floats_neon<const BRAIN: bool>(weights: &Interleaved, groups: Range<usize>, x: &[f32], n: usize, out: Out) {
    for index in groups {
        let mut i = 0;
        while i < n {
            // SAFETY: the caller's promise.
            i += unsafe {
                match n - i {
                    2.. => float_tile::<BRAIN, 2>(weights, index, x, i, out),
                    _ => float_tile::<BRAIN, 1>(weights, index, x, i, out),
                }
            };
        }
    }
}

/// One group times `N` activation rows from `first`; returns `N`.
#[inline(always)]
unsafe fn float_tile<const BRAIN: bool, const N: usize>(
    weights: &Interleaved,
    index: usize,
    x: &[f32],
    first: usize,
    out: Out,
) -> usize {
    let cols = weights.cols();
    let x = &x[first * cols..][..N * cols];
    let rows = weights.rows_of(index);
    // SAFETY: the caller has the instructions; a group has `cols` lines of 32 numbers, and `x` `N` rows of `cols`.
    unsafe {
        let x = x.as_ptr();
        let mut sums = [[vdupq_n_f32(0.0); FLOAT_GROUP / 4]; N];
        for (column, line) in weights.floats_of(index).iter().enumerate() {
            let numbers = std::ptr::from_ref(line).cast::<u16>();
            for four in 0..FLOAT_GROUP / 4 {
                let raw = vld1_u16(numbers.add(4 * four));
                let weight = match BRAIN {
                    true => vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(raw))),
                    false => widened_halves(raw),
                };
                for i in 0..N {
                    sums[i][four] = vfmaq_f32(sums[i][four], weight, vdupq_n_f32(*x.add(i * cols + column)));
                }
            }
        }
        for i in 0..N {
            let mut values = [0.0f32; FLOAT_GROUP];
            for four in 0..FLOAT_GROUP / 4 {
                vst1q_f32(values.as_mut_ptr().add(4 * four), sums[i][four]);
            }
            let to = out.start.add((first + i) * out.rows + index * FLOAT_GROUP);
            std::ptr::copy_nonoverlapping(values.as_ptr(), to, rows);
        }
    }
    N
}
