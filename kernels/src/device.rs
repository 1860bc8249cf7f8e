//! Which device computes, chosen at run time.

use std::fmt;

/// A device that can compute.
#[derive(Debug, Clone)]
pub struct Device {
    tensors: burn::tensor::Device,
    name: String,
    memory_bytes: Option<u64>,
}

/// Caches may take what is left of this share of a device's memory; without knowledge of it, 4 GiB.
const CACHE_BYTES_UNKNOWN: u64 = 4 << 30;

impl Device {
    /// The CPU.
    pub fn cpu() -> Self {
        Self {
            tensors: burn::tensor::Device::flex(),
            name: format!("cpu ({}, {} threads)", instructions(), rayon::current_num_threads()),
            memory_bytes: None,
        }
    }

    /// Such as `cpu (AVX-512, 2 threads)`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of its memory, where known.
    pub fn memory_bytes(&self) -> Option<u64> {
        self.memory_bytes
    }

    /// What tensors are made on.
    pub(crate) fn tensors(&self) -> &burn::tensor::Device {
        &self.tensors
    }

    /// How many bytes the caches of a stage may take unless it is told otherwise.
    pub(crate) fn cache_bytes_max(&self) -> u64 {
        self.memory_bytes.map_or(CACHE_BYTES_UNKNOWN, |bytes| bytes / 2)
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

fn instructions() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            return "AVX-512";
        }
        if is_x86_feature_detected!("avx2") {
            return "AVX2";
        }
    }
    std::env::consts::ARCH
}
