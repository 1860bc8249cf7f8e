//! Mamba-2: a convolution over the last few positions, and a state that every position decays and adds to.
//!
//! The state cannot be unwound. So a session keeps the state of some positions ago beside the present one, and what came
//! in since: going back is going forward again from there, with the same bits.

use rayon::prelude::*;

use super::dense::{Dense, LoadedNorm};
use super::elementwise::{exp, silu, softplus};
use super::matrix::Matrix;
use crate::model::describe::Mamba;
use crate::stage::StageError;
use crate::stage::weights::PartReader;

/// How far a session can always go back: more than any draft that is verified at once.
pub(in crate::stage) const REWIND_POSITIONS: usize = 64;

/// The weights of one mixer.
#[derive(Debug)]
pub(in crate::stage) struct MambaWeights {
    pub(in crate::stage) in_proj: Dense,
    pub(in crate::stage) recurrence: Recurrence,
    pub(in crate::stage) out_proj: Dense,
}

/// What lies between a mixer's two projections. It is computed here even where those are on a device.
#[derive(Debug, Clone)]
pub(in crate::stage) struct Recurrence {
    shape: Mamba,
    /// `[channels, taps]`
    conv: Vec<f32>,
    conv_bias: Vec<f32>,
    dt_bias: Vec<f32>,
    /// `−exp(A_log)`
    a: Vec<f32>,
    d: Vec<f32>,
    norm: LoadedNorm,
}

/// One session's state after some position.
#[derive(Debug, Clone)]
struct Moment {
    position: usize,
    /// `[heads, head_dim, state]`
    state: Vec<f32>,
    /// `[taps − 1, channels]`: the last inputs of the convolution, oldest first.
    past: Vec<f32>,
}

/// What is kept of one session.
#[derive(Debug, Clone)]
pub(in crate::stage) struct MambaState {
    now: Moment,
    base: Moment,
    /// What came in from the base to now: rows of channels and time steps.
    journal: Vec<f32>,
}

impl MambaState {
    /// The earliest position after zero that the session can go back to.
    pub(in crate::stage) const fn earliest(&self) -> usize {
        self.base.position
    }
}

impl MambaWeights {
    pub(in crate::stage) fn read(reader: &PartReader<'_>, shape: &Mamba) -> Result<Self, StageError> {
        Ok(Self {
            in_proj: reader.dense(&shape.in_proj)?,
            recurrence: Recurrence::read(reader, shape)?,
            out_proj: reader.dense(&shape.out_proj)?,
        })
    }

    /// Both projections.
    pub(super) fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        [&self.in_proj, &self.out_proj].into_iter().map(|dense| &dense.weight)
    }

    /// Of the `n` normed rows `x` at `position ..`, which the session has reached or can go back to.
    pub(super) fn forward(&self, x: &[f32], n: usize, position: usize, state: &mut MambaState, out: &mut [f32]) {
        let mixed = self.recurrence.forward(&self.in_proj.of(x, n), n, position, state);
        self.out_proj.apply(&mixed, n, out);
    }
}

impl Recurrence {
    fn read(reader: &PartReader<'_>, shape: &Mamba) -> Result<Self, StageError> {
        let channels = shape.channels();
        Ok(Self {
            conv: reader.vector(shape.conv)?,
            conv_bias: match shape.conv_bias {
                Some(slot) => reader.vector(slot)?,
                None => vec![0.0; channels],
            },
            dt_bias: reader.vector(shape.dt_bias)?,
            a: reader
                .vector(shape.a_log)?
                .into_iter()
                .map(|log| -f64::from(log).exp() as f32)
                .collect(),
            d: reader.vector(shape.d)?,
            norm: reader.norm(&shape.norm)?,
            shape: shape.clone(),
        })
    }

    /// Elements of the convolution.
    pub(super) const fn convolution_len(&self) -> usize {
        self.conv.len()
    }

    /// Bytes that a session takes, however long it is.
    pub(in crate::stage) const fn state_bytes(&self) -> u64 {
        let shape = &self.shape;
        let moment = shape.inner() * shape.state + (shape.taps - 1) * shape.channels();
        let journal = 2 * REWIND_POSITIONS * (shape.channels() + shape.heads);
        (2 * moment + journal) as u64 * 4
    }

    /// The state before the first position.
    pub(in crate::stage) fn start(&self) -> MambaState {
        let moment = Moment {
            position: 0,
            state: vec![0.0; self.shape.inner() * self.shape.state],
            past: vec![0.0; (self.shape.taps - 1) * self.shape.channels()],
        };
        MambaState {
            base: moment.clone(),
            now: moment,
            journal: Vec::new(),
        }
    }

    /// Of `n` projected rows at `position ..`, `[n, inner + channels + heads]`; the answer is `[n, inner]`.
    pub(in crate::stage) fn forward(
        &self,
        projected: &[f32],
        n: usize,
        position: usize,
        state: &mut MambaState,
    ) -> Vec<f32> {
        let (inner, row) = (self.shape.inner(), self.row());
        self.go_back(position, state);
        let entering: Vec<f32> = projected
            .chunks_exact(inner + row)
            .flat_map(|projected| &projected[inner..])
            .copied()
            .collect();
        let mut mixed = vec![0.0; n * inner];
        self.advance(state, &entering, &mut mixed);
        for (mixed, projected) in mixed.chunks_exact_mut(inner).zip(projected.chunks_exact(inner + row)) {
            let mut gate = projected[..inner].to_vec();
            silu(&mut gate);
            for (mixed, gate) in mixed.iter_mut().zip(&gate) {
                *mixed *= gate;
            }
        }
        self.norm.apply_grouped(&mut mixed, inner / self.shape.groups);
        mixed
    }

    /// What comes in at a position: channels and time steps.
    const fn row(&self) -> usize {
        self.shape.channels() + self.shape.heads
    }

    fn go_back(&self, position: usize, state: &mut MambaState) {
        if position == state.now.position {
            return;
        }
        if position < state.base.position {
            *state = self.start();
            return;
        }
        let kept = (position - state.base.position) * self.row();
        state.journal.truncate(kept);
        state.now = state.base.clone();
        let mut unused = vec![0.0; (position - state.base.position) * self.shape.inner()];
        self.run(&mut state.now, &state.journal, &mut unused);
    }

    /// Goes forward, and keeps the journal within twice what must be remembered.
    fn advance(&self, state: &mut MambaState, entering: &[f32], out: &mut [f32]) {
        let (row, inner) = (self.row(), self.shape.inner());
        let (n, kept) = (entering.len() / row, state.journal.len() / row);
        if kept + n <= 2 * REWIND_POSITIONS {
            self.run(&mut state.now, entering, out);
            state.journal.extend_from_slice(entering);
            return;
        }
        let before = n.saturating_sub(REWIND_POSITIONS);
        let (first, last) = entering.split_at(before * row);
        let (first_out, last_out) = out.split_at_mut(before * inner);
        if before > 0 {
            self.run(&mut state.now, first, first_out);
            state.base = state.now.clone();
            state.journal.clear();
        } else {
            let forgotten = (kept + n - REWIND_POSITIONS).min(kept);
            let mut unused = vec![0.0; forgotten * inner];
            self.run(&mut state.base, &state.journal[..forgotten * row], &mut unused);
            state.journal.drain(..forgotten * row);
        }
        self.run(&mut state.now, last, last_out);
        state.journal.extend_from_slice(last);
    }

    /// The recurrence over rows, heads side by side.
    fn run(&self, moment: &mut Moment, rows: &[f32], out: &mut [f32]) {
        let Mamba {
            heads,
            head_dim,
            groups,
            state: width,
            ..
        } = self.shape;
        let (inner, channels, row) = (self.shape.inner(), self.shape.channels(), self.row());
        let n = rows.len() / row;
        let convolved = self.convolve(moment, rows);
        // [heads, n, head_dim], so that each head writes a place of its own.
        let mut by_head = vec![0.0; n * inner];
        let states = moment.state.par_chunks_exact_mut(head_dim * width);
        let work = by_head.par_chunks_exact_mut((n * head_dim).max(1)).zip(states);
        work.enumerate().for_each(|(head, (out, state))| {
            let group = head / (heads / groups) * width;
            for (i, out) in out.chunks_exact_mut(head_dim).enumerate() {
                let step = softplus(rows[i * row + channels + head] + self.dt_bias[head]);
                let decay = exp(step * self.a[head]);
                let row = &convolved[i * channels..(i + 1) * channels];
                let (b, c) = (
                    &row[inner + group..][..width],
                    &row[inner + (groups * width) + group..][..width],
                );
                let x = &row[head * head_dim..(head + 1) * head_dim];
                for ((out, x), state) in out.iter_mut().zip(x).zip(state.chunks_exact_mut(width)) {
                    let sum = step_state(state, decay, step * x, b, c);
                    *out = sum + self.d[head] * x;
                }
            }
        });
        for (head, made) in by_head.chunks_exact((n * head_dim).max(1)).enumerate() {
            for (i, made) in made.chunks_exact(head_dim).enumerate() {
                out[i * inner + head * head_dim..][..head_dim].copy_from_slice(made);
            }
        }
        moment.position += n;
    }

    /// The convolution of each channel with its last inputs, and the activation.
    fn convolve(&self, moment: &mut Moment, rows: &[f32]) -> Vec<f32> {
        let (channels, taps, row) = (self.shape.channels(), self.shape.taps, self.row());
        let n = rows.len() / row;
        let mut inputs = std::mem::take(&mut moment.past);
        inputs.extend(rows.chunks_exact(row).flat_map(|row| &row[..channels]));
        let mut out = vec![0.0; n * channels];
        for (i, out) in out.chunks_exact_mut(channels).enumerate() {
            out.copy_from_slice(&self.conv_bias);
            for tap in 0..taps {
                let input = &inputs[(i + tap) * channels..(i + tap + 1) * channels];
                for ((channel, out), input) in out.iter_mut().enumerate().zip(input) {
                    *out += self.conv[channel * taps + tap] * input;
                }
            }
        }
        silu(&mut out);
        moment.past = inputs.split_off(n * channels);
        out
    }
}

/// `state ← state · decay + added · b`, and the new state's product with `c`, summed in 16 lanes that are folded in
/// halves.
fn step_state(state: &mut [f32], decay: f32, added: f32, b: &[f32], c: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (chunks, rest) = state.as_chunks_mut::<16>();
    let ((b_chunks, b_rest), (c_chunks, c_rest)) = (b.as_chunks::<16>(), c.as_chunks::<16>());
    for ((state, b), c) in chunks.iter_mut().zip(b_chunks).zip(c_chunks) {
        for lane in 0..16 {
            state[lane] = state[lane] * decay + added * b[lane];
            lanes[lane] += state[lane] * c[lane];
        }
    }
    for (((state, b), c), lane) in rest.iter_mut().zip(b_rest).zip(c_rest).zip(&mut lanes) {
        *state = *state * decay + added * b;
        *lane += *state * c;
    }
    let mut width = 8;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}
