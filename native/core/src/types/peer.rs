//! The peer that messages go to, and the path of their packets.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::SocketAddr;

use bytes::Bytes;

use super::endpoint::Endpoint;

/// The name of a node: at most 255 bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(Bytes);

impl NodeId {
    /// The longest name.
    pub const MAX_LEN: usize = 255;

    /// `None` if the name is empty or too long.
    pub fn new(name: &[u8]) -> Option<Self> {
        (1..=Self::MAX_LEN).contains(&name.len()).then(|| Self(Bytes::copy_from_slice(name)))
    }

    /// The name.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub fn to_bytes(&self) -> Bytes {
        self.0.clone()
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The peer that messages go to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerName {
    /// The node at an address.
    Endpoint(Endpoint),
    /// A node, wherever it is.
    Node(NodeId),
    /// The local gateway, which gets what arrives here.
    Gateway(Endpoint),
}

impl PeerName {
    /// The node, if that is what it names.
    pub fn node(&self) -> Option<&NodeId> {
        match self {
            Self::Node(node) => Some(node),
            Self::Endpoint(_) | Self::Gateway(_) => None,
        }
    }
}

impl Hash for PeerName {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match self {
            Self::Endpoint(endpoint) | Self::Gateway(endpoint) => endpoint.hash(state),
            Self::Node(node) => node.as_bytes().hash(state),
        }
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Endpoint(endpoint) => endpoint.fmt(f),
            Self::Gateway(endpoint) => write!(f, "gateway {endpoint}"),
            Self::Node(node) => write!(f, "{node:?}"),
        }
    }
}

/// How packets travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Path {
    /// Straight to the peer's address.
    Direct,
    /// Straight to the address at which the peer's NAT lets this node in, after both have sent there.
    HolePunch,
    /// In a circuit of the relay at this address.
    Relay(SocketAddr),
}

impl Path {
    /// Whether packets go through a relay.
    pub fn is_relayed(self) -> bool {
        matches!(self, Self::Relay(_))
    }
}
