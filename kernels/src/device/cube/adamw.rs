//! AdamW in one pass over parameters, gradient and both moments.

use cubecl::prelude::*;

use super::memory::{one_unit_each, size, small, units};
use super::{Cost, CubeError, Cubes, Floats};

/// What one step is set to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Step size.
    pub learning_rate: f32,
    /// First moment decay.
    pub beta_1: f32,
    /// Second moment decay.
    pub beta_2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// What the gradient is multiplied by first: clipping, and the mean over micro-batches.
    pub gradient_scale: f32,
    /// Which step, from 1.
    pub step: u32,
}

#[cube(launch)]
fn adamw(
    parameters: &mut [f32],
    gradient: &[f32],
    first: &mut [f32],
    second: &mut [f32],
    count: u32,
    gradient_scale: f32,
    beta_1: f32,
    beta_2: f32,
    first_correction: f32,
    second_correction: f32,
    epsilon: f32,
    learning_rate: f32,
    weight_decay: f32,
) {
    if ABSOLUTE_POS < count as usize {
        let gradient = gradient[ABSOLUTE_POS] * gradient_scale;
        let m = beta_1 * first[ABSOLUTE_POS] + (1.0f32 - beta_1) * gradient;
        let v = beta_2 * second[ABSOLUTE_POS] + (1.0f32 - beta_2) * gradient * gradient;
        first[ABSOLUTE_POS] = m;
        second[ABSOLUTE_POS] = v;
        let update = m / first_correction / ((v / second_correction).sqrt() + epsilon);
        let parameter = parameters[ABSOLUTE_POS];
        parameters[ABSOLUTE_POS] = parameter - learning_rate * (update + weight_decay * parameter);
    }
}

impl Cubes {
    /// One step of AdamW (Loshchilov and Hutter 2019), in place.
    ///
    /// # Errors
    ///
    /// [`CubeError`] where the lengths differ, or the step is the zeroth.
    pub fn adamw(
        &self,
        parameters: &Floats,
        gradient: &Floats,
        first: &Floats,
        second: &Floats,
        step: AdamWStep,
    ) -> Result<(), CubeError> {
        let count = size("parameters", &[parameters.len()])?;
        gradient.check("the gradient", count)?;
        first.check("the first moment", count)?;
        second.check("the second moment", count)?;
        if step.step == 0 {
            return Err(CubeError::Range {
                what: "a step",
                value: 0,
                limit: "1 or more",
            });
        }
        let correction = |beta: f32| (1.0 - f64::from(beta).powf(f64::from(step.step))) as f32;
        if count > 0 {
            adamw::launch(
                self.client(),
                one_unit_each(count),
                units(),
                parameters.argument(),
                gradient.argument(),
                first.argument(),
                second.argument(),
                small(count),
                step.gradient_scale,
                step.beta_1,
                step.beta_2,
                correction(step.beta_1),
                correction(step.beta_2),
                step.epsilon,
                step.learning_rate,
                step.weight_decay,
            );
        }
        Ok(())
    }
}

impl Cost {
    /// Of [`Cubes::adamw`].
    pub const fn adamw(count: usize) -> Self {
        Self::new(16 * count, 12 * count, 18 * count)
    }
}
