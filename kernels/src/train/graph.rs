//! The forward pass of consecutive blocks in tensors, on any device, with a graph where gradients are wanted.

use burn::tensor::activation::{log_softmax, silu, softmax};
use burn::tensor::{Device, Int, Tensor, TensorData};
use polder_protocol::layout::{BlockRange, Layout};

use crate::model::{Config, Frequencies};

/// What masks a later position: far below any score, and finite, so that nothing becomes NaN.
const MASKED: f32 = -1e30;

/// The parameters of a stage as tensors, per part, in layout order.
#[derive(Debug, Clone)]
pub(super) struct Leaves(Vec<Vec<Leaf>>);

/// A parameter.
#[derive(Debug, Clone)]
pub(super) enum Leaf {
    Vector(Tensor<1>),
    Matrix(Tensor<2>),
}

impl Leaves {
    /// Uploads parameters; a device with gradients tracks them.
    pub(super) fn new(layout: &Layout, range: BlockRange, parameters: &[Vec<f32>], device: &Device) -> Self {
        let first = range.parts(layout.blocks()).start as usize;
        let tracked = device.is_autodiff();
        let parts = parameters.iter().zip(&layout.parts[first..]).map(|(values, part)| {
            let mut rest = &values[..];
            let leaves = part.tensors.iter().map(|tensor| {
                let shape: Vec<usize> = tensor.shape.iter().map(|dim| *dim as usize).collect();
                let (own, others) = rest.split_at(shape.iter().product());
                rest = others;
                let data = TensorData::new(own.to_vec(), shape.clone());
                match shape.len() {
                    1 => Leaf::Vector(Tensor::from_data(data, device).set_require_grad(tracked)),
                    _ => Leaf::Matrix(Tensor::from_data(data, device).set_require_grad(tracked)),
                }
            });
            leaves.collect()
        });
        Self(parts.collect())
    }

    /// Parts, each with its parameters.
    pub(super) fn parts(&self) -> &[Vec<Leaf>] {
        &self.0
    }
}

/// What all micro-batches of one shape share: rotations and the mask.
#[derive(Debug, Clone)]
pub(super) struct Positions {
    seq: usize,
    /// `[1, seq, 1, head_dim / 2]`
    cosines: Tensor<4>,
    sines: Tensor<4>,
    /// `[1, 1, group · seq, seq]`: zero for what a position sees.
    mask: Tensor<4>,
}

impl Positions {
    pub(super) fn new(config: &Config, seq: usize, device: &Device) -> Self {
        let frequencies = Frequencies::of(config);
        let pairs = frequencies.pairs();
        let (mut cosines, mut sines) = (vec![0.0; seq * pairs], vec![0.0; seq * pairs]);
        for (position, (cosines, sines)) in cosines.chunks_mut(pairs).zip(sines.chunks_mut(pairs)).enumerate() {
            frequencies.turn(position, cosines, sines);
        }
        let group = config.heads / config.kv_heads;
        let mask = (0..group * seq).flat_map(|row| {
            let visible = row % seq + 1;
            (0..seq).map(move |column| if column < visible { 0.0 } else { MASKED })
        });
        let rotation = |values| Tensor::from_data(TensorData::new(values, [1, seq, 1, pairs]), device);
        Self {
            seq,
            cosines: rotation(cosines),
            sines: rotation(sines),
            mask: Tensor::from_data(
                TensorData::new(mask.collect::<Vec<f32>>(), [1, 1, group * seq, seq]),
                device,
            ),
        }
    }

    pub(super) fn seq(&self) -> usize {
        self.seq
    }
}

/// Embeds token ids: `[rows]` to `[rows, hidden]`.
pub(super) fn embed(leaves: &Leaves, tokens: &[u32], device: &Device) -> Option<Tensor<2>> {
    let Some(Leaf::Matrix(embedding)) = leaves.0.first().and_then(|part| part.first()) else {
        return None;
    };
    Some(embedding.clone().select(0, indices(tokens, device)))
}

/// Runs the blocks of a stage: `[batch · seq, hidden]` to the same.
pub(super) fn blocks(
    config: &Config,
    range: BlockRange,
    leaves: &Leaves,
    positions: &Positions,
    mut x: Tensor<2>,
) -> Tensor<2> {
    let first = usize::from(range.has_embedding());
    let count = (range.end - range.first) as usize;
    for part in leaves.0.iter().skip(first).take(count) {
        if let [
            Leaf::Vector(attention_norm),
            Leaf::Matrix(q),
            Leaf::Matrix(k),
            Leaf::Matrix(v),
            Leaf::Matrix(o),
            Leaf::Vector(mlp_norm),
            Leaf::Matrix(gate),
            Leaf::Matrix(up),
            Leaf::Matrix(down),
        ] = part.as_slice()
        {
            let normed = rms_norm(x.clone(), attention_norm, config.epsilon);
            let mixed = attention(config, positions, [q, k, v].map(|weight| product(&normed, weight)));
            x = x + product(&mixed, o);
            let normed = rms_norm(x.clone(), mlp_norm, config.epsilon);
            let gated = silu(product(&normed, gate)) * product(&normed, up);
            x = x + product(&gated, down);
        }
    }
    x
}

/// The logits of a stage with the head: `[rows, hidden]` to `[rows, vocabulary]`.
pub(super) fn logits(config: &Config, leaves: &Leaves, x: Tensor<2>) -> Option<Tensor<2>> {
    let head = leaves.0.last()?;
    let Some(Leaf::Vector(norm)) = head.first() else {
        return None;
    };
    let projection = match config.tied {
        true => leaves.0.first()?.first()?,
        false => head.get(1)?,
    };
    let Leaf::Matrix(projection) = projection else {
        return None;
    };
    Some(product(&rms_norm(x, norm, config.epsilon), projection))
}

/// The loss of each row in nats, `[rows]`.
pub(super) fn losses(logits: Tensor<2>, targets: &[u32], device: &Device) -> Tensor<1> {
    let targets = indices(targets, device).unsqueeze_dim::<2>(1);
    log_softmax(logits, 1).gather(1, targets).neg().squeeze_dim(1)
}

fn indices(tokens: &[u32], device: &Device) -> Tensor<1, Int> {
    // Checked against the vocabulary, which fits.
    let ids: Vec<i32> = tokens.iter().map(|token| *token as i32).collect();
    let count = ids.len();
    Tensor::from_data(TensorData::new(ids, [count]), &device.clone().without_autodiff())
}

fn product(x: &Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
    x.clone().matmul(weight.clone().transpose())
}

fn rms_norm(x: Tensor<2>, gain: &Tensor<1>, epsilon: f32) -> Tensor<2> {
    let scale = x.clone().square().mean_dim(1).add_scalar(epsilon).sqrt().recip();
    x * scale * gain.clone().unsqueeze::<2>()
}

/// Causal attention; each key-value head meets the queries of its whole group in one product.
fn attention(config: &Config, positions: &Positions, [q, k, v]: [Tensor<2>; 3]) -> Tensor<2> {
    let (heads, kv_heads, width) = (config.heads, config.kv_heads, config.head_dim);
    let (seq, group) = (positions.seq, heads / kv_heads);
    let rows = q.dims()[0];
    let batch = rows / seq;
    let q = rotate(q.reshape([batch, seq, heads, width]), positions).mul_scalar(1.0 / (width as f32).sqrt());
    let k = rotate(k.reshape([batch, seq, kv_heads, width]), positions);
    let q = q
        .reshape([batch, seq, kv_heads, group, width])
        .permute([0, 2, 3, 1, 4])
        .reshape([batch, kv_heads, group * seq, width]);
    let k = k.permute([0, 2, 3, 1]);
    let v = v.reshape([batch, seq, kv_heads, width]).permute([0, 2, 1, 3]);
    let shares = softmax(q.matmul(k) + positions.mask.clone(), 3);
    shares
        .matmul(v)
        .reshape([batch, kv_heads, group, seq, width])
        .permute([0, 3, 1, 2, 4])
        .reshape([rows, heads * width])
}

/// Rotates the pairs `(i, i + head_dim / 2)` of `[batch, seq, heads, head_dim]`.
fn rotate(x: Tensor<4>, positions: &Positions) -> Tensor<4> {
    let half = x.dims()[3] / 2;
    let (first, second) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
    let (cosines, sines) = (positions.cosines.clone(), positions.sines.clone());
    let turned = first.clone() * cosines.clone() - second.clone() * sines.clone();
    Tensor::cat(vec![turned, second * cosines + first * sines], 3)
}
