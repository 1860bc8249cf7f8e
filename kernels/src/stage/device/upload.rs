//! Weights on their way to the device, and why they are not taken.

use std::cell::Cell;

use polder_protocol::layout::BlockRange;

use crate::device::Device;
use crate::device::cube::{CubeError, Cubes, Floats, HEAD_DIM_MAX, NormOnDevice, WeightOnDevice};
use crate::model::Config;
use crate::model::describe::Mixer;
use crate::quant::{DeviceBlocks, PackedType};
use crate::stage::StageError;
use crate::stage::cpu::{Dense as LoadedDense, LoadedNorm, Matrix};

/// Why a stage is not on the device.
#[derive(Debug)]
pub(in crate::stage) enum Refusal {
    /// What the model has and the device, or our kernels, have not: the CPU takes it.
    Lacking(String),
    /// What else went wrong.
    Failed(StageError),
}

impl From<StageError> for Refusal {
    fn from(error: StageError) -> Self {
        Self::Failed(error)
    }
}

impl From<CubeError> for Refusal {
    fn from(error: CubeError) -> Self {
        Self::Failed(error.into())
    }
}

impl From<CubeError> for StageError {
    fn from(error: CubeError) -> Self {
        Self::Device {
            reason: error.to_string(),
        }
    }
}

/// Whether all that some blocks of a model do is computed here; otherwise what is not.
pub(super) fn covered(config: &Config, range: BlockRange) -> Result<(), Refusal> {
    let blocks = config.description.get(range.first as usize..range.end as usize);
    for sublayer in blocks.unwrap_or_default().iter().flat_map(|block| &block.0) {
        let widest = match &sublayer.mixer {
            Mixer::Latent(latent) => latent.rank + latent.rope,
            Mixer::Attention(attention) => attention.head_dim,
            Mixer::Mlp(_) | Mixer::Experts(_) | Mixer::Mamba(_) => 0,
        };
        if widest > HEAD_DIM_MAX {
            let what = format!("heads of {widest} elements, more than {HEAD_DIM_MAX}");
            return Err(Refusal::Lacking(what));
        }
    }
    Ok(())
}

/// Brings weights to a device, and counts them.
pub(super) struct Upload<'a> {
    cubes: &'a Cubes,
    bytes: Cell<u64>,
}

impl<'a> Upload<'a> {
    /// To a device that has room for `matrices` and for `floats` more, and takes each of them in one buffer.
    pub(super) fn new<'m>(
        cubes: &'a Cubes,
        device: &Device,
        matrices: impl Iterator<Item = &'m Matrix>,
        floats: u64,
    ) -> Result<Self, Refusal> {
        let limit = device.buffer_bytes_max();
        let mut bytes = floats.saturating_mul(4);
        for matrix in matrices {
            let one = match matrix {
                Matrix::Packed(packed) if DeviceBlocks::holds(packed.ty()) => {
                    DeviceBlocks::bytes_max(packed.ty(), matrix.rows(), matrix.cols())
                }
                // What cannot be laid out is widened.
                _ => DeviceBlocks::bytes_max(PackedType::F32, matrix.rows(), matrix.cols()),
            };
            if one > limit {
                let what = format!("a weight of {one} bytes, more than the device's largest buffer of {limit}");
                return Err(Refusal::Lacking(what));
            }
            let elements = matrix.rows() as u64 * matrix.cols() as u64;
            if elements > u64::from(u32::MAX) {
                let what = format!("a weight of {elements} elements, which kernels count in 32 bits");
                return Err(Refusal::Lacking(what));
            }
            bytes = bytes.saturating_add(one);
        }
        match device.has_room(bytes) {
            true => Ok(Self {
                cubes,
                bytes: Cell::new(0),
            }),
            false => Err(Refusal::Failed(StageError::DeviceMemory { what: "weights", bytes })),
        }
    }

    /// Bytes that were brought, those of norms and biases left out.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    pub(super) fn matrix(&self, matrix: &Matrix) -> Result<WeightOnDevice, StageError> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let weight = match matrix {
            Matrix::Packed(packed) if DeviceBlocks::holds(packed.ty()) => self.cubes.upload_weight(packed)?,
            Matrix::Packed(packed) => self.cubes.upload_floats(&packed.widen(), rows, cols)?,
            Matrix::Plain(plain) => self.cubes.upload_floats(plain.values(), rows, cols)?,
        };
        self.bytes.set(self.bytes.get() + weight.bytes() as u64);
        Ok(weight)
    }

    pub(super) fn dense(&self, dense: &LoadedDense) -> Result<Dense, StageError> {
        Ok(Dense {
            weight: self.matrix(&dense.weight)?,
            bias: dense.bias.as_ref().map(|bias| self.cubes.upload(bias)),
        })
    }

    pub(super) fn norm(&self, norm: &LoadedNorm) -> NormOnDevice {
        NormOnDevice {
            gain: self.cubes.upload(norm.gain()),
            bias: norm.bias().map(|bias| self.cubes.upload(bias)),
            epsilon: norm.epsilon(),
        }
    }

    pub(super) fn floats(&self, values: &[f32]) -> Floats {
        self.bytes.set(self.bytes.get() + 4 * values.len() as u64);
        self.cubes.upload(values)
    }
}

/// `out = weight · x + bias`.
#[derive(Debug)]
pub(super) struct Dense {
    pub(super) weight: WeightOnDevice,
    pub(super) bias: Option<Floats>,
}

impl Dense {
    /// `[n, rows]` of `[n, cols]`.
    pub(super) fn of(&self, cubes: &Cubes, x: &Floats) -> Result<Floats, CubeError> {
        let out = cubes.multiply(x, &self.weight)?;
        if let Some(bias) = &self.bias {
            cubes.add(&out, bias)?;
        }
        Ok(out)
    }
}
