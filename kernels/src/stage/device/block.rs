//! Sublayers of blocks: what they are on the device, and how rows go through them.

use super::engine::{Piece, Sequence};
use super::experts::Experts;
use super::grouped::Grouped;
use super::latent::Latent;
use super::mamba::Mamba;
use super::pages::{Cache, Pages, Widths};
use super::perceptron::Perceptron;
use super::upload::Upload;
use crate::device::cube::{CubeError, Cubes, Floats, NormOnDevice, Places, Turns};
use crate::model::describe::QueryScale;
use crate::stage::StageError;
use crate::stage::cpu::{LoadedMixer, LoadedSublayer, Recurrence, Trace};
use crate::stage::sessions::Span;

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
    Mamba(Box<Mamba>),
}

/// What the sublayers of a stage keep of a session.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// Of each attention, in pages.
    pub(super) widths: Vec<Widths>,
    /// How many recurrent states.
    pub(super) states: usize,
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
    /// Whose rows they are.
    pub(super) pieces: &'a [Piece],
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
    /// `kept` takes what the sublayer keeps, if anything.
    pub(super) fn upload(upload: &Upload<'_>, loaded: &LoadedSublayer, kept: &mut Kept) -> Result<Self, StageError> {
        let caches = &mut kept.widths;
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
                    values: weights.indexer.as_ref().map_or(0, |index| index.shape.head_dim),
                });
                Mixer::Latent(Box::new(Latent::upload(upload, weights, caches.len() - 1)?))
            }
            LoadedMixer::Mlp(weights) => Mixer::Perceptron(Box::new(Perceptron::upload(upload, weights)?)),
            LoadedMixer::Experts(weights) => Mixer::Experts(Box::new(Experts::upload(upload, weights)?)),
            LoadedMixer::Mamba(weights) => {
                kept.states += 1;
                Mixer::Mamba(Box::new(Mamba::upload(upload, weights, kept.states - 1)?))
            }
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
        spans: &mut [Span<'_, Sequence>],
        x: &Floats,
        added: Option<&Floats>,
        trace: Option<(u32, &mut Trace)>,
    ) -> Result<Floats, CubeError> {
        let cubes = batch.cubes;
        let normed = cubes.add_and_normalise(x, added, &self.norm)?;
        let mixed = match &self.mixer {
            Mixer::Grouped(grouped) => grouped.of(batch, &normed)?,
            Mixer::Latent(latent) => {
                let trace = trace.filter(|_| latent.chooses());
                let seen = trace.map(|(block, trace)| trace.selected.entry(block).or_default());
                latent.of(batch, &normed, seen)?
            }
            Mixer::Perceptron(perceptron) => perceptron.of(cubes, &normed)?,
            Mixer::Experts(experts) => {
                let seen = trace.map(|(block, trace)| trace.routing.entry(block).or_default());
                experts.of(cubes, &normed, batch.positions.len(), seen)?
            }
            Mixer::Mamba(mamba) => mamba.of(batch, spans, &normed)?,
        };
        match &self.after {
            Some(norm) => cubes.add_and_normalise(&mixed, None, norm),
            None => Ok(mixed),
        }
    }

    /// What the host keeps a state for.
    pub(super) const fn recurrence(&self) -> Option<&Recurrence> {
        match &self.mixer {
            Mixer::Mamba(mamba) => Some(mamba.recurrence()),
            _ => None,
        }
    }
}

/// Multiplies each row's queries by what its position says.
pub(super) fn scale_queries(batch: &Batch<'_>, scale: Option<QueryScale>, q: &Floats) -> Result<(), CubeError> {
    let Some(scale) = scale else { return Ok(()) };
    let factors: Vec<f32> = batch.positions.iter().map(|position| scale.at(*position)).collect();
    batch.cubes.scale_rows(q, &batch.cubes.upload(&factors))
}
