//! Which device computes, chosen at run time.
//!
//! A device that was asked for and is not there is a normal answer: the CPU takes over and says why. What computes no
//! faster than the CPU's own engine is only taken when `wgpu` is asked for by name: a software rasteriser is a CPU in
//! disguise, and an integrated GPU reads weights from the same memory, where the CPU keeps them packed.

#[cfg(feature = "gpu")]
pub mod cube;
#[cfg(feature = "gpu")]
mod graphics;
pub(crate) mod memory;

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// What a person asks for with `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// A GPU with memory of its own where there is one that this binary can drive, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// Whatever wgpu finds (Vulkan, Metal, DX12), integrated GPUs and software rasterisers too; else the CPU.
    Wgpu,
}

/// A text that names no choice of device.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
#[error("`{text}` is not a device; devices are auto, cpu and wgpu")]
pub struct UnknownDevice {
    /// The text.
    pub text: String,
}

impl FromStr for Choice {
    type Err = UnknownDevice;

    fn from_str(text: &str) -> Result<Self, UnknownDevice> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "wgpu" => Ok(Self::Wgpu),
            _ => Err(UnknownDevice { text: text.to_owned() }),
        }
    }
}

/// A device that can compute.
#[derive(Debug, Clone)]
pub struct Device {
    tensors: burn::tensor::Device,
    name: String,
    memory_bytes: Option<u64>,
    /// One tensor at most.
    buffer_bytes_max: u64,
    is_cpu: bool,
    #[cfg(feature = "gpu")]
    graphics: Option<graphics::Graphics>,
}

/// Room for caches where a device's memory is not known.
const CACHE_BYTES_UNKNOWN: u64 = 4 << 30;
/// No device has so much; asking it would only take long.
const TOO_LARGE: u64 = 1 << 42;

impl Device {
    /// The CPU.
    pub fn cpu() -> Self {
        Self {
            tensors: burn::tensor::Device::flex(),
            name: match rayon::current_num_threads() {
                1 => format!("cpu ({}, 1 thread)", instructions()),
                threads => format!("cpu ({}, {threads} threads)", instructions()),
            },
            memory_bytes: None,
            buffer_bytes_max: TOO_LARGE,
            is_cpu: true,
            #[cfg(feature = "gpu")]
            graphics: None,
        }
    }

    /// The CPU, driven as a GPU is in training: in tensors. Slower than [`Device::cpu`]; it shows what is the engine's doing
    /// and what a driver's. It runs no kernels of ours, so stages for serving are those of [`Device::cpu`].
    pub fn cpu_in_tensors() -> Self {
        Self {
            name: format!("cpu ({}, in tensors)", instructions()),
            is_cpu: false,
            ..Self::cpu()
        }
    }

    /// The device for a choice and, where it is not the one that was asked for, the reason. Call it once, before any
    /// computation: a graphics interface is set up only once in a process.
    pub fn choose(choice: Choice) -> (Self, Option<String>) {
        match choice {
            Choice::Cpu => (Self::cpu(), None),
            Choice::Auto => match find(Slow::Refused) {
                Ok(device) => (device, None),
                // Nobody asked for a GPU, so its absence needs no reason.
                Err(_) => (Self::cpu(), None),
            },
            Choice::Wgpu => match find(Slow::Taken) {
                Ok(device) => (device, None),
                Err(reason) => (Self::cpu(), Some(reason)),
            },
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

    /// Whether it is the CPU with its own engine, driven without a graphics interface.
    pub fn is_cpu(&self) -> bool {
        self.is_cpu
    }

    /// Bytes of one tensor at most.
    pub(crate) fn buffer_bytes_max(&self) -> u64 {
        self.buffer_bytes_max
    }

    /// Whether `bytes` more would fit now, as far as the driver knows.
    pub(crate) fn has_room(&self, bytes: u64) -> bool {
        #[cfg(feature = "gpu")]
        if let Some(graphics) = &self.graphics {
            return graphics.has_room(bytes);
        }
        bytes <= TOO_LARGE
    }

    /// Whether it has memory of its own, which [`Device::has_room`] can tell of.
    pub(crate) fn has_memory(&self) -> bool {
        #[cfg(feature = "gpu")]
        if self.graphics.is_some() {
            return true;
        }
        false
    }

    /// Whether a graphics driver computes.
    #[cfg(feature = "gpu")]
    pub(crate) fn has_graphics(&self) -> bool {
        self.graphics.is_some()
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

/// What to do with a device that computes no faster than the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slow {
    Refused,
    Taken,
}

#[cfg(not(feature = "gpu"))]
fn find(_: Slow) -> Result<Device, String> {
    Err("this binary was built without the feature `gpu`".to_owned())
}

#[cfg(feature = "gpu")]
use graphics::find;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_always_there() {
        let (device, reason) = Device::choose("cpu".parse().unwrap());
        assert!(device.is_cpu() && reason.is_none());
        assert!(device.name().starts_with("cpu ("));
    }

    #[cfg(not(feature = "gpu"))]
    #[test]
    fn without_the_feature_a_gpu_falls_back_with_a_reason() {
        let (device, reason) = Device::choose(Choice::Wgpu);
        assert!(device.is_cpu());
        assert!(reason.unwrap().contains("`gpu`"));
    }

    #[test]
    fn an_unknown_device_is_refused() {
        assert!(
            "cuda"
                .parse::<Choice>()
                .unwrap_err()
                .to_string()
                .contains("auto, cpu and wgpu")
        );
    }
}
