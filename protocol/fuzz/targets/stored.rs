//! What nodes store, and fetch from each other by hash.

use polder_protocol::aggregate::PartState;
use polder_protocol::blob::{ChunkSet, Manifest};
use polder_protocol::epoch::Epoch;

use super::{byte, training};

pub(crate) fn blob_manifest(bytes: &[u8]) {
    if let Ok(manifest) = Manifest::from_bytes(bytes) {
        assert_eq!(manifest.to_bytes(), bytes, "a blob has one id");
    }
}

/// How many chunks there are, in two bytes, then the set.
pub(crate) fn chunk_set(bytes: &[u8]) {
    let (low, rest) = byte(bytes);
    let (high, rest) = byte(rest);
    let chunks = u32::from(u16::from_le_bytes([low, high]));
    if let Some(set) = ChunkSet::from_bytes(chunks, rest) {
        assert_eq!(set.to_bytes(), rest);
        assert_eq!(set.iter().count() + set.missing().count(), chunks as usize);
    }
}

pub(crate) fn epoch(bytes: &[u8]) {
    if let Ok(epoch) = Epoch::from_bytes(bytes) {
        assert!(epoch.blocks() as usize <= epoch.parts.len());
        assert_eq!(Epoch::from_bytes(&epoch.to_bytes()), Ok(epoch));
    }
}

pub(crate) fn aggregate_state(bytes: &[u8]) {
    if let Ok(state) = PartState::from_bytes(&training::part(), bytes) {
        assert!(
            state
                .parameters
                .iter()
                .chain(&state.momentum)
                .all(|value| value.is_finite())
        );
    }
}
