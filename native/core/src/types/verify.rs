//! Which certificates are accepted.

use std::path::PathBuf;

use super::{Dialect, Fingerprint};

/// Which certificates are accepted. That the other side holds the key of its certificate is always checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Verify {
    /// Any. Between nodes that run this library each knows the other's key, and a node id belongs to the key that it
    /// was first seen with; any node can pose as a 0.14.3 peer.
    #[default]
    FirstSeen,
    /// Any, and nothing is made of it.
    None,
    /// A certificate with one of these keys. Clients must show one, so 0.14.3 clients cannot connect.
    Pin(Vec<Fingerprint>),
    /// A certificate that leads to an authority of this PEM file, and is for the dialled host. Clients must show one,
    /// for any name.
    CaFile(PathBuf),
    /// The same, but a peer that is dialled may also show one for any name.
    CaFileAnyName(PathBuf),
}

impl Verify {
    /// Whether some nodes are not let in.
    pub fn is_strict(&self) -> bool {
        matches!(self, Self::Pin(_) | Self::CaFile(_) | Self::CaFileAnyName(_))
    }

    /// Whether any node can pose as the other end of a link in this dialect.
    pub fn leaves_open(&self, dialect: Dialect) -> bool {
        match self {
            Self::FirstSeen => dialect == Dialect::Macula,
            Self::None => true,
            Self::Pin(_) | Self::CaFile(_) | Self::CaFileAnyName(_) => false,
        }
    }
}
