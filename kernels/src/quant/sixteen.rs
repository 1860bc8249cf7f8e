//! Sixteen bytes in a register that every processor of its architecture has: SSE2 or NEON.
//!
//! Each `by_turns` takes lanes of two registers by turns, first one of the first: the lower lanes' result, then the upper's.

pub(super) use registers::{Sixteen, by_turns_16, by_turns_32, by_turns_64, load, store, turned};

#[cfg(target_arch = "x86_64")]
mod registers {
    use std::arch::x86_64::*;

    pub(in super::super) type Sixteen = __m128i;

    #[inline(always)]
    pub(in super::super) fn load(bytes: &[u8; 16]) -> Sixteen {
        // SAFETY: so many bytes are there, and they may lie anywhere; SSE2 is part of x86-64.
        unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
    }

    #[inline(always)]
    pub(in super::super) fn store(value: Sixteen, bytes: &mut [u8; 16]) {
        // SAFETY: as above.
        unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), value) }
    }

    /// The bits that are set in `bits` turned in every byte.
    #[inline(always)]
    pub(in super::super) fn turned(value: Sixteen, bits: u8) -> Sixteen {
        // SAFETY: SSE2 is part of x86-64.
        unsafe { _mm_xor_si128(value, _mm_set1_epi8(bits as i8)) }
    }

    #[inline(always)]
    pub(in super::super) fn by_turns_16(a: Sixteen, b: Sixteen) -> [Sixteen; 2] {
        // SAFETY: as above.
        unsafe { [_mm_unpacklo_epi16(a, b), _mm_unpackhi_epi16(a, b)] }
    }

    #[inline(always)]
    pub(in super::super) fn by_turns_32(a: Sixteen, b: Sixteen) -> [Sixteen; 2] {
        // SAFETY: as above.
        unsafe { [_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b)] }
    }

    #[inline(always)]
    pub(in super::super) fn by_turns_64(a: Sixteen, b: Sixteen) -> [Sixteen; 2] {
        // SAFETY: as above.
        unsafe { [_mm_unpacklo_epi64(a, b), _mm_unpackhi_epi64(a, b)] }
    }
}

#[cfg(target_arch = "aarch64")]
mod registers {
    use std::arch::aarch64::*;

    pub(in super::super) type Sixteen = uint8x16_t;

    #[inline(always)]
    pub(in super::super) fn load(bytes: &[u8; 16]) -> Sixteen {
        // SAFETY: so many bytes are there, and they may lie anywhere; NEON is part of 64-bit ARM.
        unsafe { vld1q_u8(bytes.as_ptr()) }
    }

    #[inline(always)]
    pub(in super::super) fn store(value: Sixteen, bytes: &mut [u8; 16]) {
        // SAFETY: as above.
        unsafe { vst1q_u8(bytes.as_mut_ptr(), value) }
    }

    /// The bits that are set in `bits` turned in every byte.
    #[inline(always)]
    pub(in super::super) fn turned(value: Sixteen, bits: u8) -> Sixteen {
        // SAFETY: NEON is part of 64-bit ARM.
        unsafe { veorq_u8(value, vdupq_n_u8(bits)) }
    }

    #[inline(always)]
    pub(in super::super) fn by_turns_16(a: Sixteen, b: Sixteen) -> [Sixteen; 2] {
        // SAFETY: as above.
        unsafe {
            let (a, b) = (vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b));
            [vzip1q_u16(a, b), vzip2q_u16(a, b)].map(|lanes| vreinterpretq_u8_u16(lanes))
        }
    }

    #[inline(always)]
    pub(in super::super) fn by_turns_32(a: Sixteen, b: Sixteen) -> [Sixteen; 2] {
        // SAFETY: as above.
        unsafe {
            let (a, b) = (vreinterpretq_u32_u8(a), vreinterpretq_u32_u8(b));
            [vzip1q_u32(a, b), vzip2q_u32(a, b)].map(|lanes| vreinterpretq_u8_u32(lanes))
        }
    }

    #[inline(always)]
    pub(in super::super) fn by_turns_64(a: Sixteen, b: Sixteen) -> [Sixteen; 2] {
        // SAFETY: as above.
        unsafe {
            let (a, b) = (vreinterpretq_u64_u8(a), vreinterpretq_u64_u8(b));
            [vzip1q_u64(a, b), vzip2q_u64(a, b)].map(|lanes| vreinterpretq_u8_u64(lanes))
        }
    }
}
