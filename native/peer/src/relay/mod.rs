//! Relays and circuits: how nodes that cannot reach each other do.

use std::net::SocketAddr;
use std::time::Instant;

use macula_peer_core::types::{Fingerprint, NodeId};

mod circuits;
pub(crate) mod client;
pub(crate) mod clients;
pub(crate) mod registration;
pub(crate) mod responder;
pub(crate) mod server;
#[cfg(test)]
pub(crate) mod testing;

/// A node that is registered at a relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayNode {
    /// What it is registered as.
    pub node_id: NodeId,
    /// Who it is.
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
