//! Our own kernels for devices behind a graphics driver: one source in CubeCL, made at run time for Vulkan, Metal or DX12.
//!
//! - [`Cubes`]: the device's queue, and memory on it.
//! - Kernels for serving: [`Cubes::add_and_normalise`], [`Cubes::rotate`], [`Cubes::activate`], [`Cubes::append`],
//!   [`Cubes::attend`] and [`Cubes::score_positions`], [`Cubes::multiply`] and [`Cubes::multiply_heads`], [`Cubes::gather`] and
//!   [`Cubes::add_to_rows`].
//! - For training and its exchange: [`Cubes::attend_sequences`] and [`Cubes::attend_sequences_backward`], [`SquareSums`],
//!   [`Cubes::adamw`], [`Cubes::encode_sparsely`]; of activations: [`Cubes::quantise`] and [`Cubes::dequantise`].
//! - [`Cost`]: the bytes and operations of each, counted, to say how far one is from what a device can.
//!
//! Shapes are checked before anything is launched: a kernel that reads beyond its memory gives zeros or the end of the
//! device, not an error.

mod activation;
mod adamw;
mod attention;
mod choose;
mod copy;
mod cost;
mod heads;
mod int8;
mod memory;
mod normalise;
mod places;
mod product;
mod rotate;
mod rows;
#[allow(
    clippy::too_many_arguments,
    reason = "a kernel's arguments are plain numbers and pointers"
)]
mod sequences;
mod sparse;
mod square_sums;
mod tensors;

pub use adamw::AdamWStep;
pub use attention::{AttentionShape, HEAD_DIM_MAX};
pub use choose::{ChosenPositions, ScoredHeads};
pub use cost::Cost;
pub use heads::Columns;
pub use int8::Int8OnDevice;
pub use memory::{CubeError, Cubes, Elements, Floats, Words};
pub use normalise::NormOnDevice;
pub use places::{PagedRows, Places};
pub use product::WeightOnDevice;
pub use rotate::{Rotated, Turns};
pub use rows::PickedRows;
pub use sequences::{Attended, SequenceAttention};
pub use square_sums::SquareSums;
pub(crate) use tensors::Primitive;

/// Units of a cube that share a row: a multiple of every device's plane (at most 64).
const UNITS: u32 = 64;
