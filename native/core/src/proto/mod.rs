//! `macula-peer/1` on the wire (docs/protocol.md).

pub mod answers;
pub mod codes;
pub mod control;
mod map;
pub mod packet;
pub mod session;
pub mod signal;
