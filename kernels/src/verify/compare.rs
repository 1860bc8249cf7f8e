//! Errors of what was computed, quantity by quantity.

use super::cases::Cases;
use super::{Measure, Quantity};

/// Collects quantities.
pub(super) struct Tally<'a> {
    cases: &'a Cases,
    pub(super) quantities: Vec<Quantity>,
}

impl<'a> Tally<'a> {
    pub(super) const fn new(cases: &'a Cases) -> Self {
        Self {
            cases,
            quantities: Vec::new(),
        }
    }

    /// Differences, at most the tolerance `key`.
    pub(super) fn absolute(&mut self, name: &str, own: &[f32], right: &[f32], key: &str, otherwise: f64) {
        self.values(
            name,
            own,
            right,
            1.0,
            Measure::Absolute,
            self.cases.tolerance(key, otherwise),
        );
    }

    /// Differences as shares of the largest right value.
    pub(super) fn of_largest(&mut self, name: &str, own: &[f32], right: &[f32], key: &str, otherwise: f64) {
        let largest = right.iter().map(|value| f64::from(value.abs())).fold(0.0, f64::max);
        let largest = if largest > 0.0 { largest } else { 1.0 };
        let tolerance = self.cases.tolerance(key, otherwise);
        self.values(name, own, right, largest, Measure::OfLargest, tolerance);
    }

    /// How many of `of` differ; none may.
    pub(super) fn count(&mut self, name: &str, differ: usize, of: usize) {
        self.push(Quantity {
            name: name.to_owned(),
            largest: differ as f64,
            mean: differ as f64 / of.max(1) as f64,
            tolerance: 0.0,
            measure: Measure::Count,
            passed: differ == 0,
        });
    }

    /// Numbers as shares of the right ones, or of `floor` where those are below it: what is nothing but rounding has no
    /// digits to agree in.
    pub(super) fn relative(&mut self, name: &str, pairs: &[(f64, f64)], floor: f64, tolerance: f64) {
        let errors = pairs
            .iter()
            .map(|(own, right)| (own - right).abs() / right.abs().max(floor));
        self.errors(name, errors, Measure::Relative, tolerance);
    }

    fn values(&mut self, name: &str, own: &[f32], right: &[f32], unit: f64, measure: Measure, tolerance: f64) {
        if own.len() != right.len() {
            // Another number of values is as wrong as can be.
            return self.errors(name, [f64::INFINITY].into_iter(), measure, tolerance);
        }
        let errors = own
            .iter()
            .zip(right)
            .map(|(own, right)| f64::from((own - right).abs()) / unit);
        self.errors(name, errors, measure, tolerance);
    }

    fn errors(&mut self, name: &str, errors: impl Iterator<Item = f64>, measure: Measure, tolerance: f64) {
        let (mut largest, mut sum, mut count) = (0.0f64, 0.0, 0usize);
        for error in errors {
            // A number that is none is worse than any other.
            let error = if error.is_nan() { f64::INFINITY } else { error };
            largest = largest.max(error);
            sum += error;
            count += 1;
        }
        self.push(Quantity {
            name: name.to_owned(),
            largest,
            mean: sum / count.max(1) as f64,
            tolerance,
            measure,
            passed: largest <= tolerance,
        });
    }

    fn push(&mut self, quantity: Quantity) {
        self.quantities.push(quantity);
    }
}
