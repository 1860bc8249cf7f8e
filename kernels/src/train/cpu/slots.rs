//! Where the tensors of a part lie in its numbers, and whose gradients are asked for.

use core::ops::Range;

use polder_protocol::layout::{BlockRange, Layout};

use super::products::Products;
use crate::model::describe::{Linear, Slot};

/// The tensors of one part.
#[derive(Debug, Clone)]
pub(super) struct Slots {
    /// In layout order.
    tensors: Vec<Range<usize>>,
    /// The weights whose gradients are asked for, where not all parameters' are.
    only: Option<Vec<Range<usize>>>,
}

impl Slots {
    /// Those of each part of `range`.
    pub(super) fn of(layout: &Layout, range: BlockRange) -> Vec<Self> {
        let parts = range.parts(layout.blocks());
        let parts = layout.parts.get(parts.start as usize..parts.end as usize);
        let slots = parts.unwrap_or_default().iter().map(|part| {
            let mut start = 0;
            let ranges = part.tensors.iter().map(|tensor| {
                let end = start + tensor.elements().unwrap_or(0);
                core::mem::replace(&mut start, end)..end
            });
            Self {
                tensors: ranges.collect(),
                only: None,
            }
        });
        slots.collect()
    }

    /// A description names only what is in its layout.
    pub(super) fn range(&self, slot: Slot) -> Range<usize> {
        self.tensors
            .get(slot.0)
            .cloned()
            .unwrap_or_else(|| unreachable!("{slot:?} is not in the layout"))
    }

    /// From now on the gradients of these weights are asked for, and no others'.
    pub(super) fn ask_only(&mut self, weights: Vec<Range<usize>>) {
        self.only = Some(weights);
    }

    /// Whether gradients of all parameters are asked for.
    pub(super) fn asks_all(&self) -> bool {
        self.only.is_none()
    }

    /// Whether the gradient of a weight is asked for.
    pub(super) fn asks(&self, weight: &Range<usize>) -> bool {
        let meets = |only: &Range<usize>| only.start < weight.end && weight.start < only.end;
        self.only.as_ref().is_none_or(|only| only.iter().any(meets))
    }

    /// The weight of `linear`, `[rows, cols]`.
    pub(super) fn weight(&self, linear: &Linear) -> Range<usize> {
        let start = self.range(linear.weight).start + linear.first_row * linear.cols;
        start..start + linear.rows * linear.cols
    }
}

/// The parameters of one part, and what multiplies with them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Weights<'a> {
    pub(super) values: &'a [f32],
    pub(super) slots: &'a Slots,
    pub(super) products: Products,
}

impl<'a> Weights<'a> {
    pub(super) fn slot(self, slot: Slot) -> &'a [f32] {
        &self.values[self.slots.range(slot)]
    }
}
