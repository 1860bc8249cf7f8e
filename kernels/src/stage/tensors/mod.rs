//! A stage in tensors, on any device that burn drives: where weights are of a type that our own kernels do not multiply.
//!
//! Weights stay on the device, widened to f32, as do keys and values; activations come and go. Sums are made in the order
//! that the device's kernels choose, so results are near the CPU's and not the same bits.

mod attention;
mod engine;
mod weight;

pub(super) use engine::{Engine, Sequence};
