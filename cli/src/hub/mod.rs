//! Published models on a hub that speaks Hugging Face's HTTP interface: what is there, and how it gets here.

mod choose;
mod client;
mod download;
mod place;
mod tls;

pub(crate) use choose::{first_files, shards};
pub(crate) use client::{Facts, Hub};
pub(crate) use download::fetch;
pub(crate) use place::Place;
