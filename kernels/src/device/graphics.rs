//! Devices behind a graphics driver: finding one, what it can hold, and whether it has room.

use std::panic::catch_unwind;
use std::task::{Context, Poll, Waker};

use burn::tensor::DeviceType;
use burn::tensor::wgpu::WgpuSetup;
use burn::tensor::wgpu::wgpu;

use super::{Device, Slow, TOO_LARGE};

/// A device's driver, for what burn does not tell.
#[derive(Debug, Clone)]
pub(super) struct Graphics(WgpuSetup);

/// Finds a device and sets it up; a text says why there is none.
pub(super) fn find(slow: Slow) -> Result<Device, String> {
    // Drivers fail in more ways than they report; a panic in one is an absent device.
    catch_unwind(|| set_up(slow)).unwrap_or_else(|_| Err("the graphics driver failed".to_owned()))
}

fn set_up(slow: Slow) -> Result<Device, String> {
    // Listing opens nothing, and tells of an absent driver without a panic.
    let found = burn::tensor::Device::enumerate(DeviceType::Wgpu).into_vec();
    if found.is_empty() {
        return Err("no graphics driver offers a device".to_owned());
    }
    let (tensors, setup) = burn::tensor::Device::wgpu_options()
        .init_with_setup()
        .map_err(|error| error.to_string())?;
    let info = setup.adapter.get_info();
    let kind = match info.device_type {
        wgpu::DeviceType::Cpu => "software rasteriser, ",
        wgpu::DeviceType::IntegratedGpu => "integrated, ",
        wgpu::DeviceType::DiscreteGpu | wgpu::DeviceType::VirtualGpu | wgpu::DeviceType::Other => "",
    };
    let name = format!("wgpu ({}, {kind}{:?})", info.name, info.backend);
    let fast = matches!(
        info.device_type,
        wgpu::DeviceType::DiscreteGpu | wgpu::DeviceType::VirtualGpu
    );
    if !fast && slow == Slow::Refused {
        return Err(format!("{name} is no faster than the CPU"));
    }
    let limits = setup.device.limits();
    Ok(Device {
        tensors,
        name,
        memory_bytes: None,
        buffer_bytes_max: limits.max_buffer_size.min(limits.max_storage_buffer_binding_size),
        is_cpu: false,
        graphics: Some(Graphics(setup)),
    })
}

impl Graphics {
    /// Whether the driver has `bytes` to give now. It takes them and lets them go: what tensors are made of comes from
    /// pools that do not report a refusal, but panic.
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        if bytes > TOO_LARGE {
            return false;
        }
        let device = &self.0.device;
        let piece = device.limits().max_buffer_size.clamp(1 << 20, PIECE_BYTES);
        let mut rest = bytes;
        let mut taken = Vec::new();
        while rest > 0 {
            let size = rest.min(piece).next_multiple_of(4);
            let refused = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
            let buffer = device.create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size,
                usage: wgpu::BufferUsages::STORAGE,
                mapped_at_creation: false,
            });
            taken.push(buffer);
            let refused = std::pin::pin!(refused.pop());
            // Ready at once, except in a browser.
            match refused.poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(None) => {}
                Poll::Ready(Some(_)) | Poll::Pending => return false,
            }
            rest = rest.saturating_sub(size);
        }
        true
    }
}

/// What is asked for at once: below every driver's limit for one allocation, and large enough to be quick.
const PIECE_BYTES: u64 = 256 << 20;
