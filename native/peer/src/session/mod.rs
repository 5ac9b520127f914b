//! Sessions of `macula-peer/1` (docs/protocol.md): delivery in order and exactly once across links.

mod receive;
mod send;

use bytes::{BufMut, BytesMut};
use macula_peer_wire::VERSION;

use crate::decide::session_table::SessionId;
use crate::message::NodeId;

pub(crate) use receive::{Answers, Sessions, receive};
pub(crate) use send::{Progress, Session, Taken};

/// Type ids of frames that are the engine's own. macula's end at `61`.
pub(crate) const OPEN_SESSION: u8 = 0xF0;
const NUMBER: u8 = 0xF1;
pub(crate) const OPEN_CONTROL: u8 = 0xF2;
pub(crate) const ASK_NODE: u8 = 0xF3;
pub(crate) const FOR_NODE: u8 = 0xF4;
pub(crate) const REQUEST: u8 = 0xF5;

/// The payload of the frame that opens a session: its id, the channel, the receiver's run as the sender knows it, and the
/// id of the node that it is for, or nothing.
const OPEN_LEN: usize = size_of::<SessionId>() + 1 + size_of::<Run>();
const MAX_OPEN_LEN: usize = OPEN_LEN + NodeId::MAX_LEN;

/// A word of the receiver's: what it is about, and a number. The first one on a stream says whether it knows the session,
/// its run, and the number it expects.
const WORD_LEN: usize = 1 + NUMBER_LEN;
const GREETING: usize = 1 + size_of::<Run>() + NUMBER_LEN;
const NUMBER_LEN: usize = 8;

/// Later words are the number it expects, or the error for which it does not take the message of a number.
const EXPECTED: u8 = 0;

/// A number may have the seconds behind it that the receiver should keep the session for.
const KEEP_LEN: usize = 4;

/// What a node draws when it starts: it tells a receiver that was restarted from one that has forgotten a session.
pub(crate) type Run = [u8; 8];

/// Nothing is known of the receiver. No node draws it.
const NO_RUN: Run = [0; 8];

/// Application error codes of streams: the receiver has forgotten the session; has no room for it.
const FORGOTTEN: u8 = 12;
const TOO_MANY: u8 = 14;

pub(crate) fn new_run() -> Run {
    fastrand::u64(1..).to_be_bytes()
}

/// The header of a frame of the engine's own.
pub(crate) fn put_header(piece: &mut BytesMut, type_id: u8, payload_len: usize) {
    piece.extend_from_slice(&[VERSION, type_id, 0, 0]);
    piece.put_u32(payload_len as u32);
}

fn put_word(words: &mut BytesMut, about: u8, number: u64) {
    words.put_u8(about);
    words.put_u64(number);
}
