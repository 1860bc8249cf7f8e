//! Squares of the output by products of tiles, as Intel's "Advanced Matrix Extensions" have them (Software Developer's
//! Manual, volume 1, chapter 18). The compiler has no stable names for these instructions yet.

use core::arch::asm;
use core::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::sync::LazyLock;

use super::super::product::Mode;
use super::tile::{Factors, LINES, Tile};

/// Whether the processor has tiles of bf16 and the system lets this process use them.
pub(super) fn permitted() -> bool {
    static PERMITTED: LazyLock<bool> = LazyLock::new(|| there() && asked());
    *PERMITTED
}

fn there() -> bool {
    if !is_x86_feature_detected!("xsave") || __cpuid(0).eax < 7 {
        return false;
    }
    // EDX of leaf 7: bit 22 is AMX-BF16, bit 24 AMX-TILE. Bits 17 and 18 of XCR0: the system saves tiles.
    let features = __cpuid_count(7, 0).edx;
    // SAFETY: the processor has XSAVE, and a system that runs AVX-512 has enabled it.
    let saved = is_x86_feature_detected!("avx512f") && unsafe { xcr0() } & (0b11 << 17) == 0b11 << 17;
    features & (1 << 22) != 0 && features & (1 << 24) != 0 && saved
}

#[target_feature(enable = "xsave")]
unsafe fn xcr0() -> u64 {
    // SAFETY: register 0 is there wherever XSAVE is enabled.
    unsafe { _xgetbv(0) }
}

/// Linux gives a process tiles when it asks (`arch_prctl`, ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA).
#[cfg(target_os = "linux")]
fn asked() -> bool {
    let status: i64;
    // SAFETY: the call has no effect on memory; the kernel writes over `rcx` and `r11` alone.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") 158_i64 => status,
            in("rdi") 0x1023_i64,
            in("rsi") 18_i64,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    status == 0
}

/// Others have other ways, on which this was never run.
#[cfg(not(target_os = "linux"))]
fn asked() -> bool {
    false
}

/// The shapes of all tiles, as LDTILECFG reads them.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    first_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static SHAPES: Shapes = {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    let mut tile = 0;
    while tile < 8 {
        row_bytes[tile] = 64;
        rows[tile] = 16;
        tile += 1;
    }
    Shapes {
        palette: 1,
        first_row: 0,
        reserved: [0; 14],
        row_bytes,
        rows,
    }
};

/// This thread's tiles while it multiplies.
#[derive(Debug)]
pub(super) struct Tiles(());

impl Tiles {
    /// # Safety
    ///
    /// [`permitted`] has said so.
    pub(super) unsafe fn configure() -> Self {
        // SAFETY: the shapes are those that palette 1 has.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const SHAPES, options(nostack, readonly, preserves_flags)) };
        Self(())
    }

    /// Writes or adds a square of 32 rows, each `stride` after the one before, and 32 columns.
    ///
    /// # Safety
    ///
    /// `out` points to such a square, and `factors` are of one length above zero.
    pub(super) unsafe fn square(&self, out: *mut f32, stride: usize, mode: Mode, factors: Factors<'_>) {
        let outs = [0, LINES, LINES * stride, LINES * stride + LINES].map(|at| out.wrapping_add(at));
        let [left, left_next] = factors.left.map(<[Tile]>::as_ptr);
        let [right, right_next] = factors.right.map(<[Tile]>::as_ptr);
        // SAFETY: tiles 0 to 3 are the square's quarters and 4 to 7 a step's factors, all of 16 rows of 64 bytes, read and
        // written within what the caller vouches for.
        unsafe {
            match mode {
                Mode::Write => asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    options(nostack, preserves_flags),
                ),
                Mode::Add => asm!(
                    "tileloadd tmm0, [{0} + {stride}]",
                    "tileloadd tmm1, [{1} + {stride}]",
                    "tileloadd tmm2, [{2} + {stride}]",
                    "tileloadd tmm3, [{3} + {stride}]",
                    in(reg) outs[0],
                    in(reg) outs[1],
                    in(reg) outs[2],
                    in(reg) outs[3],
                    stride = in(reg) stride * 4,
                    options(nostack, preserves_flags, readonly),
                ),
            }
            asm!(
                "2:",
                "tileloadd tmm4, [{left} + {row}]",
                "tileloadd tmm6, [{right} + {row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{right_next} + {row}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{left_next} + {row}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {left}, 1024",
                "add {left_next}, 1024",
                "add {right}, 1024",
                "add {right_next}, 1024",
                "dec {steps}",
                "jnz 2b",
                left = inout(reg) left => _,
                left_next = inout(reg) left_next => _,
                right = inout(reg) right => _,
                right_next = inout(reg) right_next => _,
                steps = inout(reg) factors.left[0].len() => _,
                row = in(reg) 64_usize,
                options(nostack, readonly),
            );
            asm!(
                "tilestored [{0} + {stride}], tmm0",
                "tilestored [{1} + {stride}], tmm1",
                "tilestored [{2} + {stride}], tmm2",
                "tilestored [{3} + {stride}], tmm3",
                in(reg) outs[0],
                in(reg) outs[1],
                in(reg) outs[2],
                in(reg) outs[3],
                stride = in(reg) stride * 4,
                options(nostack, preserves_flags),
            );
        }
    }
}

impl Drop for Tiles {
    /// Lets the system forget the tiles, which it would otherwise save whenever the thread is interrupted.
    fn drop(&mut self) {
        // SAFETY: nothing is left in them.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}
