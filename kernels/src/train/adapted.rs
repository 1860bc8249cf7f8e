//! A stage whose low-rank adapters are trained, over a model that is frozen.
//!
//! Engines compute with weights into which the adapters have been merged, and know nothing of them: so every family can
//! be adapted. From the gradient of a merged weight `∂W` those of its adapter are `∂B = s · ∂W · Aᵀ` and
//! `∂A = s · Bᵀ · ∂W`, with `s = alpha / rank`.

use core::ops::Range;

use polder_protocol::adapters::{Adapters, Place};
use polder_protocol::layout::{BlockRange, Layout};
use polder_protocol::rng::Random;

use super::TrainError;
use super::checks::check_sizes;
use super::cpu::product::{Mode, Threads, View, ViewMut, product};

/// The adapters of a stage.
#[derive(Debug)]
pub(super) struct Adapted {
    scale: f32,
    rank: usize,
    layout: Layout,
    range: BlockRange,
    /// Per part of `range`, as all vectors below.
    parts: Vec<Vec<Frozen>>,
    parameters: Vec<Vec<f32>>,
    gradients: Vec<Vec<f32>>,
}

/// A weight as it was before its adapter.
#[derive(Debug)]
struct Frozen {
    place: Place,
    /// `[out, inner]`
    weight: Vec<f32>,
}

impl Adapted {
    /// Adapters with their `parameters`, for a stage with the frozen `model`; both per part of `range`, and of checked sizes
    /// as far as the model's are concerned.
    pub(super) fn new(
        adapters: &Adapters,
        model_layout: &Layout,
        range: BlockRange,
        model: &[Vec<f32>],
        parameters: Vec<Vec<f32>>,
    ) -> Result<Self, TrainError> {
        // What the configuration says is the model, whatever the run's facts say.
        let adapters = Adapters {
            model: model_layout.clone(),
            ..adapters.clone()
        };
        let layout = adapters.layout()?;
        check_sizes(&layout, range, &parameters)?;
        let parts = range.parts(model_layout.blocks()).zip(model).map(|(part, values)| {
            let places = adapters.places(&model_layout.parts[part as usize]);
            let frozen = places.into_iter().map(|place| Frozen {
                weight: values[place.weight.clone()].to_vec(),
                place,
            });
            frozen.collect()
        });
        Ok(Self {
            scale: adapters.scale(),
            rank: adapters.rank as usize,
            range,
            parts: parts.collect(),
            gradients: parameters.iter().map(|part| vec![0.0; part.len()]).collect(),
            layout,
            parameters,
        })
    }

    /// The layout of the adapters' parameters.
    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(super) fn parameters(&self) -> &[Vec<f32>] {
        &self.parameters
    }

    /// Where the weights with an adapter lie, per part of the stage.
    pub(super) fn places(&self) -> Vec<Vec<Range<usize>>> {
        let places = |part: &Vec<Frozen>| part.iter().map(|frozen| frozen.place.weight.clone()).collect();
        self.parts.iter().map(places).collect()
    }

    /// Bytes of adapters, their gradients and the weights that they change.
    pub(super) fn bytes(&self) -> u64 {
        let frozen: u64 = self
            .parts
            .iter()
            .flatten()
            .map(|frozen| frozen.weight.len() as u64)
            .sum();
        let own: u64 = self.parameters.iter().map(|part| part.len() as u64).sum();
        (frozen + 2 * own) * 4
    }

    pub(super) fn set(&mut self, parameters: Vec<Vec<f32>>) -> Result<(), TrainError> {
        check_sizes(&self.layout, self.range, &parameters)?;
        self.parameters = parameters;
        Ok(())
    }

    /// Parameters and their gradients, for an optimiser.
    pub(super) fn both(&mut self) -> (&mut [Vec<f32>], &[Vec<f32>]) {
        (&mut self.parameters, &self.gradients)
    }

    pub(super) fn gradients(&self) -> &[Vec<f32>] {
        &self.gradients
    }

    pub(super) fn gradients_mut(&mut self) -> &mut [Vec<f32>] {
        &mut self.gradients
    }

    /// Writes `W + s · B · A` over each adapted weight of the model.
    pub(super) fn merge(&self, model: &mut [Vec<f32>]) {
        for ((parts, own), model) in self.parts.iter().zip(&self.parameters).zip(model) {
            for Frozen { place, weight } in parts {
                let merged = &mut model[place.weight.clone()];
                merged.copy_from_slice(weight);
                let scaled: Vec<f32> = own[place.b.clone()].iter().map(|b| b * self.scale).collect();
                let out = ViewMut::new(merged, place.out, place.inner);
                let b = View::new(&scaled, place.out, self.rank);
                let a = View::new(&own[place.a.clone()], self.rank, place.inner);
                product(out, Mode::Add, b, a, Threads::All);
            }
        }
    }

    /// Makes the gradients of the adapters from those of the merged model.
    pub(super) fn project(&mut self, model_gradients: &[Vec<f32>]) {
        let parts = self.parts.iter().zip(&self.parameters).zip(&mut self.gradients);
        for (((parts, own), gradients), model) in parts.zip(model_gradients) {
            for Frozen { place, .. } in parts {
                let whole = View::new(&model[place.weight.clone()], place.out, place.inner);
                let a = View::new(&own[place.a.clone()], self.rank, place.inner);
                let b = View::new(&own[place.b.clone()], place.out, self.rank);
                let out = ViewMut::new(&mut gradients[place.a.clone()], self.rank, place.inner);
                product(out, Mode::Write, b.transposed(), whole, Threads::All);
                let out = ViewMut::new(&mut gradients[place.b.clone()], place.out, self.rank);
                product(out, Mode::Write, whole, a.transposed(), Threads::All);
            }
            gradients.iter_mut().for_each(|gradient| *gradient *= self.scale);
        }
    }
}

/// First parameters of adapters, per part: every `A` uniform within 1 / √inner, every `B` zero, so that the first step begins
/// with the model as it is. They follow from `seed`.
///
/// # Errors
///
/// [`TrainError::Adapters`] names what does not fit the model.
pub fn initial_adapters(adapters: &Adapters, seed: u64) -> Result<(Layout, Vec<Vec<f32>>), TrainError> {
    let layout = adapters.layout()?;
    let parts = layout.parts.iter().zip(0u64..).map(|(part, index)| {
        let mut values = vec![0.0; part.elements().unwrap_or(0)];
        let places = adapters
            .model
            .parts
            .get(index as usize)
            .map(|part| adapters.places(part));
        for (place, number) in places.unwrap_or_default().into_iter().zip(0u64..) {
            let mut random = Random::from_labels(&[seed, index, number]);
            let width = 1.0 / (place.inner.max(1) as f32).sqrt();
            for value in &mut values[place.a] {
                *value = (2.0 * random.unit_f32() - 1.0) * width;
            }
        }
        values
    });
    let parts = parts.collect();
    Ok((layout, parts))
}
