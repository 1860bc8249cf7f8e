//! Blobs: kept as plain files, fetched from many peers at once, served to whoever is admitted.

mod answer;
mod fetch;
pub(super) mod message;
mod partial;
mod store;

pub(super) use answer::{SENDING_CHUNKS_MAX, answer};
pub(super) use fetch::Fetches;
pub use fetch::{Fetch, FetchError, Progress};
pub use store::{BlobError, BlobStore, Keep};
