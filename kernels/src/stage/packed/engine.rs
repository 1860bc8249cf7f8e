//! The forward pass of consecutive blocks with our own kernels, weights packed on the device.

use super::pages::{Block as Cache, Pages, Place};
use crate::device::Device;
use crate::device::cube::{AttentionShape, CubeError, Cubes, Floats, PackedOnDevice, PagedRows};
use crate::quant::DeviceBlocks;
use crate::stage::cpu::{Dense, Matrix};
use crate::stage::pages::{PAGE_POSITIONS, Table};
use crate::stage::plain_llama::{Parts, Shape};
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
    shape: Shape,
    cubes: Cubes,
    /// Rows that are run together.
    rows_max: usize,
    /// At the first stage. It stays with the host, packed as it came: of each token only one row is needed.
    embedding: Option<Matrix>,
    blocks: Vec<Block>,
    head: Option<(Floats, PackedOnDevice)>,
}

#[derive(Debug)]
struct Block {
    attention_norm: Floats,
    q: PackedOnDevice,
    k: PackedOnDevice,
    v: PackedOnDevice,
    o: PackedOnDevice,
    mlp_norm: Floats,
    gate: PackedOnDevice,
    up: PackedOnDevice,
    down: PackedOnDevice,
}

/// What one session keeps.
#[derive(Debug, Default)]
pub(in crate::stage) struct Sequence(Table<Place>);

impl sessions::Sequence for Sequence {
    type Store = Pages;

    fn table(&mut self) -> &mut Table<Place> {
        &mut self.0
    }

    fn fork(&self, end: usize) -> Self {
        Self(self.0.share(end))
    }

    fn earliest(&self) -> usize {
        0
    }
}

/// Rows of one session that are run at once.
struct Piece {
    /// Among the sessions of the batch.
    session: usize,
    position: usize,
    rows: usize,
    /// Whether the session's rows end here.
    last: bool,
}

impl Engine {
    /// Uploads weights as they are packed. `None` where the device runs no kernels of ours, or a weight is of a type that
    /// they do not multiply or is too large for one buffer.
    pub(in crate::stage) fn upload(
        shape: &Shape,
        weights: &StageWeights,
        device: &Device,
    ) -> Result<Option<Self>, StageError> {
        let Ok(cubes) = Cubes::of(device) else {
            return Ok(None);
        };
        let blocks = Parts::of_all(weights)?;
        let embedding = weights.embedding.as_ref();
        let head = weights.head.as_ref();
        let head = head.and_then(|head| Some((&head.norm, head.projection.as_ref().or(embedding)?)));
        let matrices = blocks.iter().flat_map(Parts::matrices);
        let mut bytes: u64 = 0;
        for matrix in matrices.chain(head.map(|(_, projection)| projection)) {
            let elements = matrix.rows() as u64 * matrix.cols() as u64;
            let one = match matrix {
                Matrix::Packed(packed) if Cubes::multiplies(packed.ty()) => {
                    DeviceBlocks::bytes_max(packed.ty(), elements)
                }
                _ => return Ok(None),
            };
            if one > device.buffer_bytes_max() {
                return Ok(None);
            }
            bytes = bytes.saturating_add(one);
        }
        if !device.has_room(bytes) {
            return Err(StageError::DeviceMemory {
                what: "packed weights",
                bytes,
            });
        }
        let matrix = |matrix: &Matrix| match matrix {
            Matrix::Packed(packed) => Ok(cubes.upload_packed(packed)?),
            Matrix::Plain(_) => Err(StageError::Device {
                reason: "a weight is not packed".to_owned(),
            }),
        };
        let weight = |dense: &Dense| matrix(&dense.weight);
        let blocks = blocks.iter().map(|block| {
            Ok(Block {
                attention_norm: cubes.upload(block.attention_norm.gain()),
                q: weight(&block.attention.q)?,
                k: weight(&block.attention.k)?,
                v: weight(&block.attention.v)?,
                o: weight(&block.attention.o)?,
                mlp_norm: cubes.upload(block.mlp_norm.gain()),
                gate: weight(block.gate)?,
                up: weight(&block.mlp.up)?,
                down: weight(&block.mlp.down)?,
            })
        });
        let blocks = blocks.collect::<Result<_, StageError>>()?;
        let head = match head {
            Some((norm, projection)) => Some((cubes.upload(norm.gain()), matrix(projection)?)),
            None => None,
        };
        device.tensors().sync().map_err(|error| StageError::Device {
            reason: error.to_string(),
        })?;
        Ok(Some(Self {
            rows_max: rows_max(shape, head.is_some(), device),
            shape: shape.clone(),
            cubes,
            embedding: None,
            blocks,
            head,
        }))
    }

    /// At the first stage, with the embedding.
    pub(in crate::stage) fn with_embedding(self, embedding: Option<Matrix>) -> Self {
        Self { embedding, ..self }
    }

    /// Pages for sessions of this stage, on its device.
    pub(in crate::stage) fn pages(&self, device: &Device) -> Pages {
        let width = self.shape.kv_heads * self.shape.head_dim;
        Pages::new(self.cubes.clone(), device.clone(), self.blocks.len(), width)
    }

    /// Bytes of weights on the device.
    pub(in crate::stage) fn bytes(&self) -> u64 {
        let blocks = self.blocks.iter().flat_map(|block| {
            let Block { q, k, v, o, .. } = block;
            [q, k, v, o, &block.gate, &block.up, &block.down]
        });
        let all = blocks.chain(self.head.iter().map(|(_, projection)| projection));
        all.map(|weight| weight.bytes() as u64).sum()
    }

    /// Width of the activations.
    pub(in crate::stage) const fn hidden(&self) -> usize {
        self.shape.hidden
    }

    /// The embeddings of tokens, `[seq, hidden]`, at the first stage.
    pub(in crate::stage) fn embed(&self, tokens: &[u32]) -> Vec<f32> {
        let hidden = self.shape.hidden;
        let mut x = vec![0.0; tokens.len() * hidden];
        if let Some(embedding) = &self.embedding {
            for (token, x) in tokens.iter().zip(x.chunks_exact_mut(hidden)) {
                embedding.row(*token as usize, x);
            }
        }
        x
    }

    /// Runs rows of several sessions as one batch, or as several where they are too many. `x` are tokens' embeddings or
    /// activations, `[rows of all spans, hidden]`; each span gets its activations, or the logits of all rows or of its last.
    /// The pages of all rows are ready to be written.
    pub(in crate::stage) fn forward(
        &self,
        pages: &Pages,
        spans: &mut [Span<'_, Sequence>],
        x: &[f32],
        want: Want,
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
            let (own, others) = rest.split_at_checked(rows * self.shape.hidden).unwrap_or((rest, &[]));
            rest = others;
            let out = self.run(pages, &tables, &batch, own, want)?;
            let mut out = &out[..];
            for piece in &batch {
                let values = match want {
                    Want::Hidden => piece.rows * self.shape.hidden,
                    Want::AllLogits => piece.rows * self.shape.vocabulary,
                    Want::LastLogits => usize::from(piece.last) * self.shape.vocabulary,
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
    fn run(
        &self,
        pages: &Pages,
        tables: &[Vec<u32>],
        batch: &[Piece],
        x: &[f32],
        want: Want,
    ) -> Result<Vec<f32>, StageError> {
        let (cubes, shape) = (&self.cubes, &self.shape);
        let paged = batch.iter().map(|piece| PagedRows {
            pages: tables.get(piece.session).map_or(&[], Vec::as_slice),
            position: piece.position,
            rows: piece.rows,
        });
        let places = cubes.place(PAGE_POSITIONS, &paged.collect::<Vec<_>>())?;
        let (cosines, sines) = self.turns(batch);
        let heads = AttentionShape {
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
        };
        let width = shape.kv_heads * shape.head_dim;
        let x = cubes.upload(x);
        // What the last sublayer gave: it is added where the next one norms.
        let mut added: Option<Floats> = None;
        for (block, Cache { keys, values }) in self.blocks.iter().zip(pages.blocks()) {
            let normed = cubes.add_and_normalise(&x, added.as_ref(), &block.attention_norm, shape.epsilon)?;
            let q = cubes.multiply(&normed, &block.q)?;
            let k = cubes.multiply(&normed, &block.k)?;
            let v = cubes.multiply(&normed, &block.v)?;
            cubes.rotate(&q, &cosines, &sines, shape.heads, shape.head_dim)?;
            cubes.rotate(&k, &cosines, &sines, shape.kv_heads, shape.head_dim)?;
            cubes.append(&k, keys, &places, width)?;
            cubes.append(&v, values, &places, width)?;
            let mixed = cubes.attend(heads, &q, keys, values, &places)?;
            let mixed = cubes.multiply(&mixed, &block.o)?;
            let normed = cubes.add_and_normalise(&x, Some(&mixed), &block.mlp_norm, shape.epsilon)?;
            let gate = cubes.multiply(&normed, &block.gate)?;
            let up = cubes.multiply(&normed, &block.up)?;
            added = Some(cubes.multiply(&cubes.gate(&gate, &up)?, &block.down)?);
        }
        let Some((norm, projection)) = self.head.as_ref().filter(|_| want != Want::Hidden) else {
            if let (Some(block), Some(added)) = (self.blocks.last(), &added) {
                // For the sum.
                cubes.add_and_normalise(&x, Some(added), &block.mlp_norm, shape.epsilon)?;
            }
            return Ok(cubes.read(&x)?);
        };
        let normed = cubes.add_and_normalise(&x, added.as_ref(), norm, shape.epsilon)?;
        let wanted = match want {
            Want::LastLogits => self.last_rows(&normed, batch)?,
            _ => normed,
        };
        match wanted.is_empty() {
            true => Ok(Vec::new()),
            false => Ok(cubes.read(&cubes.multiply(&wanted, projection)?)?),
        }
    }

    /// Cosines and sines of the rows' positions, `[rows, head_dim / 2]` each.
    fn turns(&self, batch: &[Piece]) -> (Floats, Floats) {
        let frequencies = &self.shape.frequencies;
        let (rows, pairs) = (batch.iter().map(|piece| piece.rows).sum::<usize>(), frequencies.pairs());
        let (mut cosines, mut sines) = (vec![0.0; rows * pairs], vec![0.0; rows * pairs]);
        let positions = batch
            .iter()
            .flat_map(|piece| piece.position..piece.position + piece.rows);
        let turns = cosines.chunks_exact_mut(pairs).zip(sines.chunks_exact_mut(pairs));
        for (position, (cosines, sines)) in positions.zip(turns) {
            frequencies.turn(position, cosines, sines);
        }
        (self.cubes.upload(&cosines), self.cubes.upload(&sines))
    }

    /// Of `[rows, hidden]`, the last row of each session whose rows end in this batch.
    fn last_rows(&self, normed: &Floats, batch: &[Piece]) -> Result<Floats, CubeError> {
        let hidden = self.shape.hidden;
        let mut end = 0;
        let mut lasts = Vec::new();
        for piece in batch {
            end += piece.rows;
            if piece.last {
                lasts.push(end - 1);
            }
        }
        if lasts.len() * hidden == normed.len() {
            return Ok(normed.clone());
        }
        let out = self.cubes.room(lasts.len() * hidden);
        for (row, from) in lasts.into_iter().enumerate() {
            self.cubes.copy(normed, from * hidden, &out, row * hidden, hidden)?;
        }
        Ok(out)
    }
}

/// How many rows to run together: a power of two, so that few shapes occur.
fn rows_max(shape: &Shape, with_logits: bool, device: &Device) -> usize {
    let logits = if with_logits { shape.vocabulary } else { 0 };
    let widest = (shape.heads * shape.head_dim).max(shape.intermediate).max(logits);
    let bytes = SCRATCH_BYTES_MAX.min(device.buffer_bytes_max());
    let fit = usize::try_from(bytes / (widest as u64 * 4).max(1)).unwrap_or(usize::MAX);
    1 << fit.clamp(1, ROWS_MAX).ilog2()
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

impl From<CubeError> for StageError {
    fn from(error: CubeError) -> Self {
        Self::Device {
            reason: error.to_string(),
        }
    }
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
