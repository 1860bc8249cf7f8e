//! Memory for packed operands, kept by each thread from product to product.

use core::cell::Cell;

use super::tile::Tile;

thread_local! {
    static WHOLE: Cell<Vec<Tile>> = const { Cell::new(Vec::new()) };
    static BLOCK: Cell<Vec<Tile>> = const { Cell::new(Vec::new()) };
}

/// What a buffer is for. A thread that waits for others with one in hand may be asked for another product meanwhile, and
/// then begins with none.
#[derive(Debug, Clone, Copy)]
pub(super) enum Buffer {
    /// The smaller operand.
    Whole,
    /// A part of the larger one.
    Block,
}

impl Buffer {
    /// Lends `count` tiles with anything in them.
    pub(super) fn lend<R>(self, count: usize, use_it: impl FnOnce(&mut [Tile]) -> R) -> R {
        let key = match self {
            Self::Whole => &WHOLE,
            Self::Block => &BLOCK,
        };
        let mut tiles = key.take();
        if tiles.len() < count {
            tiles.resize(count, Tile::ZERO);
        }
        let result = use_it(&mut tiles[..count]);
        key.set(tiles);
        result
    }
}
