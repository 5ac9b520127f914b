//! Sessions of `macula-peer/1` (docs/protocol.md): delivery in order and exactly once across links.

mod receive;
mod send;

pub(crate) use macula_peer_core::proto::session::{
    ASK_NODE, FOR_NODE, OPEN_CONTROL, OPEN_SESSION, REQUEST, put_header,
};
pub(crate) use receive::{Answers, Sessions, receive};
pub(crate) use send::{Progress, Session, Taken};

/// Application error codes of streams: the receiver has forgotten the session; has no room for it.
const FORGOTTEN: u8 = 12;
const TOO_MANY: u8 = 14;
