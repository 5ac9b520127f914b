//! The transport settings that several kinds of connections share.

use std::time::Duration;

use macula_peer_core::config::Config;
use quinn::TransportConfig;

/// A client that is silent during the handshake is dropped after this long. QUIC's handshake takes one and a half round
/// trips.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes that may be unread on one connection, over all its streams, and on one stream.
pub(crate) const CONNECTION_WINDOW: u32 = 8 << 20;
pub(crate) const STREAM_WINDOW: u32 = 1 << 20;

/// Answers, to messages sent without waiting, that the peer may send at once.
pub(crate) const MAX_ANSWERING: u32 = 64;

/// The window of a connection that answers come on too: large answers that wait to be read must not delay the others.
pub(crate) const DIALLED_WINDOW: u32 = CONNECTION_WINDOW + MAX_ANSWERING * STREAM_WINDOW;

/// The round trip that is assumed, until it is measured, on a path over which packets have just passed: most are
/// shorter. quinn's 333 ms are for unknown paths, and make a lost packet of the handshake cost a second.
pub(crate) const KNOWN_PATH_ROUND_TRIP: Duration = Duration::from_millis(100);

/// Common NATs forget a UDP mapping after 30 s (RFC 4787 asks for 120 s); one keep-alive may be late.
pub(crate) const RELAY_KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Three keep-alives may be lost. Silence is noticed sooner; this is for a relay that stays unreachable.
pub(crate) const RELAY_IDLE_TIMEOUT: Duration = Duration::from_secs(45);

/// Bytes of datagrams that a connection between a node and its relay keeps until they are read; the newest push the
/// oldest out. 2 ms at 1 Gbit/s, and the task that reads them is never late for long. Other connections take none.
pub(crate) const RELAY_RECEIVE_BUFFER: usize = 256 << 10;

/// What may wait for the connection to the relay; inner connections wait beyond that. A tenth of a second at 10 Mbit/s:
/// more would only make packets late.
const RELAY_SEND_BUFFER: usize = 128 << 10;

/// A silent peer is noticed by what it does not acknowledge; this is for links that carry nothing. Three keep-alives
/// may be lost.
pub(crate) fn idle_timeout(config: &Config) -> Duration {
    config.keep_alive * 3
}

pub(crate) fn set_idle_timeout(transport: &mut TransportConfig, config: &Config) {
    // A time beyond QUIC's 2^62 ms means none.
    transport.max_idle_timeout(idle_timeout(config).try_into().ok());
}

/// For a connection to a relay, beside what holds for all connections.
pub(crate) fn to_relay(transport: &mut TransportConfig) {
    transport
        .keep_alive_interval(Some(RELAY_KEEP_ALIVE))
        // Cannot fail: far below 2^62 ms.
        .max_idle_timeout(RELAY_IDLE_TIMEOUT.try_into().ok())
        .datagram_receive_buffer_size(Some(RELAY_RECEIVE_BUFFER))
        .datagram_send_buffer_size(RELAY_SEND_BUFFER);
}
