//! A stage of a dense model on the CPU: embedding, blocks, head.

use core::ops::Range;

use polder_protocol::layout::{BlockRange, Layout};
use polder_protocol::run::Precision;

use super::block::{self, Loadable};
use super::head::Head;
use super::pool::Pool;
use super::products::Products;
use super::rotation::Rotations;
use super::slots::{Slots, Weights};
use crate::model::Config;
use crate::model::describe::Slot;
use crate::train::TrainError;
use crate::train::engine::{Input, Model};

/// Whether all of a model is computed here. It is asked of whole models, so that all their stages agree.
pub(in crate::train) fn covers(config: &Config) -> bool {
    let mut sublayers = config.description.iter().flat_map(|block| &block.0);
    sublayers.all(|sublayer| block::covers(&sublayer.mixer))
}

/// What the largest block of `range` keeps of each row, in elements.
pub(in crate::train) fn kept_elements(config: &Config, range: BlockRange) -> u64 {
    let blocks = config
        .description
        .iter()
        .take(range.end as usize)
        .skip(range.first as usize);
    let elements = blocks.map(|block| block.0.iter().map(block::kept_elements).sum::<usize>());
    elements.max().unwrap_or(0) as u64
}

/// What a stage keeps besides its parameters.
#[derive(Debug)]
pub(in crate::train) struct Engine {
    slots: Vec<Slots>,
    rotations: Option<Rotations>,
    pool: Pool,
    products: Products,
}

/// A micro-batch between its forward and its backward.
#[derive(Debug)]
pub(in crate::train) struct Kept {
    blocks: Vec<KeptBlock>,
    tokens: Option<Vec<u32>>,
    seq: usize,
    pub(in crate::train) elements: usize,
}

#[derive(Debug)]
enum KeptBlock {
    All(Vec<block::Kept>),
    /// What went in, `[rows, hidden]`: the rest is computed again.
    Input(Vec<f32>),
}

impl Engine {
    pub(in crate::train) fn new(layout: &Layout, range: BlockRange, precision: Precision) -> Self {
        Self {
            slots: Slots::of(layout, range),
            rotations: None,
            pool: Pool::default(),
            products: Products::of(precision),
        }
    }

    /// From now on the gradients of these weights are asked for, per part, and no others'. What is added to the gradients of
    /// others is of no use.
    pub(in crate::train) fn ask_only(&mut self, weights: Vec<Vec<Range<usize>>>) {
        for (slots, weights) in self.slots.iter_mut().zip(weights) {
            slots.ask_only(weights);
        }
    }

    /// What its products are computed in.
    pub(in crate::train) fn products(&self) -> &'static str {
        self.products.name()
    }

    /// Runs the blocks: `[rows, hidden]`, and what their backward needs.
    pub(in crate::train) fn forward(
        &mut self,
        model: Model<'_>,
        input: &Input<'_>,
        blocks_kept: u32,
    ) -> Result<(Vec<f32>, Kept), TrainError> {
        let mut x = self.enter(model, input)?;
        let mut kept = Vec::new();
        let pool = &mut self.pool;
        let rotations = fit(&mut self.rotations, model.config, input.seq);
        // The backward begins at the end, and what it has done with is there for what must be computed again.
        let again = (model.range.end - model.range.first).saturating_sub(blocks_kept) as usize;
        for (index, block) in blocks(model, &self.slots, rotations, self.products).enumerate() {
            if index < again {
                kept.push(KeptBlock::Input(pool.copy(&x)));
                block.forward(&mut x, pool, block::Kept::give);
                continue;
            }
            let mut sublayers = Vec::new();
            block.forward(&mut x, pool, |kept, _| sublayers.push(kept));
            kept.push(KeptBlock::All(sublayers));
        }
        let kept = Kept {
            blocks: kept,
            tokens: input.tokens.map(<[u32]>::to_vec),
            seq: input.seq,
            elements: x.len(),
        };
        Ok((x, kept))
    }

    /// The mean loss of a stage with the head; `x` becomes its own gradient, and the parameters' are added.
    pub(in crate::train) fn mean_loss(
        &mut self,
        model: Model<'_>,
        x: &mut [f32],
        targets: &[u32],
        gradients: &mut [Vec<f32>],
    ) -> Result<f32, TrainError> {
        let head = Head::new(model.config, model.range, model.parameters, &self.slots, self.products);
        let head = head.ok_or(TrainError::Kind { takes: "a head" })?;
        Ok(head.mean_loss(x, targets, gradients, &mut self.pool))
    }

    /// The loss of each row, in nats, with nothing kept.
    pub(in crate::train) fn losses(
        &mut self,
        model: Model<'_>,
        input: &Input<'_>,
        targets: &[u32],
    ) -> Result<Vec<f32>, TrainError> {
        let mut x = self.enter(model, input)?;
        let pool = &mut self.pool;
        let rotations = fit(&mut self.rotations, model.config, input.seq);
        for block in blocks(model, &self.slots, rotations, self.products) {
            block.forward(&mut x, pool, block::Kept::give);
        }
        let head = Head::new(model.config, model.range, model.parameters, &self.slots, self.products);
        let losses = head
            .ok_or(TrainError::Kind { takes: "a head" })?
            .losses(&x, targets, pool);
        pool.give(x);
        Ok(losses)
    }

    /// Runs the blocks backward from the gradient of their output, adds those of the parameters, and returns that of the
    /// input: empty at a stage with the embedding.
    pub(in crate::train) fn backward(
        &mut self,
        model: Model<'_>,
        kept: Kept,
        mut gradient: Vec<f32>,
        gradients: &mut [Vec<f32>],
    ) -> Vec<f32> {
        let pool = &mut self.pool;
        pool.fit(gradient.len());
        let rotations = fit(&mut self.rotations, model.config, kept.seq);
        let first = usize::from(model.range.has_embedding());
        let parts = blocks(model, &self.slots, rotations, self.products).zip(&mut gradients[first..]);
        let mut parts: Vec<_> = parts.zip(kept.blocks).collect();
        while let Some(((block, gradients), kept)) = parts.pop() {
            let kept = match kept {
                KeptBlock::All(kept) => kept,
                KeptBlock::Input(x) => block.again(x, pool),
            };
            block.backward(kept, &mut gradient, gradients, pool);
        }
        drop(parts);
        match (kept.tokens, gradients.first_mut()) {
            (Some(tokens), Some(part)) => {
                if !self.slots[0].asks(&self.slots[0].range(Slot(0))) {
                    pool.give(gradient);
                    return Vec::new();
                }
                let embedding = &mut part[self.slots[0].range(Slot(0))];
                let (hidden, scale) = (model.config.hidden, model.config.embedding_scale);
                for (token, row) in tokens.iter().zip(gradient.chunks_exact(hidden)) {
                    let at = *token as usize * hidden;
                    for (sum, gradient) in embedding[at..at + hidden].iter_mut().zip(row) {
                        *sum += gradient * scale;
                    }
                }
                pool.give(gradient);
                Vec::new()
            }
            _ => gradient,
        }
    }

    /// What goes into the first block.
    fn enter(&mut self, model: Model<'_>, input: &Input<'_>) -> Result<Vec<f32>, TrainError> {
        let hidden = model.config.hidden;
        let Some(tokens) = input.tokens else {
            self.pool.fit(input.hidden.len());
            return Ok(self.pool.copy(input.hidden));
        };
        let kind = TrainError::Kind { takes: "activations" };
        let (Some(part), Some(slots)) = (model.parameters.first(), self.slots.first()) else {
            return Err(kind);
        };
        self.pool.fit(tokens.len() * hidden);
        let embedding = &part[slots.range(Slot(0))];
        let mut x = self.pool.take(tokens.len() * hidden);
        for (token, x) in tokens.iter().zip(x.chunks_exact_mut(hidden)) {
            let at = *token as usize * hidden;
            for (x, value) in x.iter_mut().zip(&embedding[at..at + hidden]) {
                *x = value * model.config.embedding_scale;
            }
        }
        Ok(x)
    }
}

fn fit<'a>(rotations: &'a mut Option<Rotations>, config: &Config, seq: usize) -> &'a Rotations {
    match rotations.take().filter(|rotations| rotations.seq() == seq) {
        Some(same) => rotations.insert(same),
        None => rotations.insert(Rotations::new(config, seq)),
    }
}

/// The blocks of a stage with their parameters.
fn blocks<'a>(
    model: Model<'a>,
    slots: &'a [Slots],
    rotations: &'a Rotations,
    products: Products,
) -> impl Iterator<Item = Loadable<'a>> {
    let first = usize::from(model.range.has_embedding());
    let count = (model.range.end - model.range.first) as usize;
    let parts = model.parameters.iter().zip(slots).skip(first).take(count);
    let described = model.config.description.iter().skip(model.range.first as usize);
    described.zip(parts).map(move |(block, (values, slots))| Loadable {
        block,
        weights: Weights {
            values,
            slots,
            products,
        },
        rotations,
    })
}
