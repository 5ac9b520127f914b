//! Engines that talk to each other, and to gateways, over real sockets. What measures the whole process, or changes it for
//! others, is a program of its own.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;

mod admission;
mod delivery;
mod frames;
mod gateway;
mod identity;
mod invalidate;
mod known_keys;
mod legacy_relay;
mod lossy;
mod narrow;
mod nat;
mod node_ids;
mod one_connection;
mod punch;
mod relay;
mod requests;
mod session;
mod slow;
mod source_port;
mod stalled;
