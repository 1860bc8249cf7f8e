//! The forward pass of consecutive blocks with our own kernels, as the model's description says.

use std::iter::once;

use polder_protocol::layout::BlockRange;

use super::block::{Batch, Kept, Sublayer};
use super::pages::{Pages, Place};
use super::upload::{Refusal, Upload, covered};
use crate::device::Device;
use crate::device::cube::{CubeError, Cubes, Floats, NormOnDevice, PagedRows, Turns, WeightOnDevice};
use crate::model::{Config, Frequencies};
use crate::stage::cpu::{LoadedMixer, LoadedNorm, LoadedSublayer, MambaState, Matrix, Recurrence, Trace};
use crate::stage::pages::{PAGE_POSITIONS, Table};
use crate::stage::sessions::{self, Span};
use crate::stage::weights::StageWeights;
use crate::stage::{Output, StageError, Want};

/// Rows that are run together at most: enough to keep a GPU busy, and memory stays bounded for any prompt.
const ROWS_MAX: usize = 256;
/// The largest intermediate result: what a GPU with 4 GiB can hold several of.
const SCRATCH_BYTES_MAX: u64 = 64 << 20;

/// A stage's blocks and head.
#[derive(Debug)]
pub(in crate::stage) struct Engine {
    config: Config,
    range: BlockRange,
    cubes: Cubes,
    /// Of each of the model's rotations.
    frequencies: Vec<Frequencies>,
    /// Rows that are run together.
    rows_max: usize,
    /// At the first stage. It stays with the host, packed as it came: of each token only one row is needed.
    embedding: Option<Matrix>,
    blocks: Vec<Vec<Sublayer>>,
    kept: Kept,
    head: Option<Head>,
    bytes: u64,
}

#[derive(Debug)]
struct Head {
    norm: NormOnDevice,
    projection: WeightOnDevice,
    /// The norm once more.
    on_host: LoadedNorm,
}

/// What one session keeps.
#[derive(Debug)]
pub(in crate::stage) struct Sequence {
    table: Table<Place>,
    /// Of recurrent sublayers, in the host's memory.
    pub(super) states: Vec<MambaState>,
}

impl sessions::Sequence for Sequence {
    type Store = Pages;

    fn table(&mut self) -> &mut Table<Place> {
        &mut self.table
    }

    fn fork(&self, end: usize) -> Self {
        Self {
            table: self.table.share(end),
            states: self.states.clone(),
        }
    }

    fn earliest(&self) -> usize {
        self.states.iter().map(MambaState::earliest).max().unwrap_or(0)
    }
}

/// Rows of one session that are run at once.
pub(super) struct Piece {
    /// Among the sessions of the batch.
    pub(super) session: usize,
    pub(super) position: usize,
    pub(super) rows: usize,
    /// Whether the session's rows end here.
    last: bool,
}

impl Engine {
    /// Whether some blocks of a model are computed here, as far as its configuration tells.
    ///
    /// # Errors
    ///
    /// [`Refusal::Lacking`] where it is not.
    pub(in crate::stage) fn covers(config: &Config, range: BlockRange, device: &Device) -> Result<(), Refusal> {
        Cubes::of(device).map_err(|error| Refusal::Lacking(error.to_string()))?;
        covered(config, range)
    }

    /// Uploads weights as they are stored.
    ///
    /// # Errors
    ///
    /// [`Refusal`]: what is lacking, or what the device says.
    pub(in crate::stage) fn upload(
        config: &Config,
        range: BlockRange,
        weights: StageWeights,
        device: &Device,
    ) -> Result<Self, Refusal> {
        Self::covers(config, range, device)?;
        let cubes = Cubes::of(device)?;
        let embedding = weights.embedding.as_ref();
        let head = weights.head;
        let projection = head.as_ref().and_then(|head| head.projection.as_ref().or(embedding));
        let sublayers = || weights.blocks.iter().flatten();
        let matrices = || {
            sublayers()
                .flat_map(|sublayer| sublayer.mixer.matrices())
                .chain(projection)
        };
        let floats = sublayers().map(|sublayer| sublayer.mixer.plain_floats() as u64).sum();
        let upload = Upload::new(&cubes, device, matrices(), floats)?;
        let rows_max = rows_max(widest(matrices(), sublayers()), device)?;
        let mut kept = Kept::default();
        let mut block = |sublayers: &Vec<LoadedSublayer>| -> Result<Vec<Sublayer>, StageError> {
            let upload = |loaded| Sublayer::upload(&upload, loaded, &mut kept);
            sublayers.iter().map(upload).collect()
        };
        let blocks = weights.blocks.iter().map(&mut block).collect::<Result<_, _>>()?;
        let projection = projection.map(|projection| upload.matrix(projection)).transpose()?;
        let head = head.zip(projection).map(|(head, projection)| Head {
            norm: upload.norm(&head.norm),
            projection,
            on_host: head.norm,
        });
        device.tensors().sync().map_err(|error| StageError::Device {
            reason: error.to_string(),
        })?;
        Ok(Self {
            frequencies: config.rotaries.iter().map(Frequencies::of).collect(),
            config: config.clone(),
            range,
            rows_max,
            bytes: upload.bytes(),
            embedding: weights.embedding.filter(|_| range.has_embedding()),
            blocks,
            kept,
            head,
            cubes,
        })
    }

    /// Pages for sessions of this stage, on its device.
    pub(in crate::stage) fn pages(&self, device: &Device) -> Pages {
        Pages::new(self.cubes.clone(), device.clone(), self.kept.widths.clone())
    }

    /// A session before its first position.
    pub(in crate::stage) fn sequence(&self) -> Sequence {
        Sequence {
            table: Table::default(),
            states: self.recurrences().map(Recurrence::start).collect(),
        }
    }

    /// Bytes of a session's recurrent states, however long it is.
    pub(in crate::stage) fn state_bytes(&self) -> u64 {
        self.recurrences().map(Recurrence::state_bytes).sum()
    }

    fn recurrences(&self) -> impl Iterator<Item = &Recurrence> {
        self.blocks.iter().flatten().filter_map(Sublayer::recurrence)
    }

    /// Bytes of weights on the device.
    pub(in crate::stage) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Width of the activations.
    pub(in crate::stage) const fn hidden(&self) -> usize {
        self.config.hidden
    }

    /// The embeddings of tokens, `[seq, hidden]`, at the first stage.
    pub(in crate::stage) fn embed(&self, tokens: &[u32]) -> Vec<f32> {
        let mut x = vec![0.0; tokens.len() * self.config.hidden];
        if let Some(embedding) = &self.embedding {
            embedding.rows_of(tokens, self.config.embedding_scale, &mut x);
        }
        x
    }

    /// The final norm of activations, at a stage with the head; on the host.
    pub(in crate::stage) fn final_norm(&self, x: &[f32]) -> Option<Vec<f32>> {
        self.head.as_ref().map(|head| head.on_host.of(x))
    }

    /// Runs rows of several sessions as one batch, or as several where they are too many. `x` are tokens' embeddings or
    /// activations, `[rows of all spans, hidden]`; each span gets its activations, or the logits of all rows or of its last.
    /// The pages of all rows are ready to be written. `trace` takes what happens where there is one span.
    pub(in crate::stage) fn forward(
        &self,
        pages: &Pages,
        spans: &mut [Span<'_, Sequence>],
        x: &[f32],
        want: Want,
        mut trace: Option<&mut Trace>,
    ) -> Result<Vec<Output>, StageError> {
        let want = if self.head.is_some() { want } else { Want::Hidden };
        let tables = spans.iter_mut().map(|span| {
            let pages = sessions::Sequence::table(span.sequence).pages();
            pages.iter().map(|page| page.number()).collect()
        });
        let tables: Vec<Vec<u32>> = tables.collect();
        let counts: Vec<(usize, usize)> = spans.iter().map(|span| (span.position, span.rows)).collect();
        let mut outputs = vec![Vec::new(); spans.len()];
        let mut rest = x;
        for batch in batches(&counts, self.rows_max) {
            let rows: usize = batch.iter().map(|piece| piece.rows).sum();
            let (own, others) = rest.split_at_checked(rows * self.config.hidden).unwrap_or((rest, &[]));
            rest = others;
            let out = self.run(pages, &tables, &batch, spans, own, want, trace.as_deref_mut())?;
            let mut out = &out[..];
            for piece in &batch {
                let values = match want {
                    Want::Hidden => piece.rows * self.config.hidden,
                    Want::AllLogits => piece.rows * self.config.vocabulary,
                    Want::LastLogits => usize::from(piece.last) * self.config.vocabulary,
                };
                let (own, others) = out.split_at_checked(values).unwrap_or((out, &[]));
                out = others;
                if let Some(output) = outputs.get_mut(piece.session) {
                    output.extend_from_slice(own);
                }
            }
        }
        Ok(match want {
            Want::Hidden => outputs.into_iter().map(Output::Hidden).collect(),
            Want::AllLogits | Want::LastLogits => outputs.into_iter().map(Output::Logits).collect(),
        })
    }

    /// Runs `[rows, hidden]`; what is wanted of them, piece by piece.
    #[expect(clippy::too_many_arguments, reason = "what a batch is made of")]
    fn run(
        &self,
        pages: &Pages,
        tables: &[Vec<u32>],
        pieces: &[Piece],
        spans: &mut [Span<'_, Sequence>],
        x: &[f32],
        want: Want,
        trace: Option<&mut Trace>,
    ) -> Result<Vec<f32>, StageError> {
        let cubes = &self.cubes;
        let paged = pieces.iter().map(|piece| PagedRows {
            pages: tables.get(piece.session).map_or(&[], Vec::as_slice),
            position: piece.position,
            rows: piece.rows,
        });
        let positions = pieces
            .iter()
            .flat_map(|piece| piece.position..piece.position + piece.rows);
        let positions: Vec<usize> = positions.collect();
        let batch = Batch {
            cubes,
            pages,
            places: &cubes.place(PAGE_POSITIONS, &paged.collect::<Vec<_>>())?,
            turns: &self.turns(&positions),
            positions: &positions,
            pieces,
        };
        let x = cubes.upload(x);
        let added = self.blocks(&batch, spans, &x, trace)?;
        let Some(head) = self.head.as_ref().filter(|_| want != Want::Hidden) else {
            if let Some(added) = &added {
                cubes.add(&x, added)?;
            }
            return Ok(cubes.read(&x)?);
        };
        let normed = cubes.add_and_normalise(&x, added.as_ref(), &head.norm)?;
        let wanted = match want {
            Want::LastLogits => self.last_rows(&normed, pieces, positions.len())?,
            _ => normed,
        };
        match wanted.is_empty() {
            true => Ok(Vec::new()),
            false => Ok(cubes.read(&cubes.multiply(&wanted, &head.projection)?)?),
        }
    }

    /// Takes `x` through all blocks; what the last sublayer gave is still to be added.
    fn blocks(
        &self,
        batch: &Batch<'_>,
        spans: &mut [Span<'_, Sequence>],
        x: &Floats,
        mut trace: Option<&mut Trace>,
    ) -> Result<Option<Floats>, CubeError> {
        let mut added: Option<Floats> = None;
        for (index, block) in (self.range.first..).zip(&self.blocks) {
            for sublayer in block {
                let trace = trace.as_deref_mut().map(|trace| (index, trace));
                added = Some(sublayer.run(batch, spans, x, added.as_ref(), trace)?);
            }
            if let Some(trace) = trace.as_deref_mut() {
                if let Some(added) = added.take() {
                    batch.cubes.add(x, &added)?;
                }
                trace.hidden.entry(index).or_default().extend(batch.cubes.read(x)?);
            }
        }
        Ok(added)
    }

    /// Cosines and sines of the rows' positions, rotation by rotation.
    fn turns(&self, positions: &[usize]) -> Vec<Turns> {
        let turns = self.frequencies.iter().zip(&self.config.rotaries);
        let turns = turns.map(|(frequencies, rotary)| {
            let pairs = frequencies.pairs();
            let (mut cosines, mut sines) = (vec![0.0; positions.len() * pairs], vec![0.0; positions.len() * pairs]);
            let rows = cosines.chunks_exact_mut(pairs).zip(sines.chunks_exact_mut(pairs));
            for (position, (cosines, sines)) in positions.iter().zip(rows) {
                frequencies.turn(*position, cosines, sines);
            }
            Turns {
                cosines: self.cubes.upload(&cosines),
                sines: self.cubes.upload(&sines),
                pairs,
                interleaved: rotary.interleaved,
            }
        });
        turns.collect()
    }

    /// Of `[rows, hidden]`, the last row of each session whose rows end in this batch.
    fn last_rows(&self, normed: &Floats, pieces: &[Piece], rows: usize) -> Result<Floats, CubeError> {
        let mut end = 0;
        let mut lasts = Vec::new();
        for piece in pieces {
            end += piece.rows;
            if piece.last {
                lasts.push(end - 1);
            }
        }
        match lasts.len() == rows {
            true => Ok(normed.clone()),
            false => self.cubes.gather(normed, &self.cubes.pick(&lasts, rows)?),
        }
    }
}

/// Elements of the largest intermediate result of one row.
fn widest<'a>(
    matrices: impl Iterator<Item = &'a Matrix>,
    sublayers: impl Iterator<Item = &'a LoadedSublayer>,
) -> usize {
    let products = matrices.flat_map(|matrix| [matrix.rows(), matrix.cols()]);
    let carried = sublayers.map(|sublayer| match &sublayer.mixer {
        LoadedMixer::Latent(weights) => weights.shape.heads * (weights.shape.rank + weights.shape.rope),
        _ => 0,
    });
    products.chain(carried).chain(once(1)).max().unwrap_or(1)
}

/// How many rows to run together: a power of two, so that few shapes occur.
fn rows_max(widest: usize, device: &Device) -> Result<usize, Refusal> {
    let (row, limit) = (widest as u64 * 4, device.buffer_bytes_max());
    if row > limit {
        let what = format!("rows of {row} bytes, more than the device's largest buffer of {limit}");
        return Err(Refusal::Lacking(what));
    }
    let fit = usize::try_from(SCRATCH_BYTES_MAX.min(limit) / row).unwrap_or(usize::MAX);
    Ok(1 << fit.clamp(1, ROWS_MAX).ilog2())
}

/// Cuts sessions of `(position, rows)` into batches of at most `rows_max` rows, in order.
fn batches(sessions: &[(usize, usize)], rows_max: usize) -> Vec<Vec<Piece>> {
    let (mut batches, mut batch, mut free) = (Vec::new(), Vec::new(), rows_max);
    for (session, (position, rows)) in sessions.iter().copied().enumerate() {
        let mut done = 0;
        while done < rows {
            let own = free.min(rows - done);
            batch.push(Piece {
                session,
                position: position + done,
                rows: own,
                last: done + own == rows,
            });
            done += own;
            free -= own;
            if free == 0 {
                batches.push(std::mem::take(&mut batch));
                free = rows_max;
            }
        }
    }
    if !batch.is_empty() {
        batches.push(batch);
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_all_rows_in_order_and_no_session_twice() {
        for rows_max in [1, 2, 7, 64] {
            let sessions = [(0, 5), (9, 1), (64, 130), (3, 7)];
            let batches = batches(&sessions, rows_max);
            let mut next: Vec<usize> = sessions.iter().map(|(position, _)| *position).collect();
            for batch in &batches {
                assert!(batch.iter().map(|piece| piece.rows).sum::<usize>() <= rows_max);
                assert!(batch.windows(2).all(|pair| pair[0].session < pair[1].session));
                for piece in batch {
                    assert_eq!(piece.position, next[piece.session]);
                    next[piece.session] += piece.rows;
                    let (position, rows) = sessions[piece.session];
                    assert_eq!(piece.last, next[piece.session] == position + rows);
                }
            }
            assert!(
                sessions
                    .iter()
                    .zip(next)
                    .all(|((position, rows), next)| position + rows == next)
            );
        }
    }
}
