//! Which chunks of a blob somebody has.

use alloc::vec;
use alloc::vec::Vec;

use super::manifest::CHUNKS_MAX;

/// A set of chunk indexes below a fixed count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkSet {
    // `words` holds ⌈chunks / 64⌉ words; bits from `chunks` on are zero; `count` is the number of ones.
    chunks: u32,
    count: u32,
    words: Vec<u64>,
}

impl ChunkSet {
    /// None of `chunks` chunks.
    pub fn empty(chunks: u32) -> Self {
        let chunks = chunks.min(CHUNKS_MAX);
        Self {
            chunks,
            count: 0,
            words: vec![0; words_for(chunks)],
        }
    }

    /// All of `chunks` chunks.
    pub fn full(chunks: u32) -> Self {
        let mut set = Self::empty(chunks);
        for chunk in 0..set.chunks {
            set.insert(chunk);
        }
        set
    }

    /// How many chunks the blob has.
    pub fn chunks(&self) -> u32 {
        self.chunks
    }

    /// How many of them are in the set.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Whether all are in the set.
    pub fn is_full(&self) -> bool {
        self.count == self.chunks
    }

    /// Whether `chunk` is in the set.
    pub fn contains(&self, chunk: u32) -> bool {
        let (word, bit) = place(chunk);
        self.words.get(word).is_some_and(|word| word & bit != 0)
    }

    /// Adds `chunk`; says whether it was new. An index out of range is not added.
    pub fn insert(&mut self, chunk: u32) -> bool {
        let (word, bit) = place(chunk);
        match self.words.get_mut(word) {
            Some(word) if chunk < self.chunks && *word & bit == 0 => {
                *word |= bit;
                self.count += 1;
                true
            }
            Some(_) | None => false,
        }
    }

    /// Takes `chunk` out; says whether it was there.
    pub fn remove(&mut self, chunk: u32) -> bool {
        let (word, bit) = place(chunk);
        match self.words.get_mut(word) {
            Some(word) if *word & bit != 0 => {
                *word &= !bit;
                self.count -= 1;
                true
            }
            Some(_) | None => false,
        }
    }

    /// The chunks in the set, in order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.chunks).filter(|chunk| self.contains(*chunk))
    }

    /// The chunks that are not, in order.
    pub fn missing(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.chunks).filter(|chunk| !self.contains(*chunk))
    }

    /// Eight bytes per 64 chunks, little-endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Reads a set of `chunks` chunks; `None` for another length or a bit beyond the last chunk.
    pub fn from_bytes(chunks: u32, bytes: &[u8]) -> Option<Self> {
        if chunks > CHUNKS_MAX || bytes.len() != words_for(chunks).checked_mul(8)? {
            return None;
        }
        let (words, []) = bytes.as_chunks::<8>() else {
            return None;
        };
        let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let beyond = words.last().copied().unwrap_or(0) & !last_mask(chunks);
        let count = words.iter().map(|word| word.count_ones()).sum();
        (beyond == 0).then_some(Self { chunks, count, words })
    }
}

fn words_for(chunks: u32) -> usize {
    usize::try_from(chunks.div_ceil(64)).unwrap_or(usize::MAX)
}

fn place(chunk: u32) -> (usize, u64) {
    (usize::try_from(chunk / 64).unwrap_or(usize::MAX), 1 << (chunk % 64))
}

/// The bits of the last word that stand for a chunk.
fn last_mask(chunks: u32) -> u64 {
    match chunks % 64 {
        0 => u64::MAX,
        rest => (1 << rest) - 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_index_beyond_the_last_is_never_in_the_set() {
        let mut set = ChunkSet::empty(3);
        assert!(!set.insert(3));
        assert!(!set.insert(u32::MAX));
        assert!(set.insert(2));
        assert!(!set.insert(2));
        assert_eq!(set.missing().collect::<Vec<_>>(), [0, 1]);
        assert!(ChunkSet::full(0).is_full());
    }

    #[test]
    fn bytes_of_another_length_or_with_stray_bits_are_refused() {
        assert_eq!(
            ChunkSet::from_bytes(3, &[0b111, 0, 0, 0, 0, 0, 0, 0]),
            Some(ChunkSet::full(3))
        );
        assert_eq!(ChunkSet::from_bytes(3, &[0b1111, 0, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(ChunkSet::from_bytes(3, &[0; 7]), None);
        assert_eq!(ChunkSet::from_bytes(u32::MAX, &[0; 8]), None);
        assert_eq!(ChunkSet::from_bytes(0, &[]), Some(ChunkSet::empty(0)));
    }

    proptest! {
        #[test]
        fn a_set_survives_its_bytes(chunks in 0u32..300, picks in proptest::collection::vec(0u32..300, 0..100)) {
            let mut set = ChunkSet::empty(chunks);
            for chunk in picks {
                set.insert(chunk);
            }
            prop_assert_eq!(set.iter().count() + set.missing().count(), set.chunks() as usize);
            prop_assert_eq!(ChunkSet::from_bytes(chunks, &set.to_bytes()), Some(set));
        }
    }
}
