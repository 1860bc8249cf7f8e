//! A mixture of experts: the choice is made on the host, everything else in tensors.

use burn::tensor::activation::sigmoid;
use burn::tensor::{IndexingUpdateOp, Tensor, TensorData};

use super::leaves::Part;
use super::mlp::mlp;
use super::{host, indices, linear, softmax};
use crate::model::describe::Experts;
use crate::model::routing::Score;
use crate::train::TrainError;

/// Of rows `[rows, hidden]`; also how many rows each expert got.
pub(super) fn experts(part: Part<'_>, shape: &Experts, x: &Tensor<2>) -> Result<(Tensor<2>, Vec<u64>), TrainError> {
    let (rule, device) = (shape.router.rule, x.device());
    let count = shape.experts.len();
    let logits = linear(part, &shape.router.weight, x);
    let scores = match rule.score {
        Score::Softmax => softmax(logits),
        Score::Sigmoid => sigmoid(logits),
    };
    let correction = match shape.router.correction {
        Some(slot) => host(&part.vector(slot))?,
        None => Vec::new(),
    };
    let mut rows_of: Vec<Vec<usize>> = vec![Vec::new(); count];
    let mut mask = vec![0.0f32; x.dims()[0] * count];
    for (row, (scores, mask)) in host(&scores)?
        .chunks_exact(count)
        .zip(mask.chunks_exact_mut(count))
        .enumerate()
    {
        for expert in rule.choose(scores, &correction) {
            mask[expert] = 1.0;
            rows_of[expert].push(row);
        }
    }
    let mask = Tensor::<2>::from_data(TensorData::new(mask, scores.dims()), &device);
    let mut weights = scores * mask;
    if rule.normalised {
        let sum = weights.clone().sum_dim(1).add_scalar(1e-20);
        weights = weights / sum;
    }
    let weights = weights.mul_scalar(rule.scale);

    let within = match &shape.latent {
        Some((down, _)) => linear(part, down, x),
        None => x.clone(),
    };
    let mut mixed = Tensor::<2>::zeros(within.dims(), &device);
    for (index, (expert, rows)) in shape.experts.iter().zip(&rows_of).enumerate() {
        if rows.is_empty() {
            continue;
        }
        let rows = indices(rows.iter().copied(), &device);
        let made = mlp(part, expert, &within.clone().select(0, rows.clone()));
        let weight = weights.clone().narrow(1, index, 1).select(0, rows.clone());
        mixed = mixed.select_assign(0, rows, made * weight, IndexingUpdateOp::Add);
    }
    let mut out = match &shape.latent {
        Some((_, up)) => linear(part, up, &mixed),
        None => mixed,
    };
    if let Some(shared) = &shape.shared {
        out = out + mlp(part, shared, x);
    }
    Ok((out, rows_of.iter().map(|rows| rows.len() as u64).collect()))
}
