//! The products of [`super::dot`] with AVX2 and AVX-512 VNNI. Same lanes, same order, same bits.
//!
//! Everything below the entry points is `inline(always)`, so that it is compiled once per instruction set.

use std::arch::x86_64::*;

use super::PackedType;
use super::activations::{ActivationRow, Activations};
use super::blocks::{TWICE_E2M1, UNEVEN, UNIT, half_power, has_two_minima, k_scale_and_minimum, q3_scale};
use super::dot::{LANES, float_dot, sum_of_lanes};

/// Activation rows that one pass over a weight row is multiplied with.
const TILE: usize = 4;

pub(super) fn multiply_rows_avx2(
    ty: PackedType,
    rows: &[u8],
    row_bytes: usize,
    x: &Activations,
    n: usize,
    out: &mut [f32],
) {
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn run(ty: PackedType, rows: &[u8], row_bytes: usize, x: &Activations, n: usize, out: &mut [f32]) {
        // SAFETY: this function has AVX2 and F16C.
        unsafe { multiply_rows::<false>(ty, rows, row_bytes, x, n, out) }
    }
    // SAFETY: `Path::best` chooses this path where the processor has AVX2 and F16C.
    unsafe { run(ty, rows, row_bytes, x, n, out) }
}

pub(super) fn multiply_rows_vnni(
    ty: PackedType,
    rows: &[u8],
    row_bytes: usize,
    x: &Activations,
    n: usize,
    out: &mut [f32],
) {
    #[target_feature(enable = "avx2,f16c,avx512vl,avx512vnni")]
    unsafe fn run(ty: PackedType, rows: &[u8], row_bytes: usize, x: &Activations, n: usize, out: &mut [f32]) {
        // SAFETY: this function has AVX2, F16C and 256-bit VNNI.
        unsafe { multiply_rows::<true>(ty, rows, row_bytes, x, n, out) }
    }
    // SAFETY: `Path::best` chooses this path where the processor has AVX2, F16C, AVX-512 VL and VNNI.
    unsafe { run(ty, rows, row_bytes, x, n, out) }
}

pub(super) fn float_dot_avx2(weights: &[f32], x: &[f32]) -> f32 {
    #[target_feature(enable = "avx2")]
    fn run(weights: &[f32], x: &[f32]) -> f32 {
        float_dot(weights, x)
    }
    // SAFETY: `Path::best` chooses this path where the processor has AVX2.
    unsafe { run(weights, x) }
}

/// # Safety
///
/// The caller has AVX2 and F16C, and where `VNNI` also AVX-512 VL and VNNI.
#[inline(always)]
unsafe fn multiply_rows<const VNNI: bool>(
    ty: PackedType,
    rows: &[u8],
    row_bytes: usize,
    x: &Activations,
    n: usize,
    out: &mut [f32],
) {
    // SAFETY: the caller's promise.
    unsafe {
        match ty {
            PackedType::Q5_0 => rows_of::<Q5_0, VNNI>(rows, row_bytes, x, n, out),
            PackedType::Q5_1 => rows_of::<Q5_1, VNNI>(rows, row_bytes, x, n, out),
            PackedType::Iq4Nl => rows_of::<Iq4Nl, VNNI>(rows, row_bytes, x, n, out),
            PackedType::Mxfp4 => rows_of::<Mxfp4, VNNI>(rows, row_bytes, x, n, out),
            PackedType::Q2K => rows_of::<Q2K, VNNI>(rows, row_bytes, x, n, out),
            PackedType::Q3K => rows_of::<Q3K, VNNI>(rows, row_bytes, x, n, out),
            PackedType::Q4K => rows_of::<Q4K, VNNI>(rows, row_bytes, x, n, out),
            PackedType::Q5K => rows_of::<Q5K, VNNI>(rows, row_bytes, x, n, out),
            PackedType::Q6K => rows_of::<Q6K, VNNI>(rows, row_bytes, x, n, out),
            PackedType::Q8_0 | PackedType::Q4_0 | PackedType::Q4_1 => unreachable!("their rows lie side by side"),
            PackedType::F32 | PackedType::F16 | PackedType::BF16 => unreachable!("plain floats have their own product"),
        }
    }
}

#[inline(always)]
unsafe fn rows_of<B: Block, const VNNI: bool>(
    rows: &[u8],
    row_bytes: usize,
    x: &Activations,
    n: usize,
    out: &mut [f32],
) {
    for (row, out) in rows.chunks_exact(row_bytes).zip(out.chunks_exact_mut(n)) {
        let (tiles, rest) = out.as_chunks_mut::<TILE>();
        let tiled = tiles.len() * TILE;
        for (t, out) in tiles.iter_mut().enumerate() {
            let x = [0, 1, 2, 3].map(|i| x.row(t * TILE + i));
            // SAFETY: the caller's promise.
            *out = unsafe { dots::<B, VNNI, TILE>(row, x) };
        }
        for (i, out) in rest.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            let [dot] = unsafe { dots::<B, VNNI, 1>(row, [x.row(tiled + i)]) };
            *out = dot;
        }
    }
}

/// One weight row times `N` activation rows.
#[inline(always)]
unsafe fn dots<B: Block, const VNNI: bool, const N: usize>(row: &[u8], x: [ActivationRow<'_>; N]) -> [f32; N] {
    // SAFETY: the caller has the instructions; loads are of arrays whose length their type states.
    unsafe {
        let mut lanes = [_mm256_setzero_ps(); N];
        let mut minima = [0.0; N];
        let units = B::SIZE.units;
        for (b, block) in row.chunks_exact(B::SIZE.bytes).enumerate() {
            for index in 0..units {
                let unit = B::unit(block, index);
                let at = b * units + index;
                for i in 0..N {
                    let quants: &[i8; UNIT] = &x[i].quants[at];
                    let quants = _mm256_loadu_si256(quants.as_ptr().cast());
                    let sums = if B::SIGNED {
                        let signed = _mm256_sign_epi8(quants, unit.quants);
                        dot_bytes::<VNNI>(_mm256_abs_epi8(unit.quants), signed)
                    } else {
                        dot_bytes::<VNNI>(unit.quants, quants)
                    };
                    let scale = _mm256_mul_ps(unit.scales, _mm256_set1_ps(x[i].scales[at]));
                    lanes[i] = _mm256_add_ps(lanes[i], _mm256_mul_ps(_mm256_cvtepi32_ps(sums), scale));
                    if B::SIZE.two_minima {
                        let sums = dot_bytes::<VNNI>(_mm256_set1_epi8(1), quants);
                        let scale = _mm256_mul_ps(unit.minima, _mm256_set1_ps(x[i].scales[at]));
                        lanes[i] = _mm256_add_ps(lanes[i], _mm256_mul_ps(_mm256_cvtepi32_ps(sums), scale));
                    } else if !B::SIGNED {
                        minima[i] += unit.minimum * x[i].sums[at];
                    }
                }
            }
        }
        let mut out = [0.0; N];
        for i in 0..N {
            let mut sums = [0.0; LANES];
            _mm256_storeu_ps(sums.as_mut_ptr(), lanes[i]);
            out[i] = sum_of_lanes(sums) + minima[i];
        }
        out
    }
}

/// Sums of four neighbouring products, eight of them. The unsigned factor is at most 128, so no pair overflows i16.
#[inline(always)]
unsafe fn dot_bytes<const VNNI: bool>(unsigned: __m256i, signed: __m256i) -> __m256i {
    // SAFETY: the caller has the instructions.
    unsafe {
        if VNNI {
            _mm256_dpbusd_epi32(_mm256_setzero_si256(), unsigned, signed)
        } else {
            _mm256_madd_epi16(_mm256_maddubs_epi16(unsigned, signed), _mm256_set1_epi16(1))
        }
    }
}

/// [`super::blocks::Unit`] in registers.
struct Unit {
    quants: __m256i,
    scales: __m256,
    minimum: f32,
    /// Those of a type with two.
    minima: __m256,
}

/// The size of a block.
struct Size {
    bytes: usize,
    units: usize,
    two_minima: bool,
}

const fn size(ty: PackedType) -> Size {
    Size {
        bytes: ty.block_bytes(),
        units: ty.block_elements() / UNIT,
        two_minima: has_two_minima(ty),
    }
}

trait Block {
    const SIZE: Size;
    /// Whether quants have a sign; then the minimum is zero.
    const SIGNED: bool;
    /// # Safety
    ///
    /// The caller has AVX2 and F16C. `block` may be of any length: reads are checked.
    unsafe fn unit(block: &[u8], index: usize) -> Unit;
}

struct Q5_0;
struct Q5_1;
struct Iq4Nl;
struct Mxfp4;
struct Q2K;
struct Q3K;
struct Q4K;
struct Q5K;
struct Q6K;

impl Block for Q5_0 {
    const SIZE: Size = size(PackedType::Q5_0);
    const SIGNED: bool = false;

    #[inline(always)]
    unsafe fn unit(block: &[u8], _: usize) -> Unit {
        // SAFETY: the caller has the instructions.
        unsafe {
            let d = half_at(block, 0);
            let quants = _mm256_or_si256(nibbles(block, 6), fifth_bits(block, 2));
            uniform(quants, d, -16.0 * d)
        }
    }
}

impl Block for Q5_1 {
    const SIZE: Size = size(PackedType::Q5_1);
    const SIGNED: bool = false;

    #[inline(always)]
    unsafe fn unit(block: &[u8], _: usize) -> Unit {
        // SAFETY: the caller has the instructions.
        unsafe {
            let quants = _mm256_or_si256(nibbles(block, 8), fifth_bits(block, 4));
            uniform(quants, half_at(block, 0), half_at(block, 2))
        }
    }
}

impl Block for Iq4Nl {
    const SIZE: Size = size(PackedType::Iq4Nl);
    const SIGNED: bool = true;

    #[inline(always)]
    unsafe fn unit(block: &[u8], _: usize) -> Unit {
        // SAFETY: the caller has the instructions.
        unsafe { uniform(looked_up(&UNEVEN, block, 2), half_at(block, 0), 0.0) }
    }
}

impl Block for Mxfp4 {
    const SIZE: Size = size(PackedType::Mxfp4);
    const SIGNED: bool = true;

    #[inline(always)]
    unsafe fn unit(block: &[u8], _: usize) -> Unit {
        // SAFETY: the caller has the instructions.
        unsafe { uniform(looked_up(&TWICE_E2M1, block, 1), half_power(block[0]), 0.0) }
    }
}

impl Block for Q2K {
    const SIZE: Size = size(PackedType::Q2K);
    const SIGNED: bool = false;

    #[inline(always)]
    unsafe fn unit(block: &[u8], index: usize) -> Unit {
        // SAFETY: the caller has the instructions.
        unsafe {
            let (d, d_minimum) = (half_at(block, 80), half_at(block, 82));
            let packed = [block[2 * index], block[2 * index + 1]];
            halves(
                two_bits(block, 16, index),
                packed.map(|both| d * f32::from(both & 15)),
                packed.map(|both| -d_minimum * f32::from(both >> 4)),
            )
        }
    }
}

impl Block for Q3K {
    const SIZE: Size = size(PackedType::Q3K);
    const SIGNED: bool = true;

    #[inline(always)]
    unsafe fn unit(block: &[u8], index: usize) -> Unit {
        // SAFETY: the caller has the instructions.
        unsafe {
            let bit = _mm256_set1_epi8(1i8.wrapping_shl(index as u32));
            let unset = _mm256_cmpeq_epi8(_mm256_and_si256(load_32(block, 0), bit), _mm256_setzero_si256());
            let quants = _mm256_sub_epi8(two_bits(block, 32, index), _mm256_and_si256(unset, _mm256_set1_epi8(4)));
            let d = half_at(block, 108);
            let packed = array_at::<12>(block, 96);
            let scales = [2 * index, 2 * index + 1].map(|half| d * f32::from(q3_scale(packed, half)));
            halves(quants, scales, [0.0; 2])
        }
    }
}

impl Block for Q4K {
    const SIZE: Size = size(PackedType::Q4K);
    const SIGNED: bool = false;

    #[inline(always)]
    unsafe fn unit(block: &[u8], index: usize) -> Unit {
        // SAFETY: the caller has the instructions.
        unsafe { k_unit(block, index, half_of_chunk(block, 16, index)) }
    }
}

impl Block for Q5K {
    const SIZE: Size = size(PackedType::Q5K);
    const SIGNED: bool = false;

    #[inline(always)]
    unsafe fn unit(block: &[u8], index: usize) -> Unit {
        // SAFETY: the caller has the instructions.
        unsafe {
            let bit = _mm256_set1_epi8(1i8.wrapping_shl(index as u32));
            let unset = _mm256_cmpeq_epi8(_mm256_and_si256(load_32(block, 16), bit), _mm256_setzero_si256());
            let fifth = _mm256_andnot_si256(unset, _mm256_set1_epi8(16));
            k_unit(block, index, _mm256_or_si256(half_of_chunk(block, 48, index), fifth))
        }
    }
}

impl Block for Q6K {
    const SIZE: Size = size(PackedType::Q6K);
    const SIGNED: bool = true;

    #[inline(always)]
    unsafe fn unit(block: &[u8], index: usize) -> Unit {
        // SAFETY: the caller has the instructions.
        unsafe {
            let (half, quarter) = (index / 4, index % 4);
            let low = shift_right(load_32(block, half * 64 + quarter % 2 * 32), quarter / 2 * 4);
            let high = shift_right(load_32(block, 128 + half * 32), quarter * 2);
            let low = _mm256_and_si256(low, _mm256_set1_epi8(15));
            let high = _mm256_slli_epi16::<4>(_mm256_and_si256(high, _mm256_set1_epi8(3)));
            let quants = _mm256_sub_epi8(_mm256_or_si256(low, high), _mm256_set1_epi8(32));
            let d = half_at(block, 208);
            let scale = |i: usize| d * f32::from(i8::from_le_bytes([block[192 + index * 2 + i]]));
            halves(quants, [scale(0), scale(1)], [0.0; 2])
        }
    }
}

#[inline(always)]
unsafe fn k_unit(block: &[u8], index: usize, quants: __m256i) -> Unit {
    // SAFETY: the caller has the instructions.
    unsafe {
        let packed = array_at::<12>(block, 4);
        let (scale, minimum) = k_scale_and_minimum(packed, index);
        uniform(
            quants,
            half_at(block, 0) * f32::from(scale),
            -half_at(block, 2) * f32::from(minimum),
        )
    }
}

#[inline(always)]
unsafe fn uniform(quants: __m256i, scale: f32, minimum: f32) -> Unit {
    // SAFETY: the caller has the instructions.
    unsafe {
        Unit {
            quants,
            scales: _mm256_set1_ps(scale),
            minimum,
            minima: _mm256_setzero_ps(),
        }
    }
}

/// A unit whose halves differ.
#[inline(always)]
unsafe fn halves(quants: __m256i, scales: [f32; 2], minima: [f32; 2]) -> Unit {
    // SAFETY: the caller has the instructions.
    unsafe {
        let both = |[low, high]: [f32; 2]| _mm256_set_m128(_mm_set1_ps(high), _mm_set1_ps(low));
        Unit {
            quants,
            scales: both(scales),
            minimum: 0.0,
            minima: both(minima),
        }
    }
}

/// `N` bytes from `at`. The compiler sees the length of a block and drops the check.
#[inline(always)]
fn array_at<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..].first_chunk().expect("a block has the length of its type")
}

#[inline(always)]
unsafe fn half_at(block: &[u8], at: usize) -> f32 {
    let bits = u16::from_le_bytes(*array_at(block, at));
    // SAFETY: the caller has the instructions.
    unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits)))) }
}

#[inline(always)]
unsafe fn load_32(block: &[u8], at: usize) -> __m256i {
    // SAFETY: the caller has the instructions; the array has the 32 bytes that are read.
    unsafe { _mm256_loadu_si256(array_at::<32>(block, at).as_ptr().cast()) }
}

/// 16 bytes to 32 nibbles: the low ones first.
#[inline(always)]
unsafe fn nibbles(block: &[u8], at: usize) -> __m256i {
    // SAFETY: the caller has the instructions; the array has the 16 bytes that are read.
    unsafe {
        let bytes = _mm_loadu_si128(array_at::<16>(block, at).as_ptr().cast());
        let both = _mm256_set_m128i(_mm_srli_epi16::<4>(bytes), bytes);
        _mm256_and_si256(both, _mm256_set1_epi8(15))
    }
}

/// 16 bytes to what their 32 nibbles stand for.
#[inline(always)]
unsafe fn looked_up(table: &[i8; 16], block: &[u8], at: usize) -> __m256i {
    // SAFETY: the caller has the instructions; the array has the 16 bytes that are read.
    unsafe {
        let table = _mm_loadu_si128(table.as_ptr().cast());
        _mm256_shuffle_epi8(_mm256_set_m128i(table, table), nibbles(block, at))
    }
}

/// Of 32 bytes that hold four units the two bits of one.
#[inline(always)]
unsafe fn two_bits(block: &[u8], at: usize, index: usize) -> __m256i {
    // SAFETY: the caller has the instructions.
    unsafe {
        let bytes = shift_right(load_32(block, at + index / 4 * 32), index % 4 * 2);
        _mm256_and_si256(bytes, _mm256_set1_epi8(3))
    }
}

/// 32 bits to 32 bytes of 0 or 16.
#[inline(always)]
unsafe fn fifth_bits(block: &[u8], at: usize) -> __m256i {
    let bits = i32::from_le_bytes(*array_at(block, at));
    // SAFETY: the caller has the instructions.
    unsafe {
        // Byte i of the result sees byte i / 8 of the bits, of which the mask keeps bit i % 8.
        let pick = _mm256_set_epi64x(0x0303_0303_0303_0303, 0x0202_0202_0202_0202, 0x0101_0101_0101_0101, 0);
        let mask = _mm256_set1_epi64x(i64::from_le_bytes([1, 2, 4, 8, 16, 32, 64, 128]));
        let spread = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), pick);
        let set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, mask), mask);
        _mm256_and_si256(set, _mm256_set1_epi8(16))
    }
}

/// The low nibbles of 32 bytes for an even unit, the high ones for an odd.
#[inline(always)]
unsafe fn half_of_chunk(block: &[u8], at: usize, index: usize) -> __m256i {
    // SAFETY: the caller has the instructions.
    unsafe {
        let bytes = shift_right(load_32(block, at + index / 2 * 32), index % 2 * 4);
        _mm256_and_si256(bytes, _mm256_set1_epi8(15))
    }
}

/// Shifts 16-bit words; the caller masks what comes in from the neighbour.
#[inline(always)]
unsafe fn shift_right(words: __m256i, bits: usize) -> __m256i {
    // SAFETY: the caller has the instructions.
    unsafe { _mm256_srl_epi16(words, _mm_cvtsi32_si128(bits as i32)) }
}
