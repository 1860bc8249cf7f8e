//! What Polder computes: models, weights, stages, training. On burn where there is a device to choose or a gradient to
//! take, as plain loops over slices where one CPU answers one person.
//!
//! See docs/src/architecture.md for the place of this package.

pub mod device;
pub mod model;
pub mod quant;
pub mod sample;
pub mod stage;
mod team;
pub mod text;
pub mod train;
pub mod verify;
pub mod weights;
