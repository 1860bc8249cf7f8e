//! What one session keeps of a stage: pages of its positions, and the states of recurrent sublayers.

use super::engine::{LoadedMixer, LoadedSublayer};
use super::mamba::MambaState;
use super::pages::{Memory, Page};
use crate::stage::pages::{PAGE_POSITIONS, Pool, Table};
use crate::stage::sessions;

/// What one session keeps, sublayer by sublayer of all blocks.
#[derive(Debug)]
pub(in crate::stage) struct Sequence {
    pub(super) table: Table<Page>,
    pub(super) kept: Vec<Kept>,
}

/// What one sublayer keeps of a session.
#[derive(Debug, Clone)]
pub(super) enum Kept {
    Nothing,
    /// A part of each page.
    Paged {
        /// Where it begins.
        start: usize,
    },
    Mamba(Box<MambaState>),
}

impl Sequence {
    /// The sequence of these sublayers before its first position.
    pub(super) fn new<'a>(sublayers: impl Iterator<Item = &'a LoadedSublayer>) -> Self {
        let mut start = 0;
        let kept = sublayers.map(|sublayer| match &sublayer.mixer {
            LoadedMixer::Mamba(weights) => Kept::Mamba(Box::new(weights.recurrence.start())),
            mixer => match position_floats(mixer) {
                0 => Kept::Nothing,
                floats => {
                    let own = start;
                    start += floats * PAGE_POSITIONS;
                    Kept::Paged { start: own }
                }
            },
        });
        Self {
            kept: kept.collect(),
            table: Table::default(),
        }
    }
}

impl sessions::Sequence for Sequence {
    type Store = Memory;

    fn table(&mut self) -> &mut Table<Page> {
        &mut self.table
    }

    fn earliest(&self) -> usize {
        let earliest = self.kept.iter().map(|kept| match kept {
            Kept::Mamba(state) => state.earliest(),
            _ => 0,
        });
        earliest.max().unwrap_or(0)
    }

    fn fork(&self, end: usize) -> Self {
        Self {
            table: self.table.share(end),
            kept: self.kept.clone(),
        }
    }
}

/// A pool of pages for sequences of these sublayers.
pub(super) fn pool<'a>(sublayers: impl Iterator<Item = &'a LoadedSublayer>) -> Pool<Memory> {
    Pool::new(Memory::new(
        sublayers.map(|sublayer| position_floats(&sublayer.mixer)).sum(),
    ))
}

/// Bytes of a sequence's states, however long it is.
pub(super) fn state_bytes<'a>(sublayers: impl Iterator<Item = &'a LoadedSublayer>) -> u64 {
    let bytes = sublayers.map(|sublayer| match &sublayer.mixer {
        LoadedMixer::Mamba(weights) => weights.recurrence.state_bytes(),
        _ => 0,
    });
    bytes.sum()
}

/// Numbers that are kept of each position.
fn position_floats(mixer: &LoadedMixer) -> usize {
    match mixer {
        LoadedMixer::Attention(weights) => weights.position_floats(),
        LoadedMixer::Latent(weights) => weights.position_floats(),
        LoadedMixer::Mlp(_) | LoadedMixer::Experts(_) | LoadedMixer::Mamba(_) => 0,
    }
}
