//! Cut at every boundary, a chain of stages must give the bits of the whole, forward and backward; on a device, what is near.

use polder_protocol::layout::BlockRange;
use serde_json::Value;

use super::VerifyError;
use super::cases::Cases;
use super::compare::Tally;
use super::training::{inner, input};
use crate::device::Device;
use crate::model::{Config, json, layout};
use crate::stage::{Input, Output, ServeStage, StageError, Want};
use crate::train::{TrainError, TrainOutput, TrainStage};
use crate::weights::{Tensors, parameters};

/// Serving: to the bit where all stages are on the CPU, otherwise near.
pub(super) fn compare_serving(
    config: &Config,
    tensors: &dyn Tensors,
    cases: &Cases,
    device: &Device,
    tally: &mut Tally<'_>,
) -> Result<(), VerifyError> {
    if config.blocks < 2 {
        return Ok(());
    }
    let mut on_cpu = true;
    let mut run = |range: BlockRange, input: Input<'_>| -> Result<Vec<f32>, StageError> {
        let mut stage = ServeStage::part(config.clone(), range, tensors, device)?;
        on_cpu &= stage.is_on_cpu();
        let rows = match input {
            Input::Tokens(tokens) => tokens.len(),
            Input::Hidden(hidden) => hidden.len() / config.hidden,
        };
        stage.open_session(1, u32::try_from(rows).unwrap_or(u32::MAX))?;
        Ok(match stage.forward(1, 0, input, Want::AllLogits)? {
            Output::Hidden(hidden) => hidden,
            Output::Logits(logits) => logits,
        })
    };
    let tokens = cases.tokens.first().map(Vec::as_slice).unwrap_or_default();
    let whole = run(BlockRange::whole(config.blocks), Input::Tokens(tokens))?;
    let mut chains = Vec::new();
    for cut in 1..config.blocks {
        let [first, second] = halves(config.blocks, cut);
        let hidden = run(first, Input::Tokens(tokens))?;
        chains.push(run(second, Input::Hidden(&hidden))?);
    }
    match on_cpu {
        true => {
            let wrong = chains.iter().filter(|chained| !same_bits(chained, &whole));
            tally.count("stages forward", wrong.count(), chains.len());
        }
        false => {
            let right = whole.repeat(chains.len());
            tally.absolute("stages forward", &chains.concat(), &right, "logits_abs", 2e-4);
        }
    }
    Ok(())
}

/// Training: to the bit.
pub(super) fn compare_training(
    config: &Config,
    config_json: &str,
    tensors: &dyn Tensors,
    cases: &Cases,
    device: &Device,
    tally: &mut Tally<'_>,
) -> Result<(), VerifyError> {
    if config.blocks < 2 {
        return Ok(());
    }
    let (wrong, cuts) = training(config_json, tensors, cases, device)?;
    tally.count("stages backward", wrong, cuts);
    Ok(())
}

/// Both halves of a model cut at `cut`.
const fn halves(blocks: u32, cut: u32) -> [BlockRange; 2] {
    let (first, second) = (
        BlockRange { first: 0, end: cut },
        BlockRange {
            first: cut,
            end: blocks,
        },
    );
    [first, second]
}

fn training(
    config_json: &str,
    tensors: &dyn Tensors,
    cases: &Cases,
    device: &Device,
) -> Result<(usize, usize), VerifyError> {
    let (config, config_json, parameters) = untied(config_json, tensors)?;
    let tokens = cases.tokens.concat();
    let stage = |range: BlockRange| {
        let parts = range.parts(config.blocks);
        let own = parameters
            .get(parts.start as usize..parts.end as usize)
            .unwrap_or_default();
        TrainStage::new(&config_json, range, own.to_vec(), inner(cases), 1, device)
    };
    let mut whole = stage(BlockRange::whole(config.blocks))?;
    let right = loss_of(whole.forward(0, input(cases, &tokens, &[]))?)?;
    let right_gradients = whole.gradients()?;
    let mut wrong = 0;
    for cut in 1..config.blocks {
        let [first, second] = halves(config.blocks, cut);
        let (mut first, mut second) = (stage(first)?, stage(second)?);
        let TrainOutput::Hidden(hidden) = first.forward(0, input(cases, &tokens, &[]))? else {
            return Err(TrainError::Kind { takes: "no head" }.into());
        };
        let (loss, gradient) = loss_of(second.forward(0, input(cases, &tokens, &hidden))?)?;
        first.backward(0, &gradient)?;
        let own = first.gradients()?.iter().chain(second.gradients()?);
        let same = own.zip(right_gradients).all(|(own, right)| same_bits(own, right));
        wrong += usize::from(!same || loss.to_bits() != right.0.to_bits());
    }
    Ok((wrong, config.blocks as usize - 1))
}

fn loss_of(output: TrainOutput) -> Result<(f32, Vec<f32>), TrainError> {
    match output {
        TrainOutput::Loss { loss, input_gradient } => Ok((loss, input_gradient)),
        TrainOutput::Hidden(_) => Err(TrainError::Kind { takes: "a head" }),
    }
}

/// First and last stage cannot share a tensor in training, so a tied model is given a projection of its own.
fn untied(config_json: &str, tensors: &dyn Tensors) -> Result<(Config, String, Vec<Vec<f32>>), VerifyError> {
    let config = Config::from_json(config_json)?;
    let mut parameters = parameters(&layout(&config), tensors)?;
    if !config.tied {
        return Ok((config, config_json.to_owned(), parameters));
    }
    let mut value = json::parse(config_json).unwrap_or_default(); // It has been read before.
    value["tie_word_embeddings"] = Value::Bool(false);
    let text = value.to_string();
    let embedding = parameters.first().cloned().unwrap_or_default();
    if let Some(head) = parameters.last_mut() {
        head.extend(embedding);
    }
    Ok((Config::from_json(&text)?, text, parameters))
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}
