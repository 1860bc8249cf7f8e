//! Muon: momentum whose matrix is made nearly orthogonal by Newton and Schulz's iteration, in f32.

use super::cpu::product::{Mode, Threads, View, ViewMut, product};

/// A step's settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Muon {
    /// How far a step goes, before [`Muon::step`] widens it for tall matrices.
    pub(super) learning_rate: f32,
    /// Decay of the momentum.
    pub(super) momentum: f32,
    /// Whether the gradient is mixed in once more.
    pub(super) nesterov: bool,
    /// Decoupled weight decay.
    pub(super) weight_decay: f32,
    /// Iterations.
    pub(super) iterations: u32,
    /// What each gradient is multiplied by first.
    pub(super) gradient_scale: f32,
}

/// The quintic that drives singular values towards one, tuned for a steep slope at zero.
const COEFFICIENTS: [f32; 3] = [3.4445, -4.775, 2.0315];
/// Keeps the norm of an empty matrix from dividing by zero.
const NORM_MIN: f32 = 1e-7;

impl Muon {
    /// Takes a step with a matrix `[rows, cols]` and its momentum of the same shape.
    ///
    /// # Panics
    ///
    /// When lengths differ.
    pub(super) fn step(
        &self,
        parameters: &mut [f32],
        gradient: &[f32],
        momentum: &mut [f32],
        [rows, cols]: [usize; 2],
    ) {
        assert!(parameters.len() == rows * cols && gradient.len() == rows * cols && momentum.len() == rows * cols);
        for (momentum, gradient) in momentum.iter_mut().zip(gradient) {
            *momentum += (1.0 - self.momentum) * (gradient * self.gradient_scale - *momentum);
        }
        let update: Vec<f32> = match self.nesterov {
            true => gradient
                .iter()
                .zip(&*momentum)
                .map(|(gradient, momentum)| {
                    let gradient = gradient * self.gradient_scale;
                    gradient + self.momentum * (momentum - gradient)
                })
                .collect(),
            false => momentum.to_vec(),
        };
        let orthogonal = orthogonal(update, [rows, cols], self.iterations);
        // A tall matrix moves its outputs less for the same norm.
        let rate = self.learning_rate * (rows as f32 / cols.max(1) as f32).max(1.0).sqrt();
        let kept = 1.0 - self.learning_rate * self.weight_decay;
        for (p, update) in parameters.iter_mut().zip(orthogonal) {
            *p = *p * kept - rate * update;
        }
    }
}

/// Nearly the orthogonal factor of a matrix.
fn orthogonal(x: Vec<f32>, [rows, cols]: [usize; 2], iterations: u32) -> Vec<f32> {
    // The products are of the shorter side.
    let tall = rows > cols;
    let (mut x, rows, cols) = if tall {
        (transposed(&x, rows, cols), cols, rows)
    } else {
        (x, rows, cols)
    };
    let norm = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() as f32;
    x.iter_mut().for_each(|x| *x /= norm.max(NORM_MIN));
    let [a, b, c] = COEFFICIENTS;
    let (mut gram, mut mixed) = (vec![0.0; rows * rows], vec![0.0; rows * rows]);
    let mut moved = vec![0.0; rows * cols];
    for _ in 0..iterations {
        let own = View::new(&x, rows, cols);
        let out = ViewMut::new(&mut gram, rows, rows);
        product(out, Mode::Write, own, own.transposed(), Threads::All);
        let square = View::new(&gram, rows, rows);
        product(
            ViewMut::new(&mut mixed, rows, rows),
            Mode::Write,
            square,
            square,
            Threads::All,
        );
        for (mixed, gram) in mixed.iter_mut().zip(&gram) {
            *mixed = b * gram + c * *mixed;
        }
        let out = ViewMut::new(&mut moved, rows, cols);
        product(out, Mode::Write, View::new(&mixed, rows, rows), own, Threads::All);
        for (x, moved) in x.iter_mut().zip(&moved) {
            *x = a * *x + moved;
        }
    }
    if tall { transposed(&x, rows, cols) } else { x }
}

fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols).map(|at| x[at % rows * cols + at / rows]).collect()
}

#[cfg(test)]
mod tests {
    use super::super::rules::{number, row, rule};
    use super::*;

    #[test]
    fn muon_meets_pytorch_as_closely_as_its_bfloat16_allows() {
        let rule = rule("muon");
        let muon = Muon {
            learning_rate: number(&rule, "lr"),
            momentum: number(&rule, "momentum"),
            nesterov: rule["nesterov"].as_bool().unwrap(),
            weight_decay: number(&rule, "weight_decay"),
            iterations: rule["ns_steps"].as_u64().unwrap() as u32,
            gradient_scale: 1.0,
        };
        let matrix =
            |value: &serde_json::Value| -> Vec<f32> { value.as_array().unwrap().iter().flat_map(row).collect() };
        let mut parameters = matrix(&rule["p0"]);
        let shape = [4, 6];
        let mut momentum = vec![0.0; 24];
        let steps = rule["grads"]
            .as_array()
            .unwrap()
            .iter()
            .zip(rule["p"].as_array().unwrap());
        for (gradient, right) in steps {
            muon.step(&mut parameters, &matrix(gradient), &mut momentum, shape);
            for (p, right) in parameters.iter().zip(matrix(right)) {
                assert!((p - right).abs() < number(&rule, "tolerance_abs"), "{p} {right}");
            }
        }
    }

    #[test]
    fn a_tall_matrix_is_the_turned_step_of_a_wide_one() {
        let x: Vec<f32> = (0..24).map(|i| (i as f32 * 0.7).sin()).collect();
        let wide = orthogonal(x.clone(), [4, 6], 5);
        let tall = orthogonal(transposed(&x, 4, 6), [6, 4], 5);
        assert_eq!(transposed(&wide, 4, 6), tall);
    }
}
