//! Checks that a model computed here is the model that was published: a Hugging Face folder with `cases.safetensors` and
//! `expected.json` beside its weights, as made by PyTorch, against both engines.

mod cases;
mod compare;
mod serving;
mod stages;
mod training;

use std::path::Path;

use serde::Serialize;
use thiserror::Error;

use crate::device::Device;
use crate::model::{Config, ConfigError};
use crate::stage::StageError;
use crate::train::TrainError;
use crate::weights::{WeightsError, open_folder};
use cases::Cases;
use compare::Tally;

/// Why a folder could not be compared at all.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum VerifyError {
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("the serving engine refuses the model")]
    Stage(#[from] StageError),
    #[error("the training engine refuses the model")]
    Train(#[from] TrainError),
    #[error("{file}: {reason}")]
    Cases { file: String, reason: String },
}

/// What a comparison came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// What the case calls itself.
    pub case: String,
    /// The model's family.
    pub family: String,
    /// Which device served.
    pub served_on: String,
    /// What was compared, in order.
    pub quantities: Vec<Quantity>,
}

impl Report {
    /// Whether every quantity is within its tolerance.
    pub fn passed(&self) -> bool {
        self.quantities.iter().all(|quantity| quantity.passed)
    }
}

/// One thing that was compared.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Quantity {
    /// Such as `hidden.3`.
    pub name: String,
    /// The largest error.
    pub largest: f64,
    /// The mean error.
    pub mean: f64,
    /// What the largest may be.
    pub tolerance: f64,
    /// How errors are measured.
    pub measure: Measure,
    /// Whether the largest is within the tolerance.
    pub passed: bool,
}

/// How errors are measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Measure {
    /// Differences.
    Absolute,
    /// Differences as shares of the largest right value.
    OfLargest,
    /// Differences as shares of the right value.
    Relative,
    /// How many differ.
    Count,
}

impl Measure {
    /// In words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Absolute => "absolute",
            Self::OfLargest => "of the largest",
            Self::Relative => "relative",
            Self::Count => "how many differ",
        }
    }
}

/// Compares the model in `folder` with the cases beside it: what the serving engine and the training engine compute on
/// `device`, and chains of stages, which are equal to the bit on the CPU and near elsewhere.
///
/// # Errors
///
/// [`VerifyError`] where the model or its cases cannot be read; numbers that differ are no error but a [`Quantity`].
pub fn verify(folder: &Path, device: &Device) -> Result<Report, VerifyError> {
    compare(folder, device, Engines::Both)
}

/// As [`verify`], without training.
///
/// # Errors
///
/// As [`verify`].
pub fn verify_serving(folder: &Path, device: &Device) -> Result<Report, VerifyError> {
    compare(folder, device, Engines::Serving)
}

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Engines {
    Serving,
    Both,
}

fn compare(folder: &Path, device: &Device, engines: Engines) -> Result<Report, VerifyError> {
    let text = cases::text(&folder.join("config.json"))?;
    let config = Config::from_json(&text)?;
    let cases = Cases::read(folder, &config)?;
    let tensors = open_folder(folder, &text)?;
    let mut tally = Tally::new(&cases);
    other_spelling(folder, &config, &mut tally)?;
    let served_on = serving::compare(&config, &*tensors, &cases, device, &mut tally)?;
    stages::compare_serving(&config, &*tensors, &cases, device, &mut tally)?;
    if engines == Engines::Both {
        training::compare(&config, &text, &*tensors, &cases, device, &mut tally)?;
        stages::compare_training(&config, &text, &*tensors, &cases, &Device::cpu(), &mut tally)?;
    }
    Ok(Report {
        case: cases.name.clone(),
        family: config.family.to_owned(),
        served_on,
        quantities: tally.quantities,
    })
}

/// A newer spelling of the configuration must describe the same model.
fn other_spelling(folder: &Path, config: &Config, tally: &mut Tally<'_>) -> Result<(), VerifyError> {
    let path = folder.join("config.v5.json");
    if path.exists() {
        let other = Config::from_json(&cases::text(&path)?)?;
        tally.count("config.v5.json", usize::from(other != *config), 1);
    }
    Ok(())
}
