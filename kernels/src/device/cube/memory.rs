//! A device's queue, and memory on the device.

use std::marker::PhantomData;

use bytemuck::{Pod, cast_slice, try_cast_slice};
use cubecl::MemoryScope;
use cubecl::client::Client;
use cubecl::prelude::{BufferArg, CubeCount, CubeDim};
use cubecl::server::Handle;
use thiserror::Error;

use super::UNITS;
use crate::device::Device;

/// Bytes of an element.
const BYTES: usize = 4;

/// Why a kernel was not run.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum CubeError {
    #[error("{device} runs no kernels of ours")]
    NoKernels { device: String },
    #[error("{what} has {found} elements, and {expected} are needed")]
    Length {
        what: &'static str,
        found: usize,
        expected: usize,
    },
    #[error("{what} of {value} is out of range: {limit}")]
    Range {
        what: &'static str,
        value: usize,
        limit: &'static str,
    },
    #[error("no kernel multiplies {ty} as it is stored")]
    Type { ty: &'static str },
    #[error("the device failed: {reason}")]
    Device { reason: String },
}

/// The queue of a device that runs our kernels. They run in the order of the calls; reading waits for them.
#[derive(Clone)]
pub struct Cubes {
    client: Client,
}

impl std::fmt::Debug for Cubes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cubes({})", self.client.name())
    }
}

/// Elements of four bytes on the device. Clones share them.
#[derive(Debug, Clone)]
pub struct Elements<T> {
    handle: Handle,
    len: usize,
    kind: PhantomData<T>,
}

/// Numbers on the device.
pub type Floats = Elements<f32>;
/// 32-bit words on the device.
pub type Words = Elements<u32>;

impl Cubes {
    /// The queue of a device that was [chosen](Device::choose).
    ///
    /// # Errors
    ///
    /// [`CubeError::NoKernels`] for the CPU.
    pub fn of(device: &Device) -> Result<Self, CubeError> {
        match device.has_graphics() {
            true => Ok(Self {
                // The same driver that burn set up: there is one in a process.
                client: cubecl::Device::Wgpu(Default::default()).client(),
            }),
            false => Err(CubeError::NoKernels {
                device: device.name().to_owned(),
            }),
        }
    }

    /// Brings elements to the device.
    pub fn upload<T: Pod>(&self, values: &[T]) -> Elements<T> {
        Elements::new(self.client.create_from_slice(cast_slice(values)), values.len())
    }

    /// Room for `len` elements, whatever they are.
    pub fn room<T: Pod>(&self, len: usize) -> Elements<T> {
        Elements::new(self.client.empty(len * BYTES), len)
    }

    /// Waits for all kernels before, and brings elements back.
    ///
    /// # Errors
    ///
    /// [`CubeError::Device`] where the driver failed.
    pub fn read<T: Pod>(&self, elements: &Elements<T>) -> Result<Vec<T>, CubeError> {
        let failed = |reason: String| CubeError::Device { reason };
        let len = elements.len;
        let bytes = self.client.read_one(elements.handle.clone());
        let bytes = bytes.map_err(|error| failed(error.to_string()))?;
        let values = try_cast_slice(bytes.get(..len * BYTES).unwrap_or(&bytes));
        let values = values.map_err(|error| failed(error.to_string()))?.to_vec();
        match values.len() == len {
            true => Ok(values),
            false => Err(failed(format!("it gave {} of {len} elements", values.len()))),
        }
    }

    /// Bytes of the device's memory that are in use now, by tensors and by kernels of ours.
    pub fn bytes_in_use(&self) -> u64 {
        self.client.memory_report(MemoryScope::Device).usage().bytes_in_use
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }
}

impl<T> Elements<T> {
    pub(super) fn new(handle: Handle, len: usize) -> Self {
        const { assert!(size_of::<T>() == BYTES) };
        Self {
            handle,
            len,
            kind: PhantomData,
        }
    }

    /// How many.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// The same memory, read as words.
    pub(super) fn as_words(&self) -> Words {
        Elements::new(self.handle.clone(), self.len)
    }

    pub(super) fn argument(&self) -> BufferArg {
        // SAFETY: the memory was made for so many elements of four bytes.
        unsafe { BufferArg::from_raw_parts(self.handle.clone(), self.len) }
    }

    pub(super) fn check(&self, what: &'static str, expected: usize) -> Result<(), CubeError> {
        match self.len == expected {
            true => Ok(()),
            false => Err(CubeError::Length {
                what,
                found: self.len,
                expected,
            }),
        }
    }
}

/// A product of sizes, which fits 32 bits: kernels count in these.
pub(super) fn size(what: &'static str, factors: &[usize]) -> Result<usize, CubeError> {
    let product = factors
        .iter()
        .try_fold(1usize, |product, factor| product.checked_mul(*factor));
    product
        .filter(|size| u32::try_from(*size).is_ok())
        .ok_or(CubeError::Range {
            what,
            value: usize::MAX,
            limit: "fewer than 2^32 elements",
        })
}

/// A size as kernels count it. Sizes were checked before.
pub(super) fn small(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}

/// One cube for each of `count` pieces of work: as many in a row as every driver takes, and rows of them.
pub(super) fn one_cube_each(count: usize) -> CubeCount {
    let (x, y) = grid(count);
    CubeCount::Static(x, y, 1)
}

/// As many cubes as `count` elements need, one unit each.
pub(super) fn one_unit_each(count: usize) -> CubeCount {
    one_cube_each(count.div_ceil(UNITS as usize))
}

pub(super) fn units() -> CubeDim {
    CubeDim::new_1d(UNITS)
}

/// WebGPU's least limit of cubes along one axis.
const AXIS_MAX: usize = 65_535;

fn grid(count: usize) -> (u32, u32) {
    let rows = count.div_ceil(AXIS_MAX).max(1);
    (small(count.div_ceil(rows)), small(rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_holds_all_pieces_within_the_limits() {
        for count in [0, 1, 65_535, 65_536, 1 << 20, 3_000_001] {
            let (x, y) = grid(count);
            assert!(x as usize * y as usize >= count);
            assert!(x as usize <= AXIS_MAX && y as usize <= AXIS_MAX);
        }
    }

    #[test]
    fn sizes_beyond_32_bits_are_refused() {
        assert!(size("x", &[1 << 16, 1 << 15]).is_ok());
        assert!(size("x", &[1 << 16, 1 << 16]).is_err());
        assert!(size("x", &[usize::MAX, 2]).is_err());
    }
}
