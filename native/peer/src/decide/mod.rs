//! The part that decides: plain state driven by events and a clock, no sockets and no tasks, so that it can be tested
//! in virtual time.

pub(crate) mod access;
pub(crate) mod admission;
pub(crate) mod coordinate;
pub(crate) mod descriptors;
pub(crate) mod faults;
pub(crate) mod growth;
pub(crate) mod handover;
pub(crate) mod known_keys;
pub(crate) mod lanes;
pub(crate) mod liveness;
pub(crate) mod lookup;
pub(crate) mod names;
pub(crate) mod nat;
#[cfg(test)]
mod natsim;
pub(crate) mod places;
pub(crate) mod punch;
pub(crate) mod quirks;
pub(crate) mod relay;
pub(crate) mod reports;
pub(crate) mod requests;
pub(crate) mod retry;
pub(crate) mod sending;
pub(crate) mod session;
pub(crate) mod session_table;
pub(crate) mod shares;
pub(crate) mod silence;
#[cfg(test)]
mod simulation;
pub(crate) mod source_port;
pub(crate) mod targets;
pub(crate) mod trust;
pub(crate) mod turns;
pub(crate) mod unproven;
pub(crate) mod upgrade;
pub(crate) mod weights;
pub(crate) mod witness;
