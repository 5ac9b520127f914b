//! The settings with which connections are accepted.

use std::sync::Arc;
use std::time::Duration;

use macula_peer_core::config::Config;
use macula_peer_core::types::Dialect;
use quinn::congestion::ControllerFactory;
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{AckFrequencyConfig, Connection, ServerConfig, TransportConfig};

use crate::transport::{
    CONNECTION_WINDOW, KNOWN_PATH_ROUND_TRIP, RELAY_IDLE_TIMEOUT, RELAY_RECEIVE_BUFFER, STREAM_WINDOW, idle_timeout,
};

/// Streams that a new connection may open before it is known what it speaks and needs them for. quinn keeps memory for
/// each, and a registration at a relay needs no more.
const FIRST_STREAMS: u32 = 32;

/// The least that our dialect allows, however little is configured: a session has two streams, a relay's node one more,
/// and a question needs one.
const LEAST_STREAMS: u32 = 4;

/// Streams that a sender may open and needs no answer on. As a 0.14.3 gateway has it.
const ONE_WAY_STREAMS: u8 = 3;

/// How a listener lets others in.
#[derive(Clone)]
pub(crate) struct Admission {
    pub(crate) config: Arc<ServerConfig>,
    transport: Transport,
    /// The same if some nodes are not let in.
    strict: Arc<ServerConfig>,
    strict_transport: Transport,
}

impl Admission {
    /// `strict`: not every node is let in. Streams are then allowed only to nodes that are, which tells them. `relay`:
    /// packets of circuits are taken.
    pub(crate) fn new(tls: QuicServerConfig, strict: bool, relay: bool, config: &Config) -> Self {
        Self::with_transport(tls, strict, |strict| {
            let mut transport = Transport::new(strict, config);
            if relay {
                transport.datagrams = Some(RELAY_RECEIVE_BUFFER);
                // Nodes probe at their own pace, whatever this node's pace is.
                transport.idle_timeout = RELAY_IDLE_TIMEOUT.max(transport.idle_timeout);
            }
            transport
        })
    }

    /// For connections over circuits, and on paths that both nodes have made.
    pub(crate) fn over_known_paths(tls: QuicServerConfig, strict: bool, config: &Config) -> Self {
        Self::with_transport(tls, strict, |strict| Transport {
            initial_round_trip: Some(KNOWN_PATH_ROUND_TRIP),
            ..Transport::new(strict, config)
        })
    }

    fn with_transport(tls: QuicServerConfig, strict: bool, transport: impl Fn(bool) -> Transport) -> Self {
        let tls = Arc::new(tls);
        let server = |transport: &Transport| {
            let mut server = ServerConfig::with_crypto(tls.clone());
            server.transport_config(Arc::new(transport.config()));
            Arc::new(server)
        };
        let (transport, strict_transport) = (transport(strict), transport(true));
        Self { config: server(&transport), transport, strict: server(&strict_transport), strict_transport }
    }

    /// For a client that connects now and is followed. `select_by_key`: whether it is admitted depends on its key.
    pub(crate) fn following(
        &self,
        select_by_key: bool,
        remote: Arc<dyn ControllerFactory + Send + Sync>,
    ) -> Arc<ServerConfig> {
        let (config, transport) = match select_by_key {
            true => (&self.strict, &self.strict_transport),
            false => (&self.config, &self.transport),
        };
        let mut transport = transport.config();
        transport.congestion_controller_factory(remote);
        let mut server = ServerConfig::clone(config);
        server.transport_config(Arc::new(transport));
        Arc::new(server)
    }

    pub(crate) fn let_in(connection: &Connection, dialect: Dialect, config: &Config) {
        let streams = match dialect {
            Dialect::Macula => config.max_streams,
            Dialect::MaculaPeer1 => first_streams(config),
        };
        connection.set_max_concurrent_bi_streams(streams.into());
        connection.set_max_concurrent_uni_streams(ONE_WAY_STREAMS.into());
    }
}

pub(crate) fn first_streams(config: &Config) -> u32 {
    config.max_streams.clamp(LEAST_STREAMS, FIRST_STREAMS)
}

/// The transport settings of accepted connections.
#[derive(Debug, Clone, Copy)]
struct Transport {
    two_way_streams: u32,
    one_way_streams: u8,
    idle_timeout: Duration,
    /// Until it is measured. `None`: nothing is known.
    initial_round_trip: Option<Duration>,
    /// Bytes of datagrams that wait to be read. `None`: none are taken.
    datagrams: Option<usize>,
}

impl Transport {
    fn new(strict: bool, config: &Config) -> Self {
        let (two_way_streams, one_way_streams) = if strict { (0, 0) } else { (first_streams(config), ONE_WAY_STREAMS) };
        let idle_timeout = idle_timeout(config);
        Self { two_way_streams, one_way_streams, idle_timeout, initial_round_trip: None, datagrams: None }
    }

    fn config(&self) -> TransportConfig {
        // The credit of a stream comes back when our half of it is acknowledged as closed. A sender that has run out of
        // credit has nothing to send its acknowledgements with and would delay them by 25 ms, so it is asked not to.
        let mut acknowledgements = AckFrequencyConfig::default();
        acknowledgements.ack_eliciting_threshold(0u8.into());
        let mut transport = TransportConfig::default();
        transport
            .ack_frequency_config(Some(acknowledgements))
            .max_concurrent_bidi_streams(self.two_way_streams.into())
            .max_concurrent_uni_streams(self.one_way_streams.into())
            .receive_window(CONNECTION_WINDOW.into())
            .stream_receive_window(STREAM_WINDOW.into())
            .datagram_receive_buffer_size(self.datagrams)
            // A time beyond QUIC's 2^62 ms means none.
            .max_idle_timeout(self.idle_timeout.try_into().ok());
        if let Some(round_trip) = self.initial_round_trip {
            transport.initial_rtt(round_trip);
        }
        transport
    }
}
