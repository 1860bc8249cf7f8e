//! The first bytes of a frame: whose contribution it is, to which round of which run, and how it is written.

use alloc::vec::Vec;

use super::{DecodeError, Form, TOPK_CHUNK};
use crate::hash::{Digest, RunId};
use crate::layout::Part;

/// The mark of a pseudo-gradient frame.
const MAGIC: [u8; 4] = *b"PLDG";

/// The version of the frame that this code writes and reads.
const VERSION: u16 = 1;

/// Bytes of a header: mark 4, version 2, form 1 + 2, run 32, round 8, replica 8, base 32, part 4, tokens 8, tensors 4.
pub const HEADER_BYTES: usize = 105;

/// What a frame says of itself. Numbers are little-endian on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The run.
    pub run: RunId,
    /// The round.
    pub round: u64,
    /// The replica that trained.
    pub replica: u64,
    /// From which state the replica started: [`crate::run::state_hash`] of the parts of the node that wrote this.
    pub base: Digest,
    /// Which part of the model.
    pub part: Part,
    /// How its tensors are written.
    pub form: Form,
    /// Tokens on which the replica trained in this round.
    pub tokens: u64,
}

impl Header {
    pub(super) fn write(&self, tensors: u32, out: &mut Vec<u8>) {
        let (tag, parameter) = match self.form {
            Form::Raw => (0, 0),
            Form::Int8 => (1, 0),
            Form::E3m0 => (2, 0),
            Form::TopkQ2 { k } => (3, k),
        };
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.push(tag);
        out.extend_from_slice(&parameter.to_le_bytes());
        out.extend_from_slice(&self.run.0);
        out.extend_from_slice(&self.round.to_le_bytes());
        out.extend_from_slice(&self.replica.to_le_bytes());
        out.extend_from_slice(&self.base.0);
        out.extend_from_slice(&self.part.0.to_le_bytes());
        out.extend_from_slice(&self.tokens.to_le_bytes());
        out.extend_from_slice(&tensors.to_le_bytes());
    }

    /// Reads a header and the number of tensors that it declares; what follows the header is the rest.
    pub(super) fn read(bytes: &[u8]) -> Result<(Self, u32, &[u8]), DecodeError> {
        let mut reader = Reader(bytes);
        if reader.take::<4>()? != MAGIC {
            return Err(DecodeError::Magic);
        }
        let version = u16::from_le_bytes(reader.take()?);
        if version != VERSION {
            return Err(DecodeError::Version {
                theirs: version,
                ours: VERSION,
            });
        }
        let [tag] = reader.take()?;
        let parameter = u16::from_le_bytes(reader.take()?);
        let form = match (tag, parameter) {
            (0, 0) => Form::Raw,
            (1, 0) => Form::Int8,
            (2, 0) => Form::E3m0,
            (3, k) if k > 0 && usize::from(k) <= TOPK_CHUNK => Form::TopkQ2 { k },
            _ => return Err(DecodeError::Form { tag, parameter }),
        };
        let header = Self {
            form,
            run: RunId(reader.take()?),
            round: u64::from_le_bytes(reader.take()?),
            replica: u64::from_le_bytes(reader.take()?),
            base: Digest(reader.take()?),
            part: Part(u32::from_le_bytes(reader.take()?)),
            tokens: u64::from_le_bytes(reader.take()?),
        };
        let tensors = u32::from_le_bytes(reader.take()?);
        Ok((header, tensors, reader.0))
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(DecodeError::Length {
            found: self.0.len(),
            expected: HEADER_BYTES,
        })?;
        self.0 = rest;
        Ok(*taken)
    }
}
