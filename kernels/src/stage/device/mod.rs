//! A stage on a graphics device with our own kernels: weights stay as they are in their file, keys and values lie in pages, and
//! the rows of several sessions are one batch. Choices (of experts, of positions) and Mamba's recurrence are the host's.
//!
//! Sums are made in the order that the device's kernels choose, so results are near the CPU's and not the same bits. What a
//! device cannot hold or our kernels do not reach, a [`Refusal`] names.

mod block;
mod engine;
mod experts;
mod grouped;
mod index;
mod latent;
mod mamba;
mod pages;
mod perceptron;
mod upload;

pub(super) use engine::{Engine, Sequence};
pub(super) use upload::Refusal;
