//! What is decided over links needs to know of one.

use super::{Dialect, Fingerprint, Path};

/// Names a connection within the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkId(u64);

impl LinkId {
    pub fn new(id: u64) -> Self {
        Self(id)
    }
}

/// A link, as far as decisions depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    pub id: LinkId,
    pub path: Path,
    pub dialect: Dialect,
    /// Whether this node dialled it.
    pub dialled: bool,
    /// The key that the other end has shown.
    pub shown: Option<Fingerprint>,
}
