//! How fast this machine serves a model: the numbers of `polder bench engine`.

mod served;

use std::path::Path;
use std::time::Instant;

use polder_kernels::device::{Choice, Device};
use polder_kernels::stage::{Input, Output, ServeStage, StageError, Step, Want};
use polder_kernels::text::{TextError, Tokenizer};
use polder_protocol::work::Weights;
use thiserror::Error;

/// Positions that stand before the first one that is decoded; as many as a short question has.
const PROMPT_TOKENS: u32 = 16;
/// What a process that answers one question is asked.
const QUESTION: &str = "Once upon a time, in a land below the sea,";

/// What is measured, and how long.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Threads that compute; `None` for one per core.
    pub threads: Option<usize>,
    /// Tokens that are decoded one by one.
    pub decode_tokens: u32,
    /// Tokens of the prompt that is taken in one piece.
    pub prefill_tokens: u32,
    /// Sessions that decode together.
    pub sessions: u32,
    /// Each figure is the median of so many.
    pub repeats: u32,
}

/// Tokens a second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speeds {
    /// Of one session, token by token.
    pub decode: f64,
    /// Of a prompt in one piece.
    pub prefill: f64,
    /// Of all sessions together.
    pub together: f64,
    /// Of all sessions, each asking for itself through a worker's pipes.
    pub served: f64,
    /// Seconds from a model on disk to one that is ready.
    pub load_seconds: f64,
}

/// Why nothing was measured.
#[derive(Debug, Error)]
pub enum BenchError {
    /// The model was not loaded or did not run.
    #[error(transparent)]
    Stage(#[from] StageError),
    /// The tokenizer is at fault.
    #[error(transparent)]
    Text(#[from] TextError),
    /// Threads cannot be set twice.
    #[error("the threads cannot be set: {reason}")]
    Threads {
        /// What the pool says.
        reason: String,
    },
    /// The stage gave no logits.
    #[error("the model gives no logits")]
    NoLogits,
    /// The worker's pipes broke.
    #[error("the worker's pipe broke")]
    Pipe(#[from] std::io::Error),
    /// The worker did not do what was asked.
    #[error("the worker failed: {reason}")]
    Worker {
        /// What it said.
        reason: String,
    },
    /// A figure of nothing.
    #[error("decode, prefill, sessions and repeats must be at least 1")]
    Nothing,
}

/// Measures a model in a GGUF file or a Hugging Face folder on the CPU.
///
/// # Errors
///
/// [`BenchError`].
pub fn engine(source: &Path, plan: Plan) -> Result<Speeds, BenchError> {
    if [plan.decode_tokens, plan.prefill_tokens, plan.sessions, plan.repeats].contains(&0) {
        return Err(BenchError::Nothing);
    }
    set_threads(plan.threads)?;
    let start = Instant::now();
    let (mut stage, _) = open(source)?;
    let load_seconds = start.elapsed().as_secs_f64();
    let (mut decode, mut prefill, mut together) = (Vec::new(), Vec::new(), Vec::new());
    // The first of each warms up and is not counted.
    for repeat in 0..=plan.repeats {
        let figures = (
            decoding(&mut stage, plan)?,
            prefilling(&mut stage, plan)?,
            decoding_together(&mut stage, plan)?,
        );
        if repeat > 0 {
            decode.push(figures.0);
            prefill.push(figures.1);
            together.push(figures.2);
        }
    }
    Ok(Speeds {
        decode: median(decode),
        prefill: median(prefill),
        together: median(together),
        served: served::served(stage, plan)?,
        load_seconds,
    })
}

/// Loads a model and its tokenizer, takes a short question in, and gives the first token of the answer.
///
/// # Errors
///
/// [`BenchError`].
pub fn first_token(source: &Path, threads: Option<usize>) -> Result<u32, BenchError> {
    set_threads(threads)?;
    let (mut stage, tokenizer) = open(source)?;
    let tokens = Tokenizer::from_bytes(&tokenizer)?.encode(QUESTION)?;
    stage.open_session(1, 512.min(stage.config().context_tokens_max))?;
    let output = stage.forward(1, 0, Input::Tokens(&tokens), Want::LastLogits)?;
    // The process ends now, and its memory with it.
    std::mem::forget(stage);
    greedy(&output)
}

fn open(source: &Path) -> Result<(ServeStage, Vec<u8>), BenchError> {
    let (device, _) = Device::choose(Choice::Cpu);
    Ok(ServeStage::open(source, Weights::Packed, &device)?)
}

fn set_threads(threads: Option<usize>) -> Result<(), BenchError> {
    let Some(threads) = threads else { return Ok(()) };
    let built = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    built.map_err(|error| BenchError::Threads {
        reason: error.to_string(),
    })
}

/// A prompt that repeats nothing within reach.
fn prompt(stage: &ServeStage, count: u32) -> Vec<u32> {
    let vocabulary = u32::try_from(stage.config().vocabulary).unwrap_or(u32::MAX);
    (0..count).map(|i| i.wrapping_mul(97) % vocabulary).collect()
}

fn decoding(stage: &mut ServeStage, plan: Plan) -> Result<f64, BenchError> {
    stage.open_session(1, PROMPT_TOKENS + plan.decode_tokens)?;
    let tokens = prompt(stage, PROMPT_TOKENS);
    let mut token = greedy(&stage.forward(1, 0, Input::Tokens(&tokens), Want::LastLogits)?)?;
    let start = Instant::now();
    for step in 0..plan.decode_tokens {
        let output = stage.forward(1, PROMPT_TOKENS + step, Input::Tokens(&[token]), Want::LastLogits)?;
        token = greedy(&output)?;
    }
    let seconds = start.elapsed().as_secs_f64();
    stage.close_session(1);
    Ok(f64::from(plan.decode_tokens) / seconds)
}

fn prefilling(stage: &mut ServeStage, plan: Plan) -> Result<f64, BenchError> {
    stage.open_session(1, plan.prefill_tokens)?;
    let tokens = prompt(stage, plan.prefill_tokens);
    let start = Instant::now();
    greedy(&stage.forward(1, 0, Input::Tokens(&tokens), Want::LastLogits)?)?;
    let seconds = start.elapsed().as_secs_f64();
    stage.close_session(1);
    Ok(f64::from(plan.prefill_tokens) / seconds)
}

fn decoding_together(stage: &mut ServeStage, plan: Plan) -> Result<f64, BenchError> {
    let sessions = u64::from(plan.sessions);
    let prompt = prompt(stage, PROMPT_TOKENS + plan.sessions);
    let mut tokens = Vec::new();
    for (session, prompt) in (0..sessions).zip(prompt.windows(PROMPT_TOKENS as usize)) {
        stage.open_session(session, PROMPT_TOKENS + plan.decode_tokens)?;
        tokens.push(greedy(&stage.forward(
            session,
            0,
            Input::Tokens(prompt),
            Want::LastLogits,
        )?)?);
    }
    let start = Instant::now();
    for step in 0..plan.decode_tokens {
        let steps = (0..sessions).zip(&tokens).map(|(session, token)| Step {
            session,
            position: PROMPT_TOKENS + step,
            input: Input::Tokens(std::slice::from_ref(token)),
        });
        let outputs = stage.forward_together(&steps.collect::<Vec<_>>(), Want::LastLogits)?;
        tokens = outputs.iter().map(greedy).collect::<Result<_, _>>()?;
    }
    let seconds = start.elapsed().as_secs_f64();
    for session in 0..sessions {
        stage.close_session(session);
    }
    Ok(f64::from(plan.decode_tokens) * f64::from(plan.sessions) / seconds)
}

fn greedy(output: &Output) -> Result<u32, BenchError> {
    let Output::Logits(logits) = output else {
        return Err(BenchError::NoLogits);
    };
    best(logits).ok_or(BenchError::NoLogits)
}

fn best(logits: &[f32]) -> Option<u32> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let index = logits.iter().position(|logit| *logit == largest)?;
    u32::try_from(index).ok()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
