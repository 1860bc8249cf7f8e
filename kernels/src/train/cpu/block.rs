//! Blocks of attention and perceptrons: forward, and backward from what the forward kept or from the input alone.

use super::activation::curve;
use super::attention::{self, Attend};
use super::linear;
use super::norm::Loaded;
use super::pool::Pool;
use super::product::Mode;
use super::rotation::Rotations;
use super::slots::Weights;
use crate::model::describe::{Activation, Block, Linear, Mixer, Mlp, Sublayer};

/// A block with everything that it reads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Loadable<'a> {
    pub(super) block: &'a Block,
    pub(super) weights: Weights<'a>,
    pub(super) rotations: &'a Rotations,
}

/// What a sublayer's backward needs.
#[derive(Debug)]
pub(super) struct Kept {
    /// `[rows, hidden]`: what went in.
    x: Vec<f32>,
    mixer: KeptMixer,
    /// What the sublayer came to before its last norm, where it has one.
    out: Option<Vec<f32>>,
}

#[derive(Debug)]
enum KeptMixer {
    Attention(attention::Kept),
    /// `[rows, gate and up]` before the activation.
    Mlp(Vec<f32>),
}

impl Kept {
    pub(super) fn give(self, pool: &mut Pool) {
        pool.give(self.x);
        match self.mixer {
            KeptMixer::Attention(kept) => kept.give(pool),
            KeptMixer::Mlp(inner) => pool.give(inner),
        }
        if let Some(out) = self.out {
            pool.give(out);
        }
    }
}

/// What a sublayer is computed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Output,
    /// What its backward needs, alone.
    Kept,
}

/// Whether sublayers of this kind are computed here.
pub(super) fn covers(mixer: &Mixer) -> bool {
    match mixer {
        Mixer::Attention(_) => true,
        Mixer::Mlp(mlp) => mlp.gate.is_none() || !matches!(mlp.activation, Activation::Xielu(_)),
        Mixer::Latent(_) | Mixer::Experts(_) | Mixer::Mamba(_) => false,
    }
}

/// Elements of one row of a [`Kept`].
pub(super) fn kept_elements(sublayer: &Sublayer) -> usize {
    let hidden = sublayer.norm.width;
    let mixer = match &sublayer.mixer {
        Mixer::Attention(shape) => (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim + shape.heads,
        Mixer::Mlp(mlp) => mlp.up.rows * inputs(mlp).len(),
        Mixer::Latent(_) | Mixer::Experts(_) | Mixer::Mamba(_) => 0,
    };
    hidden + mixer + if sublayer.after.is_some() { hidden } else { 0 }
}

impl Loadable<'_> {
    /// Moves rows `[rows, hidden]` through the block, in place.
    pub(super) fn forward(self, x: &mut [f32], pool: &mut Pool, mut keep: impl FnMut(Kept, &mut Pool)) {
        for sublayer in &self.block.0 {
            let kept = self.sublayer(sublayer, x, Wanted::Output, pool);
            keep(kept, pool);
        }
    }

    /// What the backward needs, from the block's input; the block's output is not computed.
    pub(super) fn again(self, mut x: Vec<f32>, pool: &mut Pool) -> Vec<Kept> {
        let last = self.block.0.len().saturating_sub(1);
        let mut all = Vec::new();
        for (index, sublayer) in self.block.0.iter().enumerate() {
            let wanted = if index == last { Wanted::Kept } else { Wanted::Output };
            all.push(self.sublayer(sublayer, &mut x, wanted, pool));
        }
        pool.give(x);
        all
    }

    /// Turns the gradient of the block's output into that of its input, and adds those of its parameters.
    pub(super) fn backward(self, kept: Vec<Kept>, x_gradient: &mut [f32], gradients: &mut [f32], pool: &mut Pool) {
        for (sublayer, kept) in self.block.0.iter().zip(kept).rev() {
            self.sublayer_backward(sublayer, kept, x_gradient, gradients, pool);
        }
    }

    fn sublayer(self, sublayer: &Sublayer, x: &mut [f32], wanted: Wanted, pool: &mut Pool) -> Kept {
        // A norm at the end is asked for its input again.
        let outs = wanted == Wanted::Output || sublayer.after.is_some();
        let kept = pool.copy(x);
        let mut normed = pool.take(x.len());
        let norm = Loaded::new(&sublayer.norm, self.weights);
        norm.rows(&mut normed, x);
        let rows = x.len() / sublayer.norm.width;
        let (mixer, out) = match &sublayer.mixer {
            Mixer::Attention(shape) => {
                let attend = self.attend(shape);
                let mut qkv = pool.take(rows * attend.width());
                linear::forward(
                    &mut qkv,
                    Mode::Write,
                    self.weights,
                    &[&shape.q, &shape.k, &shape.v],
                    &normed,
                );
                let kept = attend.forward(qkv, pool);
                let out = match outs {
                    true => self.add_out(sublayer, &shape.o, &kept.mixed, x, pool),
                    false => None,
                };
                (KeptMixer::Attention(kept), out)
            }
            Mixer::Mlp(mlp) => {
                let inputs = inputs(mlp);
                let mut inner = pool.take(rows * mlp.up.rows * inputs.len());
                linear::forward(&mut inner, Mode::Write, self.weights, &inputs, &normed);
                let mut out = None;
                if outs {
                    let mut active = pool.take(rows * mlp.up.rows);
                    let curve = curve(mlp.activation, self.weights);
                    curve.forward(&mut active, &inner, mlp.up.rows, mlp.gate.is_some());
                    out = self.add_out(sublayer, &mlp.down, &active, x, pool);
                    pool.give(active);
                }
                (KeptMixer::Mlp(inner), out)
            }
            other => unreachable!("{other:?} is computed elsewhere"),
        };
        pool.give(normed);
        Kept { x: kept, mixer, out }
    }

    /// Adds a sublayer's output to `x`, and returns it where its norm will be asked for again.
    fn add_out(
        self,
        sublayer: &Sublayer,
        linear: &Linear,
        mixed: &[f32],
        x: &mut [f32],
        pool: &mut Pool,
    ) -> Option<Vec<f32>> {
        let Some(after) = &sublayer.after else {
            linear::forward(x, Mode::Add, self.weights, &[linear], mixed);
            return None;
        };
        let (mut out, mut normed) = (pool.take(x.len()), pool.take(x.len()));
        linear::forward(&mut out, Mode::Write, self.weights, &[linear], mixed);
        Loaded::new(after, self.weights).rows(&mut normed, &out);
        x.iter_mut().zip(&normed).for_each(|(x, normed)| *x += normed);
        pool.give(normed);
        Some(out)
    }

    fn sublayer_backward(
        self,
        sublayer: &Sublayer,
        kept: Kept,
        x_gradient: &mut [f32],
        gradients: &mut [f32],
        pool: &mut Pool,
    ) {
        let mut before_norm = None;
        if let (Some(after), Some(out)) = (&sublayer.after, kept.out) {
            let mut gradient = pool.take(out.len());
            gradient.fill(0.0);
            let sums = Loaded::new(after, self.weights).rows_backward(&mut gradient, x_gradient, &out);
            sums.add_to(gradients, after, self.weights);
            pool.give(out);
            before_norm = Some(gradient);
        }
        let out_gradient = before_norm.as_deref().unwrap_or(x_gradient);
        let mut normed = pool.take(kept.x.len());
        let norm = Loaded::new(&sublayer.norm, self.weights);
        norm.rows(&mut normed, &kept.x);
        let mut normed_gradient = pool.take(kept.x.len());
        match (&sublayer.mixer, kept.mixer) {
            (Mixer::Attention(shape), KeptMixer::Attention(kept)) => {
                let mut mixed_gradient = pool.take(kept.mixed.len());
                linear::backward(&mut mixed_gradient, self.weights, &[&shape.o], out_gradient);
                linear::add_gradients(gradients, self.weights, &[&shape.o], out_gradient, &kept.mixed);
                let inputs = [&shape.q, &shape.k, &shape.v];
                let gradient = self.attend(shape).backward(kept, &mixed_gradient, gradients, pool);
                linear::backward(&mut normed_gradient, self.weights, &inputs, &gradient);
                linear::add_gradients(gradients, self.weights, &inputs, &gradient, &normed);
                pool.give(gradient);
                pool.give(mixed_gradient);
            }
            (Mixer::Mlp(mlp), KeptMixer::Mlp(mut inner)) => {
                let rows = kept.x.len() / sublayer.norm.width;
                let mut active = pool.take(rows * mlp.up.rows);
                linear::backward(&mut active, self.weights, &[&mlp.down], out_gradient);
                let curve = curve(mlp.activation, self.weights);
                if let Activation::Xielu(slots) = mlp.activation {
                    curve.add_parameter_gradients(gradients, slots, self.weights, &inner, &active);
                }
                curve.backward(&mut active, &mut inner, mlp.up.rows, mlp.gate.is_some());
                linear::add_gradients(gradients, self.weights, &[&mlp.down], out_gradient, &active);
                linear::backward(&mut normed_gradient, self.weights, &inputs(mlp), &inner);
                linear::add_gradients(gradients, self.weights, &inputs(mlp), &inner, &normed);
                pool.give(active);
                pool.give(inner);
            }
            (other, _) => unreachable!("{other:?} is computed elsewhere"),
        }
        let sums = norm.rows_backward(x_gradient, &normed_gradient, &kept.x);
        sums.add_to(gradients, &sublayer.norm, self.weights);
        for buffer in [normed, normed_gradient, kept.x].into_iter().chain(before_norm) {
            pool.give(buffer);
        }
    }
}

impl<'a> Loadable<'a> {
    fn attend(self, shape: &'a crate::model::describe::Attention) -> Attend<'a> {
        Attend {
            shape,
            weights: self.weights,
            rotations: self.rotations,
        }
    }
}

/// What reads the normed rows.
fn inputs(mlp: &Mlp) -> Vec<&Linear> {
    mlp.gate.iter().chain([&mlp.up]).collect()
}
