//! A run: what there is in it, and what happens when.

use std::collections::{BinaryHeap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use hashbrown::{HashMap, HashSet};

use super::gateway::Gateway;
use super::network::{Body, Cut, Event, Host, HostId, INTERNET, Is, Owner, Packet, Scheduled, Slab, Time, Weather};
use super::node::Node;
use super::promises::Promises;
use super::quic::{Conn, ConnId, KeyId, Notice, Serves};
use super::relay::Relay;
use super::scenario::Scenario;
use crate::sim::gate::Gate;
use crate::types::{Fingerprint, NodeId};

/// What may follow from one event, and how many events a second may have: more have no end.
const MOST_AT_ONCE: u32 = 100_000;
const MOST_IN_A_SECOND: u64 = 20_000;

pub(super) struct World {
    pub(super) random: fastrand::Rng,
    start: Instant,
    pub(super) now: Time,
    pub(super) scheduled: u64,
    pub(super) events: BinaryHeap<Scheduled>,
    // The network.
    pub(super) packets: Slab<Packet>,
    pub(super) hosts: Vec<Host>,
    pub(super) owners: HashMap<(usize, IpAddr), Owner>,
    /// The gate that leads out of each network.
    pub(super) uplinks: Vec<Option<usize>>,
    pub(super) gates: Vec<Gate>,
    pub(super) cuts: Vec<Cut>,
    pub(super) weather: Weather,
    pub(super) next_ip: u32,
    pub(super) relay_ips: HashSet<IpAddr>,
    // Connections.
    pub(super) conns: Vec<Option<Conn>>,
    pub(super) free_conns: Vec<u32>,
    pub(super) next_conn: u32,
    /// The server's end, by its host and the client's end.
    pub(super) initials: HashMap<(HostId, ConnId), ConnId>,
    pub(super) unflushed: Vec<ConnId>,
    pub(super) notices: VecDeque<(ConnId, Notice)>,
    // Who there is.
    pub(super) keys: Vec<Fingerprint>,
    pub(super) names: Vec<NodeId>,
    pub(super) nodes: Vec<Node>,
    pub(super) relays: Vec<Relay>,
    pub(super) gateways: Vec<Gateway>,
    /// Peers of nodes whose machines have something to do.
    pub(super) dirty: VecDeque<(usize, usize)>,
    pub(super) scenario: Scenario,
    pub(super) promises: Promises,
    pub(super) traced: bool,
    /// How many events there were.
    pub(super) happened: u64,
}

/// A line of the trace.
macro_rules! trace {
    ($world:expr, $($what:tt)*) => {
        if $world.traced {
            let at = $world.now;
            $world.print(at, format!($($what)*));
        }
    };
}
pub(super) use trace;

impl World {
    pub(super) fn new(seed: u64, traced: bool) -> Self {
        Self {
            random: fastrand::Rng::with_seed(seed),
            start: Instant::now(),
            now: 0,
            scheduled: 0,
            events: BinaryHeap::new(),
            packets: Slab::default(),
            hosts: Vec::new(),
            owners: HashMap::new(),
            uplinks: vec![None],
            gates: Vec::new(),
            cuts: Vec::new(),
            weather: Weather::default(),
            next_ip: 0,
            relay_ips: HashSet::new(),
            conns: Vec::new(),
            free_conns: Vec::new(),
            next_conn: 0,
            initials: HashMap::new(),
            unflushed: Vec::new(),
            notices: VecDeque::new(),
            keys: Vec::new(),
            names: Vec::new(),
            nodes: Vec::new(),
            relays: Vec::new(),
            gateways: Vec::new(),
            dirty: VecDeque::new(),
            scenario: Scenario::default(),
            promises: Promises::default(),
            traced,
            happened: 0,
        }
    }

    #[allow(clippy::print_stdout)]
    pub(super) fn print(&self, at: Time, what: String) {
        println!("{:>10.3} ms  {what}", at as f64 / 1000.0);
    }

    pub(super) fn instant(&self, time: Time) -> Instant {
        self.start + Duration::from_micros(time)
    }

    pub(super) fn clock(&self) -> Instant {
        self.instant(self.now)
    }

    /// Timers are 1 ms coarse.
    pub(super) fn time(&self, instant: Instant) -> Time {
        let nanos = instant.saturating_duration_since(self.start).as_nanos() as u64;
        nanos.div_ceil(1_000_000) * super::network::MS
    }

    pub(super) fn new_key(&mut self) -> KeyId {
        let mut key = [0; 32];
        self.random.fill(&mut key);
        self.keys.push(key.into());
        self.keys.len() - 1
    }

    /// Until then, or until a promise is broken.
    pub(super) fn run(&mut self, until: Time) {
        while let Some(next) = self.events.peek()
            && next.at <= until
            && self.promises.broken.is_none()
        {
            let Some(Scheduled { at, event, .. }) = self.events.pop() else { return };
            self.now = at;
            self.happened += 1;
            if self.happened > MOST_IN_A_SECOND * (10 + at / super::network::SECOND) {
                return self.breaks("what happens has no end".to_owned());
            }
            self.happen(event);
            self.settle();
        }
        self.now = self.now.max(until);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Arrive { network, packet } => {
                if let Some(packet) = self.packets.remove(packet) {
                    self.arrive(network as usize, packet);
                }
            }
            Event::Conn(id) => self.conn_timer(id),
            Event::Peer { node, peer } => self.peer_timer(node as usize, peer as usize),
            Event::Node(node) => self.node_timer(node as usize),
            Event::Relay(relay) => self.relay_timer(relay as usize),
            Event::Step(step) => self.step(step as usize),
        }
    }

    /// Everything that follows at once.
    pub(super) fn settle(&mut self) {
        for _ in 0..MOST_AT_ONCE {
            if let Some((id, notice)) = self.notices.pop_front() {
                self.notice(id, notice);
            } else if let Some((node, peer)) = self.dirty.pop_front() {
                self.drive(node, peer);
            } else if let Some(id) = self.unflushed.pop() {
                self.flush(id);
            } else {
                return;
            }
        }
        self.breaks("what happens at once has no end".to_owned());
    }

    fn notice(&mut self, id: ConnId, notice: Notice) {
        let Some(conn) = self.conn(id) else { return };
        match self.hosts[conn.host].is {
            Is::Node(node) => self.node_notice(node, id, notice),
            Is::Relay(relay) => self.relay_notice(relay, id, notice),
            Is::Gateway(gateway) => self.gateway_notice(gateway, id, &notice),
            Is::Closed | Is::Silent => {}
        }
    }

    /// Whether a host takes the connection that this packet begins; its key, and how long the connection may be idle.
    pub(super) fn accepts(
        &self,
        host: HostId,
        carrier: super::quic::Carrier,
        content: &super::quic::Content,
    ) -> Option<Serves> {
        let super::quic::Content::Frames { frames, .. } = content else { return None };
        if !frames.iter().any(|frame| matches!(frame, super::quic::Frame::ClientHello)) {
            return None;
        }
        match self.hosts[host].is {
            Is::Node(node) => self.node_accepts(node, carrier),
            Is::Relay(relay) => Some(Serves::peer1(self.relays[relay].key, super::relay::TIMEOUTS)),
            Is::Gateway(gateway) => Some(self.gateways[gateway].serves()),
            Is::Closed | Is::Silent => None,
        }
    }

    pub(super) fn key_of_host(&self, host: HostId) -> Option<KeyId> {
        match self.hosts[host].is {
            Is::Node(node) => Some(self.nodes[node].key),
            Is::Relay(relay) => Some(self.relays[relay].key),
            Is::Gateway(gateway) => Some(self.gateways[gateway].key),
            Is::Closed | Is::Silent => None,
        }
    }

    /// The address that a host may send to from now on.
    pub(super) fn earn(&mut self, host: HostId, address: SocketAddr) {
        if let Is::Node(node) = self.hosts[host].is {
            self.nodes[node].earned.insert(address);
        }
    }

    /// Packets come from there on an authenticated connection.
    pub(super) fn prove(&mut self, id: ConnId) {
        let Some(conn) = self.conn(id) else { return };
        if let super::quic::Carrier::Udp { to, .. } = conn.carrier {
            self.earn(conn.host, to);
        }
    }

    /// Nodes send to nobody whose address they were not told by somebody who knows, or that has not proved to be there.
    pub(super) fn account(&mut self, host: HostId, to: SocketAddr, body: &Body) {
        let Is::Node(node) = self.hosts[host].is else { return };
        if !self.nodes[node].earned.contains(&to) && !self.nodes[node].may_guess(to, body) {
            self.breaks(format!("node {node} sends to {to}, which nobody has named or proved: {body:?}"));
        }
    }

    pub(super) fn breaks(&mut self, what: String) {
        trace!(self, "BROKEN: {what}");
        self.promises.broken.get_or_insert(what);
    }

    /// A host moves to another address.
    pub(super) fn move_host(&mut self, host: HostId, ip: IpAddr) {
        let Host { network, ip: before, .. } = self.hosts[host];
        self.owners.remove(&(network, before));
        self.hosts[host].ip = ip;
        self.owners.insert((network, ip), Owner::Host(host));
    }

    pub(super) fn is_public(&self, host: HostId) -> bool {
        self.hosts[host].network == INTERNET
    }
}
