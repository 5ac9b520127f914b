//! A node finds out what NAT it is behind: carries out what its detector decides, and compares what that claims with what the NAT
//! does.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use hashbrown::{HashMap, HashSet};

use super::network::{Body, Time};
use super::node::Node;
use super::quic::ConnId;
use super::world::{World, trace};
use crate::config::HolePunching;
use crate::detection::{Action, Detector, Found, Probe, Relays, Socket, candidates};
use crate::nat::{Allocation, Filtering, Mapping, NatProfile};
use crate::proto::signal::Signal;
use crate::sim::gate::Gate;

/// How long a look may take to begin: the pause after another one, and its rounds.
const LOOKS_WITHIN: Duration = Duration::from_secs(6);

/// What a node knows of its NAT, and its sockets beside the main one.
pub(super) struct Nat {
    pub(super) description: Option<(NatProfile, Vec<SocketAddr>)>,
    /// Connections on paths that were punched.
    pub(super) punched: HashSet<ConnId>,
    pub(super) sockets: HashMap<u16, Use>,
    detector: Detector,
    /// The sockets that the detector has opened.
    asking: Vec<u16>,
    look: Look,
}

/// What a socket is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// Questions of the detector.
    Asking(usize),
    /// The sample of a punch.
    Sampling {
        session: u64,
    },
    Extra {
        session: u64,
        n: u16,
    },
    /// A connection uses it.
    Kept,
}

/// The last look.
#[derive(Default)]
struct Look {
    begun: Time,
    /// The addresses of the relays that could be asked.
    ips: HashSet<IpAddr>,
}

impl Nat {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            description: None,
            punched: HashSet::new(),
            sockets: HashMap::new(),
            detector: Detector::new(HolePunching::On, now),
            asking: Vec::new(),
            look: Look::default(),
        }
    }
}

impl Node {
    pub(super) fn has_socket(&self, port: u16) -> bool {
        matches!(self.nat.sockets.get(&port), Some(Use::Extra { .. } | Use::Kept))
    }
}

impl World {
    pub(super) fn next_detection(&self, node: usize) -> Time {
        self.nodes[node].nat.detector.next_timeout().map_or(Time::MAX, |at| self.time(at))
    }

    pub(super) fn look_at_nat(&mut self, node: usize) {
        let (registering, clock) = (self.is_registering(node), self.clock());
        self.nodes[node].nat.detector.wanted(registering, clock);
        self.follow_detector(node);
    }

    /// A relay sees the node at another address.
    pub(super) fn network_moved(&mut self, node: usize) {
        let (registering, clock) = (self.is_registering(node), self.clock());
        self.nodes[node].nat.detector.moved(registering, clock);
        self.follow_detector(node);
    }

    pub(super) fn tend_nat(&mut self, node: usize) {
        if self.next_detection(node) <= self.now {
            let (registering, clock) = (self.is_registering(node), self.clock());
            self.nodes[node].nat.detector.timeout(registering, clock);
            self.follow_detector(node);
        }
    }

    /// A port that no other socket of the node has had: a NAT may still let in what the other has asked for.
    pub(super) fn new_socket(&mut self, node: usize, used: Use) -> u16 {
        loop {
            let opening = &mut self.nodes[node];
            // Comes to each port once before it comes to any again.
            opening.next_port = opening.next_port.wrapping_add(7919);
            let port = opening.next_port;
            if port >= 2048 && port != opening.port && !opening.nat.sockets.contains_key(&port) {
                opening.nat.sockets.insert(port, used);
                return port;
            }
        }
    }

    /// Carries out what the machine decided.
    fn follow_detector(&mut self, node: usize) {
        while let Some(action) = self.nodes[node].nat.detector.poll() {
            let clock = self.clock();
            match action {
                Action::Begin => {
                    let usual = self.probed(node);
                    let relay_ips = usual.iter().map(|probed| probed.relay.ip());
                    let ips = relay_ips.chain(usual.iter().filter_map(|probed| probed.probes.ip)).collect();
                    let (port, seed) = (self.nodes[node].port, self.random.u64(..));
                    let nat = &mut self.nodes[node].nat;
                    nat.look = Look { begun: self.now, ips };
                    nat.detector.begin(Relays { usual, to_check: Vec::new() }, port, seed, clock);
                }
                Action::Open(count) => {
                    let asking: Vec<u16> = (0..count).map(|n| self.new_socket(node, Use::Asking(n))).collect();
                    let nat = &mut self.nodes[node].nat;
                    nat.detector.opened(&asking, clock);
                    nat.asking = asking;
                }
                Action::Send(probe) => self.send_probe(node, &probe),
                Action::Close => {
                    let nat = &mut self.nodes[node].nat;
                    for port in nat.asking.drain(..) {
                        nat.sockets.remove(&port);
                    }
                }
                Action::Describe(profile) => self.described(node, profile),
                Action::TellAgain => {
                    self.describe_to_all(node);
                    self.peers_network_changed(node);
                }
                Action::Found { found, .. } => self.watch_claim(node, found),
                Action::Heard(_) | Action::ReturnToUsual(_) | Action::DescribeNothing => {}
            }
        }
        let next = self.next_detection(node);
        if next < Time::MAX {
            self.arm_node(node, next.max(self.now));
        }
    }

    fn send_probe(&mut self, node: usize, probe: &Probe) {
        let asking = &self.nodes[node];
        let port = match probe.by {
            Socket::Main => asking.port,
            Socket::New(n) => asking.nat.asking[n],
        };
        self.send_probe_from(node, port, probe);
    }

    pub(super) fn send_probe_from(&mut self, node: usize, port: u16, probe: &Probe) {
        let host = self.nodes[node].host;
        // A relay has named it.
        self.nodes[node].earned.insert(probe.to);
        self.transmit(host, port, probe.to, Body::Probe(probe.signal));
    }

    pub(super) fn probe_answered(&mut self, node: usize, port: u16, from: SocketAddr, answer: Signal) {
        let clock = self.clock();
        let hearing = &mut self.nodes[node];
        let by = match hearing.nat.sockets.get(&port) {
            _ if port == hearing.port => Socket::Main,
            Some(&Use::Asking(n)) => Socket::New(n),
            Some(&Use::Sampling { session }) => return self.sample_answered(node, session, from, answer),
            _ => return,
        };
        hearing.nat.detector.heard(by, from, answer, clock);
        self.follow_detector(node);
    }

    fn described(&mut self, node: usize, profile: NatProfile) {
        let Node { host, port, .. } = self.nodes[node];
        let candidates = candidates(vec![SocketAddr::new(self.hosts[host].ip, port)]);
        let known = self.nodes[node].nat.description.replace((profile, candidates.clone()));
        if known != Some((profile, candidates)) {
            trace!(self, "node {node} is behind {profile:?}");
            self.describe_to_all(node);
            self.peers_network_changed(node);
        }
    }
}

// What the NAT really does.
impl World {
    /// The NATs and firewalls between a node and the internet.
    fn gates_of(&self, node: usize) -> Vec<&Gate> {
        let mut network = self.hosts[self.nodes[node].host].network;
        let mut gates = Vec::new();
        while let Some(gate) = self.uplinks[network] {
            gates.push(&self.gates[gate]);
            network = self.gates[gate].outer;
        }
        gates
    }

    fn watch_claim(&mut self, node: usize, found: Found) {
        trace!(self, "node {node} has found {found:?}");
        let Look { begun, ips } = &self.nodes[node].nat.look;
        if *begun <= self.promises.disturbed {
            // What was asked before and after is about different NATs, or mappings.
            return;
        }
        let many = ips.len() > 1;
        let gates = self.gates_of(node);
        let hard = gates.iter().any(|gate| gate.mapping != Mapping::EndpointIndependent);
        let filtering = gates.iter().map(|gate| gate.filtering).max_by_key(|filtering| *filtering as u8);
        let filtering = filtering.unwrap_or(Filtering::EndpointIndependent);
        let allocation = match gates[..] {
            [] => Some(Allocation::Preserving),
            [gate] => Some(gate.allocation),
            _ => None,
        };
        let claimed = found.profile;
        let what = if claimed.mapping.is_some() && claimed.is_hard() != hard {
            "claims a wrong mapping"
        } else if claimed.filtering.is_some_and(|claimed| (claimed as u8) < filtering as u8) {
            "claims that its NAT lets in more than it does"
        } else if !self.scenario.theme.is_smooth() || self.weather.loss > 0 {
            ""
        } else if claimed.mapping != expected_mapping(hard, many) {
            "has not found out its mapping"
        } else if claimed.filtering != Some(expected_filtering(filtering, many)) {
            "has not found out what its NAT lets in"
        } else if allocation.is_some_and(|allocation| !is_allocation(claimed.allocation, allocation)) {
            "has not found out how its NAT chooses ports"
        } else {
            ""
        };
        self.promises.looks += 1;
        let too_strict = claimed.filtering.is_some_and(|claimed| claimed != expected_filtering(filtering, many));
        self.promises.too_strict += u64::from(too_strict);
        if !what.is_empty() {
            let kind = self.nodes[node].kind;
            self.breaks(format!("node {node} {what}: {claimed:?} behind {kind:?}"));
        }
    }
}

// At the end.
impl World {
    /// The last look of each node asked all relays that have registered it for long.
    pub(super) fn check_detection(&mut self) {
        if !self.scenario.theme.is_smooth() {
            return;
        }
        for node in 0..self.nodes.len() {
            let long = self.clock() - LOOKS_WITHIN;
            let relays = self.registered_before(node, long);
            let missed = relays.iter().find(|relay| !self.nodes[node].nat.look.ips.contains(&relay.ip()));
            if let Some(relay) = missed {
                return self.breaks(format!("node {node} has not asked {relay}, which has registered it"));
            }
        }
    }
}

/// One relay at one address cannot tell a mapping for one address from one for all.
fn expected_mapping(hard: bool, many: bool) -> Option<Mapping> {
    match (hard, many) {
        (true, _) => Some(Mapping::PortDependent),
        (false, true) => Some(Mapping::EndpointIndependent),
        (false, false) => None,
    }
}

/// One relay at one address cannot send from another.
fn expected_filtering(filtering: Filtering, many: bool) -> Filtering {
    match filtering {
        Filtering::EndpointIndependent if !many => Filtering::HostDependent,
        filtering => filtering,
    }
}

/// Neighbours may take ports of a contiguous allocator in between.
fn is_allocation(claimed: Option<Allocation>, real: Allocation) -> bool {
    match (claimed, real) {
        (Some(Allocation::Contiguous(claimed)), Allocation::Contiguous(real)) => {
            claimed % real == 0 && claimed.signum() == real.signum()
        }
        (claimed, real) => claimed == Some(real),
    }
}
