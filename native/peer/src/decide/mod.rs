//! The part that decides: plain state driven by events and a clock, no sockets and no tasks, so that it can be tested
//! in virtual time.

#[cfg_attr(not(test), expect(dead_code, reason = "until nodes punch"))]
pub(crate) mod coordinate;
pub(crate) mod known;
pub(crate) mod lanes;
#[cfg_attr(not(test), expect(dead_code, reason = "until nodes punch"))]
pub(crate) mod nat;
#[cfg(test)]
mod natsim;
#[cfg_attr(not(test), expect(dead_code, reason = "until nodes punch"))]
pub(crate) mod punch;
pub(crate) mod relay;
pub(crate) mod retry;
pub(crate) mod session;
pub(crate) mod silence;
#[cfg(test)]
mod simulation;
#[cfg_attr(not(test), expect(dead_code, reason = "until nodes punch"))]
pub(crate) mod upgrade;
pub(crate) mod witness;
