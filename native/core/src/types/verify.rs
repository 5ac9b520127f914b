//! Which certificates are accepted.

use std::path::PathBuf;

use super::{Dialect, Fingerprint};

/// Whose certificate is good enough. That the other side holds the key of the certificate it shows is checked always.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Verify {
    /// Any. Between nodes that run this library each knows the other's key, and a node id belongs to the key that it was
    /// first seen with; a 0.14.3 peer may be anybody.
    #[default]
    FirstSeen,
    /// Any, and nothing is made of it.
    None,
    /// One with a key of these. Who connects must show one, so 0.14.3 clients cannot.
    Pin(Vec<Fingerprint>),
    /// One that leads to a certificate authority of this PEM file, and is for the host that was dialled. Who connects
    /// must show one, for any name.
    CaFile(PathBuf),
    /// The same, but a peer that is dialled may also show one for any name.
    CaFileAnyName(PathBuf),
}

impl Verify {
    /// Whether not everybody is let in.
    pub fn is_strict(&self) -> bool {
        matches!(self, Self::Pin(_) | Self::CaFile(_) | Self::CaFileAnyName(_))
    }

    /// Whether the other end of a link in this dialect may be anybody.
    pub fn leaves_open(&self, dialect: Dialect) -> bool {
        match self {
            Self::FirstSeen => dialect == Dialect::Macula,
            Self::None => true,
            Self::Pin(_) | Self::CaFile(_) | Self::CaFileAnyName(_) => false,
        }
    }
}
