//! How fast packed products are, against the speed at which memory can be read at all.
//!
//! `cargo bench -p polder-kernels --bench packed_products`. A product of one activation row reads its weights once, so
//! its bound is memory; one of many rows is bound by arithmetic.

use std::hint::black_box;
use std::time::{Duration, Instant};

use polder_kernels::quant::{PackedMatrix, PackedType, narrow};
use rayon::prelude::*;

/// `[out, in]` of SmolLM2-135M: attention, key-value, up, down, head.
const SHAPES: [(usize, usize); 5] = [(576, 576), (192, 576), (1536, 576), (576, 1536), (49_152, 576)];
/// Weights that are read in turn, so that none is still in a cache: several times the largest.
const WORKING_SET_BYTES: usize = 256 << 20;
const MEASURED: Duration = Duration::from_millis(300);

fn main() {
    let memory = memory_bandwidth();
    println!("threads {}, memory {memory:.1} GB/s", rayon::current_num_threads());
    println!(
        "{:6} {:>13} {:>4} {:>10} {:>8} {:>9} {:>9}",
        "type", "shape", "rows", "µs", "GB/s", "of memory", "GMAC/s"
    );
    for ty in [PackedType::Q4_1, PackedType::Q8_0] {
        for (rows, cols) in SHAPES {
            for n in [1, 16, 128] {
                if n * rows * cols < 1 << 30 {
                    report(ty, rows, cols, n, memory);
                }
            }
        }
    }
}

fn report(ty: PackedType, rows: usize, cols: usize, n: usize, memory: f64) {
    let values: Vec<f32> = (0..rows * cols)
        .map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0)
        .collect();
    let bytes = narrow(ty, &values).expect("the shapes are whole blocks");
    let copies = (WORKING_SET_BYTES / bytes.len()).clamp(1, 2_000);
    let matrices: Vec<PackedMatrix> = (0..copies)
        .map(|_| PackedMatrix::new(ty, rows, cols, bytes.clone().into()).expect("the bytes were made for it"))
        .collect();
    let x = vec![0.5; n * cols];
    let mut out = vec![0.0; n * rows];
    let mut turns = matrices.iter().cycle();
    let seconds = time(|| {
        if let Some(matrix) = turns.next() {
            matrix.multiply(&x, n, &mut out);
        }
        black_box(&out);
    });
    let speed = bytes.len() as f64 / seconds / 1e9;
    println!(
        "{ty:6} {:>13} {n:>4} {:>10.1} {speed:>8.2} {:>8.0}% {:>9.1}",
        format!("{rows}x{cols}"),
        seconds * 1e6,
        speed / memory * 100.0,
        (n * rows * cols) as f64 / seconds / 1e9
    );
}

/// Gigabytes that all threads together read in a second.
fn memory_bandwidth() -> f64 {
    let words = vec![1u64; WORKING_SET_BYTES / 8];
    let seconds = time(|| {
        let sum: u64 = words.par_chunks(1 << 16).map(|chunk| chunk.iter().sum::<u64>()).sum();
        black_box(sum);
    });
    WORKING_SET_BYTES as f64 / seconds / 1e9
}

/// Seconds of one call: the fastest of several measurements, each long enough for the clock.
fn time(mut call: impl FnMut()) -> f64 {
    call();
    let mut best = f64::INFINITY;
    let end = Instant::now() + MEASURED;
    while Instant::now() < end {
        let start = Instant::now();
        let mut calls = 0;
        while start.elapsed() < MEASURED / 10 {
            call();
            calls += 1;
        }
        best = best.min(start.elapsed().as_secs_f64() / f64::from(calls));
    }
    best
}
