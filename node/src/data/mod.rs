//! The data plane: blobs and activations over QUIC, between nodes that have shown who they are.
//!
//! One UDP port, mutual TLS bound to the node's ed25519 key, and a greeting in which both ends show their credentials
//! before anything else is answered. Each pair of peers keeps two connections: [`Class::Act`] for what somebody waits
//! for, [`Class::Bulk`] for what is large, so that neither holds up the other.

mod blobs;
mod caps;
mod congestion;
mod detour;
mod error;
mod frames;
mod greeting;
mod knock;
mod links;
mod moved;
mod plane;
mod report;
mod roads;
mod settings;
mod sink;
mod tls;
mod traffic;
pub(crate) mod untrusted;
mod windows;

pub use blobs::{BlobError, BlobStore, Fetch, FetchError, Keep, Progress};
pub use caps::UploadCaps;
pub use detour::{Detour, TunnelStream};
pub use error::{DataError, StreamEnd};
pub use frames::{FrameReceiver, FrameSender};
pub(crate) use knock::knock;
pub use links::Road;
pub use plane::{DataPlane, IncomingStream};
pub use report::LinkReport;
pub use settings::{Class, DataConfig, Service};
pub use sink::Poured;
pub use traffic::PeerTraffic;
