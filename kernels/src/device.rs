//! Which device computes, chosen at run time.
//!
//! A device that was asked for and is not there is a normal answer: the CPU takes over and says why. A software
//! rasteriser is a CPU in disguise, and only taken when `wgpu` is asked for by name.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// What a person asks for with `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// A GPU where there is one that this binary can drive, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// Whatever wgpu finds (Vulkan, Metal, DX12), a software rasteriser too; else the CPU.
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
    is_cpu: bool,
}

/// Room for caches where a device's memory is not known.
const CACHE_BYTES_UNKNOWN: u64 = 4 << 30;

impl Device {
    /// The CPU.
    pub fn cpu() -> Self {
        Self {
            tensors: burn::tensor::Device::flex(),
            name: format!("cpu ({}, {} threads)", instructions(), rayon::current_num_threads()),
            memory_bytes: None,
            is_cpu: true,
        }
    }

    /// The device for a choice and, where it is not the one that was asked for, the reason. Call it once, before any
    /// computation: a graphics interface is set up only once in a process.
    pub fn choose(choice: Choice) -> (Self, Option<String>) {
        match choice {
            Choice::Cpu => (Self::cpu(), None),
            Choice::Auto => match gpu(Rasteriser::Refused) {
                Ok(device) => (device, None),
                // Nobody asked for a GPU, so its absence needs no reason.
                Err(_) => (Self::cpu(), None),
            },
            Choice::Wgpu => match gpu(Rasteriser::Taken) {
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

    /// Whether it is the CPU, driven without a graphics interface.
    pub fn is_cpu(&self) -> bool {
        self.is_cpu
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

/// What to do with a graphics driver that computes on the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rasteriser {
    Refused,
    Taken,
}

#[cfg(not(feature = "gpu"))]
fn gpu(_: Rasteriser) -> Result<Device, String> {
    Err("this binary was built without the feature `gpu`".to_owned())
}

#[cfg(feature = "gpu")]
fn gpu(rasteriser: Rasteriser) -> Result<Device, String> {
    use burn::tensor::DeviceType;

    // Drivers fail in more ways than they report; a panic in one is an absent device.
    let set_up = || {
        let found = format!("{:?}", burn::tensor::Device::enumerate(DeviceType::Wgpu).into_vec());
        // Named DiscreteGpu(0), IntegratedGpu(0) or VirtualGpu(0); a rasteriser is of kind Cpu.
        let real = found.contains("Gpu(");
        if !real && rasteriser == Rasteriser::Refused {
            return Err("no GPU was found".to_owned());
        }
        let kind = if real { "gpu" } else { "software rasteriser" };
        let tensors = burn::tensor::Device::wgpu_options()
            .init()
            .map_err(|error| error.to_string())?;
        Ok(Device {
            tensors,
            name: format!("wgpu ({kind})"),
            memory_bytes: None,
            is_cpu: false,
        })
    };
    std::panic::catch_unwind(set_up).unwrap_or_else(|_| Err("the graphics driver failed".to_owned()))
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
