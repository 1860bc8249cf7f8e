//! See docs/src/architecture.md: this room is being furnished.
