//! What all micro-batches of one length share: rotations, factors of queries, and masks.

use burn::tensor::{Device, Tensor, TensorData};

use super::Attending;
use crate::model::describe::{Mixer, QueryScale};
use crate::model::{Config, Frequencies};

/// What masks a position: far below any score, and finite, so that nothing becomes NaN.
pub(super) const MASKED: f32 = -1e30;

/// Rotations, factors and masks.
#[derive(Debug, Clone)]
pub(in crate::train) struct Positions {
    seq: usize,
    turns: Vec<Turns>,
    /// For each window and number of queries per key: `[1, 1, group · seq, seq]`, zero for what a position sees.
    masks: Vec<((Option<usize>, usize), Tensor<4>)>,
    /// `[1, seq, 1, 1]`
    query_scales: Vec<(QueryScale, Tensor<4>)>,
    /// Kernels that need no masks.
    attending: Option<Attending>,
}

/// One rotation.
#[derive(Debug, Clone)]
struct Turns {
    interleaved: bool,
    /// `[1, seq, 1, pairs]`
    cosines: Tensor<4>,
    sines: Tensor<4>,
}

impl Positions {
    pub(in crate::train) fn new(config: &Config, seq: usize, device: &Device, attending: Option<&Attending>) -> Self {
        let turns = config.rotaries.iter().map(|rotary| {
            let frequencies = Frequencies::of(rotary);
            let pairs = frequencies.pairs();
            let (mut cosines, mut sines) = (vec![0.0; seq * pairs], vec![0.0; seq * pairs]);
            for (position, (cosines, sines)) in cosines.chunks_mut(pairs).zip(sines.chunks_mut(pairs)).enumerate() {
                frequencies.turn(position, cosines, sines);
            }
            let rotation = |values| Tensor::from_data(TensorData::new(values, [1, seq, 1, pairs]), device);
            Turns {
                interleaved: rotary.interleaved,
                cosines: rotation(cosines),
                sines: rotation(sines),
            }
        });
        let mut positions = Self {
            seq,
            turns: turns.collect(),
            masks: Vec::new(),
            query_scales: Vec::new(),
            attending: attending.cloned(),
        };
        for sublayer in config.description.iter().flat_map(|block| &block.0) {
            match &sublayer.mixer {
                Mixer::Attention(shape) => {
                    if positions.attending(shape.head_dim, shape.head_dim).is_none() {
                        positions.add_mask(shape.window, shape.heads / shape.kv_heads, device);
                    }
                    positions.add_query_scale(shape.query_scale, device);
                }
                Mixer::Latent(shape) => {
                    if positions.attending(shape.nope + shape.rope, shape.value).is_none() {
                        positions.add_mask(None, 1, device);
                    }
                    positions.add_query_scale(shape.query_scale, device);
                }
                Mixer::Mlp(_) | Mixer::Experts(_) | Mixer::Mamba(_) => {}
            }
        }
        positions
    }

    /// The same memory, for a graph.
    pub(in crate::train) fn tracked(&self) -> Self {
        let mut tracked = self.clone();
        for turns in &mut tracked.turns {
            turns.cosines = turns.cosines.clone().autodiff();
            turns.sines = turns.sines.clone().autodiff();
        }
        for (_, mask) in &mut tracked.masks {
            *mask = mask.clone().autodiff();
        }
        for (_, factors) in &mut tracked.query_scales {
            *factors = factors.clone().autodiff();
        }
        tracked
    }

    /// The length.
    pub(in crate::train) const fn seq(&self) -> usize {
        self.seq
    }

    fn add_mask(&mut self, window: Option<usize>, group: usize, device: &Device) {
        let key = (window, group);
        if self.masks.iter().any(|(known, _)| *known == key) {
            return;
        }
        let seq = self.seq;
        let values = (0..group * seq).flat_map(|row| {
            let visible = row % seq + 1;
            let first = window.map_or(0, |window| visible.saturating_sub(window));
            (0..seq).map(move |column| {
                if (first..visible).contains(&column) {
                    0.0
                } else {
                    MASKED
                }
            })
        });
        let data = TensorData::new(values.collect::<Vec<f32>>(), [1, 1, group * seq, seq]);
        self.masks.push((key, Tensor::from_data(data, device)));
    }

    fn add_query_scale(&mut self, scale: Option<QueryScale>, device: &Device) {
        let Some(scale) = scale else { return };
        if self.query_scales.iter().any(|(known, _)| *known == scale) {
            return;
        }
        let values: Vec<f32> = (0..self.seq).map(|position| scale.at(position)).collect();
        let data = TensorData::new(values, [1, self.seq, 1, 1]);
        self.query_scales.push((scale, Tensor::from_data(data, device)));
    }

    /// Kernels for heads of these widths; they need no mask.
    pub(super) fn attending(&self, width: usize, value: usize) -> Option<&Attending> {
        self.attending.as_ref().filter(|kernels| kernels.covers(width, value))
    }

    /// The mask for a window and `group` queries per key.
    pub(super) fn mask(&self, window: Option<usize>, group: usize) -> Tensor<4> {
        let mask = self.masks.iter().find(|(known, _)| *known == (window, group));
        match mask {
            Some((_, mask)) => mask.clone(),
            None => unreachable!("masks are made for every block"),
        }
    }

    /// Multiplies queries `[batch, seq, heads, width]`, where they grow with the position.
    pub(super) fn scaled(&self, q: Tensor<4>, scale: Option<QueryScale>) -> Tensor<4> {
        let factors = scale.and_then(|scale| self.query_scales.iter().find(|(known, _)| *known == scale));
        match factors {
            Some((_, factors)) => q * factors.clone(),
            None => q,
        }
    }

    /// Rotates the first dimensions of `[batch, seq, heads, width]`. Interleaved pairs come out as halves; queries and
    /// keys alike, so that their products are the same.
    pub(super) fn rotate(&self, x: Tensor<4>, rotary: usize) -> Tensor<4> {
        let Some(turns) = self.turns.get(rotary) else { return x };
        let [batch, seq, heads, width] = x.dims();
        let pairs = turns.cosines.dims()[3];
        let (first, second) = if turns.interleaved {
            let split = x.clone().narrow(3, 0, 2 * pairs).reshape([batch, seq, heads, pairs, 2]);
            let half = |which| split.clone().narrow(4, which, 1).reshape([batch, seq, heads, pairs]);
            (half(0), half(1))
        } else {
            (x.clone().narrow(3, 0, pairs), x.clone().narrow(3, pairs, pairs))
        };
        let (cosines, sines) = (turns.cosines.clone(), turns.sines.clone());
        let turned = first.clone() * cosines.clone() - second.clone() * sines.clone();
        let mut parts = vec![turned, second * cosines + first * sines];
        if width > 2 * pairs {
            parts.push(x.narrow(3, 2 * pairs, width - 2 * pairs));
        }
        Tensor::cat(parts, 3)
    }
}
