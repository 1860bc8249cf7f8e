//! Seeded randomness. A stored seed must mean the same numbers for ever, so the generator is named: ChaCha8.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// A stream of numbers that follows from its seed alone.
#[derive(Debug, Clone)]
pub struct Random(ChaCha8Rng);

impl Random {
    /// The stream of `seed`.
    pub fn from_seed(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// The stream that belongs to `labels` in order: for example run seed, round, replica, step.
    pub fn from_labels(labels: &[u64]) -> Self {
        let mut hasher = blake3::Hasher::new();
        for label in labels {
            hasher.update(&label.to_le_bytes());
        }
        Self(ChaCha8Rng::from_seed(*hasher.finalize().as_bytes()))
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// A number below `bound`, every one equally likely to within 2⁻⁶⁴ × `bound`. Zero when `bound` is zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        let product = u128::from(self.next_u64()) * u128::from(bound);
        u64::try_from(product >> 64).unwrap_or(0)
    }

    /// True `per_million` times in a million.
    pub fn chance(&mut self, per_million: u64) -> bool {
        self.below(1_000_000) < per_million
    }

    /// A number in [0, 1) with 24 random bits.
    pub fn unit_f32(&mut self) -> f32 {
        // 24 bits fit an f32 exactly.
        (self.next_u64() >> 40) as f32 / 16_777_216.0
    }
}
