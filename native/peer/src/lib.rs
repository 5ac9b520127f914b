//! Peers, links and paths over QUIC: the engine of `macula_peer_connector`. It knows nothing of Erlang.
//!
//! An [`Engine`] owns one UDP socket and a tokio runtime. A [`Message`] goes to the peer at an [`EndpointRef`]; the peer
//! keeps one link, dials it when needed, and sends again what a dead link left unacknowledged. What arrives goes to a
//! [`Handler`].
#![forbid(unsafe_code)]

mod addresses;
mod admission;
mod backlog;
mod call;
mod congestion;
mod conn;
mod deadline;
mod decoding;
mod descriptors;
mod dial;
mod engine;
mod error;
mod expected;
mod frame_memory;
mod gateway;
mod handshake;
mod hello;
mod identity;
mod inbound;
mod inbox;
mod keys;
mod known_keys;
mod lifecycle;
mod link;
mod listen;
mod message;
mod names;
mod nat;
mod net;
mod node;
mod peer;
mod pem;
mod places;
mod pool;
mod ports;
mod private;
mod punch;
mod relay;
mod renewal;
mod request;
mod runtime;
mod server;
mod server_config;
mod session;
mod shares;
mod socket;
mod standing;
mod streams;
mod succession;
mod surroundings;
mod tls;
mod transfer;
mod transport;
mod turns;

pub use admission::{AdmissionAnswer, AdmissionCallback, AdmissionQuestion, Admit, NotAdmitted};
pub use backlog::{Backlog, Ticket};
pub use engine::{Engine, Listen};
pub use error::{IdentityError, KnownKeysError, ListenError, PemError, StartError, TlsError};
pub use identity::{Identity, shown_key};
pub use inbound::{Fallback, Handler, Inbound, NotTaken, ReplyToken, Unhandled};
pub use macula_peer_core::access::{Access, AccessList, Network, NotANetwork};
pub use macula_peer_core::admission::Kick;
pub use macula_peer_core::config::{Config, Delivery, HandOver, HolePunching, LocalGateway, Shares};
pub use macula_peer_core::errors::{
    ConnectError, Failures, PunchError, Rejection, ReplyError, RequestError, RouteError, SendError, UndeliveredReason,
};
pub use macula_peer_core::events::{Event, NatStatus, Registration};
pub use macula_peer_core::nat::{Allocation, Filtering, Mapping, NatProfile};
pub use macula_peer_core::proto::control::{Limit, PunchFailure, Refusal};
pub use macula_peer_core::stats::{
    AcceptedStats, AdmissionStats, GatewayStats, LinkStats, Passed, PathStatus, PeerStats, RegistrationStats,
    RelayNode, RelayStats, Stats,
};
pub use macula_peer_core::types::{
    Candidates, Dialect, Endpoint, EndpointError, EndpointRef, Fingerprint, NodeId, NotAFingerprint, Path, PeerName,
    RelayConfig, Secret, Sender, Target, Verify,
};
pub use message::Message;
pub use peer::WaitingCall;
pub use relay::clients::MAX_RELAYS;
pub use tls::Certificate;
