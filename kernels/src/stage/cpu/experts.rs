//! A mixture of experts: each token goes to a few, in the order of their numbers, so that a token's sum does not depend
//! on its neighbours.

use super::dense::Dense;
use super::elementwise::{add, sigmoid, softmax};
use super::matrix::Matrix;
use super::mlp::MlpWeights;
use crate::model::describe::Experts;
use crate::model::routing::{Rule, Score};
use crate::stage::StageError;
use crate::stage::weights::PartReader;

/// The weights of a mixture.
#[derive(Debug)]
pub(in crate::stage) struct ExpertWeights {
    pub(in crate::stage) router: Dense,
    pub(in crate::stage) choice: Choice,
    pub(in crate::stage) latent: Option<(Dense, Dense)>,
    pub(in crate::stage) experts: Vec<MlpWeights>,
    pub(in crate::stage) shared: Option<MlpWeights>,
}

/// How a router's numbers become weights of experts.
#[derive(Debug, Clone)]
pub(in crate::stage) struct Choice {
    /// Added to scores for the choice alone; empty where there is none.
    correction: Vec<f32>,
    rule: Rule,
    /// Experts.
    count: usize,
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
            choice: Choice {
                correction: match shape.router.correction {
                    Some(slot) => reader.vector(slot)?,
                    None => Vec::new(),
                },
                rule: shape.router.rule,
                count: shape.experts.len(),
            },
            latent: latent.transpose()?,
            experts: experts.collect::<Result<_, _>>()?,
            shared: shared.transpose()?,
        })
    }

    /// All that is multiplied with.
    pub(super) fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let latent = self.latent.iter().flat_map(|(down, up)| [down, up]);
        let denses = latent.chain([&self.router]).map(|dense| &dense.weight);
        let perceptrons = self.experts.iter().chain(&self.shared);
        denses.chain(perceptrons.flat_map(MlpWeights::matrices))
    }

    /// Of `n` rows; `seen` takes what the router did.
    pub(super) fn forward(&self, x: &[f32], n: usize, out: &mut [f32], seen: Option<&mut Routing>) {
        let Routing { weights, scores } = self.choice.of(self.router.of(x, n));
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

impl Choice {
    /// What becomes of a router's numbers, `[rows, experts]`.
    pub(in crate::stage) fn of(&self, logits: Vec<f32>) -> Routing {
        let mut scores = logits;
        let mut weights = vec![0.0; scores.len()];
        let rows = scores
            .chunks_exact_mut(self.count)
            .zip(weights.chunks_exact_mut(self.count));
        for (scores, weights) in rows {
            match self.rule.score {
                Score::Softmax => softmax(scores),
                Score::Sigmoid => scores.iter_mut().for_each(|score| *score = sigmoid(*score)),
            }
            let chosen = self.rule.choose(scores, &self.correction);
            for (expert, weight) in chosen.iter().zip(self.rule.weights(scores, &chosen)) {
                weights[*expert] = weight;
            }
        }
        Routing { weights, scores }
    }
}
