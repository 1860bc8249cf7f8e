//! A frame whose every byte has been checked, read one tensor at a time.

use alloc::vec::Vec;

use super::{DecodeError, Form, Header, dense, frame_bytes, topk};
use crate::layout::PartLayout;

/// A checked frame: reading it cannot fail and yields finite numbers only.
#[derive(Debug, Clone)]
pub struct Frame<'a> {
    header: Header,
    /// One entry per tensor of the layout: elements, and exactly the bytes that they take.
    tensors: Vec<(usize, &'a [u8])>,
}

impl<'a> Frame<'a> {
    /// Checks `bytes` against the part's layout: length first, then every scale, codebook, index and padding bit.
    ///
    /// # Errors
    ///
    /// [`DecodeError`] for bytes that are not a frame of this part.
    pub fn parse(bytes: &'a [u8], layout: &PartLayout) -> Result<Self, DecodeError> {
        let (header, count, mut rest) = Header::read(bytes)?;
        if usize::try_from(count) != Ok(layout.tensors.len()) {
            return Err(DecodeError::TensorCount {
                found: count,
                expected: layout.tensors.len(),
            });
        }
        let expected = frame_bytes(layout, header.form).ok_or(DecodeError::TooLarge)?;
        if bytes.len() != expected {
            return Err(DecodeError::Length {
                found: bytes.len(),
                expected,
            });
        }
        let mut tensors = Vec::with_capacity(layout.tensors.len());
        for (index, tensor) in layout.tensors.iter().enumerate() {
            let elements = tensor.elements().ok_or(DecodeError::TooLarge)?;
            let len_bytes = header.form.tensor_bytes(elements).ok_or(DecodeError::TooLarge)?;
            let (body, after) = rest.split_at_checked(len_bytes).ok_or(DecodeError::TooLarge)?;
            rest = after;
            match header.form {
                Form::Raw => dense::check_raw(index, body),
                Form::Int8 => dense::check_int8(index, body),
                Form::E3m0 => dense::check_e3m0(index, elements, body),
                Form::TopkQ2 { k } => topk::check(index, elements, k, body),
            }?;
            tensors.push((elements, body));
        }
        Ok(Self { header, tensors })
    }

    /// What the frame says of itself.
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// Writes the elements of tensor `index` over `out`, which must have the tensor's number of elements. A tensor that
    /// the part does not have is all zero.
    pub fn tensor_into(&self, index: usize, out: &mut [f32]) {
        let Some((elements, body)) = self.tensors.get(index) else {
            return out.fill(0.0);
        };
        debug_assert_eq!(out.len(), *elements);
        match self.header.form {
            Form::Raw => dense::decode_raw(body, out),
            Form::Int8 => dense::decode_int8(body, out),
            Form::E3m0 => dense::decode_e3m0(body, out),
            Form::TopkQ2 { k } => topk::decode(body, k, out),
        }
    }
}
