//! Choosing the next token.
//!
//! A choice follows from the seed, the position, the text before it and the logits alone, so a replay chooses alike.
//! Chance enters as Gumbel noise: the token with the largest `logit / temperature + noise` is drawn with its softmax
//! probability (Gumbel 1954; Maddison, Tarlow and Minka 2014). The noise of a token does not depend on the logits, so
//! whoever computes slightly different ones, as other hardware does, still finds the same token nearly always, and can
//! check a stranger's choice.

use std::collections::BTreeMap;

use polder_protocol::work::{ALTERNATIVES_MAX, Likely, Sampling, Written};

use crate::text::TokenSet;

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// Which, and its natural log-probability before penalties, temperature and limits.
    pub chosen: Likely,
    /// The likeliest tokens, the likeliest first, as many as were asked for.
    pub alternatives: Vec<Likely>,
}

/// Chooses the token at `position` from `logits` `[vocabulary]`; `None` where there are none, or none is `allowed`.
///
/// A temperature that is zero or no number is greedy: the largest logit, the lowest id among equals. A logit that is not
/// a number is never chosen before one that is.
pub fn sample(
    logits: &[f32],
    sampling: &Sampling,
    written: &Written,
    position: u32,
    allowed: Option<&TokenSet>,
) -> Option<Choice> {
    let likeliest = best(logits)?;
    let mut penalised = sampling.looks_back().then(|| penalise(logits, sampling, written));
    if let Some(allowed) = allowed {
        let weighed = penalised.get_or_insert_with(|| logits.to_vec());
        for (_, logit) in weighed
            .iter_mut()
            .enumerate()
            .filter(|(token, _)| !allowed.contains(*token))
        {
            *logit = f32::NEG_INFINITY;
        }
    }
    let weighed = penalised.as_deref().unwrap_or(logits);
    let first = best(weighed)?;
    if allowed.is_some_and(|allowed| !allowed.contains(first)) {
        return None;
    }
    let token = match sampling.temperature > 0.0 && sampling.temperature.is_finite() {
        true => drawn(weighed, first, sampling, position),
        false => first,
    };
    let max = f64::from(logits[likeliest]);
    let sum: f64 = logits.iter().map(|logit| weight(*logit, max, 1.0)).sum();
    let likely = |token: usize| Likely {
        token: u32::try_from(token).unwrap_or(u32::MAX),
        log_probability: (f64::from(logits[token]) - max - sum.ln()) as f32,
    };
    let count = usize::from(sampling.alternatives.min(ALTERNATIVES_MAX));
    let alternatives = heaviest(logits, count).into_iter().map(likely).collect();
    Some(Choice {
        chosen: likely(token),
        alternatives,
    })
}

fn best(logits: &[f32]) -> Option<usize> {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] || (logits[best].is_nan() && !logit.is_nan()) {
            best = token;
        }
    }
    (!logits.is_empty()).then_some(best)
}

/// The `count` largest logits, the largest first, lower ids first among equals.
fn heaviest(logits: &[f32], count: usize) -> Vec<usize> {
    if count == 0 {
        return Vec::new();
    }
    let mut tokens: Vec<usize> = (0..logits.len()).filter(|token| !logits[*token].is_nan()).collect();
    let order = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    if count < tokens.len() {
        tokens.select_nth_unstable_by(count - 1, order);
        tokens.truncate(count);
    }
    tokens.sort_unstable_by(order);
    tokens
}

/// Logits after the penalties for what is in the text: the repetition penalty of CTRL (Keskar et al. 2019, section 4.1)
/// over all of it, then OpenAI's frequency and presence penalties over what was generated. A penalty that is no finite
/// number, or a repetition penalty that is not positive, changes nothing.
fn penalise(logits: &[f32], sampling: &Sampling, written: &Written) -> Vec<f32> {
    let mut logits = logits.to_vec();
    let number = |value: f32| if value.is_finite() { value } else { 0.0 };
    let repetition = sampling.repetition_penalty;
    let repeats = repetition.is_finite() && repetition > 0.0 && repetition != 1.0;
    let (frequency, presence) = (number(sampling.frequency_penalty), number(sampling.presence_penalty));
    let prompt = usize::try_from(written.prompt_tokens).unwrap_or(usize::MAX);
    // How often each token of the text was generated.
    let mut generated: BTreeMap<u32, u32> = BTreeMap::new();
    for (place, token) in written.tokens.iter().enumerate() {
        *generated.entry(*token).or_default() += u32::from(place >= prompt);
    }
    for (token, times) in generated {
        let Some(logit) = usize::try_from(token).ok().and_then(|token| logits.get_mut(token)) else {
            continue;
        };
        if repeats {
            *logit = if *logit > 0.0 {
                *logit / repetition
            } else {
                *logit * repetition
            };
        }
        if times > 0 {
            *logit -= times as f32 * frequency + presence;
        }
    }
    logits
}

/// In f64, and zero for what is not a number.
fn weight(logit: f32, max: f64, temperature: f64) -> f64 {
    let weight = ((f64::from(logit) - max) / temperature).exp();
    if weight.is_nan() { 0.0 } else { weight }
}

fn drawn(logits: &[f32], first: usize, sampling: &Sampling, position: u32) -> usize {
    let (max, temperature) = (f64::from(logits[first]), f64::from(sampling.temperature));
    let candidates = candidates(logits, max, sampling);
    let noise = Noise::new(sampling.seed, position);
    let mut chosen = (first, f64::NEG_INFINITY);
    for token in candidates {
        // How far behind the likeliest, at most zero.
        let behind = (f64::from(logits[token]) - max) / temperature;
        let score = noise.added(token, behind, chosen.1);
        if score > chosen.1 {
            chosen = (token, score);
        }
    }
    chosen.0
}

/// The tokens that the limits leave.
fn candidates(logits: &[f32], max: f64, sampling: &Sampling) -> Vec<usize> {
    let temperature = f64::from(sampling.temperature);
    let top_k = match usize::try_from(sampling.top_k) {
        Ok(0) | Err(_) => logits.len(),
        Ok(top_k) => top_k,
    };
    let share = |token: usize| weight(logits[token], max, temperature);
    let mut tokens = match top_k < logits.len() || sampling.top_p < 1.0 {
        true => heaviest(logits, top_k),
        // What neither limit needs in order stays in order of ids.
        false => (0..logits.len()).filter(|token| !logits[*token].is_nan()).collect(),
    };
    if sampling.top_p < 1.0 {
        let all: f64 = tokens.iter().map(|token| share(*token)).sum();
        let mut sum = 0.0;
        let enough = tokens.iter().position(|token| {
            sum += share(*token);
            sum >= all * f64::from(sampling.top_p)
        });
        tokens.truncate(enough.map_or(tokens.len(), |last| last + 1));
    }
    if sampling.min_p > 0.0 {
        // The likeliest has weight 1 (Nguyen et al. 2024, min-p).
        let least = f64::from(sampling.min_p.min(1.0));
        tokens.retain(|token| share(*token) >= least);
    }
    tokens
}

/// Standard Gumbel noise that follows from a seed, a position and a token.
struct Noise(u64);

impl Noise {
    fn new(seed: u64, position: u32) -> Self {
        Self(mixed(seed ^ mixed(u64::from(position).wrapping_add(GOLDEN))))
    }

    /// `score` with the token's noise; negative infinity where the sum stays under `least` in any case, which is seen
    /// without a logarithm.
    fn added(&self, token: usize, score: f64, least: f64) -> f64 {
        let bits = mixed(self.0.wrapping_add((token as u64).wrapping_mul(GOLDEN)));
        // 1 - u in steps of 2^-53, from 2^-53 to 1.
        let rest = (bits >> 11) + 1;
        // Noise -ln(-ln u) is under -ln(1 - u), which is at most so many times ln 2.
        let doublings = 54 - (64 - rest.leading_zeros());
        if score + f64::from(doublings) * std::f64::consts::LN_2 < least {
            return f64::NEG_INFINITY;
        }
        let rest = rest as f64 / (1u64 << 53) as f64;
        score - (-(-rest).ln_1p()).ln()
    }
}

/// 2^64 over the golden ratio: consecutive multiples are far apart.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
fn mixed(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 3.0, -1.0];

    #[test]
    fn greedy_takes_the_largest_and_the_lowest_id_among_equals() {
        let choice = choose(&LOGITS, &how(0.0, 0, 1.0, 1), 0).unwrap();
        let sum: f32 = LOGITS.iter().map(|logit| logit.exp()).sum();
        assert_eq!(choice.chosen.token, 1);
        assert!((choice.chosen.log_probability - (3.0 - sum.ln())).abs() < 1e-6);
    }

    #[test]
    fn a_replay_chooses_alike_and_another_seed_does_not() {
        let draw = |seed| -> Vec<u32> {
            let how = how(1.5, 0, 1.0, seed);
            (0..40).map(|position| token(&LOGITS, &how, position)).collect()
        };
        assert_eq!(draw(4), draw(4));
        assert_ne!(draw(4), draw(5));
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        // Softmax of these at temperature 2: 0.1, 0.2, 0.3, 0.4.
        let logits = [1.0f32, 2.0, 3.0, 4.0].map(|share| share.ln() * 2.0);
        let how = how(2.0, 0, 1.0, 9);
        let mut counts = [0; 4];
        for position in 0..20_000 {
            counts[token(&logits, &how, position) as usize] += 1;
        }
        for (count, expected) in counts.into_iter().zip([2_000, 4_000, 6_000, 8_000]) {
            // Four standard deviations of a binomial count.
            assert!((expected - 280..expected + 280).contains(&count), "{counts:?}");
        }
    }

    #[test]
    fn slightly_different_logits_choose_alike() {
        let mut noise = 1u64;
        let mut random = move || {
            noise = mixed(noise.wrapping_add(GOLDEN));
            (noise >> 40) as f32 / (1 << 24) as f32
        };
        let logits: Vec<f32> = (0..2_000).map(|_| random() * 8.0).collect();
        let other: Vec<f32> = logits.iter().map(|logit| logit + (random() - 0.5) * 1e-3).collect();
        let how = how(1.0, 0, 1.0, 3);
        let alike = (0..500).filter(|position| token(&logits, &how, *position) == token(&other, &how, *position));
        assert!(alike.count() >= 495);
    }

    #[test]
    fn the_shortcut_changes_no_choice() {
        let logits: Vec<f32> = (0..3_000).map(|token| (token % 97) as f32 * 0.2).collect();
        let noise = Noise::new(7, 11);
        let scores: Vec<f64> = logits
            .iter()
            .enumerate()
            .map(|(token, logit)| noise.added(token, f64::from(*logit) - 19.2, f64::NEG_INFINITY))
            .collect();
        let slow = (0..scores.len())
            .max_by(|a, b| scores[*a].total_cmp(&scores[*b]).then(b.cmp(a)))
            .unwrap();
        assert_eq!(token(&logits, &how(1.0, 0, 1.0, 7), 11) as usize, slow);
    }

    #[test]
    fn limits_leave_the_heaviest() {
        for position in 0..200 {
            let token = |how| token(&LOGITS, &how, position);
            assert_eq!(token(how(5.0, 1, 1.0, 3)), 1);
            assert!([1, 3].contains(&token(how(5.0, 2, 1.0, 3))));
            assert_eq!(token(how(1.0, 0, 0.1, 3)), 1);
            assert!([1, 2, 3].contains(&token(how(5.0, 3, 0.99, 3))));
            let min_p = Sampling {
                min_p: 0.5,
                ..how(1.0, 0, 1.0, 3)
            };
            assert!([1, 3].contains(&token(min_p)));
        }
    }

    #[test]
    fn what_was_written_is_penalised() {
        let written = Written {
            tokens: vec![1, 3, 3],
            prompt_tokens: 1,
        };
        let after = |change: fn(&mut Sampling)| {
            let mut sampling = Sampling::GREEDY;
            change(&mut sampling);
            penalise(&LOGITS, &sampling, &written)
        };
        assert_eq!(after(|how| how.repetition_penalty = 2.0), [1.0, 1.5, 2.0, 1.5, -1.0]);
        assert_eq!(after(|how| how.frequency_penalty = 0.5), [1.0, 3.0, 2.0, 2.0, -1.0]);
        assert_eq!(after(|how| how.presence_penalty = 0.5), [1.0, 3.0, 2.0, 2.5, -1.0]);
        assert_eq!(after(|how| how.repetition_penalty = f32::NAN), LOGITS);
        assert_eq!(after(|how| how.frequency_penalty = f32::INFINITY), LOGITS);
        let mut sampling = Sampling::GREEDY;
        sampling.presence_penalty = 1.5;
        let foreign = Written {
            tokens: vec![u32::MAX, 1, 3],
            prompt_tokens: 0,
        };
        assert_eq!(sample(&LOGITS, &sampling, &foreign, 0, None).unwrap().chosen.token, 2);
    }

    #[test]
    fn only_what_is_allowed_is_chosen() {
        let only = |tokens: &[usize]| TokenSet::of(tokens);
        for temperature in [0.0, 2.0] {
            for position in 0..50 {
                let how = how(temperature, 0, 1.0, 3);
                let choose = |allowed: &TokenSet| sample(&LOGITS, &how, &Written::default(), position, Some(allowed));
                assert_eq!(choose(&only(&[4])).unwrap().chosen.token, 4);
                assert!([0, 2].contains(&choose(&only(&[0, 2, 70])).unwrap().chosen.token));
                assert_eq!(choose(&only(&[])), None);
                // How likely it was is told of the model, whatever was allowed.
                let alone = choose(&only(&[4])).unwrap().chosen.log_probability;
                assert!(alone < -4.0, "{alone}");
            }
        }
    }

    #[test]
    fn alternatives_are_the_likeliest() {
        let mut sampling = Sampling::GREEDY;
        sampling.alternatives = 3;
        let choice = choose(&LOGITS, &sampling, 0).unwrap();
        let tokens: Vec<u32> = choice.alternatives.iter().map(|likely| likely.token).collect();
        assert_eq!(tokens, [1, 3, 2]);
        assert_eq!(choice.alternatives[0], choice.chosen);
        sampling.alternatives = 255;
        assert_eq!(choose(&LOGITS, &sampling, 0).unwrap().alternatives.len(), 5);
    }

    #[test]
    fn numbers_that_are_none_are_not_chosen() {
        let logits = [f32::NAN, 1.0, f32::NEG_INFINITY];
        for position in 0..50 {
            assert_eq!(token(&logits, &how(2.0, 0, 0.9, 1), position), 1);
            assert_eq!(token(&logits, &how(2.0, 0, 1.0, 1), position), 1);
        }
        assert_eq!(token(&logits, &how(0.0, 0, 1.0, 1), 0), 1);
        assert_eq!(choose(&[], &how(0.0, 0, 1.0, 1), 0), None);
        assert_eq!(token(&[f32::NAN; 2], &how(1.0, 0, 1.0, 1), 0), 0);
    }

    fn choose(logits: &[f32], sampling: &Sampling, position: u32) -> Option<Choice> {
        sample(logits, sampling, &Written::default(), position, None)
    }

    fn token(logits: &[f32], sampling: &Sampling, position: u32) -> u32 {
        choose(logits, sampling, position).unwrap().chosen.token
    }

    fn how(temperature: f32, top_k: u32, top_p: f32, seed: u64) -> Sampling {
        Sampling {
            temperature,
            top_k,
            top_p,
            seed,
            ..Sampling::GREEDY
        }
    }
}
