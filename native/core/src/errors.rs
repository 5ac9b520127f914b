//! Why a peer is not reached, and why a message does not arrive.

use macula_peer_wire::{FrameError, PayloadError};
use thiserror::Error;

use crate::proto::codes::stream::{MALFORMED, TOO_DEEP, TOO_LARGE, TOO_MANY_TERMS, TOO_SLOW};
use crate::proto::control::{PunchFailure, Reason, Refusal};

/// Why an answer was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ReplyError {
    /// This message was answered before.
    #[error("already answered")]
    AlreadyReplied,
    /// The requester is gone or has given up.
    #[error("the requester no longer waits for the answer")]
    Gone,
}

/// Why no link to a peer could be made.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConnectError {
    /// The name has no address in a family that this host speaks.
    #[error("name does not resolve")]
    Unresolved,
    /// It has addresses, all of the other family than the address that the engine's socket is bound to.
    #[error("address family not supported by the socket")]
    OtherFamily,
    /// ICMP says that the port is unreachable.
    #[error("port unreachable")]
    Unreachable,
    /// This host has no route there, or no address to send from.
    #[error("no route")]
    NoRoute,
    /// No answer within the time for a dial.
    #[error("no answer")]
    TimedOut,
    /// The peer is there and refuses connections, also after retries.
    #[error("the peer refuses connections")]
    Refused,
    /// The peer speaks neither `macula` nor `macula-peer/1`.
    #[error("no protocol in common")]
    NoProtocol,
    /// We do not trust the peer's certificate.
    #[error("the peer is not trusted")]
    Untrusted,
    /// The peer does not trust ours.
    #[error("not trusted by the peer")]
    NotTrusted,
    /// The path leads to a node with another id, or back to this one.
    #[error("another node is there")]
    WrongNode,
    /// The handshake failed for another reason.
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
    /// The peer does not take it.
    #[error("rejected by the peer: {0}")]
    Rejected(Rejection),
    /// What came back is not a frame.
    #[error("answer is not a frame: {0}")]
    Malformed(#[from] FrameError),
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
    /// It was on its way when its link died, and the peer no longer knew the session when there was a link again: whether it
    /// has arrived cannot be known, and sent again it might arrive twice.
    #[error("session lost")]
    SessionLost,
    /// The peer does not take it.
    #[error("rejected by the peer: {0}")]
    Rejected(Rejection),
    /// The peer that was to get it has another key now.
    #[error("the peer is not trusted")]
    Untrusted,
    /// The engine stopped first.
    #[error("the engine stopped")]
    Stopped,
}

/// Why a peer does not take a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
pub enum Rejection {
    /// Its frame is longer than the peer's limit.
    #[error("the frame is too large")]
    TooLarge,
    /// More containers are inside one another than the peer's limit.
    #[error("its containers are nested too deep")]
    TooDeep,
    /// It has more terms than the peer's limit.
    #[error("it has too many terms")]
    TooManyTerms,
    /// It is no message to the peer.
    #[error("the peer cannot read it")]
    Malformed,
    /// It made no progress for longer than the peer waits.
    #[error("it came too slowly")]
    TooSlow,
    /// The peer stopped reading it and did not say why.
    #[error("the peer stopped reading it")]
    Unread,
}

/// Why there is no direct path.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PunchError {
    /// The settings or the call forbid hole punching.
    #[error("skipped")]
    Skipped,
    /// An attempt was made, or could not begin, at this node or at the other one.
    #[error("failed: {}", .0.name())]
    Failed(PunchFailure),
    /// The two nodes have no relay in common that can be reached.
    #[error("no relay: {0}")]
    Relay(ConnectError),
    /// The relay does not introduce the two nodes to each other.
    #[error("refused by the relay: {}", .0.name())]
    Refused(Refusal),
    /// There is a path, but no connection over it.
    #[error("no connection: {0}")]
    Connect(ConnectError),
}

impl PunchError {
    /// What the other node is told, and what the time of the next attempt depends on.
    pub fn failure(&self) -> PunchFailure {
        match self {
            Self::Failed(failure) => *failure,
            Self::Refused(Refusal::AddressFamily) => PunchFailure::BothHard,
            Self::Skipped => PunchFailure::NotAllowed,
            Self::Relay(_) | Self::Refused(_) | Self::Connect(_) => PunchFailure::TimedOut,
        }
    }
}

impl From<PunchFailure> for PunchError {
    fn from(failure: PunchFailure) -> Self {
        Self::Failed(failure)
    }
}

/// Why there is no circuit to a node.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CircuitError {
    /// There is no connection to the relay.
    #[error("relay: {0}")]
    Relay(ConnectError),
    /// The peer there is not a relay, or speaks only `macula`.
    #[error("not a relay")]
    NotARelay,
    /// The relay refuses the registration or the circuit.
    #[error("refused by the relay: {}", .0.name())]
    Refused(Refusal),
    /// The target is not registered at this relay.
    #[error("target not registered at the relay")]
    NotRegistered,
    /// The relay ended the circuit before there was a connection over it.
    #[error("circuit ended: {}", .0.name())]
    Ended(Reason),
    /// The connection to the relay was lost, or the relay did not answer.
    #[error("relay lost")]
    RelayLost,
    /// There is a circuit, but no connection over it.
    #[error("through the relay: {0}")]
    Inner(ConnectError),
    /// The client was stopped or unused for too long; another one may be made.
    #[error("relay client ended")]
    Stopped,
}

/// Why paths could not be had, as far as they were tried and failed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Failures {
    /// The last dial of an endpoint.
    pub direct: Option<ConnectError>,
    /// The last attempt to get through the NATs.
    pub hole_punch: Option<PunchError>,
    /// The last relay that was asked.
    pub relay: Option<RouteError>,
}

impl Failures {
    /// Takes over what later attempts found.
    pub fn merge(&mut self, newer: Self) {
        self.direct = newer.direct.or(self.direct.take());
        self.hole_punch = newer.hole_punch.or(self.hole_punch.take());
        self.relay = newer.relay.or(self.relay.take());
    }
}

impl From<CircuitError> for PunchError {
    fn from(error: CircuitError) -> Self {
        match error {
            CircuitError::Refused(refusal) => Self::Refused(refusal),
            CircuitError::NotRegistered => Self::Refused(Refusal::NotRegistered),
            CircuitError::Relay(error) => Self::Relay(error),
            CircuitError::NotARelay => Self::Relay(ConnectError::NoProtocol),
            CircuitError::RelayLost | CircuitError::Ended(_) | CircuitError::Inner(_) | CircuitError::Stopped => {
                Self::Relay(ConnectError::TimedOut)
            }
        }
    }
}

impl Rejection {
    /// The error code of a stream that stands for it (docs/protocol.md).
    pub fn code(self) -> u8 {
        match self {
            Self::TooSlow => TOO_SLOW,
            Self::Malformed | Self::Unread => MALFORMED,
            Self::TooLarge => TOO_LARGE,
            Self::TooDeep => TOO_DEEP,
            Self::TooManyTerms => TOO_MANY_TERMS,
        }
    }

    /// What an error code stands for, if it is about a message.
    pub fn of(code: u64) -> Option<Self> {
        match u8::try_from(code).ok()? {
            TOO_SLOW => Some(Self::TooSlow),
            MALFORMED => Some(Self::Malformed),
            TOO_LARGE => Some(Self::TooLarge),
            TOO_DEEP => Some(Self::TooDeep),
            TOO_MANY_TERMS => Some(Self::TooManyTerms),
            _ => None,
        }
    }
}

impl From<&PayloadError> for Rejection {
    fn from(error: &PayloadError) -> Self {
        match error {
            PayloadError::TooDeep { .. } => Self::TooDeep,
            PayloadError::TooManyTerms { .. } => Self::TooManyTerms,
            _ => Self::Malformed,
        }
    }
}

impl From<&FrameError> for Rejection {
    fn from(error: &FrameError) -> Self {
        match error {
            FrameError::TooLarge { .. } => Self::TooLarge,
            FrameError::Payload(error) => error.into(),
            _ => Self::Malformed,
        }
    }
}
