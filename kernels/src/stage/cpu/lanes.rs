//! Sixteen numbers at a time, with the same bits on every machine.
//!
//! A sum of products keeps 16 running sums with fused multiply-add, lane `l` taking elements `l`, `l + 16`, …, and folds
//! them in halves at the end. AVX-512, AVX2 and the portable path do exactly that, so they agree in every bit.

/// A vector of 16 `f32`.
///
/// # Safety
///
/// Every function may be called only where [`Level`] says that the processor has the instructions, and inside a
/// function that enables them. Pointers must be valid for as many elements as the function reads or writes.
pub(super) trait Lanes {
    /// The vector.
    type Vector: Copy;
    /// Rows of a tile of dot products; more would not fit the registers.
    const TILE: usize;
    /// All lanes `value`.
    unsafe fn splat(value: f32) -> Self::Vector;
    /// Sixteen elements.
    unsafe fn load(from: *const f32) -> Self::Vector;
    /// `count` elements below 16, then zeros.
    unsafe fn load_some(from: *const f32, count: usize) -> Self::Vector {
        let mut values = [0.0f32; 16];
        // SAFETY: the caller vouches for `count` elements, and `count` is at most 16.
        unsafe {
            core::ptr::copy_nonoverlapping(from, values.as_mut_ptr(), count.min(16));
            Self::load(values.as_ptr())
        }
    }
    /// Writes sixteen elements.
    unsafe fn store(to: *mut f32, vector: Self::Vector);
    /// `a · b + c`, rounded once.
    unsafe fn multiply_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// The sum of all lanes, in halves.
    unsafe fn sum(vector: Self::Vector) -> f32 {
        let mut values = [0.0f32; 16];
        // SAFETY: sixteen elements are there.
        unsafe { Self::store(values.as_mut_ptr(), vector) };
        fold(values)
    }
}

#[inline(always)]
fn fold(v: [f32; 16]) -> f32 {
    let mut eight = [0.0; 8];
    for i in 0..8 {
        eight[i] = v[i] + v[i + 8];
    }
    let mut four = [0.0; 4];
    for i in 0..4 {
        four[i] = eight[i] + eight[i + 4];
    }
    (four[0] + four[2]) + (four[1] + four[3])
}

/// The path that every processor has.
pub(super) struct Portable;

impl Lanes for Portable {
    type Vector = [f32; 16];
    const TILE: usize = 2;

    #[inline(always)]
    unsafe fn splat(value: f32) -> [f32; 16] {
        [value; 16]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; 16] {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe { from.cast::<[f32; 16]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, vector: [f32; 16]) {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe { to.cast::<[f32; 16]>().write_unaligned(vector) }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        core::array::from_fn(|lane| a[lane].mul_add(b[lane], c[lane]))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use core::arch::x86_64::*;

    use super::Lanes;

    /// AVX-512.
    pub(in super::super) struct Wide;

    #[expect(
        clippy::undocumented_unsafe_blocks,
        reason = "the trait says who vouches for instructions and pointers"
    )]
    impl Lanes for Wide {
        type Vector = __m512;
        const TILE: usize = 4;

        #[inline(always)]
        unsafe fn splat(value: f32) -> __m512 {
            unsafe { _mm512_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m512 {
            unsafe { _mm512_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn store(to: *mut f32, vector: __m512) {
            unsafe { _mm512_storeu_ps(to, vector) }
        }

        #[inline(always)]
        unsafe fn multiply_add(a: __m512, b: __m512, c: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        unsafe fn sum(vector: __m512) -> f32 {
            unsafe {
                let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(vector)));
                sum_of_eight(_mm256_add_ps(_mm512_castps512_ps256(vector), high))
            }
        }
    }

    /// AVX2 with fused multiply-add.
    pub(in super::super) struct Narrow;

    #[expect(
        clippy::undocumented_unsafe_blocks,
        reason = "the trait says who vouches for instructions and pointers"
    )]
    impl Lanes for Narrow {
        type Vector = [__m256; 2];
        const TILE: usize = 2;

        #[inline(always)]
        unsafe fn splat(value: f32) -> [__m256; 2] {
            unsafe { [_mm256_set1_ps(value); 2] }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> [__m256; 2] {
            unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
        }

        #[inline(always)]
        unsafe fn store(to: *mut f32, vector: [__m256; 2]) {
            unsafe {
                _mm256_storeu_ps(to, vector[0]);
                _mm256_storeu_ps(to.add(8), vector[1]);
            }
        }

        #[inline(always)]
        unsafe fn multiply_add(a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
            unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
        }

        #[inline(always)]
        unsafe fn sum(vector: [__m256; 2]) -> f32 {
            unsafe { sum_of_eight(_mm256_add_ps(vector[0], vector[1])) }
        }
    }

    #[inline(always)]
    #[expect(clippy::undocumented_unsafe_blocks, reason = "called by the two paths above alone")]
    unsafe fn sum_of_eight(eight: __m256) -> f32 {
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
}
#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Narrow, Wide};

/// Which instructions this processor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    /// AVX-512.
    #[cfg(target_arch = "x86_64")]
    Wide,
    /// AVX2 with fused multiply-add.
    #[cfg(target_arch = "x86_64")]
    Narrow,
    /// None of these.
    Portable,
}

impl Level {
    /// The best one here.
    #[inline]
    pub(super) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
            {
                return Self::Wide;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Self::Narrow;
            }
        }
        Self::Portable
    }

    /// All that can run here.
    #[cfg(test)]
    pub(super) fn all() -> Vec<Self> {
        let mut levels = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        match Self::best() {
            Self::Wide => levels.extend([Self::Narrow, Self::Wide]),
            Self::Narrow => levels.push(Self::Narrow),
            Self::Portable => {}
        }
        levels
    }
}

/// Compiles `$body`, generic over [`Lanes`], for each level, as `fn $name(level, arguments)`.
macro_rules! on_every_level {
    ($(#[$doc:meta])* unsafe fn $name:ident($($argument:ident: $type:ty),* $(,)?) = $body:ident) => {
        $(#[$doc])*
        pub(super) unsafe fn $name(level: $crate::stage::cpu::lanes::Level, $($argument: $type),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx2,fma")]
            unsafe fn wide($($argument: $type),*) {
                // SAFETY: the caller of the outer function vouches for the arguments.
                unsafe { $body::<$crate::stage::cpu::lanes::Wide>($($argument),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            unsafe fn narrow($($argument: $type),*) {
                // SAFETY: as above.
                unsafe { $body::<$crate::stage::cpu::lanes::Narrow>($($argument),*) }
            }
            // SAFETY: a level is only made where the processor has its instructions; the rest is the caller's.
            unsafe {
                match level {
                    #[cfg(target_arch = "x86_64")]
                    $crate::stage::cpu::lanes::Level::Wide => wide($($argument),*),
                    #[cfg(target_arch = "x86_64")]
                    $crate::stage::cpu::lanes::Level::Narrow => narrow($($argument),*),
                    $crate::stage::cpu::lanes::Level::Portable => {
                        $body::<$crate::stage::cpu::lanes::Portable>($($argument),*)
                    }
                }
            }
        }
    };
}
pub(super) use on_every_level;
