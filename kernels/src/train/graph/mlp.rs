//! Perceptrons, gated or not.

use burn::tensor::Tensor;
use burn::tensor::activation::silu;

use super::leaves::Part;
use super::{linear, softplus};
use crate::model::describe::{Activation, Mlp, Xielu};

/// Of rows `[rows, hidden]`.
pub(super) fn mlp(part: Part<'_>, mlp: &Mlp, x: &Tensor<2>) -> Tensor<2> {
    let up = linear(part, &mlp.up, x);
    let between = match &mlp.gate {
        Some(gate) => activate(part, mlp.activation, linear(part, gate, x)) * up,
        None => activate(part, mlp.activation, up),
    };
    linear(part, &mlp.down, &between)
}

fn activate(part: Part<'_>, activation: Activation, x: Tensor<2>) -> Tensor<2> {
    match activation {
        Activation::Silu => silu(x),
        Activation::GeluTanh => {
            let inner = (x.clone() + x.clone().powi_scalar(3).mul_scalar(0.044_715)).mul_scalar(0.797_884_6);
            x * inner.tanh().add_scalar(1.0).mul_scalar(0.5)
        }
        Activation::SquaredRelu => x.clamp_min(0.0).square(),
        Activation::Xielu(slots) => xielu(part, slots, x),
    }
}

/// `α₊ x² + β x` above zero, `α₋ (expm1(min(x, ε)) − x) + β x` below. `β` and `ε` are no parameters.
fn xielu(part: Part<'_>, slots: Xielu, x: Tensor<2>) -> Tensor<2> {
    let number = |slot| part.vector(slot).unsqueeze::<2>();
    let beta = number(slots.beta).detach();
    let epsilon = number(slots.epsilon).detach();
    let alpha_p = softplus(number(slots.alpha_p));
    let alpha_n = beta.clone() + softplus(number(slots.alpha_n));
    let above = x.clone().greater_elem(0.0);
    let epsilon = epsilon.expand(x.dims());
    let low = epsilon.clone().mask_where(x.clone().lower(epsilon), x.clone());
    // eʸ − 1 = tanh(y / 2) · (eʸ + 1), which does not cancel near zero.
    let expm1 = low.clone().mul_scalar(0.5).tanh() * low.exp().add_scalar(1.0);
    let below = (expm1 - x.clone()) * alpha_n;
    let curved = below.mask_where(above, x.clone().square() * alpha_p);
    curved + x * beta
}
