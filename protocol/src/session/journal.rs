//! What a stage sent in one session, kept so that it can be sent again to whoever replaces the next stage.

use alloc::vec::Vec;

use thiserror::Error;

/// Rows of equal width, one per position, from position 0 on without a gap.
///
/// It never holds more than the session's context.
#[derive(Debug)]
pub struct Journal {
    row_bytes: usize,
    rows_max: usize,
    // Always a whole number of rows.
    bytes: Vec<u8>,
}

/// Why rows cannot be kept.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum JournalError {
    /// Not a whole number of rows.
    #[error("{bytes} bytes are no whole number of rows of {row_bytes}")]
    Width {
        /// What came.
        bytes: usize,
        /// The width of a row.
        row_bytes: usize,
    },
    /// Rows after a gap.
    #[error("rows from position {position} on would leave a gap after {held}")]
    Gap {
        /// Where they belong.
        position: u32,
        /// How many are held.
        held: u32,
    },
    /// More than the context.
    #[error("rows up to position {end} do not fit a context of {context_tokens_max}")]
    Full {
        /// One past the last.
        end: usize,
        /// The context.
        context_tokens_max: usize,
    },
}

impl Journal {
    /// An empty journal for a context, with rows of `row_bytes`, at least one byte.
    pub fn new(row_bytes: usize, context_tokens_max: u32) -> Self {
        Self {
            row_bytes: row_bytes.max(1),
            rows_max: usize::try_from(context_tokens_max).unwrap_or(usize::MAX),
            bytes: Vec::new(),
        }
    }

    /// The first `positions` rows of this journal at most, for another context.
    #[must_use]
    pub fn into_start(mut self, positions: u32, context_tokens_max: u32) -> Self {
        self.forget_from(positions.min(context_tokens_max));
        self.rows_max = usize::try_from(context_tokens_max).unwrap_or(usize::MAX);
        self
    }

    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// How many positions it holds.
    pub fn positions(&self) -> u32 {
        u32::try_from(self.bytes.len() / self.row_bytes).unwrap_or(u32::MAX)
    }

    /// Keeps `rows` as those from `position` on, instead of any that it had from there on.
    ///
    /// # Errors
    ///
    /// [`JournalError`]; nothing has changed then.
    pub fn keep(&mut self, position: u32, rows: &[u8]) -> Result<(), JournalError> {
        if !rows.len().is_multiple_of(self.row_bytes) {
            return Err(JournalError::Width {
                bytes: rows.len(),
                row_bytes: self.row_bytes,
            });
        }
        let held = self.positions();
        if position > held {
            return Err(JournalError::Gap { position, held });
        }
        let start = usize::try_from(position).unwrap_or(usize::MAX);
        let end = start.saturating_add(rows.len() / self.row_bytes);
        if end > self.rows_max {
            return Err(JournalError::Full {
                end,
                context_tokens_max: self.rows_max,
            });
        }
        self.forget_from(position);
        self.bytes.extend_from_slice(rows);
        Ok(())
    }

    /// Forgets all positions from `position` on.
    pub fn forget_from(&mut self, position: u32) {
        let rows = usize::try_from(position).unwrap_or(usize::MAX);
        self.bytes.truncate(rows.saturating_mul(self.row_bytes));
    }

    /// The rows of the positions `[first, end)`; `None` where it lacks one.
    pub fn rows(&self, first: u32, end: u32) -> Option<&[u8]> {
        let at = |position: u32| usize::try_from(position).ok()?.checked_mul(self.row_bytes);
        self.bytes.get(at(first)?..at(end)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_rows_replace_earlier_ones_from_their_position_on() {
        let mut journal = Journal::new(2, 4);
        journal.keep(0, b"aabbcc").unwrap();
        journal.keep(1, b"dd").unwrap();
        assert_eq!(journal.rows(0, 2), Some(&b"aadd"[..]));
        assert_eq!(journal.rows(0, 3), None);
    }

    #[test]
    fn gaps_halves_and_too_much_are_refused() {
        let mut journal = Journal::new(2, 2);
        assert!(matches!(journal.keep(1, b"aa"), Err(JournalError::Gap { .. })));
        assert!(matches!(journal.keep(0, b"a"), Err(JournalError::Width { .. })));
        assert!(matches!(journal.keep(0, b"aabbcc"), Err(JournalError::Full { .. })));
        assert_eq!(journal.positions(), 0);
    }
}
