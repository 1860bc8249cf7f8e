//! What touches the world: libp2p for control, quinn for data, sled for what can be rebuilt, HTTP for people.

// What is kept on disk.
pub mod epochs;
pub mod home;
pub mod store;

// The two planes, and who may use them.
mod bucket;
pub mod control;
pub mod data;
pub mod enrol;
pub mod gate;
pub mod mapping;
pub mod members;
mod neighbourhood;
pub mod punch;

// Who serves what.
pub mod directory;

// The device's process, and when it may work.
pub mod contribute;
pub mod device;

// What a node does for its federation.
pub mod serve;
pub mod train;

// What a person talks to.
pub mod api;

// Readers of untrusted bytes, for fuzz targets.
#[doc(hidden)]
pub mod untrusted;

// The one place that wires.
pub mod daemon;
