//! A stage on a graphics device with our own kernels: weights stay packed, keys and values lie in pages, and the rows of
//! several sessions are one batch.
//!
//! Sums are made in the order that the device's kernels choose, so results are near the CPU's and not the same bits.

mod engine;
mod pages;

pub(super) use engine::{Engine, Sequence};
