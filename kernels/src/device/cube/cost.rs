//! What a kernel reads, writes and computes, counted.

/// Bytes between a device's memory and its units, each element once, and floating-point operations (an addition, a
/// multiplication, a division, a root or an exponential being one).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    /// Bytes that must be read.
    pub read: u64,
    /// Bytes that must be written.
    pub written: u64,
    /// Operations.
    pub operations: u64,
}

impl Cost {
    pub(super) const fn new(read: usize, written: usize, operations: usize) -> Self {
        Self {
            read: read as u64,
            written: written as u64,
            operations: operations as u64,
        }
    }

    /// The seconds that a device needs at least, which moves so many bytes and does so many operations a second.
    pub fn seconds_min(&self, bytes_per_second: f64, operations_per_second: f64) -> f64 {
        let bytes = (self.read + self.written) as f64 / bytes_per_second;
        bytes.max(self.operations as f64 / operations_per_second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slower_of_memory_and_arithmetic_counts() {
        let cost = Cost::new(300, 100, 1_000);
        assert_eq!(cost.seconds_min(200.0, 1_000.0), 2.0);
        assert_eq!(cost.seconds_min(400.0, 100.0), 10.0);
    }
}
