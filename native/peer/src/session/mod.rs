//! Sessions of `macula-peer/1` (docs/protocol.md): delivery in order and exactly once across links.

pub(crate) mod receive;
pub(crate) mod send;
