//! What is counted.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::errors::Failures;
use crate::events::Registration;
use crate::types::{Dialect, Endpoint, Fingerprint, NodeId, Path, PeerName};

/// A snapshot of everything that is counted.
#[derive(Debug, Clone, Default)]
pub struct Stats {
    /// Every peer in the pool.
    pub peers: Vec<PeerStats>,
    /// Every accepted connection.
    pub accepted: Vec<AcceptedStats>,
    /// Calls that found a live link.
    pub hits: u64,
    /// Calls that did not.
    pub misses: u64,
    /// Peers evicted because the pool was full.
    pub evictions: u64,
    /// Dialled links whose peer is not verified: its certificate was not checked.
    pub unverified: u64,
    /// Messages that had been accepted and were not delivered.
    pub undelivered: u64,
    /// Messages that arrived while there was no handler.
    pub unhandled: u64,
    /// Frames that arrived and could not be read.
    pub malformed: u64,
    /// What was refused, had to wait or was forgotten, by the limit that did not allow it.
    pub refused: Vec<(&'static str, u64)>,
    /// Incoming connections and registrations, by the outcome of the lists and the callback.
    pub admission: AdmissionStats,
    /// Sessions of senders that this node knows.
    pub sessions: usize,
    /// This node at its relays.
    pub registrations: Vec<RegistrationStats>,
    /// This node as a relay.
    pub relay: Option<RelayStats>,
    /// What became of messages for the local gateway, if there is one.
    pub gateway: Option<GatewayStats>,
}

/// The local gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayStats {
    /// Where it is looked for.
    pub endpoint: Endpoint,
    /// Messages that were sent to it.
    pub handed_over: u64,
    /// Its answers that were sent on.
    pub answered: u64,
    /// Messages that others got because it was not there.
    pub fallen_back: u64,
}

/// This node at one relay.
#[derive(Debug, Clone)]
pub struct RegistrationStats {
    /// The relay.
    pub relay: Endpoint,
    /// Whether this node is registered there.
    pub state: Registration,
    /// Since when.
    pub since: Instant,
    /// What the relay sees this node at.
    pub address: Option<SocketAddr>,
    /// Circuits over it.
    pub circuits: usize,
}

/// One peer.
#[derive(Debug, Clone)]
pub struct PeerStats {
    /// Its address or its name, as the callers know it.
    pub name: PeerName,
    /// The live link, if there is one.
    pub link: Option<LinkStats>,
    /// Messages and requests written to a link, those sent again included.
    pub sent: u64,
    /// Of these, how many the peer's transport has acknowledged.
    pub acknowledged: u64,
    /// Messages and answers that came from it.
    pub received: u64,
    /// Calls that got an error and accepted messages that were not delivered.
    pub failed: u64,
    /// Dials started.
    pub dials: u64,
    /// Bytes queued or not yet acknowledged.
    pub unacknowledged_bytes: usize,
}

/// A live link to a peer.
#[derive(Debug, Clone, Copy)]
pub struct LinkStats {
    /// What it speaks.
    pub dialect: Dialect,
    /// How its packets travel.
    pub path: Path,
    /// Where they come from: the peer's address or the relay's.
    pub remote: SocketAddr,
    /// Smoothed round trip time.
    pub round_trip: Duration,
}

/// How a peer is reached.
#[derive(Debug, Clone, Default)]
pub struct PathStatus {
    /// The link that carries the messages, if there is one.
    pub link: Option<LinkStats>,
    /// Why other paths failed. Those of paths that are no better than the link's are from before it was up.
    pub failures: Failures,
}

/// One accepted connection.
#[derive(Debug, Clone, Copy)]
pub struct AcceptedStats {
    /// What it speaks, where it comes from, how far away that is.
    pub link: LinkStats,
    /// Messages that came from it.
    pub received: u64,
}

/// The outcome of incoming connections and registrations.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AdmissionStats {
    /// Questions that were put to the callback.
    pub asked: u64,
    /// Questions that it had answered before.
    pub remembered: u64,
    /// How many were not let in or had to leave, by name of the reason.
    pub refused: Vec<(&'static str, u64)>,
}

/// A node that is registered at a relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayNode {
    /// What it is registered as.
    pub node_id: NodeId,
    /// The node.
    pub key: Fingerprint,
    /// Where its packets come from.
    pub address: SocketAddr,
    /// Since when it is registered.
    pub since: Instant,
    /// Its circuits.
    pub circuits: usize,
    /// The nodes at the other ends of its circuits; of many only some.
    pub peers: Vec<NodeId>,
    /// What was passed on from it.
    pub sent: Passed,
    /// What was passed on to it.
    pub received: Passed,
}

/// Datagrams that a relay has passed on; a packet that was cut in two counts as two.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Passed {
    /// How many.
    pub packets: u64,
    /// Bytes in them.
    pub bytes: u64,
}

/// What a relay has and did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RelayStats {
    /// Nodes that are registered.
    pub registrations: usize,
    /// Circuits that exist.
    pub circuits: usize,
    /// Datagrams passed on; a packet that was cut in two counts as two.
    pub forwarded_packets: u64,
    /// Bytes in them.
    pub forwarded_bytes: u64,
    /// Requests refused, by the error's name in the protocol.
    pub refused: Vec<(&'static str, u64)>,
    /// Packets dropped, by the limit's name in the protocol.
    pub dropped: Vec<(&'static str, u64)>,
    /// Datagrams that were no packet of a circuit of the node that sent them.
    pub stray: u64,
    /// Attempts to find a direct path between two nodes.
    pub punches: u64,
    /// How many of these found one.
    pub punched: u64,
    /// Registrations ended because the node did not read what it was told.
    pub unread: u64,
}
