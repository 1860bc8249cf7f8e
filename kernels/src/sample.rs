//! Choosing the next token.
//!
//! A choice follows from the seed, the position and the logits alone, so a replay chooses alike.

use polder_protocol::rng::Random;
use polder_protocol::work::Sampling;

/// A chosen token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// Its id.
    pub token: u32,
    /// Its natural log-probability before temperature and limits.
    pub log_probability: f32,
}

/// Chooses the token at `position` from `logits` `[vocabulary]`; `None` where there are none.
///
/// A temperature that is zero or no number is greedy: the largest logit, the lowest id among equals. A logit that is not
/// a number is never chosen before one that is.
pub fn sample(logits: &[f32], sampling: &Sampling, position: u32) -> Option<Choice> {
    let greedy = best(logits)?;
    let temperature = sampling.temperature;
    let token = match temperature > 0.0 && temperature.is_finite() {
        true => drawn(logits, logits[greedy], sampling, position),
        false => greedy,
    };
    let max = f64::from(logits[greedy]);
    let sum: f64 = logits.iter().map(|logit| weight(*logit, max, 1.0)).sum();
    Some(Choice {
        token: u32::try_from(token).ok()?,
        log_probability: (f64::from(logits[token]) - max - sum.ln()) as f32,
    })
}

fn best(logits: &[f32]) -> Option<usize> {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] || logits[best].is_nan() {
            best = token;
        }
    }
    (!logits.is_empty()).then_some(best)
}

/// In f64, and zero for what is not a number.
fn weight(logit: f32, max: f64, temperature: f64) -> f64 {
    let weight = ((f64::from(logit) - max) / temperature).exp();
    if weight.is_nan() { 0.0 } else { weight }
}

fn drawn(logits: &[f32], max: f32, sampling: &Sampling, position: u32) -> usize {
    let (max, temperature) = (f64::from(max), f64::from(sampling.temperature));
    let mut candidates: Vec<(usize, f64)> = logits
        .iter()
        .map(|logit| weight(*logit, max, temperature))
        .enumerate()
        .collect();
    let top_k = usize::try_from(sampling.top_k).unwrap_or(usize::MAX);
    // What neither limit needs in order stays in order of ids.
    if top_k > 0 && top_k < candidates.len() {
        candidates.select_nth_unstable_by(top_k - 1, heavier);
        candidates.truncate(top_k);
    }
    if sampling.top_k > 0 || sampling.top_p < 1.0 {
        candidates.sort_unstable_by(heavier);
    }
    if sampling.top_p < 1.0 {
        let all: f64 = candidates.iter().map(|(_, weight)| weight).sum();
        let mut sum = 0.0;
        let enough = candidates.iter().position(|(_, weight)| {
            sum += weight;
            sum >= all * f64::from(sampling.top_p)
        });
        candidates.truncate(enough.map_or(candidates.len(), |last| last + 1));
    }
    let all: f64 = candidates.iter().map(|(_, weight)| weight).sum();
    let mut random = Random::from_labels(&[sampling.seed, u64::from(position)]);
    let mut left = f64::from(random.unit_f32()) * all;
    let mut chosen = 0;
    for (token, weight) in candidates {
        if weight > 0.0 {
            chosen = token;
            left -= weight;
            if left < 0.0 {
                break;
            }
        }
    }
    chosen
}

/// Larger weights first, lower ids among equals.
fn heavier(a: &(usize, f64), b: &(usize, f64)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 3.0, -1.0];

    #[test]
    fn greedy_takes_the_largest_and_the_lowest_id_among_equals() {
        let choice = sample(&LOGITS, &how(0.0, 0, 1.0, 1), 0).unwrap();
        let sum: f32 = LOGITS.iter().map(|logit| logit.exp()).sum();
        assert_eq!(choice.token, 1);
        assert!((choice.log_probability - (3.0 - sum.ln())).abs() < 1e-6);
    }

    #[test]
    fn a_replay_chooses_alike_and_another_seed_does_not() {
        let draw = |seed| -> Vec<u32> {
            let how = how(1.5, 0, 1.0, seed);
            (0..40)
                .map(|position| sample(&LOGITS, &how, position).unwrap().token)
                .collect()
        };
        assert_eq!(draw(4), draw(4));
        assert_ne!(draw(4), draw(5));
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let logits = [0.0, 3f32.ln()];
        let how = how(1.0, 0, 1.0, 9);
        let heavy = (0..4_000)
            .filter(|position| sample(&logits, &how, *position).unwrap().token == 1)
            .count();
        assert!((2_900..3_100).contains(&heavy), "{heavy}");
    }

    #[test]
    fn limits_leave_the_heaviest() {
        for position in 0..200 {
            let token = |how| sample(&LOGITS, &how, position).unwrap().token;
            assert_eq!(token(how(5.0, 1, 1.0, 3)), 1);
            assert!([1, 3].contains(&token(how(5.0, 2, 1.0, 3))));
            assert_eq!(token(how(1.0, 0, 0.1, 3)), 1);
            assert!([1, 2, 3].contains(&token(how(5.0, 3, 0.99, 3))));
        }
    }

    #[test]
    fn numbers_that_are_none_are_not_chosen() {
        let logits = [f32::NAN, 1.0, f32::NEG_INFINITY];
        for position in 0..50 {
            assert_eq!(sample(&logits, &how(2.0, 0, 0.9, 1), position).unwrap().token, 1);
        }
        assert_eq!(sample(&logits, &how(0.0, 0, 1.0, 1), 0).unwrap().token, 1);
        assert_eq!(sample(&[], &how(0.0, 0, 1.0, 1), 0), None);
    }

    fn how(temperature: f32, top_k: u32, top_p: f32, seed: u64) -> Sampling {
        Sampling {
            temperature,
            top_k,
            top_p,
            seed,
        }
    }
}
