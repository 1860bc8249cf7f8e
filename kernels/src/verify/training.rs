//! The training engine against the cases: loss, norms of all gradients, and those that are given whole.

use std::collections::BTreeMap;

use polder_protocol::layout::{BlockRange, Layout};
use polder_protocol::run::{Inner, Optimiser, Precision, Schedule};
use serde_json::Value;

use super::VerifyError;
use super::cases::Cases;
use super::compare::Tally;
use crate::device::Device;
use crate::model::{Config, layout};
use crate::train::{TrainInput, TrainOutput, TrainStage};
use crate::weights::{Tensors, parameters};

/// Of the norm of all gradients, below which a gradient is rounding: a few units in the last place of f32.
const ROUNDING: f64 = 1e-6;

pub(super) fn compare(
    config: &Config,
    config_json: &str,
    tensors: &dyn Tensors,
    cases: &Cases,
    device: &Device,
    tally: &mut Tally<'_>,
) -> Result<(), VerifyError> {
    let layout = layout(config);
    let parameters = parameters(&layout, tensors)?;
    let range = BlockRange::whole(config.blocks);
    let mut stage = TrainStage::new(config_json, range, parameters, inner(cases), 1, device)?;
    let tokens = cases.tokens.concat();
    if let TrainOutput::Loss { loss, .. } = stage.forward(0, input(cases, &tokens, &[]))?
        && let Some(right) = cases.number("loss")
    {
        tally.absolute("loss", &[loss], &[right as f32], "loss_abs", 1e-4);
    }
    let gradients = by_name(&layout, stage.gradients()?);
    tally_norms(cases, &gradients, tally);
    for name in cases
        .names()
        .filter_map(|name| name.strip_prefix("grad."))
        .collect::<Vec<_>>()
    {
        let right = cases.tensor(&format!("grad.{name}")).unwrap_or_default();
        let own = gradients.get(name).copied().unwrap_or_default();
        tally.of_largest(&format!("grad.{name}"), own, right, "grad_elem_rel_to_max", 2e-3);
    }
    Ok(())
}

fn tally_norms(cases: &Cases, gradients: &BTreeMap<&str, &[f32]>, tally: &mut Tally<'_>) {
    let tolerance = cases.tolerance("grad_norm_rel", 2e-3);
    let norm = |name: &str| {
        let squares = gradients
            .get(name)
            .map(|own| own.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>());
        squares.unwrap_or(f64::NAN).sqrt()
    };
    if let Some(norms) = cases.expected.get("grad_norms").and_then(Value::as_object) {
        let pairs: Vec<(f64, f64)> = norms
            .iter()
            .map(|(name, right)| (norm(name), right.as_f64().unwrap_or(f64::NAN)))
            .collect();
        let total = |side: fn(&(f64, f64)) -> f64| pairs.iter().map(|pair| side(pair).powi(2)).sum::<f64>().sqrt();
        let (own, right) = (total(|pair| pair.0), total(|pair| pair.1));
        // A key's bias has no gradient where nothing is rotated, whatever rounding makes of it.
        let floor = (ROUNDING * right).max(f64::MIN_POSITIVE);
        tally.relative("gradient norms", &pairs, floor, tolerance);
        let right = cases.number("grad_total_norm").unwrap_or(right);
        tally.relative("total gradient norm", &[(own, right)], floor, tolerance);
    }
    if let Some(without) = cases
        .expected
        .get("parameters_without_gradient")
        .and_then(Value::as_array)
        && !without.is_empty()
    {
        let moved = without.iter().filter_map(Value::as_str).filter(|name| {
            let own = gradients.get(*name).copied().unwrap_or_default();
            own.iter().any(|gradient| *gradient != 0.0)
        });
        tally.count("parameters without gradient", moved.count(), without.len());
    }
}

/// A micro-batch of all rows: the last token of each is only a target.
pub(super) fn input<'a>(cases: &Cases, tokens: &'a [u32], hidden: &'a [f32]) -> TrainInput<'a> {
    let (batch, seq) = shape(cases);
    TrainInput {
        tokens,
        hidden,
        batch,
        seq,
    }
}

fn shape(cases: &Cases) -> (u32, u32) {
    let seq = cases.tokens.first().map_or(1, |row| row.len() - 1);
    // Within the limit of tokens.
    (cases.tokens.len() as u32, seq as u32)
}

/// An optimiser that is never asked to step.
pub(super) fn inner(cases: &Cases) -> Inner {
    let (batch, seq) = shape(cases);
    Inner {
        steps: 1,
        batch,
        micro_batches: 1,
        seq,
        learning_rate: 0.0,
        warmup_steps: 0,
        beta_1: 0.9,
        beta_2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.0,
        clip_norm: 0.0,
        decay_ppm: 0,
        final_ppm: 0,
        schedule: Schedule::WarmupStableDecay,
        optimiser: Optimiser::AdamW,
        goldfish: None,
        precision: Precision::F32,
    }
}

fn by_name<'a>(layout: &'a Layout, parts: &'a [Vec<f32>]) -> BTreeMap<&'a str, &'a [f32]> {
    let mut named = BTreeMap::new();
    for (part, values) in layout.parts.iter().zip(parts) {
        let mut rest = &values[..];
        for tensor in &part.tensors {
            let Some((own, others)) = rest.split_at_checked(tensor.elements().unwrap_or(0)) else {
                break;
            };
            named.insert(tensor.name.as_str(), own);
            rest = others;
        }
    }
    named
}
