//! Activation rows as blocks of 32 int8 values with one scale: the other factor of every packed product.

use super::blocks::UNIT;

/// `n` rows of `cols` activations: `x[i] ≈ scale[unit] · quants[i]`.
#[derive(Debug)]
pub(super) struct Activations {
    cols: usize,
    quants: Vec<i8>,
    scales: Vec<f32>,
    /// Per unit, the scale times the sum of its quants: what a weight block's minimum is multiplied by.
    sums: Vec<f32>,
    /// Per unit, −128 times the sum of its quants: what weights that are kept 128 above their values give too much.
    offsets: Vec<i32>,
}

/// One row of [`Activations`].
#[derive(Debug, Clone, Copy)]
pub(super) struct ActivationRow<'a> {
    pub(super) quants: &'a [[i8; UNIT]],
    pub(super) scales: &'a [f32],
    pub(super) sums: &'a [f32],
}

impl Activations {
    /// Rounds rows of `cols` values, `cols` a multiple of 32. A unit that holds a value that is not finite gets the
    /// scale NaN, so that a broken activation is seen in the output and not rounded away.
    pub(super) fn round(x: &[f32], cols: usize) -> Self {
        let units = x.len() / UNIT;
        let mut rounded = Self {
            cols,
            quants: vec![0; x.len()],
            scales: vec![0.0; units],
            sums: vec![0.0; units],
            offsets: vec![0; units],
        };
        round_units(x, &mut rounded);
        rounded
    }

    /// Units of a row.
    pub(super) const fn units(&self) -> usize {
        self.cols / UNIT
    }

    /// The quants of the rows from `row` on.
    pub(super) fn quants_from(&self, row: usize) -> *const i8 {
        self.quants[row * self.cols..].as_ptr()
    }

    /// The scales of the rows from `row` on.
    pub(super) fn scales_from(&self, row: usize) -> *const f32 {
        self.scales[row * self.units()..].as_ptr()
    }

    /// The scaled sums of the rows from `row` on.
    pub(super) fn sums_from(&self, row: usize) -> *const f32 {
        self.sums[row * self.units()..].as_ptr()
    }

    /// −128 times the sums of the rows from `row` on.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        allow(dead_code, reason = "others multiply bytes with signs")
    )]
    pub(super) fn offsets_from(&self, row: usize) -> *const i32 {
        self.offsets[row * self.units()..].as_ptr()
    }

    /// What rounding took from `x`, the rows that were rounded. Where a unit's scale is not finite, nothing is left.
    pub(super) fn rest(&self, x: &[f32]) -> Vec<f32> {
        let units = x.as_chunks::<UNIT>().0.iter().zip(self.quants.as_chunks::<UNIT>().0);
        let rest = units.zip(&self.scales).flat_map(|((values, quants), scale)| {
            let left = move |(value, quant): (&f32, &i8)| match scale.is_finite() {
                true => value - scale * f32::from(*quant),
                false => 0.0,
            };
            values.iter().zip(quants).map(left)
        });
        rest.collect()
    }

    pub(super) fn row(&self, row: usize) -> ActivationRow<'_> {
        let units = self.cols / UNIT;
        ActivationRow {
            quants: &self.quants.as_chunks().0[row * units..][..units],
            scales: &self.scales[row * units..][..units],
            sums: &self.sums[row * units..][..units],
        }
    }
}

/// Rounds all units with the widest instructions that are there; they give the same bits.
fn round_units(x: &[f32], rounded: &mut Activations) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
        fn wide(x: &[f32], rounded: &mut Activations) {
            round_all(x, rounded);
        }
        #[target_feature(enable = "avx2")]
        fn narrow(x: &[f32], rounded: &mut Activations) {
            round_all(x, rounded);
        }
        if is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
        {
            // SAFETY: the processor has these; AVX-512F comes with each of them.
            return unsafe { wide(x, rounded) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2.
            return unsafe { narrow(x, rounded) };
        }
    }
    round_all(x, rounded);
}

#[inline(always)]
fn round_all(x: &[f32], rounded: &mut Activations) {
    let units = x.as_chunks().0.iter().zip(rounded.quants.as_chunks_mut().0);
    let numbers = rounded
        .scales
        .iter_mut()
        .zip(&mut rounded.sums)
        .zip(&mut rounded.offsets);
    for ((values, quants), ((scale, sum), offset)) in units.zip(numbers) {
        *scale = round_unit(values, quants);
        let whole: i32 = quants.iter().map(|quant| i32::from(*quant)).sum();
        *sum = *scale * whole as f32;
        *offset = -128 * whole;
    }
}

#[inline(always)]
fn round_unit(values: &[f32; UNIT], quants: &mut [i8; UNIT]) -> f32 {
    // Below this the inverse scale is no longer finite; such activations are nothing beside any other.
    const LARGEST_MIN: f32 = 1e-30;
    // Adding and taking away 1.5 · 2²³ rounds to the nearest integer, ties to even, in two plain additions.
    const ROUNDER: f32 = 12_582_912.0;
    // The bits of absolute values are ordered as the values are, with infinity and NaN at the end.
    let largest_bits = values
        .iter()
        .fold(0, |largest, value| largest.max(value.to_bits() & 0x7fff_ffff));
    let largest = f32::from_bits(largest_bits);
    if !largest.is_finite() || largest < LARGEST_MIN {
        quants.fill(0);
        return if largest < LARGEST_MIN { 0.0 } else { f32::NAN };
    }
    let inverse = 127.0 / largest;
    for (quant, value) in quants.iter_mut().zip(values) {
        // The rounded integer sits in the low bits of the sum's mantissa.
        *quant = (value * inverse + ROUNDER).to_bits() as i8;
    }
    largest / 127.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_to_the_nearest_of_255_steps() {
        let x: Vec<f32> = (0..64).map(|i| (i as f32 - 31.5) * 0.1).collect();
        let activations = Activations::round(&x, 64);
        let row = activations.row(0);
        for (i, value) in x.iter().enumerate() {
            let back = row.scales[i / 32] * f32::from(row.quants[i / 32][i % 32]);
            assert!((value - back).abs() <= row.scales[i / 32] * 0.5001);
        }
        assert_eq!(row.quants[0][0], -127);
        assert_eq!(row.quants[1][31], 127);
    }

    #[test]
    fn a_value_that_is_not_finite_shows() {
        let mut x = [1.0; 64];
        x[40] = f32::INFINITY;
        let activations = Activations::round(&x, 64);
        assert!(activations.row(0).scales[0].is_finite());
        assert!(activations.row(0).scales[1].is_nan());
        assert!(activations.row(0).sums[1].is_nan());
    }
}
