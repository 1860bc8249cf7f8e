//! See Cargo.toml.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "the rest of `kernels` uses more of these modules than their tests do"
)]

#[path = "../src/quant/mod.rs"]
pub mod quant;
#[path = "../src/team.rs"]
mod team;
