//! The error buffers of a replica's parts, on disk: what top-k left out must survive a restart.
//!
//! `PART-ROUND` holds the buffer with which that part's update of that round is encoded, as little-endian f32. A round's
//! new buffers are written as `PART.next` and get their names only when the round's update is whole, so a round that is
//! given up or begun again starts from the same buffers.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use polder_protocol::codec::ErrorFeedback;
use polder_protocol::layout::{Part, PartLayout};
use tracing::warn;

use super::durable;

/// The error buffers of one run on this node.
#[derive(Debug, Clone)]
pub(super) struct Buffers {
    folder: PathBuf,
}

impl Buffers {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// The buffer for a part's update of `round`: empty at first, and after damage, which is reported.
    pub(super) fn load(&self, part: Part, round: u64, decay: f32, layout: &PartLayout) -> ErrorFeedback {
        let elements = layout.elements().unwrap_or(0);
        let newest = self.rounds_of(part).into_iter().filter(|kept| *kept <= round).max();
        let saved = newest.map(|kept| {
            let path = self.path(part, kept);
            let values = read(&path).ok();
            let saved = values.and_then(|values| ErrorFeedback::from_saved(decay, elements, values));
            if saved.is_none() {
                warn!(path = %path.display(), "error buffer is damaged and starts from zero");
            }
            saved
        });
        saved.flatten().unwrap_or_else(|| ErrorFeedback::new(decay, elements))
    }

    /// Writes the buffer that follows an update, not yet in its place.
    pub(super) fn stage(&self, part: Part, feedback: &ErrorFeedback) -> io::Result<()> {
        write(&self.next(part), feedback)
    }

    /// Puts the staged buffers of `parts` in place, after the update of `round`; older ones are dropped.
    pub(super) fn commit(&self, parts: &[Part], round: u64) -> io::Result<()> {
        for part in parts {
            fs::rename(self.next(*part), self.path(*part, round.saturating_add(1)))?;
        }
        durable::sync_folder(&self.folder)?;
        for part in parts {
            for old in self.rounds_of(*part).into_iter().filter(|kept| *kept < round) {
                fs::remove_file(self.path(*part, old))?;
            }
        }
        Ok(())
    }

    /// Takes back an update that the others refused, into the newest buffer.
    pub(super) fn restore(&self, part: Part, layout: &PartLayout, frame: &[u8]) -> io::Result<()> {
        let Some(newest) = self.rounds_of(part).into_iter().max() else {
            return Ok(()); // Dense updates have no buffer.
        };
        // The decay is of no consequence here: nothing is encoded.
        let mut feedback = self.load(part, newest, 1.0, layout);
        feedback.restore(layout, frame).map_err(io::Error::other)?;
        write(&self.path(part, newest), &feedback)
    }

    fn next(&self, part: Part) -> PathBuf {
        self.folder.join(format!("{}.next", part.0))
    }

    fn path(&self, part: Part, round: u64) -> PathBuf {
        self.folder.join(format!("{}-{round}", part.0))
    }

    fn rounds_of(&self, part: Part) -> Vec<u64> {
        let prefix = format!("{}-", part.0);
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().to_str()?.strip_prefix(&prefix)?.parse().ok())
            .collect()
    }
}

fn read(path: &Path) -> io::Result<Vec<f32>> {
    let bytes = fs::read(path)?;
    let (chunks, rest) = bytes.as_chunks::<4>();
    if rest.is_empty() {
        Ok(chunks.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect())
    } else {
        Err(io::Error::other("not a whole number of values"))
    }
}

fn write(path: &Path, feedback: &ErrorFeedback) -> io::Result<()> {
    let bytes: Vec<u8> = feedback.error().iter().flat_map(|value| value.to_le_bytes()).collect();
    durable::write(path, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use polder_protocol::layout::TensorLayout;

    #[test]
    fn a_round_begun_again_starts_from_the_same_buffer() {
        let folder = tempfile::tempdir().unwrap();
        let buffers = Buffers::new(folder.path().to_owned());
        let layout = PartLayout {
            tensors: vec![TensorLayout {
                name: "t".into(),
                shape: vec![2],
            }],
        };
        let with = |values: [f32; 2]| ErrorFeedback::from_saved(0.9, 2, values.to_vec()).unwrap();
        let load = |round| buffers.load(Part(3), round, 0.9, &layout).error().to_vec();
        assert_eq!(load(4), [0.0, 0.0]);
        buffers.stage(Part(3), &with([1.0, 2.0])).unwrap();
        // The round is given up before its update is whole.
        assert_eq!(load(4), [0.0, 0.0]);
        buffers.stage(Part(3), &with([3.0, 4.0])).unwrap();
        buffers.commit(&[Part(3)], 4).unwrap();
        assert_eq!(
            (load(4), load(5), load(9)),
            (vec![0.0, 0.0], vec![3.0, 4.0], vec![3.0, 4.0])
        );
        buffers.stage(Part(3), &with([5.0, 6.0])).unwrap();
        buffers.commit(&[Part(3)], 9).unwrap();
        fs::write(buffers.path(Part(3), 10), [0; 3]).unwrap();
        assert_eq!(load(11), [0.0, 0.0]);
    }
}
