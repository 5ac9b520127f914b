//! What links speak.

/// What a link speaks, chosen by ALPN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// macula 0.14.3.
    Macula,
    /// Between nodes that run this library.
    MaculaPeer1,
}

impl Dialect {
    /// The ALPN protocol id.
    pub fn alpn(self) -> &'static str {
        match self {
            Self::Macula => "macula",
            Self::MaculaPeer1 => "macula-peer/1",
        }
    }
}
