//! One part of a run's state, and its bytes.

use alloc::vec::Vec;

use thiserror::Error;

use crate::layout::PartLayout;

/// A part's parameters and outer momentum, in layout order; equally long.
#[derive(Debug, Clone, PartialEq)]
pub struct PartState {
    /// θ.
    pub parameters: Vec<f32>,
    /// m. All zero before the first dense round and in sparse rounds.
    pub momentum: Vec<f32>,
}

/// Why bytes are not a state of their part.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum StateError {
    #[error("state is {found_bytes} bytes long; its part has {elements} elements, which take 4 or 8 bytes each")]
    Length { found_bytes: usize, elements: usize },
    #[error("element {element} of the state is not finite")]
    NotFinite { element: usize },
    #[error("the part is too large for this machine's addresses")]
    TooLarge,
}

impl PartState {
    /// The state before round 0, which has no momentum.
    pub fn initial(parameters: Vec<f32>) -> Self {
        let momentum = alloc::vec![0.0; parameters.len()];
        Self { parameters, momentum }
    }

    /// Reads a state blob: little-endian f32, parameters first, then momentum where there is any.
    ///
    /// # Errors
    ///
    /// [`StateError`] for bytes that are not finite numbers of this part.
    pub fn from_bytes(layout: &PartLayout, bytes: &[u8]) -> Result<Self, StateError> {
        let elements = layout.elements().ok_or(StateError::TooLarge)?;
        let plain_bytes = elements.checked_mul(4).ok_or(StateError::TooLarge)?;
        let with_momentum_bytes = plain_bytes.checked_mul(2).ok_or(StateError::TooLarge)?;
        if bytes.len() != plain_bytes && bytes.len() != with_momentum_bytes {
            return Err(StateError::Length {
                found_bytes: bytes.len(),
                elements,
            });
        }
        let (chunks, _) = bytes.as_chunks::<4>();
        let value = |chunk: &[u8; 4]| f32::from_le_bytes(*chunk);
        if let Some(element) = chunks.iter().position(|chunk| !value(chunk).is_finite()) {
            return Err(StateError::NotFinite { element });
        }
        let (parameters, momentum) = chunks.split_at_checked(elements).ok_or(StateError::TooLarge)?;
        let mut state = Self::initial(parameters.iter().map(value).collect());
        for (m, chunk) in state.momentum.iter_mut().zip(momentum) {
            *m = value(chunk);
        }
        Ok(state)
    }

    /// The state blob. Momentum that is all zero is left out, so that a run without it has blobs of half the size.
    pub fn to_bytes(&self) -> Vec<u8> {
        let has_momentum = self.momentum.iter().any(|m| *m != 0.0);
        let momentum = if has_momentum { self.momentum.as_slice() } else { &[] };
        let mut bytes = Vec::with_capacity((self.parameters.len() + momentum.len()) * 4);
        for value in self.parameters.iter().chain(momentum) {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// Forgets the momentum, after a round that has none.
    pub(super) fn drop_momentum(&mut self) {
        self.momentum.fill(0.0);
    }
}
