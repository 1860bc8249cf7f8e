//! The table `[inner]` of a run file: the steps between two exchanges, the optimiser and the loss.

use anyhow::{bail, ensure};
use polder_protocol::run::{Goldfish, Inner, Optimiser, Precision, Schedule};
use serde::Deserialize;

use super::{RunFile, positive};

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct InnerTable {
    /// H. 30 is where several published runs lie; more saves traffic and costs a little quality.
    steps: u32,
    /// Sequences of one micro-batch.
    batch: u32,
    /// Micro-batches of one step.
    micro_batches: u32,
    /// Tokens of one sequence.
    seq: u32,
    /// Peak learning rate of AdamW, and of AdEMAMix.
    learning_rate: f32,
    /// Steps to the peak.
    warmup_steps: u32,
    /// `wsd`, which holds the peak and falls at the end, or `cosine`.
    schedule: String,
    /// What the rate falls to, as a share of the peak.
    final_rate: f64,
    /// `adamw`, `ademamix` or `muon`.
    optimiser: String,
    /// Decay of the mean of gradients.
    beta_1: f32,
    /// Decay of the mean square of gradients.
    beta_2: f32,
    /// Added to the root of the mean square.
    epsilon: f32,
    /// What only AdEMAMix has.
    ademamix: Option<AdEmaMixTable>,
    /// What only Muon has.
    muon: Option<MuonTable>,
    /// Labels that are left out of the loss.
    goldfish: Option<GoldfishTable>,
    /// Decoupled weight decay of matrices.
    weight_decay: f32,
    /// Largest global gradient norm.
    clip_norm: f32,
    /// Share of the run, 0 to 1, over which the rate falls at the end; with `wsd`.
    decay: Option<f64>,
    /// What the products of linear layers are computed in: `f32`, or `bf16` on the nodes whose device multiplies that faster.
    precision: String,
}

impl Default for InnerTable {
    fn default() -> Self {
        Self {
            steps: 30,
            batch: 8,
            micro_batches: 1,
            seq: 128,
            learning_rate: 4e-4,
            warmup_steps: 100,
            schedule: "wsd".into(),
            final_rate: 0.0,
            optimiser: "adamw".into(),
            // As in the published decentralised runs.
            beta_1: 0.9,
            beta_2: 0.95,
            epsilon: 1e-8,
            ademamix: None,
            muon: None,
            goldfish: None,
            weight_decay: 0.1,
            clip_norm: 1.0,
            decay: None,
            precision: "f32".into(),
        }
    }
}

/// AdEMAMix: the values with which Apertus was trained.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct AdEmaMixTable {
    /// Decay of the slow mean.
    beta_3: f32,
    /// Its weight.
    alpha: f32,
    /// Steps over which both grow; all steps of the run by default.
    warmup_steps: Option<u32>,
}

impl Default for AdEmaMixTable {
    fn default() -> Self {
        Self {
            beta_3: 0.999,
            alpha: 8.0,
            warmup_steps: None,
        }
    }
}

/// Muon, for the matrices of blocks: its author's values. Everything else is AdamW's.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct MuonTable {
    /// Peak learning rate of the matrices.
    learning_rate: f32,
    /// Decay of the momentum.
    momentum: f32,
    /// Newton and Schulz's iterations.
    iterations: u32,
}

impl Default for MuonTable {
    fn default() -> Self {
        Self {
            learning_rate: 0.02,
            momentum: 0.95,
            iterations: 5,
        }
    }
}

/// Goldfish loss, as Apertus has it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct GoldfishTable {
    /// One label in so many is left out.
    every: u32,
    /// Labels that decide, the one in question included.
    window: u32,
}

impl Default for GoldfishTable {
    fn default() -> Self {
        Self { every: 50, window: 50 }
    }
}

impl RunFile {
    /// The inner steps.
    pub(crate) fn inner(&self) -> anyhow::Result<Inner> {
        let table = &self.inner;
        ensure!(
            table.steps > 0 && table.batch > 0 && table.micro_batches > 0 && table.seq > 0,
            "`steps`, `batch`, `micro_batches` and `seq` of [inner] must be at least 1"
        );
        let decay = table.decay.unwrap_or(0.2);
        ensure!(
            (0.0..=1.0).contains(&decay),
            "`decay` of [inner] is a share between 0 and 1"
        );
        ensure!(
            (0.0..=1.0).contains(&table.final_rate),
            "`final_rate` of [inner] is a share between 0 and 1"
        );
        let schedule = match table.schedule.as_str() {
            "wsd" => Schedule::WarmupStableDecay,
            "cosine" => Schedule::Cosine,
            other => bail!("`schedule` = \"{other}\" is none of \"wsd\", \"cosine\""),
        };
        ensure!(
            schedule == Schedule::WarmupStableDecay || table.decay.is_none(),
            "`decay` of [inner] is of the schedule \"wsd\""
        );
        let precision = match table.precision.as_str() {
            "f32" => Precision::F32,
            "bf16" => Precision::Bf16,
            other => bail!("`precision` = \"{other}\" is none of \"f32\", \"bf16\""),
        };
        let inner = Inner {
            steps: table.steps,
            batch: table.batch,
            micro_batches: table.micro_batches,
            seq: table.seq,
            learning_rate: positive("learning_rate", table.learning_rate)?,
            warmup_steps: table.warmup_steps,
            beta_1: table.beta_1,
            beta_2: table.beta_2,
            epsilon: table.epsilon,
            weight_decay: table.weight_decay,
            clip_norm: positive("clip_norm", table.clip_norm)?,
            decay_ppm: (decay * 1e6).round() as u32,
            final_ppm: (table.final_rate * 1e6).round() as u32,
            schedule,
            optimiser: self.optimiser()?,
            goldfish: table.goldfish.as_ref().map(|goldfish| Goldfish {
                every: goldfish.every,
                window: goldfish.window,
                seed: self.seed,
            }),
            precision,
        };
        inner.check().map_err(|reason| anyhow::anyhow!("[inner]: {reason}"))?;
        Ok(inner)
    }

    fn optimiser(&self) -> anyhow::Result<Optimiser> {
        let table = &self.inner;
        let name = table.optimiser.as_str();
        let others = [("ademamix", table.ademamix.is_some()), ("muon", table.muon.is_some())];
        if let Some((other, _)) = others.into_iter().find(|(other, given)| *given && *other != name) {
            bail!("[inner.{other}] is not for `optimiser` = \"{name}\"");
        }
        match name {
            "adamw" => Ok(Optimiser::AdamW),
            "ademamix" => {
                let set = table.ademamix.clone().unwrap_or_default();
                let steps = self.rounds.saturating_mul(u64::from(table.steps));
                let all = u32::try_from(steps).unwrap_or(u32::MAX);
                Ok(Optimiser::AdEmaMix {
                    beta_3: set.beta_3,
                    alpha: set.alpha,
                    warmup_steps: set.warmup_steps.unwrap_or(all),
                })
            }
            "muon" => {
                let set = table.muon.clone().unwrap_or_default();
                Ok(Optimiser::Muon {
                    learning_rate: set.learning_rate,
                    momentum: set.momentum,
                    iterations: set.iterations,
                })
            }
            other => bail!("`optimiser` = \"{other}\" is none of \"adamw\", \"ademamix\", \"muon\""),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "name = \"small\"\nrounds = 3\n[model]\nhidden = 64\nblocks = 2\nheads = 4\n";

    #[test]
    fn optimiser_schedule_and_loss_are_those_that_are_asked_for() {
        let inner = |text: &str| {
            RunFile::parse(&format!("{SMALL}[inner]\n{text}"))
                .unwrap()
                .inner()
                .unwrap()
        };
        let plain = inner("");
        assert_eq!(plain.precision, Precision::F32);
        assert_eq!(inner("precision = \"bf16\"").precision, Precision::Bf16);
        assert_eq!((plain.optimiser, plain.goldfish), (Optimiser::AdamW, None));
        let muon = inner("optimiser = \"muon\"\n[inner.muon]\nlearning_rate = 0.01\n");
        let right = Optimiser::Muon {
            learning_rate: 0.01,
            momentum: 0.95,
            iterations: 5,
        };
        assert_eq!(muon.optimiser, right);
        let ademamix =
            inner("optimiser = \"ademamix\"\nschedule = \"cosine\"\nfinal_rate = 0.1\n[inner.goldfish]\nevery = 4\n");
        let right = Optimiser::AdEmaMix {
            beta_3: 0.999,
            alpha: 8.0,
            warmup_steps: 90,
        };
        assert_eq!((ademamix.optimiser, ademamix.schedule), (right, Schedule::Cosine));
        assert_eq!((ademamix.final_ppm, ademamix.goldfish.unwrap().every), (100_000, 4));
    }
}
