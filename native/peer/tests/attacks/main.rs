//! Attacks and their outcomes. Those that measure the whole process are separate programs.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;

mod addresses;
mod listener;
mod sessions;
mod streams;
