//! Outgoing messages.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use macula_peer_core::counter::Counter;
use macula_peer_core::types::Fingerprint;
use macula_peer_wire::{MessageType, RawFrame};

use crate::inbound::ReplyToken;

/// A message to be sent: one encoded frame.
#[derive(Debug, Clone)]
pub struct Message {
    /// The whole frame, header included.
    pub frame: Bytes,
    /// Its type, which decides whether an answer is listened for.
    pub kind: MessageType,
    /// Until when it may be sent, and sent again. `None`: the engine's own bound applies to sending it again.
    pub deadline: Option<Instant>,
    /// The only key that may get it. `None`: the peer's, whichever that is.
    pub key: Option<Fingerprint>,
}

impl Message {
    /// Whether it may go to a peer that has shown this key.
    pub(crate) fn is_for(&self, shown: Option<Fingerprint>) -> bool {
        self.key.is_none() || self.key == shown
    }
}

/// An outgoing message, and the receiver of its answer.
#[derive(Debug, Clone)]
pub(crate) struct Envelope {
    message: Message,
    reader: Reader,
}

/// The receiver of the answer to a message that was sent without waiting.
#[derive(Debug, Clone)]
enum Reader {
    /// The handler, where messages of this type are answered.
    Handler,
    /// None, whatever the type is.
    None,
    /// The node that sent the message to this one, which only hands it on.
    Requester(Arc<Requester>),
}

impl Envelope {
    /// A message that is handed on; `None`: its answer is not read.
    pub(crate) fn handed_on(message: Message, requester: Option<Arc<Requester>>) -> Self {
        Self { message, reader: requester.map_or(Reader::None, Reader::Requester) }
    }

    /// How long an answer is listened for. `usual`: to messages of types that are answered.
    pub(crate) fn listens_for(&self, usual: Duration) -> Option<Duration> {
        match &self.reader {
            Reader::Handler => self.message.kind.is_answered().then_some(usual),
            Reader::None => None,
            Reader::Requester(requester) => Some(requester.patience),
        }
    }

    /// The only receiver of the answer: the message needs its own stream.
    pub(crate) fn requester(&self) -> Option<&Arc<Requester>> {
        match &self.reader {
            Reader::Requester(requester) => Some(requester),
            Reader::Handler | Reader::None => None,
        }
    }

    pub(crate) fn into_message(self) -> Message {
        self.message
    }
}

impl From<Message> for Envelope {
    fn from(message: Message) -> Self {
        Self { message, reader: Reader::Handler }
    }
}

impl Deref for Envelope {
    type Target = Message;

    fn deref(&self) -> &Message {
        &self.message
    }
}

/// Waits for the gateway's answer to one message.
#[derive(Debug)]
pub(crate) struct Requester {
    pub(crate) token: ReplyToken,
    pub(crate) patience: Duration,
    /// Slow answers that are waited for, this one among them.
    pub(crate) slow: Option<Arc<AtomicUsize>>,
    /// Counts the answers.
    pub(crate) answered: Arc<Counter>,
}

impl Requester {
    /// Passes the gateway's answer on.
    pub(crate) fn answer(&self, frame: RawFrame) {
        // The requester may be gone.
        if self.token.reply(frame.into_bytes()).is_ok() {
            self.answered.add(1);
        }
    }
}

impl Drop for Requester {
    fn drop(&mut self) {
        if let Some(slow) = &self.slow {
            slow.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
