//! The forward pass of consecutive blocks.

use polder_protocol::layout::BlockRange;

use super::attention::{Cache, Shape};
use super::elementwise::{add, rms_norm, rotate, swiglu, turns};
use super::matrix::products;
use crate::model::{Config, Frequencies};
use crate::stage::weights::StageWeights;
use crate::stage::{Input, Output, Want};

/// Positions that are worked on together: more would outgrow the caches, and memory stays bounded for any prompt.
const CHUNK_POSITIONS: usize = 256;

/// The weights of a stage, ready to multiply.
#[derive(Debug)]
pub(in crate::stage) struct Engine {
    config: Config,
    range: BlockRange,
    frequencies: Frequencies,
    weights: StageWeights,
}

/// Keys and values of one session, block by block.
#[derive(Debug)]
pub(in crate::stage) struct Sequence(Vec<Cache>);

impl Engine {
    pub(in crate::stage) fn new(config: Config, range: BlockRange, weights: StageWeights) -> Self {
        Self {
            frequencies: Frequencies::of(&config),
            config,
            range,
            weights,
        }
    }

    pub(in crate::stage) fn bytes(&self) -> u64 {
        self.weights.bytes()
    }

    /// Room for `capacity` positions; `None` where there is no memory for it.
    pub(in crate::stage) fn sequence(&self, capacity: usize) -> Option<Sequence> {
        let shape = Shape {
            heads: self.config.heads,
            kv_heads: self.config.kv_heads,
            head_dim: self.config.head_dim,
            capacity: capacity.next_multiple_of(16),
        };
        let caches = (self.range.first..self.range.end).map(|_| Cache::new(shape));
        caches.collect::<Option<Vec<_>>>().map(Sequence)
    }

    /// Runs positions `position ..`. The caller has checked tokens, lengths and room.
    pub(in crate::stage) fn forward(
        &self,
        sequence: &mut Sequence,
        position: usize,
        input: Input<'_>,
        want: Want,
    ) -> Output {
        let hidden = self.config.hidden;
        let mut x = match input {
            Input::Hidden(x) => x.to_vec(),
            Input::Tokens(tokens) => self.embed(tokens),
        };
        let n = x.len() / hidden;
        for (chunk, x) in x.chunks_mut(CHUNK_POSITIONS * hidden).enumerate() {
            self.blocks(sequence, position + chunk * CHUNK_POSITIONS, x);
        }
        let Some(head) = self.weights.head.as_ref() else {
            return Output::Hidden(x);
        };
        let x = match want {
            Want::Hidden => return Output::Hidden(x),
            Want::LastLogits => &x[(n - 1) * hidden..],
            Want::AllLogits => &x[..],
        };
        let mut normed = vec![0.0; x.len()];
        rms_norm(&mut normed, x, &head.norm, self.config.epsilon);
        let rows = x.len() / hidden;
        let projection = head.projection.as_ref().or(self.weights.embedding.as_ref());
        let Some(projection) = projection else {
            return Output::Hidden(normed);
        };
        let mut logits = vec![0.0; rows * self.config.vocabulary];
        products(&normed, rows, [(projection, &mut logits[..])]);
        Output::Logits(logits)
    }

    fn embed(&self, tokens: &[u32]) -> Vec<f32> {
        let hidden = self.config.hidden;
        let mut x = vec![0.0; tokens.len() * hidden];
        if let Some(embedding) = &self.weights.embedding {
            for (token, x) in tokens.iter().zip(x.chunks_exact_mut(hidden)) {
                embedding.row(*token as usize, x);
            }
        }
        x
    }

    fn blocks(&self, sequence: &mut Sequence, position: usize, x: &mut [f32]) {
        let config = &self.config;
        let n = x.len() / config.hidden;
        let (query_width, key_width) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let (cosines, sines) = turns(&self.frequencies, position, n);
        let mut normed = vec![0.0; x.len()];
        let (mut q, mut mixed) = (vec![0.0; n * query_width], vec![0.0; n * query_width]);
        let (mut k, mut v) = (vec![0.0; n * key_width], vec![0.0; n * key_width]);
        let (mut gate, mut up) = (vec![0.0; n * config.intermediate], vec![0.0; n * config.intermediate]);
        let mut out = vec![0.0; x.len()];
        let rotate_all = |rows: &mut [f32], heads: usize| {
            let pairs = self.frequencies.pairs();
            for (index, head) in rows.chunks_exact_mut(config.head_dim).enumerate() {
                let at = index / heads * pairs;
                rotate(head, &cosines[at..at + pairs], &sines[at..at + pairs]);
            }
        };
        for (block, cache) in self.weights.blocks.iter().zip(&mut sequence.0) {
            rms_norm(&mut normed, x, &block.attention_norm, config.epsilon);
            products(
                &normed,
                n,
                [(&block.q, &mut q[..]), (&block.k, &mut k[..]), (&block.v, &mut v[..])],
            );
            rotate_all(&mut q, config.heads);
            rotate_all(&mut k, config.kv_heads);
            cache.write(position, &k, &v);
            cache.attend(position, &q, &mut mixed);
            products(&mixed, n, [(&block.o, &mut out[..])]);
            add(x, &out);

            rms_norm(&mut normed, x, &block.mlp_norm, config.epsilon);
            products(&normed, n, [(&block.gate, &mut gate[..]), (&block.up, &mut up[..])]);
            swiglu(&mut gate, &up);
            products(&gate, n, [(&block.down, &mut out[..])]);
            add(x, &out);
        }
    }
}
