//! Attacks, and what they come to. Those that measure the whole process are programs of their own.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;

mod addresses;
mod listener;
mod sessions;
mod streams;
