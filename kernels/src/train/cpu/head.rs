//! The model's end: final norm, output projection and cross entropy, some rows at a time.
//!
//! Logits of a whole micro-batch would be the largest thing in memory. Their gradient is known as soon as they are, so
//! a chunk of rows goes there and back before the next one.

use core::ops::Range;

use polder_protocol::layout::BlockRange;
use rayon::prelude::*;

use super::linear::add_column_sums;
use super::norm::Loaded;
use super::pool::Pool;
use super::product::{Mode, View, ViewMut};
use super::products::Products;
use super::slots::{Slots, Weights};
use super::softmax::loss;
use crate::model::Config;
use crate::model::describe::{Norm, Slot};
use crate::train::goldfish::LEFT_OUT;

/// Bytes of the logits of a chunk: large enough that reading the projection costs little beside multiplying with it.
const LOGITS_BYTES: usize = 48 << 20;
/// The same where multiplying takes a fifth of the time.
#[cfg(target_arch = "x86_64")]
const LOGITS_BYTES_BF16: usize = 96 << 20;

/// The end of a stage that holds it.
#[derive(Debug, Clone)]
pub(super) struct Head<'a> {
    parameters: &'a [Vec<f32>],
    slots: &'a [Slots],
    products: Products,
    norm: &'a Norm,
    vocabulary: usize,
    hidden: usize,
    /// The part and place of the projection: the embedding's where they are tied.
    projection: (usize, Range<usize>),
    /// In the last part.
    bias: Option<Slot>,
}

impl<'a> Head<'a> {
    /// `None` where `range` has no head.
    pub(super) fn new(
        config: &'a Config,
        range: BlockRange,
        parameters: &'a [Vec<f32>],
        slots: &'a [Slots],
        products: Products,
    ) -> Option<Self> {
        let last = parameters.len().checked_sub(1)?;
        if !range.has_head(config.blocks) {
            return None;
        }
        let projection = match &config.head.projection {
            Some(projection) => (last, slots.get(last)?.weight(projection)),
            None => (0, slots.first()?.range(Slot(0))),
        };
        Some(Self {
            parameters,
            slots,
            products,
            norm: &config.head.norm,
            vocabulary: config.vocabulary,
            hidden: config.hidden,
            projection,
            bias: config.head.projection.as_ref().and_then(|projection| projection.bias),
        })
    }

    fn weights(&self) -> Weights<'a> {
        let last = self.parameters.len() - 1;
        Weights {
            values: &self.parameters[last],
            slots: &self.slots[last],
            products: self.products,
        }
    }

    fn projection(&self) -> View<'a> {
        let values = &self.parameters[self.projection.0][self.projection.1.clone()];
        View::new(values, self.vocabulary, self.hidden)
    }

    fn chunk_rows(&self, rows: usize) -> usize {
        let bytes = match self.products {
            Products::F32 => LOGITS_BYTES,
            #[cfg(target_arch = "x86_64")]
            Products::Bf16(_) => LOGITS_BYTES_BF16,
        };
        (bytes / 4 / self.vocabulary).clamp(1, rows.max(1))
    }

    fn logits(&self, logits: &mut [f32], normed: &[f32]) {
        let rows = normed.len() / self.hidden;
        let normed = View::new(normed, rows, self.hidden);
        let out = ViewMut::new(logits, rows, self.vocabulary);
        self.products
            .product(out, Mode::Write, normed, self.projection().transposed());
        if let Some(bias) = self.bias {
            let bias = self.weights().slot(bias);
            for logits in logits.chunks_exact_mut(self.vocabulary) {
                logits.iter_mut().zip(bias).for_each(|(logit, bias)| *logit += bias);
            }
        }
    }

    /// The loss of each row, in nats.
    pub(super) fn losses(&self, x: &[f32], targets: &[u32], pool: &mut Pool) -> Vec<f32> {
        let mut normed = pool.take(x.len());
        Loaded::new(self.norm, self.weights()).rows(&mut normed, x);
        let count = self.chunk_rows(targets.len());
        let mut logits = pool.take(count * self.vocabulary);
        let mut losses = Vec::with_capacity(targets.len());
        for (normed, targets) in normed.chunks(count * self.hidden).zip(targets.chunks(count)) {
            let logits = &mut logits[..targets.len() * self.vocabulary];
            self.logits(logits, normed);
            losses.extend(row_losses(logits, targets, self.vocabulary, 0.0));
        }
        pool.give(logits);
        pool.give(normed);
        losses
    }

    /// Writes the gradient of `x` by the mean loss of the rows that count over `x`, adds those of the parameters, and returns that mean.
    pub(super) fn mean_loss(&self, x: &mut [f32], targets: &[u32], gradients: &mut [Vec<f32>], pool: &mut Pool) -> f32 {
        let norm = Loaded::new(self.norm, self.weights());
        let mut normed = pool.take(x.len());
        norm.rows(&mut normed, x);
        let counted = targets.iter().filter(|target| **target != LEFT_OUT).count().max(1);
        let share = 1.0 / counted as f32;
        let count = self.chunk_rows(targets.len());
        let mut logits = pool.take(count * self.vocabulary);
        let mut sum = 0.0f64;
        let last = gradients.len() - 1;
        for (normed, targets) in normed.chunks_mut(count * self.hidden).zip(targets.chunks(count)) {
            let rows = targets.len();
            let logits = &mut logits[..rows * self.vocabulary];
            self.logits(logits, normed);
            let losses = row_losses(logits, targets, self.vocabulary, share);
            sum += losses.iter().map(|loss| f64::from(*loss)).sum::<f64>();
            if let Some(bias) = self.bias.filter(|_| self.weights().slots.asks_all()) {
                let gradient = &mut gradients[last][self.weights().slots.range(bias)];
                add_column_sums(gradient, logits, self.vocabulary, 0);
            }
            let own = View::new(logits, rows, self.vocabulary);
            let (part, weight) = self.projection.clone();
            if self.slots[part].asks(&weight) {
                let gradient = ViewMut::new(&mut gradients[part][weight], self.vocabulary, self.hidden);
                let read = View::new(normed, rows, self.hidden);
                self.products.product(gradient, Mode::Add, own.transposed(), read);
            }
            // What was normed has been read for the last time; its gradient takes its place.
            let out = ViewMut::new(normed, rows, self.hidden);
            self.products.product(out, Mode::Write, own, self.projection());
        }
        let mut x_gradient = pool.take(x.len());
        x_gradient.fill(0.0);
        let sums = norm.rows_backward(&mut x_gradient, &normed, x);
        sums.add_to(&mut gradients[last], self.norm, self.weights());
        x.copy_from_slice(&x_gradient);
        for buffer in [logits, normed, x_gradient] {
            pool.give(buffer);
        }
        (sum / counted as f64) as f32
    }
}

fn row_losses(logits: &mut [f32], targets: &[u32], vocabulary: usize, share: f32) -> Vec<f32> {
    let rows = logits.par_chunks_mut(vocabulary).zip(targets.par_iter());
    let loss = |(logits, target): (&mut [f32], &u32)| {
        if *target == LEFT_OUT {
            logits.fill(0.0);
            return 0.0;
        }
        loss(logits, *target as usize, share)
    };
    rows.map(loss).collect()
}
