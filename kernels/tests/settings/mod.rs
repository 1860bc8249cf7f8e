//! Settings for training a tiny model in a test.

use polder_protocol::run::{Inner, Optimiser, Precision, Schedule};

/// Ten steps of two short sequences.
pub(crate) fn inner() -> Inner {
    Inner {
        steps: 10,
        batch: 2,
        micro_batches: 1,
        seq: 16,
        learning_rate: 0.01,
        warmup_steps: 4,
        beta_1: 0.9,
        beta_2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        clip_norm: 1.0,
        decay_ppm: 200_000,
        final_ppm: 0,
        schedule: Schedule::WarmupStableDecay,
        optimiser: Optimiser::AdamW,
        goldfish: None,
        precision: Precision::F32,
    }
}
