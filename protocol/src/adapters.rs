//! Low-rank adapters (LoRA, arXiv 2106.09685): which weights of a frozen model they change, and how.
//!
//! A weight `W [out, in]` acts as `W + alpha / rank · B · A` with `A [rank, in]` and `B [out, rank]`, which alone are
//! trained and exchanged.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::ops::Range;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::hash::BlobId;
use crate::layout::{Layout, PartLayout, TensorLayout};

/// The largest rank: beyond it adapters are no smaller than what they change.
pub const RANK_MAX: u32 = 1_024;
/// The most names of projections.
pub const TARGETS_MAX: usize = 32;

/// The adapters of a run, and the model that they change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Adapters {
    /// Rows of every `A`, columns of every `B`.
    pub rank: u32,
    /// `B · A` counts `alpha / rank` times.
    pub alpha: f32,
    /// Names of projections as Hugging Face has them, such as `q_proj`: every block's.
    pub targets: Vec<String>,
    /// The parameters of the model, per part.
    pub model: Layout,
    /// One blob per part of the model: its parameters as little-endian f32. They never change.
    pub base: Vec<BlobId>,
}

/// Why adapters are refused.
#[derive(Debug, Clone, Error, Eq, PartialEq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum AdapterError {
    #[error("`rank` is not within 1 and {RANK_MAX}")]
    Rank,
    #[error("`alpha` is not above 0 and at most 100000")]
    Alpha,
    #[error("`targets` are not 1 to {TARGETS_MAX} names")]
    Targets,
    #[error("no block of the model has a projection `{0}`")]
    Unknown(String),
    #[error("the base has {found} of {expected} parts")]
    Base { expected: usize, found: usize },
}

/// One weight and its adapter. Ranges are of elements, of the model's part and of the adapters' part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// `W` in the model's part.
    pub weight: Range<usize>,
    /// Rows of `W`.
    pub out: usize,
    /// Columns of `W`.
    pub inner: usize,
    /// `A` in the adapters' part.
    pub a: Range<usize>,
    /// `B` in the adapters' part.
    pub b: Range<usize>,
}

impl Adapters {
    /// How many times `B · A` counts.
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank.max(1) as f32
    }

    /// The adapters' own parameters: `A` and `B` of each weight, in the order of the model. Embedding and head have none.
    ///
    /// # Errors
    ///
    /// [`AdapterError`] names what does not fit.
    pub fn layout(&self) -> Result<Layout, AdapterError> {
        if self.rank == 0 || self.rank > RANK_MAX {
            return Err(AdapterError::Rank);
        }
        if !(self.alpha > 0.0 && self.alpha <= 100_000.0) {
            return Err(AdapterError::Alpha);
        }
        if self.targets.is_empty() || self.targets.len() > TARGETS_MAX {
            return Err(AdapterError::Targets);
        }
        for target in &self.targets {
            let tensors = self.model.parts.iter().flat_map(|part| &part.tensors);
            if !tensors.into_iter().any(|tensor| is_of(tensor, target)) {
                return Err(AdapterError::Unknown(target.clone()));
            }
        }
        let parts = self.model.parts.iter().map(|part| {
            let adapted = part.tensors.iter().filter_map(|tensor| self.of(tensor));
            let tensors = adapted.flat_map(|(_, a, b)| [a, b]).collect();
            PartLayout { tensors }
        });
        Ok(Layout { parts: parts.collect() })
    }

    /// Whether there is a base blob for each part, as is the case once a run is made.
    ///
    /// # Errors
    ///
    /// [`AdapterError::Base`].
    pub fn check_base(&self) -> Result<(), AdapterError> {
        let (expected, found) = (self.model.parts.len(), self.base.len());
        if expected == found {
            Ok(())
        } else {
            Err(AdapterError::Base { expected, found })
        }
    }

    /// The adapted weights of one part.
    pub fn places(&self, part: &PartLayout) -> Vec<Place> {
        let (mut places, mut weight, mut adapter) = (Vec::new(), 0usize, 0usize);
        for tensor in &part.tensors {
            let end = weight.saturating_add(tensor.elements().unwrap_or(0));
            if let Some((shape, a, b)) = self.of(tensor) {
                let a_end = adapter.saturating_add(a.elements().unwrap_or(0));
                let b_end = a_end.saturating_add(b.elements().unwrap_or(0));
                places.push(Place {
                    weight: weight..end,
                    out: shape[0],
                    inner: shape[1],
                    a: adapter..a_end,
                    b: a_end..b_end,
                });
                adapter = b_end;
            }
            weight = end;
        }
        places
    }

    /// Adds a part's adapters to its weights, in a fixed order of sums: equal bits everywhere. Lengths that do not fit
    /// leave weights as they were.
    pub fn merge(&self, part: &PartLayout, values: &mut [f32], adapters: &[f32]) {
        let (rank, scale) = (self.rank as usize, self.scale());
        for place in self.places(part) {
            let (Some(weight), Some(a), Some(b)) = (
                values.get_mut(place.weight.clone()),
                adapters.get(place.a.clone()),
                adapters.get(place.b.clone()),
            ) else {
                continue;
            };
            for (row, b) in weight
                .chunks_exact_mut(place.inner.max(1))
                .zip(b.chunks_exact(rank.max(1)))
            {
                for (b, a) in b.iter().zip(a.chunks_exact(place.inner.max(1))) {
                    let factor = scale * b;
                    row.iter_mut().zip(a).for_each(|(weight, a)| *weight += factor * a);
                }
            }
        }
    }

    /// The shape of a weight that is adapted, and the layouts of its adapter.
    fn of(&self, tensor: &TensorLayout) -> Option<([usize; 2], TensorLayout, TensorLayout)> {
        if !self.targets.iter().any(|target| is_of(tensor, target)) {
            return None;
        }
        let [out, inner] = *tensor.shape.as_slice() else {
            return None;
        };
        let module = tensor.name.strip_suffix(".weight")?;
        let named = |which: &str, shape: [u32; 2]| TensorLayout {
            name: format!("{module}.lora_{which}.weight"),
            shape: shape.to_vec(),
        };
        let shape = [usize::try_from(out).ok()?, usize::try_from(inner).ok()?];
        Some((shape, named("A", [self.rank, inner]), named("B", [out, self.rank])))
    }
}

/// Whether a tensor is the matrix of a projection of that name, in a block.
fn is_of(tensor: &TensorLayout, target: &str) -> bool {
    let module = tensor.name.strip_suffix(".weight").unwrap_or_default();
    let (before, name) = module.rsplit_once('.').unwrap_or_default();
    name == target && before.contains(".layers.") && tensor.shape.len() == 2
}

/// Names of the projections that the blocks of a model have, for people who have to choose.
pub fn projections(model: &Layout) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for tensor in model.parts.iter().flat_map(|part| &part.tensors) {
        let module = tensor.name.strip_suffix(".weight").unwrap_or_default();
        let name = module.rsplit('.').next().unwrap_or_default();
        if is_of(tensor, name) && !names.iter().any(|known| known == name) {
            names.push(name.to_string());
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn adapters_lie_in_the_order_of_the_model_and_are_added_to_their_weights() {
        let adapters = adapters(&["q_proj"]);
        let layout = adapters.layout().unwrap();
        let names: Vec<&str> = layout.parts[1]
            .tensors
            .iter()
            .map(|tensor| tensor.name.as_str())
            .collect();
        let module = "model.layers.0.self_attn.q_proj";
        assert_eq!(
            names,
            [format!("{module}.lora_A.weight"), format!("{module}.lora_B.weight")]
        );
        assert_eq!(layout.elements(), Some(2 * 3 + 4 * 2));
        let part = &adapters.model.parts[1];
        let mut values = vec![1.0; part.elements().unwrap()];
        // A = [[1, 2, 3], [0, 0, 1]], B has ones in its first column and twos in the second of its last row.
        let a = [1.0, 2.0, 3.0, 0.0, 0.0, 1.0];
        let b = [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 2.0];
        adapters.merge(part, &mut values, &[&a[..], &b[..]].concat());
        assert_eq!(values[..3], [1.0; 3]);
        // alpha / rank is 4.
        assert_eq!(values[3..6], [5.0, 9.0, 13.0]);
        assert_eq!(values[12..15], [5.0, 9.0, 21.0]);
        assert_eq!(values[15..], [1.0; 12]);
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        assert_eq!(
            adapters(&["z_proj"]).layout(),
            Err(AdapterError::Unknown("z_proj".into()))
        );
        assert_eq!(adapters(&["norm"]).layout(), Err(AdapterError::Unknown("norm".into())));
        assert_eq!(adapters(&[]).layout(), Err(AdapterError::Targets));
        let rank = |rank| {
            Adapters {
                rank,
                ..adapters(&["q_proj"])
            }
            .layout()
        };
        assert_eq!(
            (rank(0), rank(1_025)),
            (Err(AdapterError::Rank), Err(AdapterError::Rank))
        );
        let alpha = |alpha| {
            Adapters {
                alpha,
                ..adapters(&["q_proj"])
            }
            .layout()
        };
        assert_eq!(
            (alpha(f32::NAN), alpha(0.0)),
            (Err(AdapterError::Alpha), Err(AdapterError::Alpha))
        );
        assert_eq!(projections(&adapters(&[]).model), ["q_proj", "up_proj"]);
    }

    fn adapters(targets: &[&str]) -> Adapters {
        let tensor = |name: &str, shape: &[u32]| TensorLayout {
            name: name.into(),
            shape: shape.to_vec(),
        };
        let block = PartLayout {
            tensors: vec![
                tensor("model.layers.0.norm.weight", &[3]),
                tensor("model.layers.0.self_attn.q_proj.weight", &[4, 3]),
                tensor("model.layers.0.mlp.up_proj.weight", &[4, 3]),
            ],
        };
        Adapters {
            rank: 2,
            alpha: 8.0,
            targets: targets.iter().map(|name| String::from(*name)).collect(),
            model: Layout {
                parts: vec![PartLayout::default(), block, PartLayout::default()],
            },
            base: vec![],
        }
    }
}
