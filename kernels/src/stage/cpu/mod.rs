//! A stage on the CPU: plain loops over slices, made for one answer at a time.

mod attention;
mod dense;
mod elementwise;
mod engine;
mod experts;
mod grouped;
mod indexer;
mod lanes;
mod latent;
mod mamba;
mod matrix;
mod mlp;
mod pages;
mod product;
mod sequence;

pub(super) use dense::{Dense, LoadedNorm};
pub(crate) use elementwise::{exp, expm1};
pub(crate) use engine::Trace;
pub(super) use engine::{Engine, LoadedMixer, LoadedSublayer};
#[cfg(feature = "gpu")]
pub(super) use experts::Choice;
pub(super) use experts::ExpertWeights;
pub(crate) use experts::Routing;
pub(super) use grouped::GroupedWeights;
#[cfg(feature = "gpu")]
pub(super) use indexer::{IndexerWeights, choose};
pub(super) use latent::LatentWeights;
#[cfg(feature = "gpu")]
pub(super) use latent::Query;
pub(super) use mamba::MambaWeights;
#[cfg(feature = "gpu")]
pub(super) use mamba::{MambaState, Recurrence};
pub(super) use matrix::Matrix;
pub(super) use mlp::MlpWeights;
pub(crate) use mlp::curve;
pub(super) use sequence::Sequence;
