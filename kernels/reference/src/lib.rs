//! Every operation as a plain `f32` loop: the definition of right.
//!
//! Nothing here is fast and nothing is clever. Sums run left to right. The fast versions are tested against these
//! loops, and the simulator learns with them. Shapes that do not fit are the caller's mistake: an assertion stops it.

mod attention;
mod llama;
mod loss;
mod operations;
mod optimiser;
mod rope;

pub use attention::attention;
pub use llama::{Llama, Trace};
pub use loss::{cross_entropy, log_softmax};
pub use operations::{matmul, rms_norm, swiglu};
pub use optimiser::{AdamW, adamw};
pub use rope::{Frequencies, Rope, frequencies, rotate};
