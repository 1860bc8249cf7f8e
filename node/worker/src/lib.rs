//! node/worker
