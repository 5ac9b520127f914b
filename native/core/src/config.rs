//! What an engine can be told, with the defaults and their reasons.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use macula_peer_wire::Limits;

use crate::access::Access;
use crate::places::PlaceLimits;
use crate::types::{Endpoint, NodeId, Secret, Verify};

/// In percent of the total: room for the largest frame, or its sender would wait for ever. What an address may have
/// depends on what the others have.
pub const FRAME_KEY_SHARE: u8 = 25;

/// How much there must be. `max_frame`: the size of the largest.
pub fn least_frame_memory(max_frame: usize) -> usize {
    max_frame.saturating_mul(100 / usize::from(FRAME_KEY_SHARE))
}

/// The settings of an engine. Every field has a default; `Config::default()` is what macula 0.14.3
/// peers expect.
#[derive(Debug, Clone)]
pub struct Config {
    /// Local address of the UDP socket. `None` (default): every address of both families, or every IPv4 address if the
    /// host has no IPv6.
    pub ip: Option<IpAddr>,
    /// Local port of the UDP socket. Default 0: the system chooses.
    pub port: u16,
    /// Largest frame and deepest nesting, in both directions. Default 16 MiB and 64.
    pub limits: Limits,
    /// How many peers are kept at once; the least recently used one is evicted. Default 100, as in the original's pool.
    pub pool_size: usize,
    /// A link that carried nothing for this long is closed. Default 60 s, as in the original's pool.
    pub idle_timeout: Duration,
    /// How often an otherwise quiet link is probed, so that NAT mappings (30 s and more, RFC 4787 asks for 120 s) stay.
    /// Default 20 s.
    pub keep_alive: Duration,
    /// How long one dial may take, name lookup included. Default 5 s.
    pub connect_timeout: Duration,
    /// What happens to a message that was written but not acknowledged when its link died. Default
    /// [`Delivery::AtLeastOnce`].
    pub delivery: Delivery,
    /// Bytes one peer may hold queued and unacknowledged before callers are told to wait or `overloaded`. Default 64 MiB:
    /// four of the largest frames.
    pub max_unacknowledged: usize,
    /// How long the answer to a message sent without waiting is listened for. Default 30 s: an `rpc_reply` comes when
    /// the procedure has run, and macula's own RPC calls give up before.
    pub answer_timeout: Duration,
    /// Worker threads of the runtime. Default 2: one drives the socket and the connections, which is what the
    /// throughput depends on, the other shortens the wait of a lone caller.
    pub workers: usize,
    /// Connections that may be accepted at once, without those of the nodes that are registered here. Default 1,024.
    pub max_accepted: usize,
    /// Streams that one accepted connection may have open. Default 256: quinn's memory for an idle connection follows
    /// this limit (37 KB at 100, 163 KB at 1,024).
    pub max_streams: u32,
    /// Sessions of senders that this node knows at once; one key may have a 64th of them open. Default 16,384.
    pub max_known_sessions: usize,
    /// Requests that this node was asked and remembers until their answers have arrived, of one key a 16th of them. Default
    /// 65,536: more than one node has streams for at once.
    pub max_known_requests: usize,
    /// Memory for frames above 32 KiB that are arriving, in bytes; one key may have a quarter of it. Less than four of the
    /// largest frames counts as four. Default `None`: 16 of the largest, or of 1 MiB where that is more.
    pub frame_memory: Option<usize>,
    /// How long an incomplete frame may go without growing by 16 KiB. Default 30 s: 550 bytes a second. The total time
    /// has no limit: a large frame takes as long as its path needs.
    pub frame_timeout: Duration,
    /// The PEM file of this node's key, made if it is not there. Default `None`: a new key at every start.
    pub identity_file: Option<PathBuf>,
    /// The PEM files of keys that this node had before, the last one first. They say to others that its names belong to the
    /// present key. Default none.
    pub previous_identity_files: Vec<PathBuf>,
    /// The file of the keys that node ids are bound to, made if it is not there. Default `None`: they are forgotten when the
    /// engine stops.
    pub known_keys_file: Option<PathBuf>,
    /// Which certificates are accepted. Default [`Verify::FirstSeen`].
    pub verify: Verify,
    /// Which nodes may connect to this one, until `Engine::set_access` replaces it. Default: any.
    pub access: Access,
    /// Whether clients that connect directly must meet `verify` too, unless `Listen::verify` says which are let in.
    /// Default true. False: any client may connect.
    pub verify_clients: bool,
    /// What the nodes and relays of a realm have in common. Default `None`: no realm.
    pub realm_secret: Option<Secret>,
    /// This node's id, at relays and for other nodes. It refuses messages for a node with another id. Default `None`:
    /// it is known by its fingerprint alone, and takes messages for any id.
    pub node_id: Option<NodeId>,
    /// Relays to be registered at, which others are also reached through. Default none.
    pub relays: Vec<Endpoint>,
    /// Whether direct paths through NATs are looked for. Default [`HolePunching::On`].
    pub hole_punching: HolePunching,
    /// macula's own gateway on this host, which what arrives is handed over to. Default `None`: to the handler alone.
    pub gateway: Option<LocalGateway>,
}

/// How much of a listener one stranger may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shares {
    /// What one key may have of the connections, in percent. Default 10: a node needs one or two.
    pub key: u8,
    /// What one address may have of the connections and of the handshakes, an IPv4 address or 64 bits of an IPv6 address, in
    /// percent. Default 50: many nodes may be behind one NAT.
    pub address: u8,
    /// Handshakes per second, in bursts of up to two seconds' worth. Default 500: on one processor they take about a
    /// third of it.
    pub handshake_rate: usize,
}

impl Default for Shares {
    fn default() -> Self {
        Self { key: 10, address: 50, handshake_rate: 500 }
    }
}

impl Shares {
    pub fn limits(&self, connections: usize) -> PlaceLimits {
        let Self { key, address, handshake_rate } = *self;
        PlaceLimits { connections, handshake_rate, key_share: key, address_share: address }
    }
}

/// macula's own gateway on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalGateway {
    /// Where it listens.
    pub endpoint: Endpoint,
    /// When it gets what arrives.
    pub when: HandOver,
}

/// When a local gateway gets what arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HandOver {
    /// As long as there is no handler.
    WithoutHandler,
    /// Always; a handler gets what the gateway does not take.
    Always,
}

impl LocalGateway {
    /// The port that the engine leaves alone: the gateway's, where it is on this host.
    pub fn reserved(&self, ip: Option<IpAddr>) -> Option<u16> {
        let is_here = self.endpoint.is_loopback() || (ip.is_some() && self.endpoint.ip() == ip);
        is_here.then(|| self.endpoint.port())
    }
}

/// Whether, and how, direct paths through NATs are looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HolePunching {
    /// By all means: where one of two NATs gives each destination another port at random, 256 sockets are opened on its
    /// side, and 1,024 packets sent from the other.
    On,
    /// With some packets to each address that may be the other node's.
    Plain,
    /// Not at all.
    Off,
}

impl Config {
    /// The least that [`frame_memory`](Self::frame_memory) may be: one key's share has room for the largest frame then.
    pub fn least_frame_memory(&self) -> usize {
        least_frame_memory(self.limits.max_frame)
    }

    /// The port that no socket of the engine at this address takes.
    pub fn reserved_port(&self, ip: Option<IpAddr>) -> Option<u16> {
        self.gateway.as_ref()?.reserved(ip)
    }
}

/// What happens to a message that was written but not acknowledged when its link died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// It is sent again on the next link before its deadline. The receiver may see it twice.
    AtLeastOnce,
    /// It is not sent again, but counted and reported as undelivered.
    AtMostOnce,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            ip: None,
            port: 0,
            limits: Limits::default(),
            pool_size: 100,
            idle_timeout: Duration::from_secs(60),
            keep_alive: Duration::from_secs(20),
            connect_timeout: Duration::from_secs(5),
            delivery: Delivery::AtLeastOnce,
            max_unacknowledged: 64 << 20,
            answer_timeout: Duration::from_secs(30),
            workers: 2,
            max_accepted: 1024,
            max_streams: 256,
            max_known_sessions: 16_384,
            max_known_requests: 65_536,
            frame_memory: None,
            frame_timeout: Duration::from_secs(30),
            identity_file: None,
            previous_identity_files: Vec::new(),
            known_keys_file: None,
            verify: Verify::default(),
            access: Access::default(),
            verify_clients: true,
            realm_secret: None,
            node_id: None,
            relays: Vec::new(),
            hole_punching: HolePunching::On,
            gateway: None,
        }
    }
}
