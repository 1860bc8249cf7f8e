//! Buffers that are used again and again: a step makes the same ones as the step before.

use std::collections::BTreeMap;

/// Buffers that are free, by length.
#[derive(Debug, Default)]
pub(super) struct Pool {
    rows: usize,
    free: BTreeMap<usize, Vec<Vec<f32>>>,
}

impl Pool {
    /// Lets go of all buffers where micro-batches have another size than before.
    pub(super) fn fit(&mut self, rows: usize) {
        if self.rows != rows {
            self.rows = rows;
            self.free.clear();
        }
    }

    /// A buffer with any numbers in it, which the caller writes over.
    pub(super) fn take(&mut self, len: usize) -> Vec<f32> {
        let free = self.free.get_mut(&len).and_then(Vec::pop);
        free.unwrap_or_else(|| vec![0.0; len])
    }

    /// A copy of `values`.
    pub(super) fn copy(&mut self, values: &[f32]) -> Vec<f32> {
        let mut copy = self.take(values.len());
        copy.copy_from_slice(values);
        copy
    }

    /// Takes a buffer back.
    pub(super) fn give(&mut self, buffer: Vec<f32>) {
        self.free.entry(buffer.len()).or_default().push(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_until_sizes_change() {
        let mut pool = Pool::default();
        pool.fit(2);
        let mut buffer = pool.take(3);
        buffer.fill(7.0);
        let place = buffer.as_ptr();
        pool.give(buffer);
        assert_eq!(pool.take(4), [0.0; 4]);
        let again = pool.take(3);
        assert_eq!((again.as_ptr(), &again[..]), (place, &[7.0; 3][..]));
        pool.give(again);
        pool.fit(5);
        assert_eq!(pool.take(3), [0.0; 3]);
        assert_eq!(pool.copy(&[1.0, 2.0]), [1.0, 2.0]);
    }
}
