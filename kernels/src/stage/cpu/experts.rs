//! A mixture of experts: each token goes to a few, in the order of their numbers, so that a token's sum does not depend
//! on its neighbours.

use super::dense::Dense;
use super::elementwise::{add, sigmoid, softmax};
use super::mlp::MlpWeights;
use crate::model::describe::Experts;
use crate::model::routing::{Rule, Score};
use crate::stage::StageError;
use crate::stage::weights::PartReader;

/// The weights of a mixture.
#[derive(Debug)]
pub(in crate::stage) struct ExpertWeights {
    router: Dense,
    correction: Vec<f32>,
    rule: Rule,
    latent: Option<(Dense, Dense)>,
    experts: Vec<MlpWeights>,
    shared: Option<MlpWeights>,
}

/// What a router did with some rows.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Routing {
    /// `[rows, experts]`: the weight of each expert, zero where it was not chosen.
    pub(crate) weights: Vec<f32>,
    /// `[rows, experts]`: scores before the choice.
    pub(crate) scores: Vec<f32>,
}

impl ExpertWeights {
    pub(in crate::stage) fn read(reader: &PartReader<'_>, shape: &Experts) -> Result<Self, StageError> {
        let latent = shape.latent.as_ref();
        let latent = latent.map(|(down, up)| Ok::<_, StageError>((reader.dense(down)?, reader.dense(up)?)));
        let experts = shape.experts.iter().map(|mlp| MlpWeights::read(reader, mlp));
        let shared = shape.shared.as_ref().map(|mlp| MlpWeights::read(reader, mlp));
        Ok(Self {
            router: reader.dense(&shape.router.weight)?,
            correction: match shape.router.correction {
                Some(slot) => reader.vector(slot)?,
                None => Vec::new(),
            },
            rule: shape.router.rule,
            latent: latent.transpose()?,
            experts: experts.collect::<Result<_, _>>()?,
            shared: shared.transpose()?,
        })
    }

    pub(super) fn bytes(&self) -> u64 {
        let mlps = self.experts.iter().chain(&self.shared).map(MlpWeights::bytes);
        mlps.sum::<u64>() + self.router.weight.bytes()
    }

    /// Of `n` rows; `seen` takes what the router did.
    pub(super) fn forward(&self, x: &[f32], n: usize, out: &mut [f32], seen: Option<&mut Routing>) {
        let scores = self.scores(x, n);
        let weights = self.weights(&scores);
        out.fill(0.0);
        match &self.latent {
            None => self.mix(x, n, &weights, out),
            Some((down, up)) => {
                let within = down.of(x, n);
                let mut mixed = vec![0.0; within.len()];
                self.mix(&within, n, &weights, &mut mixed);
                up.apply(&mixed, n, out);
            }
        }
        if let Some(shared) = &self.shared {
            let mut own = vec![0.0; out.len()];
            shared.forward(x, n, &mut own);
            add(out, &own);
        }
        if let Some(seen) = seen {
            seen.weights.extend(&weights);
            seen.scores.extend(&scores);
        }
    }

    fn scores(&self, x: &[f32], n: usize) -> Vec<f32> {
        let mut scores = self.router.of(x, n);
        for row in scores.chunks_exact_mut(self.experts.len()) {
            match self.rule.score {
                Score::Softmax => softmax(row),
                Score::Sigmoid => row.iter_mut().for_each(|score| *score = sigmoid(*score)),
            }
        }
        scores
    }

    fn weights(&self, scores: &[f32]) -> Vec<f32> {
        let count = self.experts.len();
        let mut weights = vec![0.0; scores.len()];
        for (scores, weights) in scores.chunks_exact(count).zip(weights.chunks_exact_mut(count)) {
            let chosen = self.rule.choose(scores, &self.correction);
            for (expert, weight) in chosen.iter().zip(self.rule.weights(scores, &chosen)) {
                weights[*expert] = weight;
            }
        }
        weights
    }

    /// Adds what the experts of each row make of it.
    fn mix(&self, x: &[f32], n: usize, weights: &[f32], out: &mut [f32]) {
        let (count, width) = (self.experts.len(), x.len() / n.max(1));
        for (index, expert) in self.experts.iter().enumerate() {
            let rows: Vec<usize> = (0..n).filter(|row| weights[row * count + index] != 0.0).collect();
            if rows.is_empty() {
                continue;
            }
            let gathered: Vec<f32> = rows
                .iter()
                .flat_map(|row| &x[row * width..(row + 1) * width])
                .copied()
                .collect();
            let mut made = vec![0.0; gathered.len()];
            expert.forward(&gathered, rows.len(), &mut made);
            for (row, made) in rows.iter().zip(made.chunks_exact(width)) {
                let weight = weights[row * count + index];
                for (out, made) in out[row * width..(row + 1) * width].iter_mut().zip(made) {
                    *out += weight * made;
                }
            }
        }
    }
}
