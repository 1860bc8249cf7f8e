//! The products of [`super::interleaved`] with AVX2 and AVX-512. Same order, same bits.
//!
//! Everything below the entry points is `inline(always)`, so that it is compiled once per instruction set and kind.

#![expect(
    clippy::needless_range_loop,
    reason = "indices name the rows and columns of a tile in registers"
)]

use std::arch::x86_64::*;
use std::ops::Range;

use super::activations::Activations;
use super::dot::Path;
use super::interleaved::{FLOAT_GROUP, Group, Interleaved, Kind, Line, Out};

/// Activation rows of the widest tile: their sums, whole and scaled, fill 24 of 32 registers.
const TILE: usize = 12;
/// Units that are asked of memory ahead of their use. A unit is half a kilobyte at most.
const AHEAD_UNITS: usize = 6;

pub(super) type Packed = unsafe fn(Group<'_>, usize, &Activations, usize, *mut f32, usize);
pub(super) type Floats = unsafe fn(&Interleaved, Range<usize>, &[f32], usize, Out);

/// The product of a group of packed rows; `None` where there is only the plain loop.
///
/// It takes the group, how many of its rows there are, activations, how many rows of them, where the first output goes,
/// and how far the next activation's outputs are.
pub(super) fn packed(path: Path, kind: Kind) -> Option<Packed> {
    Some(match (path, kind) {
        (Path::Vnni, Kind::Bytes) => packed_vnni::<BYTES>,
        (Path::Vnni, Kind::CentredNibbles) => packed_vnni::<CENTRED>,
        (Path::Vnni, Kind::Nibbles) => packed_vnni::<NIBBLES>,
        (Path::Avx2, Kind::Bytes) => packed_avx2::<BYTES>,
        (Path::Avx2, Kind::CentredNibbles) => packed_avx2::<CENTRED>,
        (Path::Avx2, Kind::Nibbles) => packed_avx2::<NIBBLES>,
        _ => return None,
    })
}

/// The product of groups of plain floats; `None` where there is only the plain loop.
pub(super) fn floats(path: Path, kind: Kind) -> Option<Floats> {
    Some(match (path, kind) {
        (Path::Vnni, Kind::Half) => floats_wide::<false>,
        (Path::Vnni, Kind::Brain) => floats_wide::<true>,
        (Path::Avx2, Kind::Half) => floats_narrow::<false>,
        (Path::Avx2, Kind::Brain) => floats_narrow::<true>,
        _ => return None,
    })
}

const BYTES: u8 = 0;
const CENTRED: u8 = 1;
const NIBBLES: u8 = 2;

/// # Safety
///
/// The processor has what [`Path::Vnni`] needs; there is room for the outputs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn packed_vnni<const KIND: u8>(
    group: Group<'_>,
    rows: usize,
    x: &Activations,
    n: usize,
    out: *mut f32,
    stride: usize,
) {
    let mask = if rows == 16 { !0 } else { (1u16 << rows) - 1 };
    let mut i = 0;
    // SAFETY: the caller's promise; `i + many` stays within `n`.
    unsafe {
        while i < n {
            let out = out.add(i * stride);
            i += match n - i {
                TILE.. => tile_vnni::<KIND, TILE>(group, mask, x, i, out, stride),
                8.. => tile_vnni::<KIND, 8>(group, mask, x, i, out, stride),
                4.. => tile_vnni::<KIND, 4>(group, mask, x, i, out, stride),
                2.. => tile_vnni::<KIND, 2>(group, mask, x, i, out, stride),
                _ => tile_vnni::<KIND, 1>(group, mask, x, i, out, stride),
            };
        }
    }
}

/// One group times `N` activation rows from `first`; returns `N`.
#[inline(always)]
unsafe fn tile_vnni<const KIND: u8, const N: usize>(
    group: Group<'_>,
    mask: u16,
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
        let (scales, sums, offsets) = (x.scales_from(first), x.sums_from(first), x.offsets_from(first));
        let cols = units * 32;
        let mut lines = group.quants.as_ptr();
        let mut numbers = group.scales.as_ptr();
        let mut totals = [_mm512_setzero_ps(); N];
        let low = _mm512_set1_epi8(15);
        for unit in 0..units {
            let mut whole = [_mm512_setzero_si512(); N];
            for i in 0..N {
                // The offset of the weights, times the sum of the activations, is taken away beforehand.
                whole[i] = match KIND {
                    BYTES => _mm512_set1_epi32(*offsets.add(i * units + unit)),
                    CENTRED => _mm512_srai_epi32::<4>(_mm512_set1_epi32(*offsets.add(i * units + unit))),
                    _ => _mm512_setzero_si512(),
                };
            }
            let four = |i: usize, k: usize| {
                _mm512_set1_epi32(quants.add(i * cols + unit * 32 + 4 * k).cast::<i32>().read_unaligned())
            };
            if KIND == BYTES {
                for k in 0..8 {
                    let weights = load(lines.add(k));
                    if N == 1 {
                        _mm_prefetch::<_MM_HINT_T0>(lines.wrapping_add(8 * AHEAD_UNITS + k).cast());
                    }
                    for i in 0..N {
                        whole[i] = _mm512_dpbusd_epi32(whole[i], weights, four(i, k));
                    }
                }
                lines = lines.add(8);
            } else {
                for k in 0..4 {
                    let both = load(lines.add(k));
                    if N == 1 {
                        _mm_prefetch::<_MM_HINT_T0>(lines.wrapping_add(4 * 2 * AHEAD_UNITS + k).cast());
                    }
                    let weights = _mm512_and_si512(both, low);
                    for i in 0..N {
                        whole[i] = _mm512_dpbusd_epi32(whole[i], weights, four(i, k));
                    }
                    let weights = _mm512_and_si512(_mm512_srli_epi16::<4>(both), low);
                    for i in 0..N {
                        whole[i] = _mm512_dpbusd_epi32(whole[i], weights, four(i, 4 + k));
                    }
                }
                lines = lines.add(4);
            }
            let scale = _mm512_cvtph_ps(_mm256_loadu_si256(numbers.cast()));
            numbers = numbers.add(16);
            if KIND == NIBBLES {
                let minimum = _mm512_cvtph_ps(_mm256_loadu_si256(numbers.cast()));
                numbers = numbers.add(16);
                for i in 0..N {
                    let sum = _mm512_set1_ps(*sums.add(i * units + unit));
                    totals[i] = _mm512_fmadd_ps(minimum, sum, totals[i]);
                }
            }
            for i in 0..N {
                let scale = _mm512_mul_ps(scale, _mm512_set1_ps(*scales.add(i * units + unit)));
                totals[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[i]), scale, totals[i]);
            }
        }
        for i in 0..N {
            _mm512_mask_storeu_ps(out.add(i * stride), mask, totals[i]);
        }
    }
    N
}

#[inline(always)]
unsafe fn load(line: *const Line) -> __m512i {
    // SAFETY: the caller points to a line and has the instructions.
    unsafe { _mm512_load_si512(line.cast()) }
}

/// # Safety
///
/// The processor has what [`Path::Avx2`] needs; there is room for the outputs.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn packed_avx2<const KIND: u8>(
    group: Group<'_>,
    rows: usize,
    x: &Activations,
    n: usize,
    out: *mut f32,
    stride: usize,
) {
    let mut i = 0;
    // SAFETY: the caller's promise; `i + many` stays within `n`.
    unsafe {
        while i < n {
            let out = out.add(i * stride);
            i += match n - i {
                4.. => tile_avx2::<KIND, 4>(group, rows, x, i, out, stride),
                2.. => tile_avx2::<KIND, 2>(group, rows, x, i, out, stride),
                _ => tile_avx2::<KIND, 1>(group, rows, x, i, out, stride),
            };
        }
    }
}

/// As [`tile_vnni`], eight rows at a time.
#[inline(always)]
unsafe fn tile_avx2<const KIND: u8, const N: usize>(
    group: Group<'_>,
    rows: usize,
    x: &Activations,
    first: usize,
    out: *mut f32,
    stride: usize,
) -> usize {
    // SAFETY: as in `tile_vnni`.
    unsafe {
        let units = x.units();
        let quants = x.quants_from(first);
        let (scales, sums) = (x.scales_from(first), x.sums_from(first));
        let cols = units * 32;
        let per_unit = group.kind.lines();
        let numbers_per_unit = group.kind.scales();
        let low = _mm256_set1_epi8(15);
        for half in 0..2 {
            let mut totals = [_mm256_setzero_ps(); N];
            for unit in 0..units {
                let mut whole = [_mm256_setzero_si256(); N];
                let lines = group.quants.as_ptr().add(unit * per_unit);
                for k in 0..per_unit {
                    let raw = _mm256_load_si256(lines.add(k).cast::<__m256i>().add(half));
                    let add = |whole: &mut [__m256i; N], weights: __m256i, k: usize| {
                        for i in 0..N {
                            let at = quants.add(i * cols + unit * 32 + 4 * k);
                            let x = _mm256_set1_epi32(at.cast::<i32>().read_unaligned());
                            whole[i] = _mm256_add_epi32(whole[i], dot_four::<KIND>(weights, x));
                        }
                    };
                    if KIND == BYTES {
                        add(&mut whole, _mm256_xor_si256(raw, _mm256_set1_epi8(-128)), k);
                    } else {
                        let centre = |weights| match KIND {
                            CENTRED => _mm256_sub_epi8(weights, _mm256_set1_epi8(8)),
                            _ => weights,
                        };
                        add(&mut whole, centre(_mm256_and_si256(raw, low)), k);
                        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(raw), low);
                        add(&mut whole, centre(high), 4 + k);
                    }
                }
                let numbers = group.scales.as_ptr().add(unit * numbers_per_unit + half * 8);
                let scale = _mm256_cvtph_ps(_mm_loadu_si128(numbers.cast()));
                if KIND == NIBBLES {
                    let minimum = _mm256_cvtph_ps(_mm_loadu_si128(numbers.add(16).cast()));
                    for i in 0..N {
                        let sum = _mm256_set1_ps(*sums.add(i * units + unit));
                        totals[i] = _mm256_fmadd_ps(minimum, sum, totals[i]);
                    }
                }
                for i in 0..N {
                    let scale = _mm256_mul_ps(scale, _mm256_set1_ps(*scales.add(i * units + unit)));
                    totals[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole[i]), scale, totals[i]);
                }
            }
            let many = rows.saturating_sub(half * 8).min(8);
            for i in 0..N {
                let mut values = [0.0f32; 8];
                _mm256_storeu_ps(values.as_mut_ptr(), totals[i]);
                std::ptr::copy_nonoverlapping(values.as_ptr(), out.add(i * stride + (8 * half).min(rows)), many);
            }
        }
    }
    N
}

/// Sums of four neighbouring products. The unsigned factor is at most 128, so no pair overflows 16 bits.
#[inline(always)]
unsafe fn dot_four<const KIND: u8>(weights: __m256i, x: __m256i) -> __m256i {
    // SAFETY: the caller has the instructions.
    unsafe {
        let pairs = match KIND {
            NIBBLES => _mm256_maddubs_epi16(weights, x),
            _ => _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights)),
        };
        _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
    }
}

/// # Safety
///
/// The processor has what [`Path::Vnni`] needs; there is room for the outputs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
unsafe fn floats_wide<const BRAIN: bool>(weights: &Interleaved, groups: Range<usize>, x: &[f32], n: usize, out: Out) {
    let mut index = groups.start;
    // SAFETY: the caller's promise; tiles stay within the groups and within `n`.
    unsafe {
        while index < groups.end {
            // One activation cannot hide the latency of two sums: four groups go together.
            let tall = if groups.end - index >= 4 { 4 } else { 1 };
            let mut i = 0;
            while i < n {
                i += match (n - i, tall) {
                    (1, 4) => float_tile::<BRAIN, 4, 1>(weights, index, x, i, out),
                    (2 | 3, 4) => float_tile::<BRAIN, 4, 2>(weights, index, x, i, out),
                    (8.., _) => float_tiles::<BRAIN, 8>(weights, index, tall, x, i, out),
                    (4.., _) => float_tiles::<BRAIN, 4>(weights, index, tall, x, i, out),
                    (2.., _) => float_tiles::<BRAIN, 2>(weights, index, tall, x, i, out),
                    _ => float_tiles::<BRAIN, 1>(weights, index, tall, x, i, out),
                };
            }
            index += tall;
        }
    }
}

/// `tall` groups one after another.
#[inline(always)]
unsafe fn float_tiles<const BRAIN: bool, const N: usize>(
    weights: &Interleaved,
    index: usize,
    tall: usize,
    x: &[f32],
    first: usize,
    out: Out,
) -> usize {
    for index in index..index + tall {
        // SAFETY: the caller's promise.
        unsafe { float_tile::<BRAIN, 1, N>(weights, index, x, first, out) };
    }
    N
}

/// `G` groups times `N` activation rows from `first`; returns `N`.
#[inline(always)]
unsafe fn float_tile<const BRAIN: bool, const G: usize, const N: usize>(
    weights: &Interleaved,
    index: usize,
    x: &[f32],
    first: usize,
    out: Out,
) -> usize {
    let cols = weights.cols();
    let x = &x[first * cols..][..N * cols];
    let mut lines = [std::ptr::null::<Line>(); G];
    for g in 0..G {
        lines[g] = weights.floats_of(index + g).as_ptr();
    }
    // SAFETY: the caller has the instructions; a group has `cols` lines, and `x` `N` rows of `cols`.
    unsafe {
        let x = x.as_ptr();
        let mut sums = [[[_mm512_setzero_ps(); 2]; G]; N];
        for column in 0..cols {
            for g in 0..G {
                let line = lines[g].add(column);
                if N <= 2 {
                    _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(24).cast());
                }
                let halves = line.cast::<__m256i>();
                let low = wide_floats::<BRAIN>(_mm256_load_si256(halves));
                let high = wide_floats::<BRAIN>(_mm256_load_si256(halves.add(1)));
                for i in 0..N {
                    let x = _mm512_set1_ps(*x.add(i * cols + column));
                    sums[i][g][0] = _mm512_fmadd_ps(low, x, sums[i][g][0]);
                    sums[i][g][1] = _mm512_fmadd_ps(high, x, sums[i][g][1]);
                }
            }
        }
        for g in 0..G {
            let rows = weights.rows_of(index + g);
            let mask = if rows >= 32 { !0u32 } else { (1 << rows) - 1 };
            for i in 0..N {
                let to = out.start.add((first + i) * out.rows + (index + g) * FLOAT_GROUP);
                _mm512_mask_storeu_ps(to, mask as u16, sums[i][g][0]);
                _mm512_mask_storeu_ps(to.wrapping_add(16), (mask >> 16) as u16, sums[i][g][1]);
            }
        }
    }
    N
}

#[inline(always)]
unsafe fn wide_floats<const BRAIN: bool>(raw: __m256i) -> __m512 {
    // SAFETY: the caller has the instructions.
    unsafe {
        match BRAIN {
            true => _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(raw))),
            false => _mm512_cvtph_ps(raw),
        }
    }
}

/// # Safety
///
/// The processor has what [`Path::Avx2`] needs; there is room for the outputs.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn floats_narrow<const BRAIN: bool>(weights: &Interleaved, groups: Range<usize>, x: &[f32], n: usize, out: Out) {
    for index in groups {
        let mut i = 0;
        while i < n {
            // SAFETY: the caller's promise.
            i += unsafe {
                match n - i {
                    2.. => narrow_tile::<BRAIN, 2>(weights, index, x, i, out),
                    _ => narrow_tile::<BRAIN, 1>(weights, index, x, i, out),
                }
            };
        }
    }
}

/// One group times `N` activation rows from `first`; returns `N`.
#[inline(always)]
unsafe fn narrow_tile<const BRAIN: bool, const N: usize>(
    weights: &Interleaved,
    index: usize,
    x: &[f32],
    first: usize,
    out: Out,
) -> usize {
    let cols = weights.cols();
    let x = &x[first * cols..][..N * cols];
    let rows = weights.rows_of(index);
    // SAFETY: the caller has the instructions; a group has `cols` lines, and `x` `N` rows of `cols`.
    unsafe {
        let x = x.as_ptr();
        let mut sums = [[_mm256_setzero_ps(); 4]; N];
        for (column, line) in weights.floats_of(index).iter().enumerate() {
            let eights = std::ptr::from_ref(line).cast::<__m128i>();
            for eight in 0..4 {
                let raw = _mm_load_si128(eights.add(eight));
                let weight = match BRAIN {
                    true => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(raw))),
                    false => _mm256_cvtph_ps(raw),
                };
                for i in 0..N {
                    let x = _mm256_set1_ps(*x.add(i * cols + column));
                    sums[i][eight] = _mm256_fmadd_ps(weight, x, sums[i][eight]);
                }
            }
        }
        for i in 0..N {
            let mut values = [0.0f32; FLOAT_GROUP];
            for eight in 0..4 {
                _mm256_storeu_ps(values[8 * eight..].as_mut_ptr(), sums[i][eight]);
            }
            let to = out.start.add((first + i) * out.rows + index * FLOAT_GROUP);
            std::ptr::copy_nonoverlapping(values.as_ptr(), to, rows);
        }
    }
    N
}
