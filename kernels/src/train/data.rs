//! Tokenised local texts, and the random windows that micro-batches are made of.

use polder_protocol::rng::Random;

/// Tokens of local texts, end to end.
#[derive(Debug, Clone, Default)]
pub struct TrainData {
    tokens: Vec<u32>,
}

impl TrainData {
    /// No tokens.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a text's tokens; begin and end tokens are the caller's to add.
    pub fn add(&mut self, tokens: &[u32]) {
        self.tokens.extend_from_slice(tokens);
    }

    /// Tokens in all.
    pub fn tokens(&self) -> u64 {
        self.tokens.len() as u64
    }

    /// A micro-batch: `[batch, seq + 1]` token ids, row-major, each row a window at a random place that follows from
    /// `labels`. `None` where the texts are shorter than one window, or the sizes overflow.
    pub fn batch(&self, labels: &[u64], batch: u32, seq: u32) -> Option<Vec<u32>> {
        let window = usize::try_from(seq).ok()?.checked_add(1)?;
        let places = self.tokens.len().checked_sub(window)?.checked_add(1)?;
        let mut random = Random::from_labels(labels);
        let mut ids = Vec::new();
        ids.try_reserve_exact(window.checked_mul(batch as usize)?).ok()?;
        for _ in 0..batch {
            let start = usize::try_from(random.below(places as u64)).ok()?;
            ids.extend_from_slice(self.tokens.get(start..start + window)?);
        }
        Some(ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_labels_pick_equal_windows_of_the_text() {
        let mut data = TrainData::new();
        data.add(&(0..100).collect::<Vec<u32>>());
        let batch = data.batch(&[1, 2, 3], 4, 9).unwrap();
        assert_eq!(batch.len(), 40);
        assert!(
            batch
                .chunks(10)
                .all(|row| row.windows(2).all(|pair| pair[1] == pair[0] + 1))
        );
        assert_eq!(data.batch(&[1, 2, 3], 4, 9).unwrap(), batch);
        assert_ne!(data.batch(&[1, 2, 4], 4, 9).unwrap(), batch);
    }

    #[test]
    fn a_text_shorter_than_a_window_gives_none() {
        let mut data = TrainData::new();
        data.add(&[1; 9]);
        assert_eq!(data.batch(&[1], 1, 9), None);
        assert_eq!(data.batch(&[1], 1, 8), Some(vec![1; 9]));
    }
}
