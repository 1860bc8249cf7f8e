//! The activations of perceptrons, with and without a gate.

use cubecl::prelude::*;

use super::memory::{one_unit_each, size, small, units};
use super::{Cost, CubeError, Cubes, Floats};
use crate::model::Curve;

/// Which branch of the kernel, and its parameters.
const fn branch(curve: Curve) -> (u32, [f32; 4]) {
    match curve {
        Curve::Silu => (0, [0.0; 4]),
        Curve::GeluTanh => (1, [0.0; 4]),
        Curve::SquaredRelu => (2, [0.0; 4]),
        Curve::Xielu {
            alpha_p,
            alpha_n,
            beta,
            epsilon,
        } => (3, [alpha_p, alpha_n, beta, epsilon]),
    }
}

#[cube(launch)]
fn activate(
    x: &[f32],
    up: &[f32],
    out: &mut [f32],
    count: u32,
    alpha_p: f32,
    alpha_n: f32,
    beta: f32,
    epsilon: f32,
    #[comptime] kind: u32,
    #[comptime] gates: bool,
) {
    if ABSOLUTE_POS < count as usize {
        let value = x[ABSOLUTE_POS];
        let mut made = f32::new(0.0f32);
        if comptime!(kind == 0u32) {
            made = value / (1.0f32 + (-value).exp());
        }
        if comptime!(kind == 1u32) {
            // (1 + tanh y) / 2 is the sigmoid of 2y.
            let inner = 0.797_884_6f32 * (value + 0.044_715f32 * value * value * value);
            made = value / (1.0f32 + (-2.0f32 * inner).exp());
        }
        if comptime!(kind == 2u32) {
            let mut positive = value;
            if positive < 0.0f32 {
                positive = f32::new(0.0f32);
            }
            made = positive * positive;
        }
        if comptime!(kind == 3u32) {
            if value > 0.0f32 {
                made = alpha_p * value * value;
            } else {
                let mut below = value;
                if below > epsilon {
                    below = epsilon;
                }
                made = alpha_n * (below.exp() - 1.0f32 - value);
            }
            made += beta * value;
        }
        if comptime!(gates) {
            made *= up[ABSOLUTE_POS];
        }
        out[ABSOLUTE_POS] = made;
    }
}

impl Cubes {
    /// `out = act(x)`, or `act(x) · up` where `x` is a gate (Shazeer 2020, SwiGLU), element by element.
    ///
    /// # Errors
    ///
    /// [`CubeError`] where the lengths differ.
    pub fn activate(&self, curve: Curve, x: &Floats, up: Option<&Floats>) -> Result<Floats, CubeError> {
        let count = size("what is activated", &[x.len()])?;
        if let Some(up) = up {
            up.check("what is gated", count)?;
        }
        let (kind, [alpha_p, alpha_n, beta, epsilon]) = branch(curve);
        let out = self.room(count);
        if count > 0 {
            activate::launch(
                self.client(),
                one_unit_each(count),
                units(),
                x.argument(),
                up.unwrap_or(x).argument(),
                out.argument(),
                small(count),
                alpha_p,
                alpha_n,
                beta,
                epsilon,
                kind,
                up.is_some(),
            );
        }
        Ok(out)
    }
}

impl Cost {
    /// Of [`Cubes::activate`]. Of the functions, which differ, that of SiLU is counted.
    pub const fn activate(count: usize, gates: bool) -> Self {
        let gates = gates as usize;
        Self::new(4 * count * (1 + gates), 4 * count, count * (4 + gates))
    }
}
