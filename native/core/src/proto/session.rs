//! The frames and words of sessions, to and from bytes.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use macula_peer_wire::VERSION;

use crate::session_table::SessionId;
use crate::types::NodeId;

/// Type ids of frames that are the engine's own. macula's end at `61`.
pub const OPEN_SESSION: u8 = 0xF0;
pub const NUMBER: u8 = 0xF1;
pub const OPEN_CONTROL: u8 = 0xF2;
pub const ASK_NODE: u8 = 0xF3;
pub const FOR_NODE: u8 = 0xF4;
pub const REQUEST: u8 = 0xF5;

/// The payload of the frame that opens a session, without the id of the node that it is for.
const OPEN_LEN: usize = size_of::<SessionId>() + 1 + size_of::<Run>();
pub const MAX_OPEN_LEN: usize = OPEN_LEN + NodeId::MAX_LEN;

const NUMBER_LEN: usize = 8;

/// A number may have the seconds behind it that the receiver should keep the session for.
const KEEP_LEN: usize = 4;

/// A word of the receiver's: what it is about, and a number. The first one on a stream has its run between the two.
const WORD_LEN: usize = 1 + NUMBER_LEN;
const GREETING_LEN: usize = 1 + size_of::<Run>() + NUMBER_LEN;

/// What a word is about, after the first: the number that is expected next. All others are errors.
const EXPECTED: u8 = 0;

/// What a node draws when it starts: it tells a receiver that was restarted from one that has forgotten a session.
pub type Run = [u8; 8];

/// Nothing is known of the receiver. No node draws it.
pub const NO_RUN: Run = [0; 8];

/// The header of a frame of the engine's own.
pub fn put_header(piece: &mut BytesMut, type_id: u8, payload_len: usize) {
    piece.extend_from_slice(&[VERSION, type_id, 0, 0]);
    piece.put_u32(payload_len as u32);
}

/// What opens a stream of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opening<'a> {
    pub id: SessionId,
    pub channel: usize,
    /// The receiver's run, as far as the sender knows.
    pub run: Run,
    /// The id of the node that the session is for; empty, whichever the other end is.
    pub target: &'a [u8],
}

impl<'a> Opening<'a> {
    pub fn parse(payload: &'a [u8]) -> Option<Self> {
        let (id, rest) = payload.split_first_chunk()?;
        let (channel, rest) = rest.split_first()?;
        let (run, target) = rest.split_first_chunk()?;
        let fits = payload.len() <= MAX_OPEN_LEN && matches!(channel, 0 | 1);
        fits.then_some(Self { id: *id, channel: usize::from(*channel), run: *run, target })
    }

    /// The frame.
    pub fn frame(&self) -> Bytes {
        let Self { id, channel, run, target } = self;
        let mut frame = BytesMut::new();
        put_header(&mut frame, OPEN_SESSION, OPEN_LEN + target.len());
        frame.extend_from_slice(id);
        frame.put_u8(*channel as u8);
        frame.extend_from_slice(run);
        frame.extend_from_slice(target);
        frame.freeze()
    }
}

/// Says the number of the message that follows, and for how many seconds to keep the session.
pub fn put_number(piece: &mut BytesMut, number: u64, keep: Option<u32>) {
    put_header(piece, NUMBER, NUMBER_LEN + if keep.is_some() { KEEP_LEN } else { 0 });
    piece.put_u64(number);
    if let Some(keep) = keep {
        piece.put_u32(keep);
    }
}

/// The number of the next message, and the seconds that the session should be kept for.
pub fn parse_number(mut payload: &[u8]) -> Option<(u64, u32)> {
    match payload.len() {
        NUMBER_LEN => Some((payload.get_u64(), 0)),
        len if len == NUMBER_LEN + KEEP_LEN => Some((payload.get_u64(), payload.get_u32())),
        _ => None,
    }
}

/// What a receiver says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// The first word of a stream: whether the receiver knew the session, its run, and the number it expects next.
    Greeting { known: bool, run: Run, expected: u64 },
    /// The number it expects next.
    Expected(u64),
    /// The error for which it does not take the message of a number.
    Refused(u8, u64),
}

impl Record {
    pub fn put(self, words: &mut BytesMut) {
        let (about, number) = match self {
            Self::Greeting { known, run, expected } => {
                words.put_u8(known.into());
                words.extend_from_slice(&run);
                return words.put_u64(expected);
            }
            Self::Expected(number) => (EXPECTED, number),
            Self::Refused(error, number) => (error, number),
        };
        words.put_u8(about);
        words.put_u64(number);
    }

    pub fn bytes(self) -> Bytes {
        let mut word = BytesMut::with_capacity(GREETING_LEN);
        self.put(&mut word);
        word.freeze()
    }
}

/// The records of one stream, which come in chunks of any size.
#[derive(Debug, Default)]
pub struct Words {
    /// Less than a word, between two pieces.
    rest: BytesMut,
    greeted: bool,
}

impl Words {
    pub fn push(&mut self, piece: &[u8]) {
        self.rest.extend_from_slice(piece);
    }

    pub fn next_word(&mut self) -> Option<Record> {
        if self.rest.len() < if self.greeted { WORD_LEN } else { GREETING_LEN } {
            return None;
        }
        let about = self.rest.get_u8();
        if !std::mem::replace(&mut self.greeted, true) {
            let mut run = NO_RUN;
            self.rest.copy_to_slice(&mut run);
            return Some(Record::Greeting { known: about != 0, run, expected: self.rest.get_u64() });
        }
        let number = self.rest.get_u64();
        Some(if about == EXPECTED { Record::Expected(number) } else { Record::Refused(about, number) })
    }

    /// Whether the first word has come.
    pub fn greeted(&self) -> bool {
        self.greeted
    }
}
