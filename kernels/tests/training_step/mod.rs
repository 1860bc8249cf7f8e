//! What tests of training share: a step over two sequences of 16 tokens, and the loss that comes of it.

use polder_kernels::train::{TrainInput, TrainOutput};

/// Two sequences of 16 tokens, with activations for a stage without the embedding.
pub(crate) fn batch<'a>(tokens: &'a [u32], hidden: &'a [f32]) -> TrainInput<'a> {
    TrainInput {
        tokens,
        hidden,
        batch: 2,
        seq: 16,
    }
}

/// The loss and the gradient of the input, of a stage with the head.
pub(crate) fn loss(output: TrainOutput) -> (f32, Vec<f32>) {
    match output {
        TrainOutput::Loss { loss, input_gradient } => (loss, input_gradient),
        TrainOutput::Hidden(_) => panic!("no head"),
    }
}
