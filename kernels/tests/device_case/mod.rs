//! A graphics device to test our own kernels on.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::sync::{Mutex, OnceLock, PoisonError};

use polder_kernels::device::cube::{Cost, Cubes};
use polder_kernels::device::{Choice, Device};

/// One device is computed on at a time: a driver that compiles for several threads is only slower.
static TURN: Mutex<()> = Mutex::new(());

pub(crate) fn with_kernels(test: impl Fn(&Cubes)) {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let device = DEVICE.get_or_init(|| {
        let (device, reason) = Device::choose(Choice::Wgpu);
        match reason {
            Some(reason) if std::env::var_os("POLDER_GPU_REQUIRED").is_some() => panic!("{reason}"),
            Some(reason) => println!("skipped: {reason}"),
            None => println!("device: {device}"),
        }
        device
    });
    match Cubes::of(device) {
        Ok(cubes) => test(&cubes),
        Err(error) => println!("skipped: {error}"),
    }
}

/// Numbers from -2 to 2, the same in every run.
pub(crate) fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as f32 / (1u32 << 22) as f32 - 2.0
    };
    (0..count).map(|_| next()).collect()
}

pub(crate) fn near(found: &[f32], right: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), right.len(), "{what}");
    let scale = right.iter().fold(1.0f32, |scale, value| scale.max(value.abs()));
    for (i, (found, right)) in found.iter().zip(right).enumerate() {
        assert!(
            (found - right).abs() <= tolerance * scale,
            "{what}, element {i}: {found} {right}"
        );
    }
}

pub(crate) fn told(what: &str, cost: Cost) {
    assert!(cost.read > 0 && cost.written > 0 && cost.operations > 0);
    println!(
        "{what}: {} bytes read, {} written, {} operations",
        cost.read, cost.written, cost.operations
    );
}
