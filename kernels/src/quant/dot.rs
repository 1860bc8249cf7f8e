//! Products of packed rows and activations: the scalar definition, and the choice of the fastest path.

use super::PackedType;
use super::activations::{ActivationRow, Activations};
use super::blocks::{UNIT, has_two_minima, unit, units_per_block};

/// Partial sums of a packed product: lane `l` takes elements `4l` to `4l + 3` of every unit.
pub(super) const LANES: usize = 8;
/// Partial sums of a product with plain floats: lane `l` takes every element `i` with `i % 16 = l`.
pub(super) const FLOAT_LANES: usize = 16;

/// How products are computed. Every path gives the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// The definition, in plain loops.
    #[cfg_attr(
        target_arch = "aarch64",
        allow(dead_code, reason = "NEON is always there; tests compare with this")
    )]
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Vnni,
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// With dot products of bytes.
    #[cfg(target_arch = "aarch64")]
    NeonDot,
}

impl Path {
    /// The fastest path of this machine.
    pub(super) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") && is_x86_feature_detected!("fma") {
                if is_x86_feature_detected!("avx512vnni")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512bw")
                {
                    return Self::Vnni;
                }
                return Self::Avx2;
            }
            Self::Scalar
        }
        #[cfg(target_arch = "aarch64")]
        {
            if std::arch::is_aarch64_feature_detected!("dotprod") {
                Self::NeonDot
            } else {
                Self::Neon
            }
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        Self::Scalar
    }
}

/// `out[r · n + i] = rows[r] · activations[i]` for rows of whole blocks, `row_bytes` bytes each.
pub(super) fn multiply_rows(
    path: Path,
    ty: PackedType,
    rows: &[u8],
    row_bytes: usize,
    activations: &Activations,
    n: usize,
    out: &mut [f32],
) {
    match path {
        Path::Scalar => {
            for (row, out) in rows.chunks_exact(row_bytes).zip(out.chunks_exact_mut(n)) {
                for (i, out) in out.iter_mut().enumerate() {
                    *out = dot(ty, row, activations.row(i));
                }
            }
        }
        #[cfg(target_arch = "x86_64")]
        Path::Avx2 => super::simd::multiply_rows_avx2(ty, rows, row_bytes, activations, n, out),
        #[cfg(target_arch = "x86_64")]
        Path::Vnni => super::simd::multiply_rows_vnni(ty, rows, row_bytes, activations, n, out),
        #[cfg(target_arch = "aarch64")]
        Path::Neon => super::neon::multiply_rows_neon(ty, rows, row_bytes, activations, n, out),
        #[cfg(target_arch = "aarch64")]
        Path::NeonDot => super::neon::multiply_rows_dot(ty, rows, row_bytes, activations, n, out),
    }
}

/// `out[r · n + i] = rows[r] · x[i]` for rows of f32, `x` being `[n, cols]`. Shorter floats lie side by side.
pub(super) fn multiply_float_rows(path: Path, rows: &[u8], row_bytes: usize, x: &[f32], n: usize, out: &mut [f32]) {
    let cols = x.len() / n;
    let mut widened = vec![0.0; cols];
    for (row, out) in rows.chunks_exact(row_bytes).zip(out.chunks_exact_mut(n)) {
        for (value, raw) in widened.iter_mut().zip(row.as_chunks().0) {
            *value = f32::from_le_bytes(*raw);
        }
        for (out, x) in out.iter_mut().zip(x.chunks_exact(cols)) {
            *out = match path {
                Path::Scalar => float_dot(&widened, x),
                #[cfg(target_arch = "x86_64")]
                Path::Avx2 | Path::Vnni => super::simd::float_dot_avx2(&widened, x),
                // The compiler has NEON for the plain loop too.
                #[cfg(target_arch = "aarch64")]
                Path::Neon | Path::NeonDot => float_dot(&widened, x),
            };
        }
    }
}

/// The definition: integer products summed exactly per lane, scaled, and added unit after unit.
fn dot(ty: PackedType, row: &[u8], x: ActivationRow<'_>) -> f32 {
    let mut lanes = [0.0; LANES];
    let mut minima = 0.0;
    let units = units_per_block(ty);
    let two_minima = has_two_minima(ty);
    for (b, block) in row.chunks_exact(ty.block_bytes()).enumerate() {
        for index in 0..units {
            let unit = unit(ty, block, index);
            let at = b * units + index;
            for (l, lane) in lanes.iter_mut().enumerate() {
                let half = l * 4 / (UNIT / 2);
                let four = 4 * l..4 * l + 4;
                let products = four
                    .clone()
                    .map(|i| i32::from(unit.quants[i]) * i32::from(x.quants[at][i]));
                *lane += products.sum::<i32>() as f32 * (unit.scales[half] * x.scales[at]);
                if two_minima {
                    let sum: i32 = four.map(|i| i32::from(x.quants[at][i])).sum();
                    *lane += sum as f32 * (unit.minima[half] * x.scales[at]);
                }
            }
            if !two_minima {
                minima += unit.minima[0] * x.sums[at];
            }
        }
    }
    sum_of_lanes(lanes) + minima
}

/// Adds halves, then quarters, then pairs.
#[inline(always)]
pub(super) fn sum_of_lanes(lanes: [f32; LANES]) -> f32 {
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// The definition for plain floats.
#[inline(always)]
pub(super) fn float_dot(weights: &[f32], x: &[f32]) -> f32 {
    let mut lanes = [0.0; FLOAT_LANES];
    let (weight_chunks, weight_rest) = weights.as_chunks::<FLOAT_LANES>();
    let (x_chunks, x_rest) = x.as_chunks::<FLOAT_LANES>();
    for (weights, x) in weight_chunks.iter().zip(x_chunks) {
        for l in 0..FLOAT_LANES {
            lanes[l] += weights[l] * x[l];
        }
    }
    for (lane, (weight, x)) in lanes.iter_mut().zip(weight_rest.iter().zip(x_rest)) {
        *lane += weight * x;
    }
    let mut halves = [0.0; LANES];
    for l in 0..LANES {
        halves[l] = lanes[l] + lanes[l + LANES];
    }
    sum_of_lanes(halves)
}
