//! From a closed set of pseudo-gradients to the next state: clip, weighted mean, outer step.
//!
//! Every node computes this for itself and must get the same bits. So the order is fixed (by replica, then by round,
//! whatever order bytes came in), sums run left to right, and only `+ − × ÷ √` are used, which IEEE 754 rounds alike
//! everywhere. It goes part by part and, within a part, tensor by tensor: beside the part's own state it takes two
//! buffers of the largest tensor, however many updates there are.
//!
//! An institution has one voice, however many nodes it starts. For each tensor, with updates `x_u` of institutions v:
//!
//! 1. `level_v`: the median `‖x_u‖` of the institution's updates; `level`: the median of all levels. Medians are the lower
//!    ones, of those that say anything at all.
//! 2. `c_u = min(1, level / ‖x_u‖)`: no update is louder than the middle institution's middle one.
//! 3. `g = Σ_v share_v Σ_u share_u · c_u · x_u`. Shares follow the weights and sum to one, among institutions and among
//!    the updates of each; but of n, none is above `2 / (n + 1)`, which is what counts double among equals has.
//! 4. `m ← μ m + g`, `θ ← θ − η (g + μ m)`.

mod state;

use alloc::vec::Vec;

use thiserror::Error;

pub use state::{PartState, StateError};

use crate::codec::{Frame, codec_of_round};
use crate::hash::InstitutionId;
use crate::layout::PartLayout;
use crate::run::{Codec, Outer};

/// η of the dense warm start that goes before a sparse codec: the value of DiLoCo (2311.08105).
const WARM_START_LEARNING_RATE: f32 = 0.7;

/// μ of that warm start.
const WARM_START_MOMENTUM: f32 = 0.9;

/// η and μ of one round.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OuterStep {
    /// η in `θ ← θ − η (g + μ m)`.
    pub learning_rate: f32,
    /// μ in `m ← μ m + g`. With zero there is no momentum, and none is kept.
    pub momentum: f32,
}

impl OuterStep {
    /// Of `round`. Sparse rounds have no momentum, where error feedback plays its part; the dense rounds before them
    /// have DiLoCo's .7 and .9, since the run's own rate is for the sparse ones.
    pub fn of_round(outer: &Outer, round: u64) -> Self {
        match (outer.codec, codec_of_round(outer, round)) {
            (Codec::TopkQ2 { .. }, Codec::TopkQ2 { .. }) => Self {
                learning_rate: outer.learning_rate,
                momentum: 0.0,
            },
            (Codec::TopkQ2 { .. }, _) => Self {
                learning_rate: WARM_START_LEARNING_RATE,
                momentum: WARM_START_MOMENTUM,
            },
            _ => Self {
                learning_rate: outer.learning_rate,
                momentum: outer.momentum,
            },
        }
    }
}

/// One update of the set, for one part.
#[derive(Debug, Clone)]
pub struct Update<'a> {
    /// Its checked bytes.
    pub frame: Frame<'a>,
    /// Its weight: tokens, discounted for being late.
    pub weight: u64,
    /// Which institution vouches for the node that made it: all its updates together are one voice.
    pub institution: InstitutionId,
}

/// Why a set cannot be folded into a state.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum AggregateError {
    #[error("the set is empty, or all its weights are zero")]
    Empty,
    #[error("replica {replica} is twice in the set with round {round}")]
    Twice { replica: u64, round: u64 },
    #[error("the state has {found} elements, the part has {expected}")]
    State { found: usize, expected: usize },
}

/// What was done to one part.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PartSummary {
    /// How often an update was clipped, over all tensors.
    pub clipped: u64,
    /// Tensors left as they were, since the step would have made them infinite.
    pub skipped: u64,
}

/// Folds `updates` into `state`. The order of `updates` is of no consequence.
///
/// # Errors
///
/// [`AggregateError`]; the state is then as it was.
pub fn apply(
    layout: &PartLayout,
    updates: &[Update<'_>],
    step: OuterStep,
    state: &mut PartState,
) -> Result<PartSummary, AggregateError> {
    let expected = layout.elements().unwrap_or(usize::MAX);
    if state.parameters.len() != expected || state.momentum.len() != expected {
        return Err(AggregateError::State {
            found: state.parameters.len(),
            expected,
        });
    }
    let voices = voices(updates)?;
    let mut summary = PartSummary::default();
    let mut parameters = state.parameters.as_mut_slice();
    let mut momentum = state.momentum.as_mut_slice();
    let (mut update, mut mean) = (Vec::new(), Vec::new());
    for (index, tensor) in layout.tensors.iter().enumerate() {
        let elements = tensor.elements().unwrap_or(0);
        let (Some((theta, theta_rest)), Some((m, m_rest))) = (
            parameters.split_at_mut_checked(elements),
            momentum.split_at_mut_checked(elements),
        ) else {
            break; // The sum of the tensors' elements was checked above.
        };
        (parameters, momentum) = (theta_rest, m_rest);
        for buffer in [&mut update, &mut mean] {
            buffer.clear();
            buffer.resize(elements, 0.0);
        }
        let mut norms = Vec::with_capacity(voices.len());
        for voice in &voices {
            let mut of_voice = Vec::with_capacity(voice.len());
            for (_, frame) in voice {
                frame.tensor_into(index, &mut update);
                of_voice.push(norm(&update));
            }
            norms.push(of_voice);
        }
        let levels: Vec<f64> = norms.iter().map(|of_voice| median_of_positive(of_voice)).collect();
        let level = median_of_positive(&levels);
        for ((share, frame), norm) in voices.iter().flatten().zip(norms.iter().flatten()) {
            if *norm == 0.0 {
                continue;
            }
            let clip = if *norm > level { level / norm } else { 1.0 };
            summary.clipped += u64::from(*norm > level);
            frame.tensor_into(index, &mut update);
            let factor = (share * clip) as f32;
            for (mean, update) in mean.iter_mut().zip(&update) {
                *mean += factor * *update;
            }
        }
        summary.skipped += u64::from(!outer_step(theta, m, &mean, step));
    }
    if step.momentum == 0.0 {
        state.drop_momentum();
    }
    Ok(summary)
}

/// `m ← μ m + g`, `θ ← θ − η (g + μ m)`. Where that would not be finite, θ stays, m becomes zero, and the answer is
/// `false`: everybody does the same, and the run goes on.
fn outer_step(theta: &mut [f32], m: &mut [f32], g: &[f32], step: OuterStep) -> bool {
    let OuterStep {
        learning_rate,
        momentum,
    } = step;
    let next = |theta: f32, m: f32, g: f32| {
        let m = momentum * m + g;
        (theta - learning_rate * (g + momentum * m), m)
    };
    let finite = theta.iter().zip(m.iter()).zip(g).all(|((theta, m), g)| {
        let (theta, m) = next(*theta, *m, *g);
        theta.is_finite() && m.is_finite()
    });
    if !finite {
        m.fill(0.0);
        return false;
    }
    for ((theta, m), g) in theta.iter_mut().zip(m).zip(g) {
        (*theta, *m) = next(*theta, *m, *g);
    }
    true
}

/// The updates of one institution, each with its share of the mean.
type Voice<'a> = Vec<(f64, &'a Frame<'a>)>;

/// Voices in the order of their first replica; the shares of all updates sum to one.
fn voices<'a>(updates: &'a [Update<'a>]) -> Result<Vec<Voice<'a>>, AggregateError> {
    let mut sorted: Vec<&Update<'_>> = updates.iter().filter(|update| update.weight > 0).collect();
    let key = |update: &Update<'_>| (update.frame.header().replica, update.frame.header().round);
    sorted.sort_by_key(|update| key(update));
    for pair in sorted.windows(2) {
        if let [a, b] = pair
            && key(a) == key(b)
        {
            let (replica, round) = key(a);
            return Err(AggregateError::Twice { replica, round });
        }
    }
    if sorted.is_empty() {
        return Err(AggregateError::Empty);
    }
    let mut groups: Vec<Vec<&Update<'_>>> = Vec::new();
    for update in sorted {
        let same = |group: &&mut Vec<&Update<'_>>| group.iter().any(|member| member.institution == update.institution);
        match groups.iter_mut().find(same) {
            Some(group) => group.push(update),
            None => groups.push(alloc::vec![update]),
        }
    }
    let weight = |update: &&Update<'_>| update.weight as f64;
    let weights: Vec<f64> = groups
        .iter()
        .map(|group| group.iter().map(weight).fold(0.0, |sum, weight| sum + weight))
        .collect();
    let voice = |(group, share): (&Vec<&'a Update<'a>>, f64)| {
        let within = shares(&group.iter().map(weight).collect::<Vec<_>>());
        let members = group.iter().zip(within);
        members.map(|(update, part)| (share * part, &update.frame)).collect()
    };
    Ok(groups.iter().zip(shares(&weights)).map(voice).collect())
}

/// Shares that follow the weights, which are above zero, and sum to one. Of n, none is above `2 / (n + 1)`; what is over
/// goes to the others, by their weights.
fn shares(weights: &[f64]) -> Vec<f64> {
    let cap = 2.0 / (weights.len() as f64 + 1.0);
    let mut capped = alloc::vec![false; weights.len()];
    loop {
        let (mut left, mut free) = (1.0, 0.0);
        for (weight, capped) in weights.iter().zip(&capped) {
            if *capped {
                left -= cap;
            } else {
                free += weight;
            }
        }
        let share = |weight: &f64, capped: &bool| if *capped { cap } else { left * weight / free };
        let shares: Vec<f64> = weights.iter().zip(&capped).map(|(w, c)| share(w, c)).collect();
        let over: Vec<bool> = shares.iter().map(|share| *share > cap).collect();
        if !over.contains(&true) {
            return shares;
        }
        // At least one more with every turn, and never all: shares that sum to one are not all above the cap.
        for (capped, over) in capped.iter_mut().zip(over) {
            *capped |= over;
        }
    }
}

/// ‖x‖, in f64: squares of f32 neither overflow nor vanish there.
fn norm(values: &[f32]) -> f64 {
    libm::sqrt(values.iter().fold(0.0, |sum, value| {
        let value = f64::from(*value);
        sum + value * value
    }))
}

/// The lower median of the norms above zero; zero when there are none.
fn median_of_positive(norms: &[f64]) -> f64 {
    let mut positive: Vec<f64> = norms.iter().copied().filter(|norm| *norm > 0.0).collect();
    positive.sort_by(f64::total_cmp);
    let middle = positive.len().saturating_sub(1) / 2;
    positive.get(middle).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests;
