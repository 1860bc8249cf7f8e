//! What is multiplied: tiles of 16 lines and 32 elements of each.

/// Lines of a tile, which are also the pairs of its elements.
pub(super) const LINES: usize = 16;
/// Elements of a line in a tile.
pub(super) const ELEMENTS: usize = 32;
/// Rows and columns of a square of the output: two tiles by two.
pub(super) const SQUARE: usize = 2 * LINES;

/// One kibibyte of bf16. Of the left matrix it is `[line][element]`, of the right one `[pair][line][element of pair]`.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Tile(pub(super) [[u16; ELEMENTS]; LINES]);

impl Tile {
    pub(super) const ZERO: Self = Self([[0; ELEMENTS]; LINES]);
}

/// Which matrix a tile is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Left,
    Right,
}

/// Tiles that make one square of the output, or the next part of its sums.
#[derive(Debug, Clone, Copy)]
pub(super) struct Factors<'a> {
    /// Of 16 rows, and of the next 16.
    pub(super) left: [&'a [Tile]; 2],
    /// Of 16 columns, and of the next 16; each as long as `left`'s.
    pub(super) right: [&'a [Tile]; 2],
}
