//! What the engine of `macula_peer_connector` decides: plain state, driven by events. Time and random draws come in as
//! arguments, so that all of it can be tested in virtual time. There are no sockets and no tasks here; the crate
//! `macula-peer` carries out.
//!
//! Its users are the crates of this workspace, which change together with it.
#![forbid(unsafe_code)]
#![allow(missing_docs)]
#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod accepted;
pub mod access;
pub mod ack_tracker;
pub mod admission;
pub mod circuits;
pub mod config;
pub mod coordinate;
pub mod counter;
pub mod descriptors;
pub mod detection;
pub mod drive;
pub mod errors;
pub mod events;
pub mod eviction;
pub mod faults;
pub mod gateway_pool;
pub mod growth;
pub mod heavy;
pub mod knowledge;
pub mod known_keys;
pub mod lanes;
pub mod link_state;
pub mod liveness;
pub mod lookup;
pub mod names;
pub mod nat;
pub mod packet_budget;
pub mod patience;
pub mod places;
pub mod proto;
pub mod punch;
pub mod queue;
pub mod quirks;
pub mod race;
pub mod registration;
pub mod relay;
pub mod reports;
pub mod request_sender;
pub mod requests;
pub mod retry;
pub mod sending;
pub mod session;
pub mod session_receiver;
pub mod session_sender;
pub mod session_table;
pub mod shares;
pub mod source_port;
pub mod stats;
pub mod sync;
pub mod trust;
pub mod turns;
pub mod types;
pub mod unanswered;
pub mod unproven;
pub mod upgrade;
pub mod weights;
pub mod x509;

#[cfg(test)]
mod sim;
