//! What the daemon asks of a worker, and what a worker answers.
//!
//! The worker is a child process that owns a device. Orders and answers cross its standard input and output, each as
//! a length (u32, little-endian), postcard bytes, a payload length (u64, little-endian) and a raw payload. Large
//! things (weights, states) are named by file; activations travel as the payload ([`frame`]).

pub mod frame;

use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::adapters::Adapters;
use crate::layout::BlockRange;
use crate::run::{Boundary, Inner};

/// A loaded stage, chosen by the daemon.
pub type StageId = u32;

/// A loaded tokenizer with its chat template, chosen by the daemon.
pub type TextId = u32;

/// One order. Answers carry the same `id`. Orders about text ([`Task::is_text`]) are carried out one after another, and
/// so are orders for the device, except that forwards of several sessions that wait may be computed as one batch, where
/// a short one overtakes a long one. Text and device do not wait for each other: words go out while a stage computes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Order {
    /// Chosen by the daemon.
    pub id: u64,
    /// What to do.
    pub task: Task,
}

/// What to do. Paths are of files on this machine that the daemon has verified.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Task {
    /// Describe the device. Answered with [`Answer::Device`].
    Hello,
    /// Load a stage for serving. Answered with [`Answer::Loaded`].
    Load {
        /// Names the stage from now on.
        stage: StageId,
        /// Hugging Face `config.json`, as text.
        config_json: String,
        /// Which blocks.
        range: BlockRange,
        /// Part files (see [`crate::epoch`]) in order: exactly the parts of `range`.
        part_files: Vec<String>,
        /// Keep packed weights packed, or widen them to f32.
        weights: Weights,
    },
    /// Forget a stage and its sessions. Answered with [`Answer::Done`].
    Unload {
        /// Which.
        stage: StageId,
    },
    /// Reserve KV cache. Answered with [`Answer::Opened`] or [`Answer::Failed`].
    OpenSession {
        /// Which stage.
        stage: StageId,
        /// Names the session.
        session: u64,
        /// Room for so many tokens.
        context_tokens_max: u32,
        /// Take over so many positions of a session that has ended ([`Task::EndSession`]), which is closed then.
        earlier: Option<(u64, u32)>,
    },
    /// End a session and keep its positions as long as nobody needs the room. Answered with [`Answer::Done`], also when
    /// there is no such session.
    EndSession {
        /// Which stage.
        stage: StageId,
        /// Which session.
        session: u64,
    },
    /// What a session's answer must keep to, at a stage with the head: from now on only tokens that `grammar` allows are
    /// chosen. Answered with [`Answer::Done`], or [`Answer::Failed`] for a grammar that cannot be used.
    Constrain {
        /// Which stage.
        stage: StageId,
        /// Which session.
        session: u64,
        /// `tokenizer.json` on this machine.
        tokenizer_file: String,
        /// Tokens that end an answer; they may come when it is whole.
        end_tokens: Vec<u32>,
        /// What to keep to.
        grammar: Grammar,
    },
    /// Free KV cache. Answered with [`Answer::Done`], also when there is no such session.
    CloseSession {
        /// Which stage.
        stage: StageId,
        /// Which session.
        session: u64,
    },
    /// Run positions `position ..` through the stage. KV entries from `position` on are forgotten first, so a replay or
    /// a rollback is a plain forward. A stage with the embedding takes `tokens`; any other takes the payload:
    /// `[seq, hidden]` f32 little-endian. A stage without the head answers [`Answer::Hidden`]; one with the head
    /// answers [`Answer::Sampled`] when `sample` is given, else [`Answer::Logits`].
    Forward {
        /// Which stage.
        stage: StageId,
        /// Which session.
        session: u64,
        /// Position of the first token.
        position: u32,
        /// Token ids, for a stage with the embedding; empty otherwise.
        tokens: Vec<u32>,
        /// How to choose the next token from the last position, at a stage with the head.
        sample: Option<Sampling>,
        /// What the choice looks back at.
        written: Written,
    },
    /// Load a stage for training, from state files. Answered with [`Answer::Loaded`].
    TrainLoad {
        /// Names the stage from now on.
        stage: StageId,
        /// Hugging Face `config.json`, as text.
        config_json: String,
        /// Which blocks.
        range: BlockRange,
        /// One file of little-endian f32 parameters per part of `range`; bytes after the parameters are ignored.
        part_files: Vec<String>,
        /// Inner optimiser and schedule.
        inner: Inner,
        /// All inner steps of the run, for the schedule.
        steps_total: u64,
        /// The optimiser's state as [`Task::TrainWrite`] wrote it; without it the optimiser begins afresh.
        optimiser_file: Option<String>,
        /// The model under adapters; `part_files` then hold the adapters' parameters.
        frozen: Option<Frozen>,
    },
    /// Replace the parameters of a training stage after an outer step; optimiser state stays. Answered with
    /// [`Answer::Done`].
    TrainSet {
        /// Which stage.
        stage: StageId,
        /// As in [`Task::TrainLoad`].
        part_files: Vec<String>,
    },
    /// Tokenise local texts and keep them for training. Answered with [`Answer::Data`].
    TrainData {
        /// `tokenizer.json` on this machine.
        tokenizer_file: String,
        /// Text files on this machine.
        text_files: Vec<String>,
    },
    /// Take whole inner steps on a stage that holds the whole model. Answered with [`Answer::Stepped`].
    TrainSteps {
        /// Which stage.
        stage: StageId,
        /// Inner steps of this run before these, for the schedule.
        step_first: u64,
        /// How many.
        steps: u32,
        /// Labels of the random stream that picks batches: run seed, round, replica.
        labels: Vec<u64>,
    },
    /// The token ids of one micro-batch. Answered with [`Answer::Batch`].
    TrainBatch {
        /// Labels of the random stream: run seed, round, replica, step, micro-batch.
        labels: Vec<u64>,
        /// Sequences.
        batch: u32,
        /// Tokens of one sequence; each comes with one more as its last target.
        seq: u32,
    },
    /// Run one micro-batch forward through a training stage and keep what its backward needs. The first stage takes
    /// `tokens`; others take the payload `[batch, seq, hidden]` in `boundary`'s form. A stage with the head also takes
    /// `tokens` as targets and answers [`Answer::Loss`], after which its backward has been run and the payload is the
    /// gradient of its input; others answer [`Answer::Hidden`], payload in `boundary`'s form.
    TrainForward {
        /// Which stage.
        stage: StageId,
        /// Which micro-batch of the step.
        micro_batch: u32,
        /// `[batch, seq + 1]` token ids, row-major; empty at a stage with neither embedding nor head.
        tokens: Vec<u32>,
        /// Sequences.
        batch: u32,
        /// Tokens of one sequence.
        seq: u32,
        /// The form of payloads in and out.
        boundary: Boundary,
    },
    /// Run the backward of a kept micro-batch: payload is the gradient of its output. Answered with
    /// [`Answer::Hidden`]: the gradient of the input, empty at the first stage.
    TrainBackward {
        /// Which stage.
        stage: StageId,
        /// Which micro-batch of the step.
        micro_batch: u32,
        /// The form of payloads in and out.
        boundary: Boundary,
    },
    /// The sum of squares of the accumulated gradients of the stage, after division by the number of micro-batches.
    /// Answered with [`Answer::SquareSum`].
    TrainSquareSum {
        /// Which stage.
        stage: StageId,
        /// Micro-batches of the step.
        micro_batches: u32,
    },
    /// An optimiser's step with the accumulated gradients, clipped by the global norm. Answered with [`Answer::Done`].
    TrainApply {
        /// Which stage.
        stage: StageId,
        /// Which inner step of the run, for the schedule.
        step: u64,
        /// Sum of squares over all stages of the replica.
        square_sum: f64,
    },
    /// Write the present parameters, one file of little-endian f32 per part. Answered with [`Answer::Done`].
    TrainWrite {
        /// Which stage.
        stage: StageId,
        /// Where, one per part of the stage's range.
        part_files: Vec<String>,
        /// Where the optimiser's state goes, for a worker that goes on with the same bits.
        optimiser_file: Option<String>,
    },
    /// Score held-out texts with a training stage that holds the whole model. Answered with [`Answer::Scored`].
    Score {
        /// Which stage.
        stage: StageId,
        /// The texts.
        texts: Vec<String>,
        /// Tokens of one window.
        seq: u32,
    },
    /// Load a tokenizer. Answered with [`Answer::Done`].
    TextLoad {
        /// Names the tokenizer from now on.
        text: TextId,
        /// `tokenizer.json` on this machine.
        tokenizer_file: String,
        /// Hugging Face `chat_template` (Jinja), where the model has one.
        chat_template: Option<String>,
        /// The token that begins a text, where there is one.
        begin_token: Option<u32>,
        /// Tokens that end a generation; the template may name the first.
        end_tokens: Vec<u32>,
    },
    /// Forget a tokenizer. Answered with [`Answer::Done`].
    TextUnload {
        /// Which.
        text: TextId,
    },
    /// Turn a prompt into tokens, with the begin token where the tokenizer adds one. Answered with
    /// [`Answer::Tokens`].
    Encode {
        /// Which tokenizer.
        text: TextId,
        /// What to turn.
        prompt: Prompt,
    },
    /// See whether answers can keep to a grammar. Answered with [`Answer::Done`] or [`Answer::Failed`].
    CheckGrammar {
        /// Which tokenizer.
        text: TextId,
        /// What to keep to.
        grammar: Grammar,
    },
    /// Turn tokens into text; bytes that are not UTF-8 become U+FFFD, special tokens nothing. Answered with
    /// [`Answer::Text`].
    Decode {
        /// Which tokenizer.
        text: TextId,
        /// What to turn.
        tokens: Vec<u32>,
    },
}

impl Task {
    /// Whether this order is about text, and so needs no device.
    pub const fn is_text(&self) -> bool {
        matches!(
            self,
            Self::TextLoad { .. }
                | Self::TextUnload { .. }
                | Self::Encode { .. }
                | Self::CheckGrammar { .. }
                | Self::Decode { .. }
        )
    }
}

/// The longest JSON schema.
pub const GRAMMAR_BYTES_MAX: usize = 32 << 10;

/// The longest descriptions of tools, together.
pub const TOOLS_BYTES_MAX: usize = 256 << 10;

/// What an answer keeps to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Grammar {
    /// A JSON object.
    JsonObject,
    /// JSON that this schema describes, at most [`GRAMMAR_BYTES_MAX`] long.
    JsonSchema(String),
}

/// What a person wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Prompt {
    /// Text to go on with.
    Plain(String),
    /// A conversation to answer, written out by the model's chat template.
    Chat {
        /// What was said so far.
        messages: Vec<Message>,
        /// What the model may call: each a JSON object `{"type": "function", "function": {...}}`, together at most
        /// [`TOOLS_BYTES_MAX`] long.
        tools: Vec<String>,
    },
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// What was said.
    pub content: String,
    /// What the assistant called.
    pub tool_calls: Vec<ToolCall>,
    /// Of a tool's answer: the call that it answers.
    pub tool_call_id: Option<String>,
    /// Who speaks, where templates want to know: of a tool's answer, the tool.
    pub name: Option<String>,
}

impl Message {
    /// A message of words alone.
    pub fn new(role: &str, content: &str) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
            tool_calls: Vec::new(),
            tool_call_id: None,
            name: None,
        }
    }
}

/// A tool that a model called.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCall {
    /// Names the call.
    pub id: String,
    /// Which tool.
    pub name: String,
    /// A JSON object.
    pub arguments: String,
}

/// A model that is frozen while its adapters are trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Frozen {
    /// The adapters.
    pub adapters: Adapters,
    /// One file of little-endian f32 parameters per part of the range.
    pub part_files: Vec<String>,
}

/// How weights are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Weights {
    /// As they are in the file.
    Packed,
    /// Widened to f32.
    F32,
}

/// The most alternatives to a chosen token that are told, as with OpenAI.
pub const ALTERNATIVES_MAX: u8 = 20;

/// How the next token is chosen. The choice at a position follows from `seed`, the position, the text before it and the
/// logits alone, so a replay chooses alike.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Zero is greedy.
    pub temperature: f32,
    /// Zero is no limit.
    pub top_k: u32,
    /// One is no limit.
    pub top_p: f32,
    /// Tokens below this share of the likeliest one's probability are not chosen. Zero is no limit.
    pub min_p: f32,
    /// Divides the logits of tokens that are in the text already, prompt included, where they are positive, and
    /// multiplies them where they are negative. One changes nothing.
    pub repetition_penalty: f32,
    /// Taken from the logit of a generated token for each time that it was generated. Zero changes nothing.
    pub frequency_penalty: f32,
    /// Taken once from the logit of every generated token. Zero changes nothing.
    pub presence_penalty: f32,
    /// Seeds the choice.
    pub seed: u64,
    /// How many of the likeliest tokens are told beside the chosen one, at most [`ALTERNATIVES_MAX`].
    pub alternatives: u8,
}

impl Sampling {
    /// Always the likeliest token.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
        presence_penalty: 0.0,
        seed: 0,
        alternatives: 0,
    };

    /// Whether the choice depends on the text before it, which the last stage must then know.
    pub fn looks_back(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }
}

/// The text before a token that is to be chosen, where [`Sampling::looks_back`] or a [`Grammar`] needs it; else nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Written {
    /// Prompt and generated tokens.
    pub tokens: Vec<u32>,
    /// How many of them are the prompt.
    pub prompt_tokens: u32,
}

/// A token and how likely it was.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Likely {
    /// Its id.
    pub token: u32,
    /// Its natural log-probability before penalties, temperature and limits.
    pub log_probability: f32,
}

/// What a worker answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// The order's id.
    pub id: u64,
    /// What came of it.
    pub answer: Answer,
}

/// What came of an order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Answer {
    /// Done.
    Done,
    /// Not done: nothing changed. The text says what happened, to what.
    Failed {
        /// For people.
        reason: String,
    },
    /// A session is open.
    Opened {
        /// So many positions it has from the session that has ended.
        positions: u32,
        /// It can go on from no earlier one of these, except from none.
        earliest: u32,
    },
    /// The device.
    Device {
        /// Such as `cpu (AVX-512, 2 threads)`.
        name: String,
        /// Bytes of its memory, where known.
        memory_bytes: Option<u64>,
        /// Whether it is the CPU.
        is_cpu: bool,
        /// Why it is not the device that was asked for, where it is another.
        fell_back: Option<String>,
    },
    /// A stage is ready.
    Loaded {
        /// Bytes that its weights take.
        bytes: u64,
        /// The width of its activations.
        hidden: u32,
    },
    /// The payload is the output `[.., hidden]`.
    Hidden,
    /// The payload is the logits `[seq, vocabulary]`, f32 little-endian.
    Logits,
    /// The chosen token.
    Sampled {
        /// What was chosen.
        chosen: Likely,
        /// The likeliest, the likeliest first, as many as were asked for.
        alternatives: Vec<Likely>,
    },
    /// Local data is ready.
    Data {
        /// Tokens in all.
        tokens: u64,
    },
    /// Inner steps were taken.
    Stepped {
        /// Mean loss of each step, in nats per token.
        losses: Vec<f32>,
        /// Tokens trained on.
        tokens: u64,
    },
    /// A micro-batch: `[batch, seq + 1]` token ids, row-major.
    Batch {
        /// The ids.
        tokens: Vec<u32>,
    },
    /// The mean loss of a micro-batch; the payload is the gradient of the stage's input.
    Loss {
        /// In nats per token.
        loss: f32,
    },
    /// A sum of squares.
    SquareSum {
        /// The sum.
        sum: f64,
    },
    /// Held-out scores.
    Scored {
        /// Bits per UTF-8 byte of each text.
        bits_per_byte: Vec<f32>,
    },
    /// A prompt as tokens.
    Tokens {
        /// The ids.
        tokens: Vec<u32>,
    },
    /// Tokens as text.
    Text {
        /// The text.
        text: String,
    },
}
