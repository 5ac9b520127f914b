//! The part that decides: plain state driven by events and a clock, no sockets and no tasks, so that it can be tested
//! in virtual time.

pub(crate) mod lanes;
pub(crate) mod relay;
pub(crate) mod retry;
pub(crate) mod silence;
#[cfg(test)]
mod simulation;
pub(crate) mod witness;
