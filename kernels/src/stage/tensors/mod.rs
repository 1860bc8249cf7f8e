//! A stage in tensors, on any device that burn drives: made for GPUs.
//!
//! Weights stay on the device, as do keys and values; activations come and go. On a graphics device packed weights stay
//! packed, and our own kernels compute (`packed`); otherwise they are widened to f32 and burn does. Sums are made in the
//! order that the device's kernels choose, so results are near the CPU's and not the same bits.

mod attention;
mod engine;
#[cfg(feature = "gpu")]
mod packed;
mod shape;
mod weight;

pub(super) use engine::{Engine, Sequence};
pub(super) use shape::Shape;
