//! The optimiser's state of this node's stages, on disk: what an optimiser remembers must survive a restart.
//!
//! `FIRST-END-ROUND` holds the state with which the stage of those blocks begins that round, as the worker wrote it. A new
//! state is written as `FIRST-END.next` and gets its name only when the round's update is whole, so a round that is given
//! up or begun again starts from the same state. Each stage keeps its newest two.

use std::fs;
use std::io;
use std::path::PathBuf;

use polder_protocol::layout::BlockRange;

use super::durable;

/// States that are kept of a stage: that of the round under way, and that of the one after it.
const KEPT: usize = 2;

/// The optimiser's states of one run on this node.
#[derive(Debug, Clone)]
pub(super) struct Moments {
    folder: PathBuf,
    range: BlockRange,
}

impl Moments {
    pub(super) fn new(folder: PathBuf, range: BlockRange) -> Self {
        Self { folder, range }
    }

    /// The newest state with which `round` may begin.
    pub(super) fn before(&self, round: u64) -> Option<PathBuf> {
        let newest = self.rounds().into_iter().filter(|kept| *kept <= round).max();
        newest.map(|kept| self.path(kept))
    }

    /// Where the worker writes the next state.
    pub(super) fn next(&self) -> PathBuf {
        self.folder.join(format!("{}.next", self.stage()))
    }

    /// Makes room for the next state.
    pub(super) fn prepare(&self) -> io::Result<()> {
        fs::create_dir_all(&self.folder)
    }

    /// Puts the next state in place, after the update of `round`, and drops older ones.
    pub(super) fn commit(&self, round: u64) -> io::Result<()> {
        let after = round.saturating_add(1);
        fs::rename(self.next(), self.path(after))?;
        durable::sync_folder(&self.folder)?;
        let mut rounds = self.rounds();
        rounds.sort_unstable();
        // A round begun anew at an earlier state makes what came after it another run's past.
        let (old, newer) = match rounds.binary_search(&after) {
            Ok(at) => rounds.split_at(at + 1),
            Err(at) => rounds.split_at(at),
        };
        for gone in old.iter().rev().skip(KEPT).chain(newer) {
            fs::remove_file(self.path(*gone))?;
        }
        Ok(())
    }

    fn stage(&self) -> String {
        format!("{}-{}", self.range.first, self.range.end)
    }

    fn path(&self, round: u64) -> PathBuf {
        self.folder.join(format!("{}-{round}", self.stage()))
    }

    fn rounds(&self) -> Vec<u64> {
        let prefix = format!("{}-", self.stage());
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().to_str()?.strip_prefix(&prefix)?.parse().ok())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_begun_again_starts_from_the_same_state_and_two_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let moments = Moments::new(folder.path().join("optimiser"), BlockRange { first: 1, end: 3 });
        moments.prepare().unwrap();
        assert_eq!(moments.before(9), None);
        for round in [4, 5, 8] {
            fs::write(moments.next(), [round]).unwrap();
            assert_eq!(
                moments
                    .before(round.into())
                    .map(|path| fs::read(path).unwrap()[0] < round),
                (round > 4).then_some(true)
            );
            moments.commit(round.into()).unwrap();
        }
        let state = |round| moments.before(round).map(|path| fs::read(path).unwrap()[0]);
        assert_eq!(
            [state(5), state(6), state(8), state(9)],
            [None, Some(5), Some(5), Some(8)]
        );
        let other = Moments::new(folder.path().join("optimiser"), BlockRange { first: 0, end: 3 });
        assert_eq!(other.before(9), None);
    }
}
