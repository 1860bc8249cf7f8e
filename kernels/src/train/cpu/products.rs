//! What multiplies activations with weights: f32, or bf16 where the run asks for it and the processor has it.

use polder_protocol::run::Precision;

#[cfg(target_arch = "x86_64")]
use super::bf16::{self, Instructions};
use super::product::{self, Mode, Threads, View, ViewMut};

/// The products of linear layers and of the head. All else, the products of attention included, is f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Products {
    F32,
    /// Elements are rounded to bf16, and sums are f32.
    #[cfg(target_arch = "x86_64")]
    Bf16(Instructions),
}

impl Products {
    /// As asked, as far as this machine can.
    pub(super) fn of(precision: Precision) -> Self {
        #[cfg(target_arch = "x86_64")]
        if precision == Precision::Bf16
            && let Some(instructions) = Instructions::detect()
        {
            return Self::Bf16(instructions);
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = precision;
        Self::F32
    }

    /// What people call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            #[cfg(target_arch = "x86_64")]
            Self::Bf16(Instructions::Amx) => "bf16 (AMX)",
            #[cfg(target_arch = "x86_64")]
            Self::Bf16(Instructions::Avx512) => "bf16 (AVX-512)",
        }
    }

    /// `out = a · b`, or `out += a · b`, by all threads.
    pub(super) fn product(self, out: ViewMut<'_>, mode: Mode, a: View<'_>, b: View<'_>) {
        match self {
            Self::F32 => product::product(out, mode, a, b, Threads::All),
            #[cfg(target_arch = "x86_64")]
            Self::Bf16(instructions) => bf16::product(instructions, out, mode, a, b),
        }
    }
}
