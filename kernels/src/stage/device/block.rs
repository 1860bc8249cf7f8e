//! Sublayers of blocks: what they are on the device, and how rows go through them.

use super::experts::Experts;
use super::grouped::Grouped;
use super::latent::Latent;
use super::pages::{Cache, Pages, Widths};
use super::perceptron::Perceptron;
use super::upload::{Refusal, Upload};
use crate::device::cube::{CubeError, Cubes, Floats, NormOnDevice, Places, Turns};
use crate::model::describe::QueryScale;
use crate::stage::cpu::{LoadedMixer, LoadedSublayer, Routing};

/// `x ← x + after(mixer(norm(x)))`.
#[derive(Debug)]
pub(super) struct Sublayer {
    norm: NormOnDevice,
    mixer: Mixer,
    after: Option<NormOnDevice>,
}

#[derive(Debug)]
enum Mixer {
    Grouped(Box<Grouped>),
    Latent(Box<Latent>),
    Perceptron(Box<Perceptron>),
    Experts(Box<Experts>),
}

/// Rows of some sessions on their way through the blocks.
pub(super) struct Batch<'a> {
    pub(super) cubes: &'a Cubes,
    pub(super) pages: &'a Pages,
    pub(super) places: &'a Places,
    /// By rotation.
    pub(super) turns: &'a [Turns],
    /// Of each row.
    pub(super) positions: &'a [usize],
}

impl Batch<'_> {
    /// Where an attention keeps what it keeps.
    pub(super) fn cache(&self, index: usize) -> Result<&Cache, CubeError> {
        self.pages.caches().get(index).ok_or(CubeError::Length {
            what: "caches",
            found: self.pages.caches().len(),
            expected: index + 1,
        })
    }
}

impl Sublayer {
    /// `caches` takes what the sublayer keeps of a position, if anything.
    pub(super) fn upload(
        upload: &Upload<'_>,
        loaded: &LoadedSublayer,
        caches: &mut Vec<Widths>,
    ) -> Result<Self, Refusal> {
        let mixer = match &loaded.mixer {
            LoadedMixer::Attention(weights) => {
                let width = weights.shape.kv_heads * weights.shape.head_dim;
                caches.push(Widths {
                    keys: width,
                    values: width,
                });
                Mixer::Grouped(Box::new(Grouped::upload(upload, weights, caches.len() - 1)?))
            }
            LoadedMixer::Latent(weights) => {
                caches.push(Widths {
                    keys: weights.shape.rank + weights.shape.rope,
                    values: 0,
                });
                Mixer::Latent(Box::new(Latent::upload(upload, weights, caches.len() - 1)?))
            }
            LoadedMixer::Mlp(weights) => Mixer::Perceptron(Box::new(Perceptron::upload(upload, weights)?)),
            LoadedMixer::Experts(weights) => Mixer::Experts(Box::new(Experts::upload(upload, weights)?)),
            LoadedMixer::Mamba(_) => return Err(Refusal::Lacking("Mamba's recurrence".to_owned())),
        };
        Ok(Self {
            norm: upload.norm(&loaded.norm),
            mixer,
            after: loaded.after.as_ref().map(|norm| upload.norm(norm)),
        })
    }

    /// Adds to `x` what the sublayer before gave, and gives what is to be added next: it is added where the next one norms.
    pub(super) fn run(
        &self,
        batch: &Batch<'_>,
        x: &Floats,
        added: Option<&Floats>,
        seen: Option<&mut Routing>,
    ) -> Result<Floats, CubeError> {
        let cubes = batch.cubes;
        let normed = cubes.add_and_normalise(x, added, &self.norm)?;
        let mixed = match &self.mixer {
            Mixer::Grouped(grouped) => grouped.of(batch, &normed)?,
            Mixer::Latent(latent) => latent.of(batch, &normed)?,
            Mixer::Perceptron(perceptron) => perceptron.of(cubes, &normed)?,
            Mixer::Experts(experts) => experts.of(cubes, &normed, batch.positions.len(), seen)?,
        };
        match &self.after {
            Some(norm) => cubes.add_and_normalise(&mixed, None, norm),
            None => Ok(mixed),
        }
    }

    /// Whether the sublayer has a router.
    pub(super) const fn routes(&self) -> bool {
        matches!(self.mixer, Mixer::Experts(_))
    }
}

/// Multiplies each row's queries by what its position says.
pub(super) fn scale_queries(batch: &Batch<'_>, scale: Option<QueryScale>, q: &Floats) -> Result<(), CubeError> {
    let Some(scale) = scale else { return Ok(()) };
    let factors: Vec<f32> = batch.positions.iter().map(|position| scale.at(*position)).collect();
    batch.cubes.scale_rows(q, &batch.cubes.upload(&factors))
}
