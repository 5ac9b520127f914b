//! The settings of a relay.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use super::Secret;

/// What a relay gives at most.
#[derive(Clone)]
pub struct RelayConfig {
    /// Node ids that are registered or still kept for their owner. Default 10,000.
    pub max_registrations: usize,
    /// Circuits. Default 100, as in the original.
    pub max_sessions: usize,
    /// Circuits that one node has opened, and circuits that others have opened to it. Default 20 of each.
    pub max_sessions_per_node: usize,
    /// What one key may have of the names, the registrations per second, all circuits and the circuits to one node, in
    /// percent. Default 25.
    pub key_share: u8,
    /// What one address may have of them, an IPv4 address or 64 bits of an IPv6 address, in percent. Default 50: many nodes
    /// may be behind one NAT.
    pub address_share: u8,
    /// Bytes per second of one circuit, both directions together. Default 1,000,000.
    pub bandwidth: u64,
    /// Bytes that may wait to be sent to one node. Default 64 KiB: 65 ms of `bandwidth`; more would only make
    /// packets late.
    pub packet_queue: usize,
    /// The longest packet in bytes. Default 1,500: quinn does not probe for more than 1,452.
    pub max_packet: usize,
    /// Registrations per second, in bursts of up to a second's worth. Default 100. What is refused because a name is taken or
    /// there is no room for it counts for its key alone.
    pub accept_rate: u64,
    /// A circuit that carried nothing for this long is ended. Default 30 min.
    pub idle_timeout: Duration,
    /// How long a node id is kept for its owner after the registration ended. Default 5 min: a restart, or a network that
    /// was away.
    pub grace: Duration,
    /// What a node must prove to know before it is registered. Default `None`: nothing.
    pub realm_secret: Option<Secret>,
    /// The port from which a relay also answers, so that nodes find out what their NATs are like. Default 0: the system
    /// chooses.
    pub probe_port: u16,
    /// Another address of the host, from which a relay also answers at that port. Default `None`: it is left to other relays
    /// to tell nodes whether their NATs treat addresses differently.
    pub probe_ip: Option<IpAddr>,
}

impl Default for RelayConfig {
    fn default() -> Self {
        Self {
            max_registrations: 10_000,
            max_sessions: 100,
            max_sessions_per_node: 20,
            key_share: 25,
            address_share: 50,
            bandwidth: 1_000_000,
            packet_queue: 64 << 10,
            max_packet: 1500,
            accept_rate: 100,
            idle_timeout: Duration::from_secs(30 * 60),
            grace: Duration::from_secs(5 * 60),
            realm_secret: None,
            probe_port: 0,
            probe_ip: None,
        }
    }
}

impl fmt::Debug for RelayConfig {
    /// Without the secret.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("RelayConfig")
            .field("max_registrations", &self.max_registrations)
            .field("max_sessions", &self.max_sessions)
            .field("max_sessions_per_node", &self.max_sessions_per_node)
            .field("key_share", &self.key_share)
            .field("address_share", &self.address_share)
            .field("bandwidth", &self.bandwidth)
            .field("packet_queue", &self.packet_queue)
            .field("max_packet", &self.max_packet)
            .field("accept_rate", &self.accept_rate)
            .field("idle_timeout", &self.idle_timeout)
            .field("grace", &self.grace)
            .field("has_realm_secret", &self.realm_secret.is_some())
            .field("probe_port", &self.probe_port)
            .field("probe_ip", &self.probe_ip)
            .finish()
    }
}
