//! The application error codes of `macula-peer/1` (docs/protocol.md).

/// Why a stream is reset or no longer read.
pub mod stream {
    /// Its frame does not grow any more, or its answer is not read.
    pub const TOO_SLOW: u8 = 1;
    /// What it carries cannot be read.
    pub const MALFORMED: u8 = 2;
    /// This node is no relay.
    pub const NOT_A_RELAY: u8 = 4;
    /// It is for a node with another id.
    pub const WRONG_NODE: u8 = 7;
    /// A message on it is larger than the receiver takes.
    pub const TOO_LARGE: u8 = 8;
    /// Its containers are nested deeper than the receiver takes.
    pub const TOO_DEEP: u8 = 9;
    /// It has more terms than the receiver takes.
    pub const TOO_MANY_TERMS: u8 = 10;
    /// The receiver does not know the request that is asked again.
    pub const REQUEST_FORGOTTEN: u8 = 11;
    /// The receiver has forgotten the session.
    pub const SESSION_FORGOTTEN: u8 = 12;
    /// The receiver has no room for the session.
    pub const TOO_MANY_SESSIONS: u8 = 14;
}

/// Why a connection is closed.
pub mod connection {
    /// Its other end shows no certificate.
    pub const NO_CERTIFICATE: u8 = 5;
    /// Its other end is another node than the expected one.
    pub const UNEXPECTED: u8 = 6;
    /// Its other end is not admitted.
    pub const DENIED: u8 = 8;
    /// Whether its other end is admitted cannot be decided now.
    pub const UNDECIDED: u8 = 9;
    /// A limit does not allow it, which the reason names.
    pub const OVER_LIMIT: u8 = 13;
}
