//! Goldfish loss: some labels are left out of the loss, always the same after the same words, so that no text can be
//! learnt by heart (arXiv 2406.10209).

use polder_protocol::rng::Random;

/// As many entries as the published table has; a prime.
const TABLE_ENTRIES: u64 = 1_000_003;

/// Which labels are left out.
#[derive(Debug, Clone)]
pub struct Goldfish {
    /// Labels that decide, the one in question included.
    window: usize,
    dropped: Vec<bool>,
}

impl Goldfish {
    /// Leaves out one label in `every`, by the `window` labels that end with it. The table follows from `seed`.
    ///
    /// `None` where `every` or `window` is zero.
    pub fn new(every: u32, window: usize, seed: u64) -> Option<Self> {
        if every == 0 || window == 0 {
            return None;
        }
        let mut random = Random::from_labels(&[seed, TABLE_ENTRIES]);
        let below = 1.0 / every as f32;
        let dropped = (0..TABLE_ENTRIES).map(|_| random.unit_f32() < below).collect();
        Some(Self { window, dropped })
    }

    /// Whether each label of a text counts. Labels before the first whole window do.
    pub fn counts(&self, labels: &[u32]) -> Vec<bool> {
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
        let goldfish = Goldfish::new(50, 13, 7).unwrap();
        let labels: Vec<u32> = (0..20_000u32)
            .map(|i| i.wrapping_mul(2_654_435_761) % 50_000 + 1)
            .collect();
        let counts = goldfish.counts(&labels);
        let left_out = counts.iter().filter(|counts| !**counts).count();
        assert!((300..500).contains(&left_out), "{left_out}");
        assert!(counts[..12].iter().all(|counts| *counts));
        // The same words elsewhere decide alike.
        assert_eq!(goldfish.counts(&labels[100..])[12..], counts[112..]);
        assert!(Goldfish::new(0, 13, 7).is_none());
    }
}
