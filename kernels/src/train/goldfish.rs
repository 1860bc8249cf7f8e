//! Goldfish loss: some labels are left out of the loss, always the same after the same words, so that no text can be
//! learnt by heart (arXiv 2406.10209).

use polder_protocol::rng::Random;
use polder_protocol::run;

/// As many entries as the published table has; a prime.
const TABLE_ENTRIES: u64 = 1_000_003;

/// A target that is left out of the loss. No vocabulary is so large.
pub(super) const LEFT_OUT: u32 = u32::MAX;

/// Which labels are left out.
#[derive(Debug, Clone)]
pub(super) struct Goldfish {
    /// Labels that decide, the one in question included.
    window: usize,
    dropped: Vec<bool>,
}

impl Goldfish {
    /// The table follows from the seed.
    pub(super) fn new(set: run::Goldfish) -> Self {
        let run::Goldfish { every, window, seed } = set;
        let mut random = Random::from_labels(&[seed, TABLE_ENTRIES]);
        let below = 1.0 / every.max(1) as f32;
        let dropped = (0..TABLE_ENTRIES).map(|_| random.unit_f32() < below).collect();
        Self {
            window: window.max(1) as usize,
            dropped,
        }
    }

    /// Marks the labels of each sequence that are left out with [`LEFT_OUT`]: `[batch, seq]`.
    pub(super) fn leave_out(&self, labels: &mut [u32], seq: usize) {
        for row in labels.chunks_mut(seq.max(1)) {
            let counts = self.counts(row);
            for (label, counts) in row.iter_mut().zip(counts) {
                if !counts {
                    *label = LEFT_OUT;
                }
            }
        }
    }

    /// Whether each label of a text counts. Labels before the first whole window do.
    fn counts(&self, labels: &[u32]) -> Vec<bool> {
        let before = (self.window - 1).min(labels.len());
        let rest = labels.windows(self.window).map(|window| {
            let dropped = self.dropped.get(index(window)).copied().unwrap_or(false);
            !dropped
        });
        std::iter::repeat_n(true, before).chain(rest).collect()
    }
}

/// The place in the table: the wrapping product of the labels as i64, and its non-negative remainder.
fn index(window: &[u32]) -> usize {
    let product = window
        .iter()
        .fold(1i64, |product, label| product.wrapping_mul(i64::from(*label)));
    // Below 2²⁰.
    product.rem_euclid(TABLE_ENTRIES as i64) as usize
}

#[cfg(test)]
mod tests {
    use super::super::rules::rule;
    use super::*;

    #[test]
    fn places_in_the_table_are_those_of_the_recipe() {
        let rule = rule("goldfish");
        let whole = |key: &str| -> Vec<u64> {
            let list = rule[key].as_array().unwrap();
            list.iter().map(|value| value.as_u64().unwrap()).collect()
        };
        let labels: Vec<u32> = whole("labels").iter().map(|label| *label as u32).collect();
        assert_eq!(rule["modulus"].as_u64(), Some(TABLE_ENTRIES));
        for window in [3, 13, 50] {
            let own: Vec<u64> = labels.windows(window).map(|window| index(window) as u64).collect();
            assert_eq!(own, whole(&format!("index_h{window}")));
        }
    }

    #[test]
    fn about_one_label_in_many_is_left_out_and_always_the_same() {
        let goldfish = Goldfish::new(run::Goldfish {
            every: 50,
            window: 13,
            seed: 7,
        });
        let labels: Vec<u32> = (0..20_000u32)
            .map(|i| i.wrapping_mul(2_654_435_761) % 50_000 + 1)
            .collect();
        let counts = goldfish.counts(&labels);
        let left_out = counts.iter().filter(|counts| !**counts).count();
        assert!((300..500).contains(&left_out), "{left_out}");
        assert!(counts[..12].iter().all(|counts| *counts));
        // The same words elsewhere decide alike.
        assert_eq!(goldfish.counts(&labels[100..])[12..], counts[112..]);
        let mut rows = [&labels[..100], &labels[50..150]].concat();
        goldfish.leave_out(&mut rows, 100);
        for (row, label) in rows.iter().enumerate() {
            let (start, at) = (row / 100 * 50, row % 100);
            let left_out = at >= 12 && !counts[start + at];
            assert_eq!(*label == LEFT_OUT, left_out, "{row}");
        }
    }
}
