//! Pseudo-gradients as bytes: one frame for each part of a replica's contribution to a round.
//!
//! A frame is a [`Header`] of [`HEADER_BYTES`] and then the part's tensors in layout order, each in the header's
//! [`Form`]. Sizes follow from the layout alone ([`frame_bytes`]), so a frame's length is checked before anything of it
//! is read. Everything is computed with `+ − × ÷ √` in a fixed order: every machine gets the same bits.

mod dense;
mod feedback;
mod frame;
mod header;
mod topk;

use alloc::vec::Vec;

use thiserror::Error;

pub use feedback::ErrorFeedback;
pub use frame::Frame;
pub use header::{HEADER_BYTES, Header};

use crate::layout::PartLayout;
use crate::run::{Codec, Outer};

/// Elements that share one scale in [`Form::Int8`].
pub const INT8_BLOCK: usize = 256;

/// Elements of one chunk in [`Form::TopkQ2`]; an index into it takes 12 bits.
pub const TOPK_CHUNK: usize = 4_096;

/// How the tensors of a frame are written: a [`Codec`] without what only its encoder needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Little-endian f32: 4 bytes an element.
    Raw,
    /// Blocks of [`INT8_BLOCK`] elements (the last may be shorter), each an f32 scale and one signed byte an element:
    /// `n + 4 × ⌈n / 256⌉` bytes. A value is `scale × byte`.
    Int8,
    /// One f32 scale, the largest magnitude of the tensor, then 4 bits an element, the first of two in the low half:
    /// `4 + ⌈n / 2⌉` bytes. Bit 3 is the sign; the others are 0 for zero, or `e` for `scale × 2^(e − 7)`.
    E3m0,
    /// A codebook of 4 f32, then for each chunk of [`TOPK_CHUNK`] elements `k` ascending 12-bit indices, two in three
    /// bytes, and `k` 2-bit positions in the codebook, four to a byte. The last chunk is padded with zeros that are not
    /// part of the tensor. With k = 64 a chunk takes 112 bytes.
    TopkQ2 {
        /// Elements kept of each chunk, 1 to [`TOPK_CHUNK`].
        k: u16,
    },
}

impl Form {
    /// The bytes that a tensor of `elements` takes; `None` where they do not fit a `usize`.
    pub fn tensor_bytes(self, elements: usize) -> Option<usize> {
        match self {
            Self::Raw => elements.checked_mul(4),
            Self::Int8 => elements.div_ceil(INT8_BLOCK).checked_mul(4)?.checked_add(elements),
            Self::E3m0 => elements.div_ceil(2).checked_add(4),
            Self::TopkQ2 { k } => elements
                .div_ceil(TOPK_CHUNK)
                .checked_mul(topk::chunk_bytes(k))?
                .checked_add(topk::CODEBOOK_BYTES),
        }
    }
}

impl From<Codec> for Form {
    fn from(codec: Codec) -> Self {
        match codec {
            Codec::Raw => Self::Raw,
            Codec::Int8 => Self::Int8,
            Codec::E3m0 => Self::E3m0,
            Codec::TopkQ2 { k, .. } => Self::TopkQ2 { k },
        }
    }
}

/// The codec of `round`: sparse codecs start only after the run's dense warm start.
pub fn codec_of_round(outer: &Outer, round: u64) -> Codec {
    match outer.codec {
        Codec::TopkQ2 { .. } if round < outer.warm_start_rounds => Codec::E3m0,
        codec => codec,
    }
}

/// The exact length of a frame; `None` where it does not fit a `usize`.
pub fn frame_bytes(layout: &PartLayout, form: Form) -> Option<usize> {
    layout.tensors.iter().try_fold(HEADER_BYTES, |sum, tensor| {
        sum.checked_add(form.tensor_bytes(tensor.elements()?)?)
    })
}

/// Why values cannot be written. Each case is the caller's.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum EncodeError {
    #[error("{found} values were given for a part of {expected}")]
    Length { found: usize, expected: usize },
    #[error("tensor {tensor} of the part holds a value that is not finite")]
    NotFinite { tensor: usize },
    #[error("a sparse frame keeps 1 to 4096 values of each chunk, not {k}")]
    Kept { k: u16 },
    #[error("the part is too large for this machine's addresses")]
    TooLarge,
}

/// Why bytes are not a frame of the part that they claim to be. Each case is the sender's doing.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum DecodeError {
    #[error("frame does not start with a pseudo-gradient's mark")]
    Magic,
    #[error("frame has version {theirs}, this node reads {ours}")]
    Version { theirs: u16, ours: u16 },
    #[error("frame names codec {tag} with parameter {parameter}, which is none")]
    Form { tag: u8, parameter: u16 },
    #[error("frame is {found} bytes long, its part and codec ask for {expected}")]
    Length { found: usize, expected: usize },
    #[error("frame holds {found} tensors, the part has {expected}")]
    TensorCount { found: u32, expected: usize },
    #[error("tensor {tensor} holds a value, scale or codebook entry that is not a finite number in range")]
    NotFinite { tensor: usize },
    #[error("tensor {tensor} has indices that do not ascend in chunk {chunk}")]
    Indices { tensor: usize, chunk: usize },
    #[error("tensor {tensor} sets bits that must be zero")]
    Padding { tensor: usize },
    #[error("the part is too large for this machine's addresses")]
    TooLarge,
}

/// Writes one part's pseudo-gradient. `values` are the part's elements in layout order.
///
/// # Errors
///
/// [`EncodeError`] for a wrong number of values, for values that are not finite and for an impossible `k`.
pub fn encode(header: &Header, layout: &PartLayout, values: &[f32]) -> Result<Vec<u8>, EncodeError> {
    if let Form::TopkQ2 { k } = header.form
        && (k == 0 || usize::from(k) > TOPK_CHUNK)
    {
        return Err(EncodeError::Kept { k });
    }
    let expected = layout.elements().ok_or(EncodeError::TooLarge)?;
    if values.len() != expected {
        return Err(EncodeError::Length {
            found: values.len(),
            expected,
        });
    }
    let len_bytes = frame_bytes(layout, header.form).ok_or(EncodeError::TooLarge)?;
    let count = u32::try_from(layout.tensors.len()).map_err(|_| EncodeError::TooLarge)?;
    let mut out = Vec::with_capacity(len_bytes);
    header.write(count, &mut out);
    let mut rest = values;
    for (index, tensor) in layout.tensors.iter().enumerate() {
        let elements = tensor.elements().ok_or(EncodeError::TooLarge)?;
        let (values, after) = rest.split_at_checked(elements).ok_or(EncodeError::TooLarge)?;
        rest = after;
        if !values.iter().all(|value| value.is_finite()) {
            return Err(EncodeError::NotFinite { tensor: index });
        }
        match header.form {
            Form::Raw => dense::encode_raw(values, &mut out),
            Form::Int8 => dense::encode_int8(values, &mut out),
            Form::E3m0 => dense::encode_e3m0(values, &mut out),
            Form::TopkQ2 { k } => topk::encode(values, k, &mut out),
        }
    }
    debug_assert_eq!(out.len(), len_bytes);
    Ok(out)
}

/// Reads a whole frame at once: its header and the part's elements in layout order. [`Frame`] reads tensor by tensor.
///
/// # Errors
///
/// [`DecodeError`] for bytes that are not a frame of this part.
pub fn decode(bytes: &[u8], layout: &PartLayout) -> Result<(Header, Vec<f32>), DecodeError> {
    let frame = Frame::parse(bytes, layout)?;
    // `parse` has seen as many bytes as the layout asks for; sparse frames still grow, by at most 4096 × 4 / 19.
    let mut values = alloc::vec![0.0; layout.elements().ok_or(DecodeError::TooLarge)?];
    let mut rest = values.as_mut_slice();
    for (index, tensor) in layout.tensors.iter().enumerate() {
        let elements = tensor.elements().ok_or(DecodeError::TooLarge)?;
        let (out, after) = rest.split_at_mut_checked(elements).ok_or(DecodeError::TooLarge)?;
        rest = after;
        frame.tensor_into(index, out);
    }
    Ok((frame.header().clone(), values))
}

#[cfg(test)]
mod tests;
