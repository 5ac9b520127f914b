//! Messages on their way out and in.

use std::fmt;
use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use macula_peer_core::proto::control::{Limit, Refusal};
use macula_peer_core::requests::{RequestId, Requests};
use macula_peer_core::shares::Client;
use macula_peer_core::types::{Dialect, Endpoint, Fingerprint, Path, PeerName};
use macula_peer_wire::{MessageType, PayloadError};
use thiserror::Error;
use tokio::sync::mpsc;

use crate::error::ReplyError;
use crate::gateway::Asker;
use crate::nat::NatStatus;
use crate::node::Node;
use crate::session::Answers;
use crate::shares::{Held, Unread};
use crate::sync::lock;
use macula_peer_core::errors::Failures;
use macula_peer_core::errors::UndeliveredReason;

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

/// A message on its way, and who its answer is for.
#[derive(Debug, Clone)]
pub(crate) struct Letter {
    message: Message,
    reader: Reader,
}

/// Who reads the answer to a message that was sent without waiting.
#[derive(Debug, Clone)]
enum Reader {
    /// The handler, where messages of this type are answered.
    Handler,
    /// Nobody, whatever the type is.
    Nobody,
    /// Who sent the message to this node, which only hands it on.
    Asker(Arc<Asker>),
}

impl Letter {
    /// One that is handed on; `None`: nobody reads an answer.
    pub(crate) fn handed_on(message: Message, asker: Option<Arc<Asker>>) -> Self {
        Self { message, reader: asker.map_or(Reader::Nobody, Reader::Asker) }
    }

    /// How long an answer is listened for. `usual`: to messages of types that are answered.
    pub(crate) fn listens_for(&self, usual: Duration) -> Option<Duration> {
        match &self.reader {
            Reader::Handler => self.message.kind.is_answered().then_some(usual),
            Reader::Nobody => None,
            Reader::Asker(asker) => Some(asker.patience()),
        }
    }

    /// The one who alone gets the answer: it needs a stream of its own.
    pub(crate) fn asker(&self) -> Option<&Arc<Asker>> {
        match &self.reader {
            Reader::Asker(asker) => Some(asker),
            Reader::Handler | Reader::Nobody => None,
        }
    }

    pub(crate) fn into_message(self) -> Message {
        self.message
    }
}

impl From<Message> for Letter {
    fn from(message: Message) -> Self {
        Self { message, reader: Reader::Handler }
    }
}

impl Deref for Letter {
    type Target = Message;

    fn deref(&self) -> &Message {
        &self.message
    }
}

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
    /// The way to answer it, unless the sender has said that it reads no answer.
    pub reply: Option<ReplyToken>,
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
    /// The sender's session, over whichever connection carries it.
    Session(Weak<Answers>, Weak<Node>),
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
    /// Sends the answer. `None`: there will be none. False if the stream's task has ended, or the asker reads no answers.
    pub(crate) fn send(self, frame: Option<Bytes>) -> bool {
        match (self, frame) {
            (Self::Stream(queue), Some(frame)) => queue.push(frame),
            // It waits for those who could answer.
            (Self::Stream(_), None) => true,
            (Self::Connection(stream, task), frame) => task.send((stream, frame)).is_ok(),
        }
    }
}

/// The answers that a stream's task has yet to write. The asker's share of the memory bounds them.
#[derive(Debug, Clone)]
pub(crate) struct AnswerQueue {
    task: mpsc::UnboundedSender<(Bytes, Held)>,
    unread: Unread,
    asker: Client,
}

impl AnswerQueue {
    pub(crate) fn new(unread: Unread, asker: Client) -> (Self, mpsc::UnboundedReceiver<(Bytes, Held)>) {
        let (task, queued) = mpsc::unbounded_channel();
        (Self { task, unread, asker }, queued)
    }

    fn push(&self, frame: Bytes) -> bool {
        let held = self.unread.queue(self.asker, frame.len());
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
            ReplyTo::Session(session, node) => {
                let (Some(session), Some(node)) = (session.upgrade(), node.upgrade()) else {
                    return Err(ReplyError::Gone);
                };
                return session.answer(&node, frame);
            }
        };
        if sent { Ok(()) } else { Err(ReplyError::Gone) }
    }

    /// The same token for somebody else: this one is used.
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
            Some(ReplyTo::Session(..)) | None => return,
        };
        // The connection may be gone, and the stream with it.
        route.send(None);
    }
}

/// Who gets what arrives.
pub trait Handler: Send + Sync {
    /// A message arrived. Called on a runtime thread: it must not block. What could not be handled is counted.
    fn message(&self, message: Inbound) -> Result<(), Unhandled>;

    /// Reports an event to the handler. Returns whether there was one.
    fn event(&self, event: Event) -> bool;
}

/// Who gets what the local gateway did not take, before the [`Handler`] does.
pub trait Fallback: Send + Sync {
    /// A message arrived. As [`Handler::message`], but gives it back if nobody is there.
    fn message(&self, message: Inbound) -> Result<(), NotTaken>;
}

/// Why a [`Fallback`] did nothing with a message.
#[derive(Debug)]
pub enum NotTaken {
    /// The payload is not valid.
    Malformed(PayloadError),
    /// Nobody is there.
    Absent(Box<Inbound>),
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
    /// The local gateway does not keep up.
    #[error("more arrives than the gateway takes")]
    TooMany,
}

/// What a [`Handler`] is told besides messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Messages that had been accepted were not delivered, as far as can be known.
    Undelivered {
        /// Whom they were for.
        peer: PeerName,
        /// How many.
        count: u64,
        /// Why.
        reason: UndeliveredReason,
    },
    /// Messages to a peer take another path than before, or a better one than theirs could not be had.
    Path {
        /// The peer.
        peer: PeerName,
        /// The path.
        path: Path,
        /// Why others could not be had.
        failures: Failures,
    },
    /// A sender goes on with a session that this node does not know: it was restarted, or had forgotten it. What was
    /// handed over before may come again.
    SessionRestarted {
        /// Where the sender is.
        peer: SocketAddr,
        /// Who it is.
        key: Fingerprint,
    },
    /// This node's registration at a relay has changed.
    Registration {
        /// The relay.
        relay: Endpoint,
        /// What it is now.
        state: Registration,
    },
    /// What is known of the NAT that this node is behind has changed.
    Nat(NatStatus),
    /// A relay dropped packets of one of this node's circuits. They are sent again, more slowly.
    RelayLimit {
        /// The relay.
        relay: Endpoint,
        /// What there were too many of.
        limit: Limit,
    },
}

/// What a registration at a relay is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Registration {
    /// It is being made.
    Connecting,
    /// Others reach this node through the relay.
    Registered,
    /// The connection broke or could not be made; it is tried again.
    Lost,
    /// The relay does not want it; it is tried again after a longer time.
    Refused(Refusal),
}
