//! The gate of a perceptron: SwiGLU.

use cubecl::prelude::*;

use super::memory::{one_unit_each, size, small, units};
use super::{Cost, CubeError, Cubes, Floats};

#[cube(launch)]
fn gate(gate: &[f32], up: &[f32], out: &mut [f32], count: u32) {
    if ABSOLUTE_POS < count as usize {
        let value = gate[ABSOLUTE_POS];
        out[ABSOLUTE_POS] = value / (1.0f32 + (-value).exp()) * up[ABSOLUTE_POS];
    }
}

impl Cubes {
    /// `out = gate · sigmoid(gate) · up`, element by element (Shazeer 2020, SwiGLU).
    ///
    /// # Errors
    ///
    /// [`CubeError`] where the lengths differ.
    pub fn gate(&self, gate: &Floats, up: &Floats) -> Result<Floats, CubeError> {
        let count = size("the gate", &[gate.len()])?;
        up.check("what is gated", count)?;
        let out = self.room(count);
        if count > 0 {
            gate::launch(
                self.client(),
                one_unit_each(count),
                units(),
                gate.argument(),
                up.argument(),
                out.argument(),
                small(count),
            );
        }
        Ok(out)
    }
}

impl Cost {
    /// Of [`Cubes::gate`].
    pub const fn gate(count: usize) -> Self {
        Self::new(8 * count, 4 * count, 5 * count)
    }
}
