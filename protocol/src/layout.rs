//! How a model's parameters are divided: parts, tensors, and the stages that hold them.
//!
//! A model of `blocks` blocks has `blocks + 2` parts: part 0 is the embedding, parts 1 to `blocks` are the blocks, and
//! the last part is the head (final norm and output projection). Weights, pseudo-gradients and state hashes are kept
//! per part, so replicas that split the model differently still speak of the same things.

use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

use serde::{Deserialize, Serialize};

/// The number of a part: 0 is the embedding, `blocks + 1` the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Part(pub u32);

/// Consecutive blocks `[first, end)` of a model. The range that starts at block 0 also holds the embedding; the one
/// that ends with the last block also holds the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockRange {
    /// The first block.
    pub first: u32,
    /// One past the last block.
    pub end: u32,
}

impl BlockRange {
    /// All blocks of a model of `blocks` blocks.
    pub const fn whole(blocks: u32) -> Self {
        Self { first: 0, end: blocks }
    }

    /// Whether this range holds the embedding.
    pub const fn has_embedding(&self) -> bool {
        self.first == 0
    }

    /// Whether this range holds the head of a model of `blocks` blocks.
    pub const fn has_head(&self, blocks: u32) -> bool {
        self.end == blocks
    }

    /// The parts that this range holds in a model of `blocks` blocks, embedding and head included where they belong.
    pub fn parts(&self, blocks: u32) -> Range<u32> {
        let first = if self.has_embedding() {
            0
        } else {
            self.first.saturating_add(1)
        };
        let end = if self.has_head(blocks) {
            blocks.saturating_add(2)
        } else {
            self.end.saturating_add(1)
        };
        first..end
    }

    /// Whether it is a non-empty range within a model of `blocks` blocks.
    pub const fn fits(&self, blocks: u32) -> bool {
        self.first < self.end && self.end <= blocks
    }
}

/// One tensor of a part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorLayout {
    /// The Hugging Face name, such as `model.layers.3.mlp.up_proj.weight`.
    pub name: String,
    /// Dimensions, outermost first, as in the Hugging Face file: a linear layer's weight is `[out, in]`.
    pub shape: Vec<u32>,
}

impl TensorLayout {
    /// The number of elements; `None` where it does not fit.
    pub fn elements(&self) -> Option<usize> {
        self.shape
            .iter()
            .try_fold(1usize, |product, dim| product.checked_mul(usize::try_from(*dim).ok()?))
    }
}

/// The tensors of one part, in the order in which their elements are laid end to end.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PartLayout {
    /// The tensors in order.
    pub tensors: Vec<TensorLayout>,
}

impl PartLayout {
    /// The number of elements of all tensors; `None` where it does not fit.
    pub fn elements(&self) -> Option<usize> {
        self.tensors
            .iter()
            .try_fold(0usize, |sum, tensor| sum.checked_add(tensor.elements()?))
    }
}

/// The parts of a model: embedding, blocks, head.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Layout {
    /// `blocks + 2` parts.
    pub parts: Vec<PartLayout>,
}

impl Layout {
    /// The number of blocks.
    pub fn blocks(&self) -> u32 {
        u32::try_from(self.parts.len()).unwrap_or(u32::MAX).saturating_sub(2)
    }

    /// The number of parameters; `None` where it does not fit.
    pub fn elements(&self) -> Option<usize> {
        self.parts
            .iter()
            .try_fold(0usize, |sum, part| sum.checked_add(part.elements()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_stages_hold_every_part_once() {
        let first = BlockRange { first: 0, end: 2 };
        let second = BlockRange { first: 2, end: 4 };
        assert_eq!(first.parts(4), 0..3);
        assert_eq!(second.parts(4), 3..6);
        assert_eq!(BlockRange::whole(4).parts(4), 0..6);
    }
}
