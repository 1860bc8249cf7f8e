//! The products of [`super::dot`] with NEON, and with its dot products of bytes. Same lanes, same order, same bits.
//!
//! NEON is part of every 64-bit ARM processor that Rust's targets name; dot products came later and are asked for.
//! Everything below the entry points is `inline(always)`, so that it is compiled once per instruction set.

#![expect(
    clippy::needless_range_loop,
    reason = "indices name the rows and halves of a tile in registers"
)]

use std::arch::aarch64::*;
use std::arch::asm;

use super::PackedType;
use super::activations::{ActivationRow, Activations};
use super::blocks::{TWICE_E2M1, UNEVEN, UNIT, half_power, has_two_minima, k_scale_and_minimum, q3_scale};
use super::dot::sum_of_lanes;

/// Activation rows that one pass over a weight row is multiplied with.
const TILE: usize = 4;

pub(super) fn multiply_rows_neon(
    ty: PackedType,
    rows: &[u8],
    row_bytes: usize,
    x: &Activations,
    n: usize,
    out: &mut [f32],
) {
    // SAFETY: NEON is there.
    unsafe { multiply_rows::<false>(ty, rows, row_bytes, x, n, out) }
}

pub(super) fn multiply_rows_dot(
    ty: PackedType,
    rows: &[u8],
    row_bytes: usize,
    x: &Activations,
    n: usize,
    out: &mut [f32],
) {
    #[target_feature(enable = "dotprod")]
    unsafe fn run(ty: PackedType, rows: &[u8], row_bytes: usize, x: &Activations, n: usize, out: &mut [f32]) {
        // SAFETY: this function has dot products.
        unsafe { multiply_rows::<true>(ty, rows, row_bytes, x, n, out) }
    }
    // SAFETY: `Path::best` chooses this path where the processor has dot products.
    unsafe { run(ty, rows, row_bytes, x, n, out) }
}

/// # Safety
///
/// The caller has dot products where `DOT`.
#[inline(always)]
unsafe fn multiply_rows<const DOT: bool>(
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
            PackedType::Q5_0 => rows_of::<Q5_0, DOT>(rows, row_bytes, x, n, out),
            PackedType::Q5_1 => rows_of::<Q5_1, DOT>(rows, row_bytes, x, n, out),
            PackedType::Iq4Nl => rows_of::<Iq4Nl, DOT>(rows, row_bytes, x, n, out),
            PackedType::Mxfp4 => rows_of::<Mxfp4, DOT>(rows, row_bytes, x, n, out),
            PackedType::Q2K => rows_of::<Q2K, DOT>(rows, row_bytes, x, n, out),
            PackedType::Q3K => rows_of::<Q3K, DOT>(rows, row_bytes, x, n, out),
            PackedType::Q4K => rows_of::<Q4K, DOT>(rows, row_bytes, x, n, out),
            PackedType::Q5K => rows_of::<Q5K, DOT>(rows, row_bytes, x, n, out),
            PackedType::Q6K => rows_of::<Q6K, DOT>(rows, row_bytes, x, n, out),
            PackedType::Q8_0 | PackedType::Q4_0 | PackedType::Q4_1 => unreachable!("their rows lie side by side"),
            PackedType::F32 | PackedType::F16 | PackedType::BF16 => unreachable!("plain floats have their own product"),
        }
    }
}

#[inline(always)]
unsafe fn rows_of<B: Block, const DOT: bool>(
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
            *out = unsafe { dots::<B, DOT, TILE>(row, x) };
        }
        for (i, out) in rest.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            let [dot] = unsafe { dots::<B, DOT, 1>(row, [x.row(tiled + i)]) };
            *out = dot;
        }
    }
}

/// One weight row times `N` activation rows.
#[inline(always)]
unsafe fn dots<B: Block, const DOT: bool, const N: usize>(row: &[u8], x: [ActivationRow<'_>; N]) -> [f32; N] {
    // SAFETY: the caller has the instructions; loads are of arrays whose length their type states.
    unsafe {
        let mut lanes = [[vdupq_n_f32(0.0); 2]; N];
        let mut minima = [0.0; N];
        let ones = vdupq_n_s8(1);
        for (b, block) in row.chunks_exact(B::BYTES).enumerate() {
            for index in 0..B::UNITS {
                let unit = B::unit(block, index);
                let at = b * B::UNITS + index;
                for i in 0..N {
                    let quants: &[i8; UNIT] = &x[i].quants[at];
                    let x_scale = x[i].scales[at];
                    for half in 0..2 {
                        let quants = vld1q_s8(quants.as_ptr().add(16 * half));
                        let none = vdupq_n_s32(0);
                        let sums = vcvtq_f32_s32(add_dots::<DOT>(none, unit.quants[half], quants));
                        let scaled = vmulq_f32(sums, vdupq_n_f32(unit.scales[half] * x_scale));
                        lanes[i][half] = vaddq_f32(lanes[i][half], scaled);
                        if B::TWO_MINIMA {
                            let sums = vcvtq_f32_s32(add_dots::<DOT>(none, ones, quants));
                            let scaled = vmulq_f32(sums, vdupq_n_f32(unit.minima[half] * x_scale));
                            lanes[i][half] = vaddq_f32(lanes[i][half], scaled);
                        }
                    }
                    if B::HAS_MINIMUM {
                        minima[i] += unit.minima[0] * x[i].sums[at];
                    }
                }
            }
        }
        let mut out = [0.0; N];
        for i in 0..N {
            let mut sums = [0.0; 8];
            vst1q_f32(sums.as_mut_ptr(), lanes[i][0]);
            vst1q_f32(sums.as_mut_ptr().add(4), lanes[i][1]);
            out[i] = sum_of_lanes(sums) + minima[i];
        }
        out
    }
}

/// Adds sums of four neighbouring products to `totals`. `x` is never −128, so no pair overflows i16.
///
/// # Safety
///
/// The function that this becomes a part of has dot products where `DOT`.
#[inline(always)]
pub(super) unsafe fn add_dots<const DOT: bool>(totals: int32x4_t, weights: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the caller's promise; the instruction reads and writes registers alone.
    unsafe {
        if DOT {
            // What the standard library does not offer by name yet.
            let mut totals = totals;
            asm!(
                "sdot {totals:v}.4s, {weights:v}.16b, {x:v}.16b",
                totals = inout(vreg) totals,
                weights = in(vreg) weights,
                x = in(vreg) x,
                options(pure, nomem, nostack, preserves_flags),
            );
            totals
        } else {
            let low = vmull_s8(vget_low_s8(weights), vget_low_s8(x));
            let high = vmull_high_s8(weights, x);
            vpadalq_s16(totals, vpaddq_s16(low, high))
        }
    }
}

/// [`super::blocks::Unit`] in registers.
struct Unit {
    /// Elements 0 to 15, and 16 to 31.
    quants: [int8x16_t; 2],
    scales: [f32; 2],
    /// Equal, unless the type has two.
    minima: [f32; 2],
}

trait Block {
    const TY: PackedType;
    const BYTES: usize = Self::TY.block_bytes();
    const UNITS: usize = Self::TY.block_elements() / UNIT;
    const TWO_MINIMA: bool = has_two_minima(Self::TY);
    /// Whether there is one minimum for a unit.
    const HAS_MINIMUM: bool;
    /// # Safety
    ///
    /// The caller has NEON. `block` may be of any length: reads are checked.
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
    const TY: PackedType = PackedType::Q5_0;
    const HAS_MINIMUM: bool = true;

    #[inline(always)]
    unsafe fn unit(block: &[u8], _: usize) -> Unit {
        // SAFETY: the caller has the instructions.
        unsafe {
            let d = half_at(block, 0);
            uniform(both(nibbles(block, 6), fifth_bits(block, 2)), d, -16.0 * d)
        }
    }
}

impl Block for Q5_1 {
    const TY: PackedType = PackedType::Q5_1;
    const HAS_MINIMUM: bool = true;

    #[inline(always)]
    unsafe fn unit(block: &[u8], _: usize) -> Unit {
        // SAFETY: the caller has the instructions.
        unsafe {
            let quants = both(nibbles(block, 8), fifth_bits(block, 4));
            uniform(quants, half_at(block, 0), half_at(block, 2))
        }
    }
}

impl Block for Iq4Nl {
    const TY: PackedType = PackedType::Iq4Nl;
    const HAS_MINIMUM: bool = false;

    #[inline(always)]
    unsafe fn unit(block: &[u8], _: usize) -> Unit {
        // SAFETY: the caller has the instructions.
        unsafe { looked_up(&UNEVEN, nibbles(block, 2), half_at(block, 0)) }
    }
}

impl Block for Mxfp4 {
    const TY: PackedType = PackedType::Mxfp4;
    const HAS_MINIMUM: bool = false;

    #[inline(always)]
    unsafe fn unit(block: &[u8], _: usize) -> Unit {
        // SAFETY: the caller has the instructions.
        unsafe { looked_up(&TWICE_E2M1, nibbles(block, 1), half_power(block[0])) }
    }
}

impl Block for Q2K {
    const TY: PackedType = PackedType::Q2K;
    const HAS_MINIMUM: bool = false;

    #[inline(always)]
    unsafe fn unit(block: &[u8], index: usize) -> Unit {
        // SAFETY: the caller has the instructions.
        unsafe {
            let (d, d_minimum) = (half_at(block, 80), half_at(block, 82));
            let packed = [block[2 * index], block[2 * index + 1]];
            let bits = fields::<3>(load_32(block, 16 + index / 4 * 32), index % 4 * 2);
            Unit {
                quants: signed(bits),
                scales: packed.map(|both| d * f32::from(both & 15)),
                minima: packed.map(|both| -d_minimum * f32::from(both >> 4)),
            }
        }
    }
}

impl Block for Q3K {
    const TY: PackedType = PackedType::Q3K;
    const HAS_MINIMUM: bool = false;

    #[inline(always)]
    unsafe fn unit(block: &[u8], index: usize) -> Unit {
        // SAFETY: the caller has the instructions.
        unsafe {
            let low = fields::<3>(load_32(block, 32 + index / 4 * 32), index % 4 * 2);
            let high = shifted_left::<2>(fields::<1>(load_32(block, 0), index));
            let d = half_at(block, 108);
            let packed = array_at::<12>(block, 96);
            Unit {
                quants: less(both(low, high), 4),
                scales: [2 * index, 2 * index + 1].map(|half| d * f32::from(q3_scale(packed, half))),
                minima: [0.0; 2],
            }
        }
    }
}

impl Block for Q4K {
    const TY: PackedType = PackedType::Q4K;
    const HAS_MINIMUM: bool = true;

    #[inline(always)]
    unsafe fn unit(block: &[u8], index: usize) -> Unit {
        // SAFETY: the caller has the instructions.
        unsafe {
            let quants = fields::<15>(load_32(block, 16 + index / 2 * 32), index % 2 * 4);
            k_unit(block, index, quants)
        }
    }
}

impl Block for Q5K {
    const TY: PackedType = PackedType::Q5K;
    const HAS_MINIMUM: bool = true;

    #[inline(always)]
    unsafe fn unit(block: &[u8], index: usize) -> Unit {
        // SAFETY: the caller has the instructions.
        unsafe {
            let low = fields::<15>(load_32(block, 48 + index / 2 * 32), index % 2 * 4);
            let fifth = shifted_left::<4>(fields::<1>(load_32(block, 16), index));
            k_unit(block, index, both(low, fifth))
        }
    }
}

impl Block for Q6K {
    const TY: PackedType = PackedType::Q6K;
    const HAS_MINIMUM: bool = false;

    #[inline(always)]
    unsafe fn unit(block: &[u8], index: usize) -> Unit {
        // SAFETY: the caller has the instructions.
        unsafe {
            let (half, quarter) = (index / 4, index % 4);
            let low = fields::<15>(load_32(block, half * 64 + quarter % 2 * 32), quarter / 2 * 4);
            let high = shifted_left::<4>(fields::<3>(load_32(block, 128 + half * 32), quarter * 2));
            let d = half_at(block, 208);
            let scales = [block[192 + index * 2], block[193 + index * 2]];
            Unit {
                quants: less(both(low, high), 32),
                scales: scales.map(|scale| d * f32::from(i8::from_le_bytes([scale]))),
                minima: [0.0; 2],
            }
        }
    }
}

#[inline(always)]
unsafe fn k_unit(block: &[u8], index: usize, quants: [uint8x16_t; 2]) -> Unit {
    let (scale, minimum) = k_scale_and_minimum(array_at::<12>(block, 4), index);
    // SAFETY: the caller has the instructions.
    unsafe {
        let scale = half_at(block, 0) * f32::from(scale);
        uniform(quants, scale, -half_at(block, 2) * f32::from(minimum))
    }
}

#[inline(always)]
unsafe fn uniform(quants: [uint8x16_t; 2], scale: f32, minimum: f32) -> Unit {
    Unit {
        // SAFETY: the caller has the instructions.
        quants: unsafe { signed(quants) },
        scales: [scale; 2],
        minima: [minimum; 2],
    }
}

/// What nibbles stand for in a table.
#[inline(always)]
unsafe fn looked_up(table: &[i8; 16], nibbles: [uint8x16_t; 2], scale: f32) -> Unit {
    // SAFETY: the caller has the instructions; the table has the 16 bytes that are read.
    unsafe {
        let table = vld1q_s8(table.as_ptr());
        Unit {
            quants: [vqtbl1q_s8(table, nibbles[0]), vqtbl1q_s8(table, nibbles[1])],
            scales: [scale; 2],
            minima: [0.0; 2],
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
    unsafe { vgetq_lane_f32::<0>(widened_halves(vdup_n_u16(bits))) }
}

/// Four numbers of half precision.
#[inline(always)]
pub(super) unsafe fn widened_halves(bits: uint16x4_t) -> float32x4_t {
    // SAFETY: the caller has NEON, whose conversion is older than its arithmetic with such numbers.
    unsafe { vcvt_f32_f16(vreinterpret_f16_u16(bits)) }
}

#[inline(always)]
unsafe fn load_32(block: &[u8], at: usize) -> [uint8x16_t; 2] {
    let bytes = array_at::<32>(block, at).as_ptr();
    // SAFETY: the caller has the instructions; the array has the 32 bytes that are read.
    unsafe { [vld1q_u8(bytes), vld1q_u8(bytes.add(16))] }
}

/// 16 bytes to 32 nibbles: the low ones first.
#[inline(always)]
unsafe fn nibbles(block: &[u8], at: usize) -> [uint8x16_t; 2] {
    // SAFETY: the caller has the instructions; the array has the 16 bytes that are read.
    unsafe {
        let bytes = vld1q_u8(array_at::<16>(block, at).as_ptr());
        [vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8::<4>(bytes)]
    }
}

/// 32 bits to 32 bytes of 0 or 16.
#[inline(always)]
unsafe fn fifth_bits(block: &[u8], at: usize) -> [uint8x16_t; 2] {
    let bytes = array_at::<4>(block, at);
    // SAFETY: the caller has the instructions.
    unsafe {
        // Byte i of the result sees byte i / 8 of the bits, of which the mask keeps bit i % 8.
        let mask = vcreate_u8(u64::from_le_bytes([1, 2, 4, 8, 16, 32, 64, 128]));
        let mask = vcombine_u8(mask, mask);
        let sixteen = vdupq_n_u8(16);
        let low = vcombine_u8(vdup_n_u8(bytes[0]), vdup_n_u8(bytes[1]));
        let high = vcombine_u8(vdup_n_u8(bytes[2]), vdup_n_u8(bytes[3]));
        [
            vandq_u8(vtstq_u8(low, mask), sixteen),
            vandq_u8(vtstq_u8(high, mask), sixteen),
        ]
    }
}

/// Of each byte the bits of `MASK`, once they are `shift` lower.
#[inline(always)]
unsafe fn fields<const MASK: u8>(bytes: [uint8x16_t; 2], shift: usize) -> [uint8x16_t; 2] {
    // SAFETY: the caller has the instructions.
    unsafe {
        // A shift to the left by less than nothing is one to the right.
        let shift = vdupq_n_s8(-(shift as i8));
        let mask = vdupq_n_u8(MASK);
        [
            vandq_u8(vshlq_u8(bytes[0], shift), mask),
            vandq_u8(vshlq_u8(bytes[1], shift), mask),
        ]
    }
}

#[inline(always)]
unsafe fn shifted_left<const BITS: i32>(bytes: [uint8x16_t; 2]) -> [uint8x16_t; 2] {
    // SAFETY: the caller has the instructions.
    unsafe { [vshlq_n_u8::<BITS>(bytes[0]), vshlq_n_u8::<BITS>(bytes[1])] }
}

#[inline(always)]
unsafe fn both(a: [uint8x16_t; 2], b: [uint8x16_t; 2]) -> [uint8x16_t; 2] {
    // SAFETY: the caller has the instructions.
    unsafe { [vorrq_u8(a[0], b[0]), vorrq_u8(a[1], b[1])] }
}

#[inline(always)]
unsafe fn signed(bytes: [uint8x16_t; 2]) -> [int8x16_t; 2] {
    // SAFETY: the caller has the instructions.
    unsafe { [vreinterpretq_s8_u8(bytes[0]), vreinterpretq_s8_u8(bytes[1])] }
}

/// Bytes less an offset.
#[inline(always)]
unsafe fn less(bytes: [uint8x16_t; 2], offset: i8) -> [int8x16_t; 2] {
    // SAFETY: the caller has the instructions.
    unsafe {
        let [low, high] = signed(bytes);
        let offset = vdupq_n_s8(offset);
        [vsubq_s8(low, offset), vsubq_s8(high, offset)]
    }
}
