//! Incoming messages, the tokens that answer them, and their receivers.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytes::Bytes;
use macula_peer_core::errors::ReplyError;
use macula_peer_core::events::Event;
use macula_peer_core::requests::{RequestId, Requests};
use macula_peer_core::shares::Client;
use macula_peer_core::sync::lock;
use macula_peer_core::types::{Dialect, Fingerprint, Path, Sender};
use macula_peer_wire::{MessageType, PayloadError};
use thiserror::Error;
use tokio::sync::mpsc;

use crate::shares::{Held, Unread};

/// A message that arrived.
#[derive(Debug)]
pub struct Inbound {
    /// Its type.
    pub kind: MessageType,
    /// Its payload, one MessagePack value that is yet to be decoded.
    pub payload: Bytes,
    /// The address its packets came from, IPv4 written as IPv4: the sender's or the relay's.
    pub from: SocketAddr,
    /// How it came.
    pub path: Path,
    /// What the link speaks.
    pub dialect: Dialect,
    /// The sender's key. `None` in the `macula` dialect, which has none.
    pub key: Option<Fingerprint>,
    /// The token for the answer, unless the sender has said that it reads none.
    pub reply: Option<ReplyToken>,
}

impl Inbound {
    /// The sender.
    pub fn sender(&self) -> Sender {
        Sender::new(self.key, self.from)
    }
}

/// Answers one [`Inbound`] message, once. Dropped unused, the sender gets no answer.
#[derive(Debug)]
pub struct ReplyToken(Mutex<Option<ReplyTo>>);

/// Where answers go.
pub(crate) enum ReplyTo {
    /// To the stream that the message came on.
    Stream(Route),
    /// To the stream that a request came on last.
    Request(Asking, Route),
    /// To the sender's session, over whichever connection carries it.
    Session(Weak<dyn AnswerSession>),
}

/// Sends answers to the sender of a session.
pub(crate) trait AnswerSession: Send + Sync {
    /// Sends an answer on a stream of its own.
    fn answer(&self, frame: Bytes) -> Result<(), ReplyError>;
}

/// The task that writes to a stream.
#[derive(Debug, Clone)]
pub(crate) enum Route {
    /// Of a stream that may carry more messages.
    Stream(AnswerQueue),
    /// Of a connection, which keeps the sending halves of streams that carried their one message. `None`: there will be no
    /// answer.
    Connection(u64, mpsc::UnboundedSender<(u64, Option<Bytes>)>),
}

impl Route {
    /// Sends the answer. `None`: there will be none. False if the stream's task has ended, or the requester reads no answers.
    pub(crate) fn send(self, frame: Option<Bytes>) -> bool {
        match (self, frame) {
            (Self::Stream(queue), Some(frame)) => queue.push(frame),
            // It waits for tasks that could answer.
            (Self::Stream(_), None) => true,
            (Self::Connection(stream, task), frame) => task.send((stream, frame)).is_ok(),
        }
    }
}

/// The answers that a stream's task has yet to write. The requester's share of the memory bounds them.
#[derive(Debug, Clone)]
pub(crate) struct AnswerQueue {
    task: mpsc::UnboundedSender<(Bytes, Held)>,
    unread: Unread,
    requester: Client,
}

impl AnswerQueue {
    pub(crate) fn new(unread: Unread, requester: Client) -> (Self, mpsc::UnboundedReceiver<(Bytes, Held)>) {
        let (task, queued) = mpsc::unbounded_channel();
        (Self { task, unread, requester }, queued)
    }

    fn push(&self, frame: Bytes) -> bool {
        let held = self.unread.queue(self.requester, frame.len());
        held.is_some_and(|held| self.task.send((frame, held)).is_ok())
    }
}

/// A request that is known by its id.
pub(crate) struct Asking {
    pub(crate) requests: Arc<Mutex<Requests<Route>>>,
    pub(crate) key: Fingerprint,
    pub(crate) id: RequestId,
}

impl fmt::Debug for ReplyTo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplyTo").finish_non_exhaustive()
    }
}

impl ReplyToken {
    pub(crate) fn new(to: ReplyTo) -> Self {
        Self(Mutex::new(Some(to)))
    }

    /// Sends `frame` back to the sender. The answer to a request of `macula-peer/1` is kept for the case that the sender asks
    /// again, also if the connection is gone.
    pub fn reply(&self, frame: Bytes) -> Result<(), ReplyError> {
        let sent = match self.take().ok_or(ReplyError::AlreadyReplied)? {
            ReplyTo::Stream(route) => route.send(Some(frame)),
            ReplyTo::Request(Asking { requests, key, id }, route) => {
                let last = lock(&requests).answered(key, id, &frame);
                last.unwrap_or(route).send(Some(frame))
            }
            ReplyTo::Session(session) => return session.upgrade().ok_or(ReplyError::Gone)?.answer(frame),
        };
        if sent { Ok(()) } else { Err(ReplyError::Gone) }
    }

    /// The same token for another holder: this one is used.
    pub(crate) fn hand_on(&self) -> Option<Self> {
        self.take().map(Self::new)
    }

    fn take(&self) -> Option<ReplyTo> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Drop for ReplyToken {
    fn drop(&mut self) {
        let route = match self.take() {
            Some(ReplyTo::Stream(route)) => route,
            Some(ReplyTo::Request(Asking { requests, key, id }, route)) => {
                lock(&requests).unanswered(key, id).unwrap_or(route)
            }
            Some(ReplyTo::Session(_)) | None => return,
        };
        // The connection may be gone, and the stream with it.
        route.send(None);
    }
}

/// Receives messages and events.
pub trait Handler: Send + Sync {
    /// A message arrived. Called on a runtime thread: it must not block. What could not be handled is counted.
    fn message(&self, message: Inbound) -> Result<(), Unhandled>;

    /// Reports an event to the handler. Returns whether there was one.
    fn event(&self, event: Event) -> bool;
}

/// Gets messages that the local gateway did not take, before the [`Handler`] does.
pub trait Fallback: Send + Sync {
    /// A message arrived. As [`Handler::message`], but gives the message back if there is no receiver.
    fn message(&self, message: Inbound) -> Result<(), NotTaken>;
}

/// Why a [`Fallback`] did nothing with a message.
#[derive(Debug)]
pub enum NotTaken {
    /// The payload is not valid.
    Malformed(PayloadError),
    /// There is no receiver.
    Absent(Box<Inbound>),
}

/// Why a [`Handler`] did nothing with a message.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Unhandled {
    /// The payload is not valid.
    #[error(transparent)]
    Malformed(#[from] PayloadError),
    /// The process that handled messages is gone.
    #[error("the handler is gone")]
    NoHandler,
    /// The local gateway does not keep up.
    #[error("more arrives than the gateway takes")]
    TooMany,
}
