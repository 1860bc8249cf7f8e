//! What a sparse frame left out is kept and sent later: without it, top-k loses most of every pseudo-gradient.

use alloc::vec::Vec;

use super::{DecodeError, EncodeError, Frame, Header, encode};
use crate::layout::PartLayout;

/// The error buffer of one part of one replica. It never leaves its node.
#[derive(Debug, Clone, PartialEq)]
pub struct ErrorFeedback {
    decay: f32,
    /// As many elements as the part has.
    error: Vec<f32>,
}

impl ErrorFeedback {
    /// An empty buffer for a part of `elements`; `decay` is what it keeps from round to round.
    pub fn new(decay: f32, elements: usize) -> Self {
        Self {
            decay,
            error: alloc::vec![0.0; elements],
        }
    }

    /// A buffer as it was saved; `None` where it has other than `elements` finite values.
    pub fn from_saved(decay: f32, elements: usize, error: Vec<f32>) -> Option<Self> {
        let whole = error.len() == elements && error.iter().all(|value| value.is_finite());
        whole.then_some(Self { decay, error })
    }

    /// What is still owed, in layout order.
    pub fn error(&self) -> &[f32] {
        &self.error
    }

    /// `a ← decay · e + delta`, `S ← encode(a)`, `e ← a − decode(S)`; answers with S.
    ///
    /// # Errors
    ///
    /// [`EncodeError`] as of [`encode`]; the buffer is then as it was.
    pub fn encode(&mut self, header: &Header, layout: &PartLayout, delta: &[f32]) -> Result<Vec<u8>, EncodeError> {
        if delta.len() != self.error.len() {
            return Err(EncodeError::Length {
                found: delta.len(),
                expected: self.error.len(),
            });
        }
        let mut sum: Vec<f32> = self
            .error
            .iter()
            .zip(delta)
            .map(|(error, delta)| self.decay * *error + *delta)
            .collect();
        let bytes = encode(header, layout, &sum)?;
        // Reading back what was just written cannot fail.
        let frame = Frame::parse(&bytes, layout).map_err(|_| EncodeError::TooLarge)?;
        each_tensor(&frame, layout, &mut sum, |owed, sent| *owed -= sent);
        self.error = sum;
        Ok(bytes)
    }

    /// Takes back a frame that the others refused: what it carried is owed again.
    ///
    /// # Errors
    ///
    /// [`DecodeError`] for bytes that are not a frame of this part; the buffer is then as it was.
    pub fn restore(&mut self, layout: &PartLayout, bytes: &[u8]) -> Result<(), DecodeError> {
        let frame = Frame::parse(bytes, layout)?;
        each_tensor(&frame, layout, &mut self.error, |owed, sent| *owed += sent);
        Ok(())
    }
}

fn each_tensor(frame: &Frame<'_>, layout: &PartLayout, values: &mut [f32], change: impl Fn(&mut f32, f32)) {
    let mut rest = values;
    let mut sent = Vec::new();
    for (index, tensor) in layout.tensors.iter().enumerate() {
        let Some((values, after)) = tensor.elements().and_then(|count| rest.split_at_mut_checked(count)) else {
            return;
        };
        rest = after;
        sent.clear();
        sent.resize(values.len(), 0.0);
        frame.tensor_into(index, &mut sent);
        for (value, sent) in values.iter_mut().zip(&sent) {
            change(value, *sent);
        }
    }
}
