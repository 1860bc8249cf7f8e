//! The forward pass of consecutive blocks, as the model's description says.

use std::collections::BTreeMap;

use polder_protocol::layout::BlockRange;

use super::dense::LoadedNorm;
use super::elementwise::{Turns, add};
use super::experts::{ExpertWeights, Routing};
use super::grouped::{Attending, GroupedWeights};
use super::latent::{LatentCache, LatentWeights};
use super::mamba::MambaWeights;
use super::matrix::{Matrix, product_finely};
use super::mlp::MlpWeights;
use super::pages::Memory;
use super::sequence::{self, Kept, Sequence};
use crate::model::{Config, Frequencies};
use crate::stage::further::FurtherWeights;
use crate::stage::pages::{PAGE_POSITIONS, Pool};
use crate::stage::sessions;
use crate::stage::weights::StageWeights;
use crate::stage::{Input, Output, Want};

/// Positions that are worked on together: more would outgrow the caches, and memory stays bounded for any prompt.
const CHUNK_POSITIONS: usize = 256;

/// The weights of a stage, ready to multiply.
#[derive(Debug)]
pub(in crate::stage) struct Engine {
    config: Config,
    range: BlockRange,
    frequencies: Vec<(Frequencies, bool)>,
    weights: StageWeights,
}

/// One sublayer, loaded.
#[derive(Debug)]
pub(in crate::stage) struct LoadedSublayer {
    pub(in crate::stage) norm: LoadedNorm,
    pub(in crate::stage) mixer: LoadedMixer,
    pub(in crate::stage) after: Option<LoadedNorm>,
}

/// What a sublayer does, loaded.
#[derive(Debug)]
pub(in crate::stage) enum LoadedMixer {
    Attention(Box<GroupedWeights>),
    Latent(Box<LatentWeights>),
    Mlp(Box<MlpWeights>),
    Experts(Box<ExpertWeights>),
    Mamba(Box<MambaWeights>),
}

/// Rows of one session among those of several.
type Span<'a> = sessions::Span<'a, Sequence>;

/// What happened inside a forward pass.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Trace {
    /// After each block, `[rows, hidden]`.
    pub(crate) hidden: BTreeMap<u32, Vec<f32>>,
    /// Of each block with experts.
    pub(crate) routing: BTreeMap<u32, Routing>,
    /// Of each block that chooses positions: those of each row, ascending.
    pub(crate) selected: BTreeMap<u32, Vec<Vec<usize>>>,
}

impl LoadedMixer {
    /// All matrices.
    pub(in crate::stage) fn matrices(&self) -> Vec<&Matrix> {
        match self {
            Self::Attention(weights) => weights.matrices().collect(),
            Self::Latent(weights) => weights.matrices().collect(),
            Self::Mlp(weights) => weights.matrices().collect(),
            Self::Experts(weights) => weights.matrices().collect(),
            Self::Mamba(weights) => weights.matrices().collect(),
        }
    }

    /// Elements that are multiplied with and always in f32.
    pub(in crate::stage) fn plain_floats(&self) -> usize {
        match self {
            Self::Latent(weights) => weights.kv_up.len(),
            Self::Mamba(weights) => weights.recurrence.convolution_len(),
            Self::Attention(_) | Self::Mlp(_) | Self::Experts(_) => 0,
        }
    }

    pub(in crate::stage) fn bytes(&self) -> u64 {
        let matrices: u64 = self.matrices().into_iter().map(Matrix::bytes).sum();
        matrices + 4 * self.plain_floats() as u64
    }
}

impl Engine {
    pub(in crate::stage) fn new(config: Config, range: BlockRange, weights: StageWeights) -> Self {
        let frequencies = config.rotaries.iter();
        Self {
            frequencies: frequencies
                .map(|rotary| (Frequencies::of(rotary), rotary.interleaved))
                .collect(),
            config,
            range,
            weights,
        }
    }

    pub(in crate::stage) fn bytes(&self) -> u64 {
        self.weights.bytes()
    }

    /// Width of the activations.
    pub(in crate::stage) const fn hidden(&self) -> usize {
        self.config.hidden
    }

    /// A session before its first position.
    pub(in crate::stage) fn sequence(&self) -> Sequence {
        Sequence::new(self.sublayers())
    }

    /// The pages of all sessions.
    pub(in crate::stage) fn pool(&self) -> Pool<Memory> {
        sequence::pool(self.sublayers())
    }

    /// Bytes of a session's recurrent states, however long it is.
    pub(in crate::stage) fn state_bytes(&self) -> u64 {
        sequence::state_bytes(self.sublayers())
    }

    /// Bytes that a session of so many positions takes.
    pub(in crate::stage) fn sequence_bytes(&self, capacity: u64) -> u64 {
        capacity.div_ceil(PAGE_POSITIONS as u64) * self.pool().page_bytes() + self.state_bytes()
    }

    fn sublayers(&self) -> impl Iterator<Item = &LoadedSublayer> {
        self.weights.blocks.iter().flatten()
    }

    /// Runs positions `position ..`. The caller has checked tokens, lengths and room.
    pub(in crate::stage) fn forward(
        &self,
        sequence: &mut Sequence,
        position: usize,
        input: Input<'_>,
        want: Want,
        mut trace: Option<&mut Trace>,
    ) -> Output {
        let hidden = self.config.hidden;
        let mut x = match input {
            Input::Hidden(x) => x.to_vec(),
            Input::Tokens(tokens) => self.embed(tokens),
        };
        let n = x.len() / hidden;
        for (chunk, x) in x.chunks_mut(CHUNK_POSITIONS * hidden).enumerate() {
            let span = Span {
                sequence,
                position: position + chunk * CHUNK_POSITIONS,
                rows: x.len() / hidden,
            };
            self.blocks(&mut [span], x, trace.as_deref_mut());
        }
        match want {
            Want::Hidden => Output::Hidden(x),
            Want::LastLogits if self.weights.head.is_some() => Output::Logits(self.logits(&x[(n - 1) * hidden..])),
            Want::AllLogits if self.weights.head.is_some() => Output::Logits(self.logits(&x)),
            Want::LastLogits | Want::AllLogits => Output::Hidden(x),
        }
    }

    /// Runs rows of several sessions as one batch: each weight is read once for all. `x` are tokens' embeddings or
    /// activations, `[rows of all spans, hidden]`; each span gets its activations, or the logits of its last row.
    ///
    /// Every session gets the bits that it would get alone.
    pub(in crate::stage) fn forward_together(
        &self,
        spans: &mut [Span<'_>],
        mut x: Vec<f32>,
        want: Want,
    ) -> Vec<Output> {
        let hidden = self.config.hidden;
        self.blocks(spans, &mut x, None);
        let counts = spans.iter().map(|span| span.rows);
        let mut end = 0;
        let ends = counts.map(|rows| {
            end += rows;
            (end, rows)
        });
        if want == Want::Hidden || self.weights.head.is_none() {
            let own = |(end, rows): (usize, usize)| Output::Hidden(x[(end - rows) * hidden..end * hidden].to_vec());
            return ends.map(own).collect();
        }
        let wanted = |rows| if want == Want::LastLogits { 1 } else { rows };
        let ends: Vec<(usize, usize)> = ends.map(|(end, rows)| (end, wanted(rows))).collect();
        let rows = ends
            .iter()
            .flat_map(|(end, rows)| &x[(end - rows) * hidden..end * hidden])
            .copied();
        let logits = self.logits(&rows.collect::<Vec<f32>>());
        let mut rest = &logits[..];
        let own = |(_, rows): (usize, usize)| {
            let (own, others) = rest.split_at(rows * self.config.vocabulary);
            rest = others;
            Output::Logits(own.to_vec())
        };
        ends.into_iter().map(own).collect()
    }

    /// Logits of activations, at a stage with the head.
    fn logits(&self, x: &[f32]) -> Vec<f32> {
        let Some(head) = self.weights.head.as_ref() else {
            return Vec::new();
        };
        let normed = head.norm.of(x);
        let rows = x.len() / self.config.hidden;
        let projection = head.projection.as_ref().or(self.weights.embedding.as_ref());
        let mut logits = vec![0.0; rows * self.config.vocabulary];
        if let Some(projection) = projection {
            product_finely(&normed, rows, projection, &mut logits);
        }
        logits
    }

    /// The final norm of activations, at a stage with the head.
    pub(in crate::stage) fn final_norm(&self, x: &[f32]) -> Option<Vec<f32>> {
        self.weights.head.as_ref().map(|head| head.norm.of(x))
    }

    /// The embeddings of tokens, `[seq, hidden]`, at a stage with them.
    pub(in crate::stage) fn embed(&self, tokens: &[u32]) -> Vec<f32> {
        let mut x = vec![0.0; tokens.len() * self.config.hidden];
        if let Some(embedding) = &self.weights.embedding {
            embedding.rows_of(tokens, self.config.embedding_scale, &mut x);
        }
        x
    }

    /// Logits of the token after the next: from final-normed activations of positions `0 ..`, and the tokens that follow
    /// each of them.
    pub(in crate::stage) fn further(&self, weights: &FurtherWeights, normed: &[f32], next: &[u32]) -> Option<Vec<f32>> {
        let hidden = self.config.hidden;
        let mut embedded = vec![0.0; next.len() * hidden];
        for (token, x) in next.iter().zip(embedded.chunks_exact_mut(hidden)) {
            weights.embedding.row(*token as usize, x);
        }
        let (left, right) = (weights.embedding_norm.of(&embedded), weights.hidden_norm.of(normed));
        let joined: Vec<f32> = left
            .chunks_exact(hidden)
            .zip(right.chunks_exact(hidden))
            .flat_map(|(left, right)| left.iter().chain(right))
            .copied()
            .collect();
        let mut x = weights.join.of(&joined, next.len());
        let n = next.len();
        let mut sequence = Sequence::new(weights.block.iter());
        let mut pool = sequence::pool(weights.block.iter());
        sequence.table.ready(&mut pool, 0, n).ok()?;
        // The module's first row has the rotation of the first token that follows.
        let turns = self.turns(1, n);
        for (index, sublayer) in weights.block.iter().enumerate() {
            let span = Span {
                sequence: &mut sequence,
                position: 0,
                rows: n,
            };
            run(
                sublayer,
                index,
                &mut [span],
                &mut x,
                hidden,
                std::slice::from_ref(&turns),
                None,
            );
        }
        let mut logits = vec![0.0; n * self.config.vocabulary];
        weights.projection.apply(&weights.norm.of(&x), n, &mut logits);
        Some(logits)
    }

    fn turns(&self, position: usize, n: usize) -> Vec<Turns> {
        let turns = self.frequencies.iter();
        turns
            .map(|(frequencies, interleaved)| Turns::new(frequencies, *interleaved, position, n))
            .collect()
    }

    /// `trace` takes what happens where there is one span.
    fn blocks(&self, spans: &mut [Span<'_>], x: &mut [f32], mut trace: Option<&mut Trace>) {
        let turns: Vec<Vec<Turns>> = spans.iter().map(|span| self.turns(span.position, span.rows)).collect();
        let mut sublayers = 0;
        for (index, block) in (self.range.first..).zip(&self.weights.blocks) {
            for sublayer in block {
                let place = trace.as_deref_mut().map(|trace| (index, trace));
                run(sublayer, sublayers, spans, x, self.config.hidden, &turns, place);
                sublayers += 1;
            }
            if let Some(trace) = trace.as_deref_mut() {
                trace.hidden.entry(index).or_default().extend_from_slice(x);
            }
        }
    }
}

/// `x ← x + after(mixer(norm(x)))` for rows of some sessions; `index` is the sublayer's among those of the sequences.
fn run(
    sublayer: &LoadedSublayer,
    index: usize,
    spans: &mut [Span<'_>],
    x: &mut [f32],
    hidden: usize,
    turns: &[Vec<Turns>],
    mut trace: Option<(u32, &mut Trace)>,
) {
    let n = x.len() / hidden;
    let normed = sublayer.norm.of(x);
    let mut out = vec![0.0; x.len()];
    match &sublayer.mixer {
        LoadedMixer::Attention(weights) => {
            let sessions = spans.iter_mut().zip(turns).filter_map(|(span, turns)| {
                let Some(Kept::Paged { start }) = span.sequence.kept.get(index) else {
                    return None; // A sequence is made from the same sublayers that it is used with.
                };
                Some(Attending {
                    pages: span.sequence.table.pages(),
                    start: *start,
                    position: span.position,
                    rows: span.rows,
                    turns,
                })
            });
            weights.forward(&normed, n, &mut sessions.collect::<Vec<_>>(), &mut out);
        }
        LoadedMixer::Mlp(weights) => weights.forward(&normed, n, &mut out),
        LoadedMixer::Experts(weights) => {
            let seen = trace.map(|(block, trace)| trace.routing.entry(block).or_default());
            weights.forward(&normed, n, &mut out, seen);
        }
        LoadedMixer::Latent(_) | LoadedMixer::Mamba(_) => {
            // These work on one session at a time.
            let mut first = 0;
            for (span, turns) in spans.iter_mut().zip(turns) {
                let own = first * hidden..(first + span.rows) * hidden;
                first += span.rows;
                let trace = trace.as_mut().map(|(block, trace)| (*block, &mut **trace));
                alone(sublayer, index, span, &normed[own.clone()], turns, &mut out[own], trace);
            }
        }
    }
    match &sublayer.after {
        Some(norm) => add(x, &norm.of(&out)),
        None => add(x, &out),
    }
}

/// A mixer with a state of another kind, for the rows of one session.
fn alone(
    sublayer: &LoadedSublayer,
    index: usize,
    span: &mut Span<'_>,
    normed: &[f32],
    turns: &[Turns],
    out: &mut [f32],
    trace: Option<(u32, &mut Trace)>,
) {
    match (&sublayer.mixer, span.sequence.kept.get_mut(index)) {
        (LoadedMixer::Latent(weights), Some(Kept::Paged { start })) => {
            let mut selected = Vec::new();
            let seen = trace.is_some().then_some(&mut selected);
            let cache = &mut LatentCache {
                pages: span.sequence.table.pages(),
                start: *start,
            };
            weights.forward(normed, span.rows, span.position, turns, cache, out, seen);
            if let Some((block, trace)) = trace
                && !selected.is_empty()
            {
                trace.selected.entry(block).or_default().extend(selected);
            }
        }
        (LoadedMixer::Mamba(weights), Some(Kept::Mamba(state))) => {
            weights.forward(normed, span.rows, span.position, state, out);
        }
        // A sequence is made from the same sublayers that it is used with.
        _ => unreachable!("a sequence of another stage"),
    }
}
