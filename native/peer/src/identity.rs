//! Who a node is. (To be replaced by the real one.)

/// The SHA-256 of a public key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    pub(crate) fn of_connection(_: &quinn::Connection) -> Option<Self> {
        Some(Self([0; 32]))
    }
}
