//! Without the feature `gpu` no optimiser steps on a device.

use super::Leaves;
use super::sums::Sums;
use crate::device::Device;
use crate::train::TrainError;
use crate::train::adamw::AdamW;

/// There is none.
#[derive(Debug)]
pub(super) enum Stepper {}

impl Stepper {
    pub(super) fn new(_: &Device, _: u64) -> Option<Self> {
        None
    }

    pub(super) fn square_sum(&self, _: &Leaves, _: &Sums, _: f32) -> Result<f64, TrainError> {
        match *self {}
    }

    pub(super) fn step<'a>(
        &mut self,
        _: &Leaves,
        _: &Sums,
        _: &[Vec<AdamW>],
        _: impl Fn(usize, usize) -> Option<&'a [Vec<f32>]>,
    ) -> Result<(), TrainError> {
        match *self {}
    }

    pub(super) fn bring_moments(&self, _: impl FnMut(usize, usize, [Vec<f32>; 2])) -> Result<(), TrainError> {
        match *self {}
    }

    pub(super) fn forget_moments(&mut self) {
        match *self {}
    }
}
