//! Consecutive blocks of a model, loaded for training: forward, backward, inner optimiser, held-out scores.

mod adamw;
mod adapted;
mod ademamix;
mod balance;
mod checks;
mod cpu;
mod data;
mod engine;
mod error;
mod files;
mod goldfish;
mod graph;
mod initial;
mod limits;
mod muon;
mod optimiser;
#[cfg(test)]
mod rules;
mod schedule;
mod stage;
mod vectorised;

pub use adapted::initial_adapters;
pub use balance::{BALANCE_RATE, balance};
pub use data::TrainData;
pub use error::TrainError;
pub use initial::initial_parameters;
pub use schedule::learning_rate;
pub use stage::{MICRO_BATCHES_KEPT_MAX, Stepped, TrainInput, TrainOutput, TrainStage};

#[cfg(test)]
mod tests {
    use polder_protocol::run::{Inner, Optimiser, Precision, Schedule};

    /// An inner optimiser for tests.
    pub(super) fn inner(learning_rate: f32, warmup_steps: u32, decay_ppm: u32) -> Inner {
        Inner {
            steps: 10,
            batch: 2,
            micro_batches: 1,
            seq: 16,
            learning_rate,
            warmup_steps,
            beta_1: 0.9,
            beta_2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            clip_norm: 1.0,
            decay_ppm,
            final_ppm: 0,
            schedule: Schedule::WarmupStableDecay,
            optimiser: Optimiser::AdamW,
            goldfish: None,
            precision: Precision::F32,
        }
    }
}
