//! Rotary positions over slices, there and back.

use crate::model::describe::QueryScale;
use crate::model::{Config, Frequencies};

/// The rotations of a model, for sequences of one length.
#[derive(Debug)]
pub(super) struct Rotations {
    seq: usize,
    turns: Vec<Turns>,
}

/// One rotation.
#[derive(Debug)]
struct Turns {
    interleaved: bool,
    pairs: usize,
    /// `[seq, pairs]`
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

impl Rotations {
    pub(super) fn new(config: &Config, seq: usize) -> Self {
        let turns = config.rotaries.iter().map(|rotary| {
            let frequencies = Frequencies::of(rotary);
            let pairs = frequencies.pairs();
            let (mut cosines, mut sines) = (vec![0.0; seq * pairs], vec![0.0; seq * pairs]);
            let rows = cosines.chunks_exact_mut(pairs).zip(sines.chunks_exact_mut(pairs));
            for (position, (cosines, sines)) in rows.enumerate() {
                frequencies.turn(position, cosines, sines);
            }
            Turns {
                interleaved: rotary.interleaved,
                pairs,
                cosines,
                sines,
            }
        });
        Self {
            seq,
            turns: turns.collect(),
        }
    }

    /// The length.
    pub(super) const fn seq(&self) -> usize {
        self.seq
    }

    /// Rotates the head of a query or key at `position`, and scales it.
    pub(super) fn turn(&self, head: &mut [f32], position: usize, rotary: Option<usize>, scale: Option<QueryScale>) {
        if let Some(turns) = rotary.and_then(|rotary| self.turns.get(rotary)) {
            turns.turn(head, position, 1.0);
        }
        multiply(head, position, scale);
    }

    /// The gradient before [`Rotations::turn`] from the one after it.
    pub(super) fn turn_back(
        &self,
        head: &mut [f32],
        position: usize,
        rotary: Option<usize>,
        scale: Option<QueryScale>,
    ) {
        multiply(head, position, scale);
        if let Some(turns) = rotary.and_then(|rotary| self.turns.get(rotary)) {
            turns.turn(head, position, -1.0);
        }
    }
}

impl Turns {
    /// Forwards with `way` 1; −1 applies the transpose, which is the gradient.
    fn turn(&self, head: &mut [f32], position: usize, way: f32) {
        let at = position * self.pairs..(position + 1) * self.pairs;
        let (cosines, sines) = (&self.cosines[at.clone()], &self.sines[at]);
        let head = &mut head[..2 * self.pairs];
        if self.interleaved {
            for ((pair, cosine), sine) in head.chunks_exact_mut(2).zip(cosines).zip(sines) {
                let (a, b, sine) = (pair[0], pair[1], sine * way);
                (pair[0], pair[1]) = (a * cosine - b * sine, b * cosine + a * sine);
            }
            return;
        }
        let (first, second) = head.split_at_mut(self.pairs);
        for (((a, b), cosine), sine) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
            let sine = sine * way;
            (*a, *b) = (*a * cosine - *b * sine, *b * cosine + *a * sine);
        }
    }
}

fn multiply(head: &mut [f32], position: usize, scale: Option<QueryScale>) {
    let Some(scale) = scale else { return };
    let factor = scale.at(position);
    head.iter_mut().for_each(|value| *value *= factor);
}
