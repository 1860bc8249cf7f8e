//! Training on the CPU without a graph: forward and backward of dense models, written out over slices.
//!
//! Gradients are added where they are summed, parameters are read where they lie, and nothing is kept that is cheap to
//! make again. Every sum has a fixed order, whatever the number of threads.

mod activation;
mod attention;
#[cfg(target_arch = "x86_64")]
mod bf16;
mod block;
mod engine;
mod head;
mod linear;
mod norm;
mod pool;
pub(super) mod product;
mod products;
mod rotation;
mod slots;
mod softmax;

pub(super) use engine::{Engine, Kept, covers, kept_elements};
