//! One error type per operation. What each becomes in Erlang is one table in the NIF crate.

use std::io;

use macula_peer_wire::FrameError;
use thiserror::Error;

use crate::relay::control::Refusal;

/// Why no link to a peer could be made.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConnectError {
    /// The name has no address in a family that this host speaks.
    #[error("name does not resolve")]
    Unresolved,
    /// Nobody listens there: ICMP port unreachable, or no route.
    #[error("nobody listens there")]
    Unreachable,
    /// No answer within the time for a dial.
    #[error("no answer")]
    TimedOut,
    /// The peer is there and refuses connections, also after retries.
    #[error("the peer refuses connections")]
    Refused,
    /// The peer speaks neither `macula` nor `macula-peer/1`.
    #[error("no protocol in common")]
    NoProtocol,
    /// The peer has another key than the one that is expected of it.
    #[error("the peer is not trusted")]
    Untrusted,
    /// The handshake failed for another reason, such as a certificate.
    #[error("handshake failed: {0}")]
    Handshake(String),
}

/// Why there is no path to a node.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RouteError {
    /// No endpoint led to it, if one was known, and there is no relay to ask.
    #[error("no relay is known")]
    NoRelay,
    /// No relay could be reached.
    #[error("relay not reached: {0}")]
    Relay(ConnectError),
    /// A relay was reached and gave no circuit.
    #[error("no circuit: {0:?}")]
    Setup(Refusal),
    /// The node was reached and there is no link to it all the same: it is not the one that was expected, for example.
    #[error("node reached, not connected: {0}")]
    Node(ConnectError),
}

/// Why a relay gave no link to a node.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum CircuitError {
    #[error("relay not reached: {0}")]
    Relay(ConnectError),
    #[error("the relay speaks only macula")]
    NotARelay,
    #[error("refused: {0:?}")]
    Refused(Refusal),
    #[error("the connection to the relay broke")]
    RelayLost,
    #[error("circuit opened, node not connected: {0}")]
    Inner(ConnectError),
}

/// Why a message was not sent.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SendError {
    /// There was no link and none could be made.
    #[error("not connected: {0}")]
    Connect(#[from] ConnectError),
    /// There was no link to a node and no path to it.
    #[error("no path: {0}")]
    Route(#[from] RouteError),
    /// The deadline passed before there was a link to send on; nothing was sent.
    #[error("deadline passed before a link was up")]
    Timeout,
    /// The deadline passed while the link had no room for the message.
    #[error("deadline passed before the link had room")]
    NoRoom,
    /// Too much is queued for the peer, and nothing gave room within the deadline.
    #[error("too much queued for this peer")]
    Overloaded,
    /// The link broke and the message may not be sent twice.
    #[error("link lost while sending")]
    LinkLost,
    /// The engine was stopped first.
    #[error("the engine stopped")]
    Stopped,
}

/// Why a request has no answer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RequestError {
    /// It could not be sent.
    #[error(transparent)]
    Send(#[from] SendError),
    /// No answer before the deadline.
    #[error("no answer before the deadline")]
    Timeout,
    /// The link broke after the peer had the request: asking again might do the work twice.
    #[error("link lost while waiting for the answer")]
    LinkLost,
    /// What came back is not a frame.
    #[error("answer is not a frame: {0}")]
    Malformed(#[from] FrameError),
}

/// Why the engine did not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// The runtime's threads could not be made.
    #[error("runtime: {0}")]
    Runtime(io::Error),
    /// The socket could not be bound.
    #[error("socket: {0}")]
    Bind(io::Error),
    /// The TLS library refused its own defaults.
    #[error("tls: {0}")]
    Tls(#[from] rustls::Error),
}

/// Why the engine does not listen.
#[derive(Debug, Error)]
pub enum ListenError {
    /// It listens already; `close` first.
    #[error("already listening")]
    AlreadyListening,
    /// The port could not be bound.
    #[error("socket: {0}")]
    Bind(io::Error),
    /// Certificate or key cannot be read or do not fit together.
    #[error("certificate: {0}")]
    Certificate(String),
}

/// Why an answer was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ReplyError {
    /// This message was answered before.
    #[error("already answered")]
    AlreadyReplied,
    /// Who asked is gone or has given up.
    #[error("nobody waits for the answer any more")]
    Gone,
}

/// Why a message that was accepted did not arrive, as far as can be known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
pub enum UndeliveredReason {
    /// Its deadline passed while no link would take or acknowledge it.
    #[error("deadline passed")]
    Expired,
    /// The link died before it was acknowledged, and it may not be sent twice.
    #[error("link lost")]
    LinkLost,
    /// The peer stopped reading it.
    #[error("rejected by the peer")]
    Rejected,
    /// The engine stopped first.
    #[error("the engine stopped")]
    Stopped,
}
