//! The senders of incoming messages.

use std::net::SocketAddr;

use super::Fingerprint;

/// A sender's messages keep their order among themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sender {
    /// A node, over whichever connection.
    Key(Fingerprint),
    /// Someone without a key.
    Address(SocketAddr),
}

impl Sender {
    pub fn new(key: Option<Fingerprint>, address: SocketAddr) -> Self {
        key.map_or(Self::Address(address), Self::Key)
    }
}
