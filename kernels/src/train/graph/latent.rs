//! Attention from latents, with keys and values made whole: what training needs, whose cache is thrown away.

use burn::tensor::{Tensor, TensorData};

use super::attention::{attend, attend_to_window};
use super::leaves::Part;
use super::positions::{MASKED, Positions};
use super::{host, linear, norm};
use crate::model::describe::{Indexer, LatentAttention, LatentQuery};
use crate::model::routing::largest;
use crate::train::TrainError;

/// Of normed rows `[batch · seq, hidden]`.
pub(super) fn latent(
    part: Part<'_>,
    shape: &LatentAttention,
    positions: &Positions,
    x: &Tensor<2>,
) -> Result<Tensor<2>, TrainError> {
    let LatentAttention {
        heads,
        rank,
        nope,
        rope,
        value,
        rotary,
        ..
    } = *shape;
    let seq = positions.seq();
    let batch = x.dims()[0] / seq;
    let (own, q) = match &shape.query {
        LatentQuery::Direct(direct) => (None, linear(part, direct, x)),
        LatentQuery::LowRank(down, own_norm, up) => {
            let own = norm(part, own_norm, linear(part, down, x));
            let q = linear(part, up, &own);
            (Some(own), q)
        }
    };
    let q = q.reshape([batch, seq, heads, nope + rope]);
    let turned = positions.rotate(q.clone().narrow(3, nope, rope), rotary);
    let q = Tensor::cat(vec![q.narrow(3, 0, nope), turned], 3);
    let q = positions.scaled(q, shape.query_scale);

    let down = linear(part, &shape.kv_down, x);
    let compressed = norm(part, &shape.kv_norm, down.clone().narrow(1, 0, rank));
    let up = linear(part, &shape.kv_up, &compressed).reshape([batch, seq, heads, nope + value]);
    let shared = down.narrow(1, rank, rope).reshape([batch, seq, 1, rope]);
    let shared = positions.rotate(shared, rotary).repeat_dim(2, heads);
    let k = Tensor::cat(vec![up.clone().narrow(3, 0, nope), shared], 3);
    let v = up.narrow(3, nope, value);

    let mixed = match (&shape.indexer, own) {
        (Some(indexer), Some(own)) => {
            let mask = chosen(part, indexer, positions, x, &own)?;
            attend(q, k, v, shape.scale, mask)
        }
        _ => attend_to_window(positions, [q, k, v], shape.scale, None)?,
    };
    Ok(linear(part, &shape.o, &mixed))
}

/// The mask of the positions that an indexer chooses, `[batch, 1, seq, seq]`. No gradient reaches the indexer.
fn chosen(
    part: Part<'_>,
    shape: &Indexer,
    positions: &Positions,
    x: &Tensor<2>,
    latent: &Tensor<2>,
) -> Result<Tensor<4>, TrainError> {
    let Indexer {
        heads, head_dim, top, ..
    } = *shape;
    let seq = positions.seq();
    let batch = x.dims()[0] / seq;
    let (x, latent) = (x.clone().detach(), latent.clone().detach());
    let q = linear(part, &shape.q, &latent).reshape([batch, seq, heads, head_dim]);
    let k = norm(part, &shape.k_norm, linear(part, &shape.k, &x)).reshape([batch, seq, 1, head_dim]);
    let q = host(&positions.rotate(q, shape.rotary))?;
    let k = host(&positions.rotate(k, shape.rotary))?;
    let weights = host(&linear(part, &shape.weights, &x))?;
    let (scale, share) = ((head_dim as f32).powf(-0.5), (heads as f32).powf(-0.5));
    let mut mask = vec![MASKED; batch * seq * seq];
    for (row, mask) in mask.chunks_exact_mut(seq).enumerate() {
        let (first, visible) = (row - row % seq, row % seq + 1);
        let score = |column: usize| {
            let key = &k[(first + column) * head_dim..][..head_dim];
            let of = |head: usize| {
                let query = &q[(row * heads + head) * head_dim..][..head_dim];
                let product: f32 = query.iter().zip(key).map(|(q, k)| q * k).sum();
                weights[row * heads + head] * share * (product * scale).max(0.0)
            };
            (column, (0..heads).map(of).sum::<f32>())
        };
        for column in largest((0..visible).map(score), top) {
            mask[column] = 0.0;
        }
    }
    Ok(Tensor::from_data(
        TensorData::new(mask, [batch, 1, seq, seq]),
        &x.device(),
    ))
}
