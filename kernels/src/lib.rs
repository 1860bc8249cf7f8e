//! What Polder computes: models, weights, stages, training, on burn.

pub mod device;
pub mod model;
pub mod quant;
pub mod sample;
pub mod stage;
pub mod text;
pub mod train;
pub mod weights;
