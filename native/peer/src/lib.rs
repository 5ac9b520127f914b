//! Peers, links and paths over QUIC: the engine of `macula_peer_connector`. It knows nothing of Erlang.
//!
//! An [`Engine`] owns one UDP socket and a tokio runtime. A [`Message`] goes to the peer at an [`EndpointRef`]; the peer
//! keeps one link, dials it when needed, and sends again what a dead link left unacknowledged. What arrives goes to a
//! [`Handler`].
#![forbid(unsafe_code)]

mod call;
mod config;
mod decide;
mod dial;
mod endpoint;
mod engine;
mod error;
mod link;
mod listen;
mod message;
mod node;
mod peer;
#[cfg_attr(not(test), expect(dead_code, reason = "nothing starts a relay yet"))]
mod relay;
mod request;
mod runtime;
mod socket;
mod stats;
mod tls;

pub use config::{Config, Delivery};
pub use endpoint::{Endpoint, EndpointError, EndpointRef};
pub use engine::{Engine, Listen};
pub use error::{ConnectError, ListenError, ReplyError, RequestError, SendError, StartError, UndeliveredReason};
pub use message::{Event, Handler, Inbound, Message, ReplyToken, Unhandled};
pub use peer::Waiting;
pub use relay::{Fingerprint, RelayConfig, RelayStats};
pub use stats::{AcceptedStats, LinkStats, PeerStats, Stats};
pub use tls::{Certificate, Dialect};
