//! The product of two matrices, block by block.

use rayon::prelude::*;

use super::super::product::{Mode, View, ViewMut};
use super::amx::Tiles;
use super::buffers::Buffer;
use super::pack::Operand;
use super::tile::{Factors, LINES, SQUARE, Side, Tile};
use super::{Instructions, avx512};

/// Bytes of the larger operand that one task packs: with what it is multiplied with they stay in a core's own cache.
const BLOCK_BYTES: usize = 512 << 10;
/// Tiles of a panel that are multiplied before the next panel's turn: those of two panels stay in the nearest cache.
const STEPS: usize = 16;
/// Tasks for each thread, so that none waits long for another.
const TASKS: usize = 3;

/// `out = a · b`, or `out += a · b`, with elements of `a` and `b` rounded to bf16.
pub(in crate::train::cpu) fn product(
    instructions: Instructions,
    out: ViewMut<'_>,
    mode: Mode,
    a: View<'_>,
    b: View<'_>,
) {
    let (left, right) = (Operand::left(a), Operand::right(b));
    let out = Output::new(out);
    assert!(
        left.lines == out.rows && right.lines == out.cols && left.elements == right.elements,
        "matrices that do not meet"
    );
    if out.rows == 0 || out.cols == 0 {
        return;
    }
    if left.elements == 0 {
        if mode == Mode::Write {
            out.clear();
        }
        return;
    }
    let steps = left.steps();
    let (whole, cut) = match left.lines <= right.lines {
        true => (left, right),
        false => (right, left),
    };
    let squares = cut.lines.div_ceil(SQUARE);
    let fit = BLOCK_BYTES / (2 * steps * size_of::<Tile>());
    let fair = squares.div_ceil(TASKS * rayon::current_num_threads());
    let block = fit.min(fair).max(1) * SQUARE;
    Buffer::Whole.lend(whole.lines.div_ceil(SQUARE) * 2 * steps, |tiles| {
        let panels = tiles.par_chunks_mut(2 * steps).enumerate();
        // SAFETY: `instructions` are those of this machine, and all of them come with those that pack.
        panels.for_each(|(index, tiles)| unsafe { whole.pack(tiles, index * SQUARE) });
        let whole = Panels { steps, tiles };
        (0..cut.lines.div_ceil(block)).into_par_iter().for_each(|index| {
            let first = index * block;
            let squares = (cut.lines - first).min(block).div_ceil(SQUARE);
            Buffer::Block.lend(squares * 2 * steps, |tiles| {
                // SAFETY: as above.
                unsafe { cut.pack(tiles, first) };
                let own = Panels { steps, tiles };
                let task = Task {
                    out: &out,
                    mode,
                    whole,
                    own,
                    first,
                    side: cut.side,
                };
                match instructions {
                    Instructions::Amx => {
                        // SAFETY: as above.
                        let tiles = unsafe { Tiles::configure() };
                        task.run(|out, stride, mode, factors| {
                            // SAFETY: the task's squares are within the output, and factors have at least one tile.
                            unsafe { tiles.square(out, stride, mode, factors) }
                        });
                    }
                    Instructions::Avx512 => task.run(|out, stride, mode, factors| {
                        // SAFETY: as above.
                        unsafe { avx512::square(out, stride, mode, factors) }
                    }),
                }
            });
        });
    });
}

/// A packed operand, or a part of one: panels of sixteen lines, two for each square.
#[derive(Debug, Clone, Copy)]
struct Panels<'a> {
    steps: usize,
    tiles: &'a [Tile],
}

impl<'a> Panels<'a> {
    fn squares(self) -> usize {
        self.tiles.len() / (2 * self.steps)
    }

    /// The two panels of a square, from step `from` to step `to`.
    fn square(self, index: usize, from: usize, to: usize) -> [&'a [Tile]; 2] {
        [0, 1].map(|half| &self.tiles[(2 * index + half) * self.steps..][from..to])
    }
}

/// The output, of which every task writes other lines.
#[derive(Debug)]
struct Output<'a> {
    values: *mut f32,
    rows: usize,
    cols: usize,
    stride: usize,
    owner: core::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: tasks write disjoint lines, and the view is borrowed for as long as this lives.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    fn new(view: ViewMut<'a>) -> Self {
        let (values, rows, cols, stride) = view.into_parts();
        Self {
            values: values.as_mut_ptr(),
            rows,
            cols,
            stride,
            owner: core::marker::PhantomData,
        }
    }

    /// Sums of no products.
    fn clear(&self) {
        for row in 0..self.rows {
            // SAFETY: the row is within the view.
            unsafe { core::slice::from_raw_parts_mut(self.values.add(row * self.stride), self.cols) }.fill(0.0);
        }
    }
}

/// Lines of the output from `first` on: those of `own`, on its side, with all of `whole`.
struct Task<'a> {
    out: &'a Output<'a>,
    mode: Mode,
    whole: Panels<'a>,
    own: Panels<'a>,
    first: usize,
    side: Side,
}

impl Task<'_> {
    /// Has `square` write or add every square of the task: at a place, with a stride, from factors.
    fn run(&self, mut square: impl FnMut(*mut f32, usize, Mode, Factors<'_>)) {
        let steps = self.own.steps;
        let mut from = 0;
        let mut mode = self.mode;
        while from < steps {
            let to = (from + STEPS).min(steps);
            for of_whole in 0..self.whole.squares() {
                let others = self.whole.square(of_whole, from, to);
                for index in 0..self.own.squares() {
                    let own = self.own.square(index, from, to);
                    let (line, other) = (self.first + index * SQUARE, of_whole * SQUARE);
                    let ((row, col), (left, right)) = match self.side {
                        Side::Left => ((line, other), (own, others)),
                        Side::Right => ((other, line), (others, own)),
                    };
                    let factors = Factors { left, right };
                    self.at(row, col, mode, factors, &mut square);
                }
            }
            from = to;
            mode = Mode::Add;
        }
    }

    fn at(
        &self,
        row: usize,
        col: usize,
        mode: Mode,
        factors: Factors<'_>,
        square: &mut impl FnMut(*mut f32, usize, Mode, Factors<'_>),
    ) {
        let Output {
            values,
            rows,
            cols,
            stride,
            ..
        } = *self.out;
        let (height, width) = ((rows - row).min(SQUARE), (cols - col).min(SQUARE));
        let place = values.wrapping_add(row * stride + col);
        if (height, width) == (SQUARE, SQUARE) {
            square(place, stride, mode, factors);
            return;
        }
        let mut edge = Edge([[0.0; SQUARE]; SQUARE]);
        square(edge.0.as_mut_ptr().cast(), SQUARE, Mode::Write, factors);
        for (row, edge) in edge.0.iter().take(height).enumerate() {
            // SAFETY: `width` elements of a row of the view, which are this task's.
            let out = unsafe { core::slice::from_raw_parts_mut(place.add(row * stride), width) };
            for (out, value) in out.iter_mut().zip(edge) {
                *out = match mode {
                    Mode::Write => *value,
                    Mode::Add => *out + value,
                };
            }
        }
    }
}

/// A square of which not all is in the output.
#[repr(C, align(64))]
struct Edge([[f32; SQUARE]; SQUARE]);

const _: () = assert!(SQUARE == 2 * LINES, "a square is two panels by two");
