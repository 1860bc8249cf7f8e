//! What a training run is: everything that every node must agree on before the first step.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::adapters::Adapters;
use crate::hash::{BlobId, Digest, FederationId, NodeId, RunId, digest};
use crate::layout::Layout;
use crate::time::Span;

/// The format of a [`RunSpec`]: 2 since a run names its optimiser, 3 since it names its precision.
pub const SPEC_VERSION: u16 = 3;

/// The agreed facts of a run. Its hash is the [`RunId`]; the steward signs it as the first entry of the run's log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunSpec {
    /// Format version, [`SPEC_VERSION`].
    pub version: u16,
    /// What people call it.
    pub name: String,
    /// The federation that it belongs to.
    pub federation: FederationId,
    /// The node that keeps the run's log.
    pub steward: NodeId,
    /// The Hugging Face `config.json` of the model, as text.
    pub config_json: String,
    /// The parameters that are trained, per part: the model's, or those of its adapters.
    pub layout: Layout,
    /// `tokenizer.json` bytes.
    pub tokenizer: BlobId,
    /// One state blob per part before round 0: the parameters as little-endian f32, momentum absent (all zero).
    pub initial: Vec<BlobId>,
    /// The number of rounds.
    pub rounds: u64,
    /// Inner steps.
    pub inner: Inner,
    /// Outer step.
    pub outer: Outer,
    /// When a round closes.
    pub closing: Closing,
    /// Names of data sets of which a participant trains on those it has; empty means any that it has.
    pub data: Vec<String>,
    /// Seeds everything: `h(seed, round, replica, step)` picks a batch.
    pub seed: u64,
    /// Public held-out texts: a blob of the postcard bytes of [`Evaluation`]; `None` for no evaluation.
    pub evaluation: Option<BlobId>,
    /// Evaluate after every so many rounds, and after the last.
    pub evaluate_every_rounds: u64,
    /// How activations and their gradients cross between the stages of one replica.
    pub boundary: Boundary,
    /// What is trained in place of a model that is frozen; `None` trains the model itself.
    pub adapters: Option<Adapters>,
}

/// The inner optimiser, its schedule and its loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Inner {
    /// H, the inner steps of one round.
    pub steps: u32,
    /// Sequences of one micro-batch.
    pub batch: u32,
    /// Micro-batches of one step.
    pub micro_batches: u32,
    /// Tokens of one sequence.
    pub seq: u32,
    /// Peak learning rate.
    pub learning_rate: f32,
    /// Steps from zero to the peak learning rate, counted over the run.
    pub warmup_steps: u32,
    /// Decay of the mean of gradients, of AdamW and AdEMAMix.
    pub beta_1: f32,
    /// Decay of the mean square of gradients.
    pub beta_2: f32,
    /// What is added to the root of the mean square.
    pub epsilon: f32,
    /// Decoupled weight decay, on tensors of two dimensions.
    pub weight_decay: f32,
    /// Largest global gradient norm; zero is no limit.
    pub clip_norm: f32,
    /// Share of the run, in millionths, over which the rate falls at its end, with [`Schedule::WarmupStableDecay`].
    pub decay_ppm: u32,
    /// What the rate falls to, in millionths of the peak.
    pub final_ppm: u32,
    /// How the rate changes after its warm-up.
    pub schedule: Schedule,
    /// What makes a step of a gradient.
    pub optimiser: Optimiser,
    /// Labels that are left out of the loss; `None` leaves out none.
    pub goldfish: Option<Goldfish>,
    /// What the products of linear layers are computed in.
    pub precision: Precision,
}

/// What the products of linear layers are computed in. Parameters, gradients, their sums and the optimiser are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Precision {
    /// f32 everywhere.
    #[default]
    F32,
    /// Elements are rounded to bf16 where a node's device multiplies those faster; elsewhere as [`Precision::F32`].
    Bf16,
}

/// What makes a step of a gradient.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub enum Optimiser {
    /// Loshchilov and Hutter 2019.
    #[default]
    AdamW,
    /// AdamW with a second, slow mean of gradients (arXiv 2409.03137).
    AdEmaMix {
        /// Decay of the slow mean, once warm.
        beta_3: f32,
        /// Weight of the slow mean, once warm.
        alpha: f32,
        /// Steps over which both grow.
        warmup_steps: u32,
    },
    /// Momentum made orthogonal, for the matrices of blocks; AdamW for embedding, head and everything that is no matrix.
    Muon {
        /// Peak learning rate of those matrices; the other one is AdamW's. Both follow one schedule.
        learning_rate: f32,
        /// Decay of the momentum, which is Nesterov's.
        momentum: f32,
        /// Newton and Schulz's iterations.
        iterations: u32,
    },
}

/// How the learning rate changes after its warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Schedule {
    /// It stays, and falls as 1 − √ over the last share of the run.
    #[default]
    WarmupStableDecay,
    /// It falls along half a cosine to the end of the run.
    Cosine,
}

/// Goldfish loss: one label in `every` is left out of the loss, always the same after the same words, so that no text is
/// learnt by heart (arXiv 2406.10209).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Goldfish {
    /// One label in so many.
    pub every: u32,
    /// Labels that decide, the one in question included.
    pub window: u32,
    /// Which windows leave theirs out.
    pub seed: u64,
}

/// The longest window of [`Goldfish`].
pub const GOLDFISH_WINDOW_MAX: u32 = 4_096;
/// The most iterations of [`Optimiser::Muon`]: its matrices are as orthogonal as they get after ten.
pub const MUON_ITERATIONS_MAX: u32 = 20;

impl Inner {
    /// Looks at numbers that would make every step wrong. What is wrong is named as in the run file.
    ///
    /// # Errors
    ///
    /// The setting at fault.
    pub fn check(&self) -> Result<(), &'static str> {
        let share = |value: f32| (0.0..1.0).contains(&value);
        let rules = [
            (
                (0.0..=10.0).contains(&self.learning_rate),
                "`learning_rate` is not within 0 and 10",
            ),
            (share(self.beta_1), "`beta_1` is not at least 0 and below 1"),
            (share(self.beta_2), "`beta_2` is not at least 0 and below 1"),
            (
                self.epsilon > 0.0 && self.epsilon <= 1.0,
                "`epsilon` is not above 0 and at most 1",
            ),
            (
                (0.0..=10.0).contains(&self.weight_decay),
                "`weight_decay` is not within 0 and 10",
            ),
            (
                self.clip_norm >= 0.0 && self.clip_norm.is_finite(),
                "`clip_norm` is below 0 or not finite",
            ),
            (self.decay_ppm <= 1_000_000, "`decay` is more than the run"),
            (self.final_ppm <= 1_000_000, "`final_rate` is above the peak"),
        ];
        let optimiser = match self.optimiser {
            Optimiser::AdamW => [(true, ""); 3],
            Optimiser::AdEmaMix { beta_3, alpha, .. } => [
                (share(beta_3), "`beta_3` of AdEMAMix is not at least 0 and below 1"),
                (
                    (0.0..=1_000.0).contains(&alpha),
                    "`alpha` of AdEMAMix is not within 0 and 1000",
                ),
                (true, ""),
            ],
            Optimiser::Muon {
                learning_rate,
                momentum,
                iterations,
            } => [
                (
                    (0.0..=10.0).contains(&learning_rate),
                    "`learning_rate` of Muon is not within 0 and 10",
                ),
                (share(momentum), "`momentum` of Muon is not at least 0 and below 1"),
                (
                    (1..=MUON_ITERATIONS_MAX).contains(&iterations),
                    "`iterations` of Muon are not 1 to 20",
                ),
            ],
        };
        let goldfish = self
            .goldfish
            .is_none_or(|goldfish| goldfish.every >= 2 && (1..=GOLDFISH_WINDOW_MAX).contains(&goldfish.window));
        let goldfish = (
            goldfish,
            "goldfish leaves out one label in 2 or more, by a `window` of 1 to 4096",
        );
        let mut all = rules.into_iter().chain(optimiser).chain([goldfish]);
        all.find(|(kept, _)| !kept).map_or(Ok(()), |(_, broken)| Err(broken))
    }
}

/// The outer step over the mean pseudo-gradient g.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Outer {
    /// How pseudo-gradients are written.
    pub codec: Codec,
    /// η in θ ← θ − η (g + μ m).
    pub learning_rate: f32,
    /// μ in m ← μ m + g. Zero for [`Codec::TopkQ2`], where error feedback plays its part.
    pub momentum: f32,
    /// The first rounds that use dense [`Codec::E3m0`] with momentum before [`Codec::TopkQ2`] takes over.
    pub warm_start_rounds: u64,
}

/// How a pseudo-gradient is written.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Codec {
    /// f32 as it is.
    Raw,
    /// One byte and a share of a block's scale.
    Int8,
    /// Four bits: a sign and a three-bit exponent, and one scale per tensor.
    E3m0,
    /// The `k` largest of each 4,096 with 2-bit values, and error feedback.
    TopkQ2 {
        /// Values kept of each chunk of 4,096.
        k: u16,
        /// What the error buffer keeps from round to round.
        error_decay: f32,
    },
}

/// When a round closes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Closing {
    /// Contributions without which a round stays open, unless the deadline passes with at least one.
    pub quorum: u32,
    /// How long to wait for the others after the quorum.
    pub grace: Span,
    /// After so long a round closes with what is there.
    pub deadline: Span,
    /// Rounds for which a late contribution is still folded in, at half its weight per round.
    pub late_rounds_max: u32,
}

/// How activations and their gradients are written between stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Boundary {
    /// Four bytes a value.
    F32,
    /// Two bytes a value.
    Bf16,
    /// One byte a value and one f32 scale per 256.
    Int8,
}

/// Held-out texts and what honest baselines need for them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
pub struct Evaluation {
    /// By language code.
    pub languages: BTreeMap<String, HeldOut>,
}

/// One language of an [`Evaluation`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
pub struct HeldOut {
    /// Never trained on. All of it is scored.
    pub text: String,
    /// Bits per byte of the text under its own byte frequencies.
    pub order_0_bits_per_byte: f32,
    /// Bits per byte of a general-purpose compressor primed with the language's training text.
    pub compressor_bits_per_byte: f32,
}

impl RunSpec {
    /// The parameters of the model that comes of the run, per part.
    pub fn model(&self) -> &Layout {
        self.adapters.as_ref().map_or(&self.layout, |adapters| &adapters.model)
    }

    /// The canonical bytes that are hashed and stored.
    pub fn to_bytes(&self) -> Vec<u8> {
        // A value of this type holds nothing that postcard cannot write.
        postcard::to_allocvec(self).unwrap_or_default()
    }

    /// Reads canonical bytes.
    ///
    /// # Errors
    ///
    /// What postcard says of malformed bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, postcard::Error> {
        postcard::from_bytes(bytes)
    }

    /// The id: the hash of the canonical bytes.
    pub fn id(&self) -> RunId {
        RunId(digest(&self.to_bytes()).0)
    }
}

/// The hash of a whole state: of the blob ids of all parts, in order.
pub fn state_hash(parts: &[BlobId]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&part.0);
    }
    Digest(*hasher.finalize().as_bytes())
}
