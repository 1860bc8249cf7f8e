//! The composed machines of one node: see `docs/src/architecture.md`.
