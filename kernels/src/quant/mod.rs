//! Weights in GGUF's block formats: what they mean, and products with them as they are.
//!
//! A packed row is a sequence of blocks of 32 or 256 elements. [`widen()`] gives the exact f32 values, [`narrow()`] packs
//! f32 values, and [`PackedMatrix`] multiplies without widening: activations become blocks of 32 int8 values and one
//! scale, integer products are exact, and their sums are added in one fixed order, so that every machine and every
//! code path (scalar, AVX2, AVX-512 VNNI, NEON with and without dot products) gives the same bits. Q4_0, Q4_1, Q8_0, F16 and BF16 are multiplied with their
//! rows side by side (`interleaved`), the other types row by row (`dot`).

mod activations;
mod blocks;
#[cfg(feature = "gpu")]
mod device_blocks;
mod dot;
mod interleaved;
#[cfg(target_arch = "aarch64")]
mod interleaved_neon;
#[cfg(target_arch = "x86_64")]
mod interleaved_simd;
mod lay;
mod matrix;
mod narrow;
mod narrow_k;
mod narrow_table;
#[cfg(target_arch = "aarch64")]
mod neon;
mod packed_type;
#[cfg(target_arch = "x86_64")]
mod simd;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod sixteen;
mod widen;

#[cfg(feature = "gpu")]
pub use device_blocks::DeviceBlocks;
pub use matrix::{PackedBytes, PackedMatrix, Product};
pub use narrow::narrow;
pub use packed_type::PackedType;
pub use widen::widen;

use thiserror::Error;

/// Why bytes are not the packed values that they are said to be.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum QuantError {
    #[error("a row of {elements} elements is not a whole number of {ty} blocks of {block}")]
    PartialBlock {
        ty: PackedType,
        elements: usize,
        block: usize,
    },
    #[error("{rows} rows of {cols} elements in {ty} do not fit in memory")]
    TooLarge { ty: PackedType, rows: usize, cols: usize },
    #[error("{rows} rows of {cols} elements in {ty} take {expected} bytes, not {found}")]
    Length {
        ty: PackedType,
        rows: usize,
        cols: usize,
        expected: usize,
        found: usize,
    },
    #[error("`{text}` is not a packed type; known are {}", PackedType::ALL.map(PackedType::name).join(", "))]
    UnknownType { text: String },
}
