//! Linear layers side by side: several that read the same rows write columns of the same output.

use core::ops::Range;

use rayon::prelude::*;

use super::product::{Mode, View, ViewMut};
use super::slots::{Slots, Weights};
use crate::model::describe::Linear;

/// Rows that one task takes where columns are summed, whatever the number of threads.
const ROWS: usize = 64;

/// Linear layers whose weights follow each other in memory: one product.
struct Run {
    weight: Range<usize>,
    column: usize,
    rows: usize,
}

/// Of those `linears` whose weight is `wanted`.
fn runs(slots: &Slots, linears: &[&Linear], wanted: impl Fn(&Range<usize>) -> bool) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut column = 0;
    for linear in linears {
        let weight = slots.weight(linear);
        match runs.last_mut() {
            _ if !wanted(&weight) => {}
            Some(run) if run.weight.end == weight.start => {
                run.weight.end = weight.end;
                run.rows += linear.rows;
            }
            _ => runs.push(Run {
                weight,
                column,
                rows: linear.rows,
            }),
        }
        column += linear.rows;
    }
    runs
}

/// `out = x · weightᵀ + bias` for all of `linears`, or added to `out`: `[rows, cols]` to `[rows, width]`.
pub(super) fn forward(out: &mut [f32], mode: Mode, weights: Weights<'_>, linears: &[&Linear], x: &[f32]) {
    let width: usize = linears.iter().map(|linear| linear.rows).sum();
    let cols = linears.first().map_or(1, |linear| linear.cols);
    let rows = x.len() / cols;
    for run in runs(weights.slots, linears, |_| true) {
        let weight = View::new(&weights.values[run.weight], run.rows, cols).transposed();
        let out = ViewMut::strided(&mut out[run.column..], rows, run.rows, width);
        weights.products.product(out, mode, View::new(x, rows, cols), weight);
    }
    let mut column = 0;
    for linear in linears {
        if let Some(bias) = linear.bias {
            let bias = weights.slot(bias);
            for out in out.chunks_exact_mut(width) {
                for (out, bias) in out[column..].iter_mut().zip(bias) {
                    *out += bias;
                }
            }
        }
        column += linear.rows;
    }
}

/// The gradient of `x` from that of the output.
pub(super) fn backward(x_gradient: &mut [f32], weights: Weights<'_>, linears: &[&Linear], out_gradient: &[f32]) {
    let width: usize = linears.iter().map(|linear| linear.rows).sum();
    let cols = linears.first().map_or(1, |linear| linear.cols);
    let rows = out_gradient.len() / width;
    let mut mode = Mode::Write;
    for run in runs(weights.slots, linears, |_| true) {
        let out_gradient = View::strided(&out_gradient[run.column..], rows, run.rows, width);
        let weight = View::new(&weights.values[run.weight], run.rows, cols);
        let x_gradient = ViewMut::new(x_gradient, rows, cols);
        weights.products.product(x_gradient, mode, out_gradient, weight);
        mode = Mode::Add;
    }
}

/// Adds the gradients of weights and biases to a part's `gradients`, those that are asked for.
pub(super) fn add_gradients(
    gradients: &mut [f32],
    weights: Weights<'_>,
    linears: &[&Linear],
    out_gradient: &[f32],
    x: &[f32],
) {
    let width: usize = linears.iter().map(|linear| linear.rows).sum();
    let cols = linears.first().map_or(1, |linear| linear.cols);
    let rows = x.len() / cols;
    for run in runs(weights.slots, linears, |weight| weights.slots.asks(weight)) {
        let out_gradient = View::strided(&out_gradient[run.column..], rows, run.rows, width);
        let gradient = ViewMut::new(&mut gradients[run.weight], run.rows, cols);
        let x = View::new(x, rows, cols);
        weights
            .products
            .product(gradient, Mode::Add, out_gradient.transposed(), x);
    }
    if !weights.slots.asks_all() {
        return;
    }
    let mut column = 0;
    for linear in linears {
        if let Some(bias) = linear.bias {
            add_column_sums(&mut gradients[weights.slots.range(bias)], out_gradient, width, column);
        }
        column += linear.rows;
    }
}

/// Adds to each of `sums` the column of `x` `[rows, width]` from `column` on.
pub(super) fn add_column_sums(sums: &mut [f32], x: &[f32], width: usize, column: usize) {
    let count = sums.len();
    let partial = x.par_chunks(ROWS * width).map(|rows| {
        let mut own = vec![0.0; count];
        for row in rows.chunks_exact(width) {
            for (sum, x) in own.iter_mut().zip(&row[column..]) {
                *sum += x;
            }
        }
        own
    });
    for own in partial.collect::<Vec<_>>() {
        for (sum, own) in sums.iter_mut().zip(own) {
            *sum += own;
        }
    }
}
