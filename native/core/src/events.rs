//! What the handler is told besides messages.

use std::net::SocketAddr;
use std::time::SystemTime;

use crate::errors::{Failures, UndeliveredReason};
use crate::nat::NatProfile;
use crate::proto::control::{Limit, Refusal};
use crate::types::{Endpoint, Fingerprint, Path, PeerName};

/// What a handler is told besides messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Messages that had been accepted were not delivered, as far as can be known.
    Undelivered {
        /// The peer they were for.
        peer: PeerName,
        /// How many.
        count: u64,
        /// Why.
        reason: UndeliveredReason,
    },
    /// Messages to a peer take another path than before, or no better one was found.
    Path {
        /// The peer.
        peer: PeerName,
        /// The path.
        path: Path,
        /// Why other paths failed.
        failures: Failures,
    },
    /// A sender goes on with a session that this node does not know: it was restarted, or had forgotten it. What was
    /// handed over before may come again.
    SessionRestarted {
        /// Where the sender is.
        peer: SocketAddr,
        /// The node.
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

/// What a node knows of the NAT that it is behind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NatStatus {
    /// How it maps and filters.
    pub profile: NatProfile,
    /// Where relays see the socket. `None`: no relay has reported it.
    pub observed: Option<SocketAddr>,
    /// The host's own addresses of the socket, without those that only the host or its link knows.
    pub local: Vec<SocketAddr>,
    /// When it was last found out.
    pub since: Option<SystemTime>,
}
