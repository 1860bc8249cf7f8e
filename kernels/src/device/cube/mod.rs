//! Our own kernels for devices behind a graphics driver: one source in CubeCL, made at run time for Vulkan, Metal or DX12.
//!
//! - [`Cubes`]: the device's queue, and memory on it.
//! - Kernels: [`Cubes::add_and_normalise`], [`Cubes::rotate`], [`Cubes::gate`], [`Cubes::append`], [`Cubes::attend`],
//!   [`Cubes::multiply`], [`Cubes::quantise`] and [`Cubes::dequantise`], [`Cubes::encode_sparsely`], [`Cubes::adamw`],
//!   [`SquareSums`], [`Cubes::attend_sequences`] and [`Cubes::attend_sequences_backward`].
//! - [`Cost`]: the bytes and operations of each, counted, to say how far one is from what a device can.
//!
//! Shapes are checked before anything is launched: a kernel that reads beyond its memory gives zeros or the end of the
//! device, not an error.

mod adamw;
mod attention;
mod attention_training;
mod copy;
mod cost;
mod gate;
mod int8;
mod memory;
mod normalise;
mod packed;
mod places;
mod rotate;
mod sparse;
mod square_sums;
mod tensors;
#[allow(
    clippy::too_many_arguments,
    reason = "a kernel's arguments are plain numbers and pointers"
)]
mod tiles;

pub use adamw::AdamWStep;
pub use attention::AttentionShape;
pub use attention_training::{Attended, SequenceAttention};
pub use cost::Cost;
pub use int8::Int8OnDevice;
pub use memory::{CubeError, Cubes, Elements, Floats, Words};
pub use packed::PackedOnDevice;
pub use places::{PagedRows, Places};
pub use square_sums::SquareSums;
pub(crate) use tensors::Primitive;

/// Units of a cube that share a row: a multiple of every device's plane (at most 64).
const UNITS: u32 = 64;
