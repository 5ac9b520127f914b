//! Messages on their way out and in.

use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use macula_peer_wire::{MessageType, PayloadError};
use thiserror::Error;
use tokio::sync::mpsc;

use crate::endpoint::Endpoint;
use crate::error::{ReplyError, UndeliveredReason};
use crate::identity::Fingerprint;
use crate::tls::Dialect;

/// A message to be sent: one encoded frame.
#[derive(Debug, Clone)]
pub struct Message {
    /// The whole frame, header included.
    pub frame: Bytes,
    /// Its type, which decides whether an answer is listened for.
    pub kind: MessageType,
    /// Until when it may be sent, and sent again. `None`: the engine's own bound applies to sending it again.
    pub deadline: Option<Instant>,
}

/// A message that arrived.
#[derive(Debug)]
pub struct Inbound {
    /// Its type.
    pub kind: MessageType,
    /// Its payload, one MessagePack value that is yet to be decoded.
    pub payload: Bytes,
    /// The address it came from, IPv4 written as IPv4.
    pub from: SocketAddr,
    /// What the link speaks.
    pub dialect: Dialect,
    /// The sender's key. `None` in the `macula` dialect, which has none.
    pub key: Option<Fingerprint>,
    /// The way to answer it, unless the sender has said that it reads no answer.
    pub reply: Option<ReplyToken>,
}

/// Answers one [`Inbound`] message, once. Dropped unused, the sender gets no answer.
#[derive(Debug)]
pub struct ReplyToken(Mutex<Option<ReplyTo>>);

/// Where answers go.
#[derive(Debug)]
pub(crate) enum ReplyTo {
    /// The task of a stream that may carry more messages.
    Stream(mpsc::UnboundedSender<Bytes>),
    /// The task of a connection, which keeps the sending halves of streams that carried their one message. `None`: there
    /// will be no answer.
    Connection(u64, mpsc::UnboundedSender<(u64, Option<Bytes>)>),
}

impl ReplyToken {
    pub(crate) fn new(to: ReplyTo) -> Self {
        Self(Mutex::new(Some(to)))
    }

    /// Sends `frame` back on the stream that the message came on.
    pub fn reply(&self, frame: Bytes) -> Result<(), ReplyError> {
        let sent = match self.take().ok_or(ReplyError::AlreadyReplied)? {
            ReplyTo::Stream(task) => task.send(frame).is_ok(),
            ReplyTo::Connection(stream, task) => task.send((stream, Some(frame))).is_ok(),
        };
        if sent { Ok(()) } else { Err(ReplyError::Gone) }
    }

    fn take(&self) -> Option<ReplyTo> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Drop for ReplyToken {
    fn drop(&mut self) {
        if let Some(ReplyTo::Connection(stream, task)) = self.take() {
            // The connection may be gone, and the stream with it.
            let _ = task.send((stream, None));
        }
    }
}

/// Who gets what arrives.
pub trait Handler: Send + Sync {
    /// A message arrived. Called on a runtime thread: it must not block. What could not be handled is counted.
    fn message(&self, message: Inbound) -> Result<(), Unhandled>;

    /// Something happened that somebody should know of.
    fn event(&self, event: Event);
}

/// Why a [`Handler`] did nothing with a message.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Unhandled {
    /// The payload is not valid.
    #[error(transparent)]
    Malformed(#[from] PayloadError),
    /// Who handled messages is gone.
    #[error("the handler is gone")]
    NoHandler,
}

/// What a [`Handler`] is told besides messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Messages that had been accepted were not delivered, as far as can be known.
    Undelivered {
        /// Whom they were for.
        peer: Endpoint,
        /// How many.
        count: u64,
        /// Why.
        reason: UndeliveredReason,
    },
}
