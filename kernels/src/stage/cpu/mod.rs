//! A stage on the CPU: plain loops over slices, made for one answer at a time.

mod attention;
mod elementwise;
mod engine;
mod lanes;
mod matrix;
mod product;

pub(super) use engine::{Engine, Sequence};
pub(super) use matrix::Matrix;
