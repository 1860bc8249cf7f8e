//! The serving engine against the cases: activations, choices, logits, greedy tokens.

use std::collections::BTreeMap;

use super::VerifyError;
use super::cases::Cases;
use super::compare::Tally;
use crate::device::Device;
use crate::model::Config;
use crate::model::describe::Mixer;
use crate::stage::{Input, Output, ServeStage, StageError, Trace, Want};
use crate::weights::Tensors;

/// What one pass over all rows gave.
#[derive(Default)]
struct Seen {
    embedded: Vec<f32>,
    hidden: BTreeMap<u32, Vec<f32>>,
    normed: Vec<f32>,
    logits: Vec<f32>,
    nll: Vec<f32>,
    further: Vec<f32>,
    routing: BTreeMap<u32, crate::stage::Routing>,
    selected: BTreeMap<u32, Vec<f32>>,
    greedy_wrong: usize,
    greedy_count: usize,
}

/// Tells which device served.
pub(super) fn compare(
    config: &Config,
    tensors: &dyn Tensors,
    cases: &Cases,
    device: &Device,
    tally: &mut Tally<'_>,
) -> Result<String, VerifyError> {
    let mut stage = ServeStage::whole(config.clone(), tensors, device)?;
    // Only the CPU's engine has the module that predicts one token further.
    let has_further = cases.tensor("mtp.logits").is_some() && stage.is_on_cpu();
    let mut seen = Seen::default();
    for (row, tokens) in cases.tokens.iter().enumerate() {
        let mut trace = Trace::default();
        run(&mut stage, tokens, &cases.greedy(row), &mut trace, &mut seen)?;
        if has_further {
            let hidden = last_normed(&stage, config, &trace);
            let count = (tokens.len() - 1) * config.hidden;
            let further = stage.further(tensors, hidden.get(..count).unwrap_or_default(), &tokens[1..])?;
            seen.further.extend(further.unwrap_or_default());
        }
        seen.take(&stage, config, trace, tokens);
    }
    seen.tally(config, cases, tally);
    if has_further && let Some(right) = cases.tensor("mtp.logits") {
        tally.absolute("mtp.logits", &seen.further, right, "logits_abs", 2e-4);
    }
    Ok(match stage.is_on_cpu() {
        true => Device::cpu().name().to_owned(),
        false => device.name().to_owned(),
    })
}

fn run(
    stage: &mut ServeStage,
    tokens: &[u32],
    greedy: &[u32],
    trace: &mut Trace,
    seen: &mut Seen,
) -> Result<(), VerifyError> {
    let room = u32::try_from(tokens.len() + greedy.len()).unwrap_or(u32::MAX);
    stage.open_session(1, room)?;
    let output = stage.forward_traced(1, 0, Input::Tokens(tokens), Want::AllLogits, Some(trace))?;
    let logits = logits_of(output)?;
    let vocabulary = logits.len() / tokens.len();
    for (logits, next) in logits.chunks_exact(vocabulary).zip(&tokens[1..]) {
        seen.nll.push(loss(logits, *next));
    }
    let mut last = logits[logits.len() - vocabulary..].to_vec();
    seen.logits.extend(logits);
    for (position, right) in (tokens.len() as u32..).zip(greedy) {
        let chosen = crate::model::routing::largest(last.iter().copied().enumerate(), 1);
        let chosen = chosen.first().map_or(0, |token| *token as u32);
        seen.greedy_count += 1;
        seen.greedy_wrong += usize::from(chosen != *right);
        if chosen != *right {
            break; // What follows another token is another text.
        }
        let output = stage.forward(1, position, Input::Tokens(&[chosen]), Want::LastLogits)?;
        last = logits_of(output)?;
    }
    Ok(())
}

fn logits_of(output: Output) -> Result<Vec<f32>, StageError> {
    match output {
        Output::Logits(logits) => Ok(logits),
        Output::Hidden(_) => Err(StageError::Kind { takes: "no logits" }),
    }
}

/// −ln p in f64.
fn loss(logits: &[f32], next: u32) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    let own = logits.get(next as usize).copied().unwrap_or(f32::NEG_INFINITY);
    (sum.ln() - f64::from(own - max)) as f32
}

fn last_normed(stage: &ServeStage, config: &Config, trace: &Trace) -> Vec<f32> {
    let last = config.blocks.saturating_sub(1);
    let hidden = trace.hidden.get(&last).map(Vec::as_slice).unwrap_or_default();
    stage.final_norm(hidden).unwrap_or_default()
}

impl Seen {
    fn take(&mut self, stage: &ServeStage, config: &Config, trace: Trace, tokens: &[u32]) {
        self.embedded.extend(stage.embed(tokens));
        self.normed.extend(last_normed(stage, config, &trace));
        for (block, hidden) in trace.hidden {
            self.hidden.entry(block).or_default().extend(hidden);
        }
        for (block, routing) in trace.routing {
            let all = self.routing.entry(block).or_default();
            all.weights.extend(routing.weights);
            all.scores.extend(routing.scores);
        }
        for (block, rows) in trace.selected {
            let all = self.selected.entry(block).or_default();
            for row in rows {
                let marks = (0..tokens.len()).map(|position| f32::from(u8::from(row.contains(&position))));
                all.extend(marks);
            }
        }
    }

    fn tally(&self, config: &Config, cases: &Cases, tally: &mut Tally<'_>) {
        let blocks = self
            .hidden
            .iter()
            .map(|(block, hidden)| (format!("hidden.{}", block + 1), hidden));
        let hidden = [("hidden.0".to_owned(), &self.embedded)].into_iter().chain(blocks);
        for (name, own) in hidden.chain([("hidden.final".to_owned(), &self.normed)]) {
            if let Some(right) = cases.tensor(&name) {
                tally.of_largest(&name, own, right, "hidden_rel", 1e-4);
            }
        }
        for (name, own, key, otherwise) in [
            ("logits", &self.logits, "logits_abs", 2e-4),
            ("nll", &self.nll, "loss_abs", 1e-4),
        ] {
            if let Some(right) = cases.tensor(name) {
                tally.absolute(name, own, right, key, otherwise);
            }
        }
        tally.count("greedy", self.greedy_wrong, self.greedy_count);
        self.tally_choices(cases, tally);
        self.tally_balance(config, cases, tally);
    }

    fn tally_choices(&self, cases: &Cases, tally: &mut Tally<'_>) {
        let names: Vec<&str> = cases.names().collect();
        for name in names {
            let mut words = name.split('.');
            let (Some(kind), Some(block)) = (words.next(), words.next().and_then(|block| block.parse::<u32>().ok()))
            else {
                continue;
            };
            let Some(right) = cases.tensor(name) else { continue };
            let nothing = Vec::new();
            match kind {
                "router" => {
                    let own = self.routing.get(&block).map_or(&nothing, |routing| &routing.weights);
                    tally.count(&format!("{name} chosen"), other_pattern(own, right), right.len());
                    tally.absolute(name, own, right, "hidden_rel", 1e-4);
                }
                "dsa" => {
                    let own = self.selected.get(&block).unwrap_or(&nothing);
                    tally.count(name, other_pattern(own, right), right.len());
                }
                _ => {}
            }
        }
    }

    /// `experts · Σ f · P` over the rows of all blocks with experts.
    fn tally_balance(&self, config: &Config, cases: &Cases, tally: &mut Tally<'_>) {
        let Some(right) = cases.number("load_balancing_loss") else {
            return;
        };
        let Some(count) = experts_of(config) else { return };
        let (mut choices, mut shares, mut rows) = (vec![0.0f64; count], vec![0.0f64; count], 0usize);
        for routing in self.routing.values() {
            let all = routing
                .weights
                .chunks_exact(count)
                .zip(routing.scores.chunks_exact(count));
            for (weights, scores) in all {
                rows += 1;
                for expert in 0..count {
                    choices[expert] += f64::from(u8::from(weights[expert] != 0.0));
                    shares[expert] += f64::from(scores[expert]);
                }
            }
        }
        let per_row = (rows.max(1) as f64).powi(2);
        let sum: f64 = choices.iter().zip(&shares).map(|(f, p)| f * p / per_row).sum();
        let own = count as f64 * sum;
        tally.absolute("load_balancing_loss", &[own as f32], &[right as f32], "loss_abs", 1e-4);
    }
}

fn experts_of(config: &Config) -> Option<usize> {
    config
        .description
        .iter()
        .flat_map(|block| &block.0)
        .find_map(|sublayer| match &sublayer.mixer {
            Mixer::Experts(experts) => Some(experts.experts.len()),
            _ => None,
        })
}

/// Where one is zero and the other is not.
fn other_pattern(own: &[f32], right: &[f32]) -> usize {
    if own.len() != right.len() {
        return own.len().max(right.len());
    }
    own.iter()
        .zip(right)
        .filter(|(own, right)| (**own != 0.0) != (**right != 0.0))
        .count()
}
