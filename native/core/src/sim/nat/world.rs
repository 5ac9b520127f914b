//! The network, the relays and the nodes.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use super::READY;
use crate::config::HolePunching;
use crate::coordinate::{Coordinate, Coordinator, Party, Refused};
use crate::detection::{self, Detector, Probed, Relays, Round, Turn};
use crate::nat::NatProfile;
use crate::proto::control::{Id, Probes, PunchFailure};
use crate::proto::signal::{self, AnswerFrom, Role, SECRET_LEN, Secret};
use crate::punch::{
    Action, MAX_BIRTHDAY_PACKETS, MAX_PACKETS, MAX_PER_PAIR, MAX_PER_STRANGER, MAX_STRANGERS, Punch, Setup, Signal,
    Strategy, Via,
};
use crate::relay::{Book, Generation};
use crate::sim::gate::{Gate, Kind};
use crate::types::{Fingerprint, RelayConfig};

const MS: u64 = 1000;

/// Within one network, and back from a NAT's own address.
const LOCAL_DELAY: u64 = 500;

/// Longer than an attempt takes.
const RETRY: u64 = 8000 * MS;

const RELAY_PORT: u16 = 9443;
const OTHER_PORT: u16 = 9444;

/// After that the relays have registered a node: a round trip.
const REGISTERED: u64 = 150 * MS;

/// The network that all others are behind.
const INTERNET: usize = 0;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    Direct,
    Failed(PunchFailure),
    Refused(Refused),
}

struct Packet {
    from: SocketAddr,
    to: SocketAddr,
    body: Body,
}

enum Body {
    /// Asks a relay where it sees a socket, or is its answer. Only the two can make it.
    Probe(signal::Signal),
    ToRelay {
        node: usize,
        said: ToRelay,
    },
    ToNode {
        relay: usize,
        told: Box<ToNode>,
    },
    /// Only who knows the session can make it.
    Signal {
        session: u64,
        by: Role,
        signal: Signal,
    },
    Connect {
        session: u64,
    },
    Accept {
        session: u64,
    },
}

enum ToRelay {
    Join,
    Alive,
    Describe(NatProfile, Vec<SocketAddr>),
    Request { session: Id, target: Id },
    Execute { session: Id, ports: Vec<u16> },
    Result { session: Id, success: bool },
}

enum ToNode {
    Coordinate(Coordinate),
    Refused { target: Id, error: Refused },
    Execute { session: Id, ports: Vec<u16> },
    Over { session: Id },
}

enum Event {
    Arrive { network: usize, packet: Packet },
    Join { node: usize },
    Alive { node: usize },
    Look { node: usize },
    Detect { node: usize },
    Sample { node: usize, session: u64 },
    Wake { node: usize, session: u64 },
    Dial { node: usize, session: u64, tries: u32 },
    Forget { node: usize, session: u64 },
    Attempt { node: usize, peer: usize, relay: usize },
    Spoof { node: usize, session: u64, n: u64 },
}

#[derive(Clone, Copy)]
enum Owner {
    Node(usize),
    Relay(usize),
    Gate(usize),
}

struct Relay {
    ip: IpAddr,
    book: Book,
    coordinator: Coordinator,
    nodes: HashMap<Generation, usize>,
    registered: HashMap<usize, (Generation, SocketAddr)>,
}

struct Node {
    kind: Kind,
    network: usize,
    ip: IpAddr,
    key: Fingerprint,
    id: Id,
    hostile: bool,
    relays: Vec<usize>,
    main: u16,
    sockets: HashMap<u16, Socket>,
    detector: Detector,
    /// Ports of the sockets that the detector has opened.
    asking: Vec<u16>,
    detect_at: Option<u64>,
    profile: NatProfile,
    sessions: BTreeMap<u64, Session>,
    links: BTreeMap<usize, Link>,
    attempts: Vec<(Ended, u64)>,
}

#[derive(Clone, Copy)]
enum Socket {
    Main,
    Extra {
        session: u64,
        n: u16,
    },
    /// For questions of the detector.
    Asking(usize),
    /// For the sample of a session.
    Sampling(u64),
}

struct Session {
    punch: Punch,
    role: Role,
    peer: usize,
    relay: usize,
    id: Id,
    /// What the relay said of the peer.
    seen: SocketAddr,
    candidates: Vec<SocketAddr>,
    birthday: bool,
    extra: Vec<u16>,
    sample: Option<(u16, Round)>,
    wake: Option<u64>,
    path: Option<(Via, SocketAddr)>,
    connected: bool,
    // What was sent and heard.
    heard: HashSet<(Via, SocketAddr)>,
    sent: HashMap<(Via, SocketAddr), u32>,
    strangers: HashSet<(Via, SocketAddr)>,
    packets: u32,
}

/// What a node has with another.
#[derive(Default)]
struct Link {
    /// When it last asked for an attempt that is not over.
    asked: Option<u64>,
    connected: bool,
    /// Over local addresses.
    local: bool,
}

pub(super) struct World {
    random: fastrand::Rng,
    start: Instant,
    now: u64,
    counter: u64,
    events: BinaryHeap<Reverse<(u64, u64)>>,
    waiting: HashMap<u64, Event>,
    loss: f64,
    jitter: u64,
    delays: HashMap<IpAddr, u64>,
    owners: HashMap<(usize, IpAddr), Owner>,
    /// The way out of each network.
    uplinks: Vec<Option<usize>>,
    gates: Vec<Gate>,
    relays: Vec<Relay>,
    nodes: Vec<Node>,
    next_ip: u32,
    next_session: u64,
    /// Those that a hostile node names.
    bystanders: HashSet<IpAddr>,
    disturbed: HashMap<SocketAddr, u32>,
    broken: Option<String>,
}

// What a test builds.
impl World {
    pub(super) fn new(seed: u64, relays: usize) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let loss = if random.bool() { 0.05 } else { random.f64() * 0.05 };
        let jitter = random.u64(1..10 * MS);
        let mut world = Self {
            random,
            start: Instant::now(),
            now: 0,
            counter: 0,
            events: BinaryHeap::new(),
            waiting: HashMap::new(),
            loss,
            jitter,
            delays: HashMap::new(),
            owners: HashMap::new(),
            uplinks: vec![None],
            gates: Vec::new(),
            relays: Vec::new(),
            nodes: Vec::new(),
            next_ip: 0,
            next_session: 0,
            bystanders: HashSet::new(),
            disturbed: HashMap::new(),
            broken: None,
        };
        for _ in 0..relays {
            world.relay();
        }
        world
    }

    pub(super) fn lossless(&mut self) {
        self.loss = 0.0;
    }

    /// Others behind a node's NAT take ports all the time.
    pub(super) fn share(&mut self, node: usize) {
        let gate = self.uplinks[self.nodes[node].network].unwrap();
        self.gates[gate].shared = true;
    }

    pub(super) fn up_to(&mut self, most: u64) -> u64 {
        self.random.u64(0..=most)
    }

    pub(super) fn any(&mut self, kinds: &[Kind]) -> Kind {
        kinds[self.random.usize(..kinds.len())]
    }

    /// A node with a NAT of its own.
    pub(super) fn node(&mut self, kind: Kind, relays: &[usize]) -> usize {
        let network = self.network(kind);
        self.node_in(network, kind, relays)
    }

    /// What is behind a NAT of this kind.
    pub(super) fn network(&mut self, kind: Kind) -> usize {
        match kind {
            Kind::Open => INTERNET,
            Kind::CarrierGrade => {
                let hairpin = self.random.bool();
                let carrier = self.carrier(hairpin);
                self.home(carrier, Kind::PortRestricted)
            }
            Kind::Firewall | Kind::Blocked => self.behind(kind, INTERNET, None),
            _ => {
                let ip = self.public_ip();
                self.behind(kind, INTERNET, Some(ip))
            }
        }
    }

    /// What is behind a carrier's NAT, which is none of the hard ones.
    pub(super) fn carrier(&mut self, hairpin: bool) -> usize {
        let ip = self.public_ip();
        let kind = self.any(&[Kind::FullCone, Kind::AddressRestricted, Kind::PortRestricted]);
        let network = self.behind(kind, INTERNET, Some(ip));
        let gate = self.uplinks[network].unwrap();
        self.gates[gate].hairpin = hairpin;
        network
    }

    /// What is behind a NAT that is behind another.
    pub(super) fn home(&mut self, carrier: usize, kind: Kind) -> usize {
        let ip = self.inner_ip(carrier, [100, 64]);
        self.behind(kind, carrier, Some(ip))
    }

    pub(super) fn node_in(&mut self, network: usize, kind: Kind, relays: &[usize]) -> usize {
        let ip = match kind {
            Kind::Open => self.public_ip(),
            // The way to a firewall's node is through it.
            Kind::Firewall | Kind::Blocked => {
                let (ip, gate) = (self.public_ip(), self.uplinks[network].unwrap());
                self.owners.insert((INTERNET, ip), Owner::Gate(gate));
                ip
            }
            _ => self.inner_ip(network, [192, 168]),
        };
        let node = self.nodes.len();
        self.owners.insert((network, ip), Owner::Node(node));
        let main = self.random.u16(1024..);
        let mut key = [0; 32];
        self.random.fill(&mut key);
        self.nodes.push(Node {
            kind,
            network,
            ip,
            key: key.into(),
            id: Id::new(node.to_string()).unwrap(),
            hostile: false,
            relays: relays.to_vec(),
            main,
            sockets: HashMap::from([(main, Socket::Main)]),
            detector: Detector::new(HolePunching::On, self.start),
            asking: Vec::new(),
            detect_at: None,
            profile: NatProfile::default(),
            sessions: BTreeMap::new(),
            links: BTreeMap::new(),
            attempts: Vec::new(),
        });
        let start = self.up_to(200 * MS);
        self.at(start, Event::Join { node });
        node
    }

    /// It knows the protocol and keeps to nothing.
    pub(super) fn turn_hostile(&mut self, node: usize) {
        self.nodes[node].hostile = true;
    }

    /// Relays, nodes of all kinds, some in the same networks, and who wants to meet whom.
    pub(super) fn populate(&mut self, relays: usize, nodes: usize) -> Vec<(usize, usize)> {
        for _ in 0..relays {
            self.relay();
        }
        for _ in 0..nodes {
            let mut registered: Vec<usize> =
                (0..self.random.usize(1..4)).map(|_| self.random.usize(..relays)).collect();
            registered.sort_unstable();
            registered.dedup();
            let neighbour = (!self.nodes.is_empty()).then(|| self.random.usize(..self.nodes.len()));
            match neighbour.map(|node| &self.nodes[node]) {
                Some(&Node { kind, network, .. }) if kind.has_network() && self.random.u8(..10) == 0 => {
                    self.node_in(network, kind, &registered);
                }
                _ => {
                    let kind = self.any(&Kind::ALL);
                    self.node(kind, &registered);
                }
            }
        }
        let mut pairs = HashSet::new();
        let mut chosen = Vec::new();
        for _ in 0..nodes {
            let (a, b) = (self.random.usize(..nodes), self.random.usize(..nodes));
            let neighbours = self.nodes[a].network == self.nodes[b].network && self.nodes[a].network != INTERNET;
            if a != b && !neighbours && self.common_relay(a, b).is_some() && pairs.insert((a.min(b), a.max(b))) {
                chosen.push((a, b));
                self.want(a, b);
                if self.random.bool() {
                    self.want(b, a);
                }
            }
        }
        chosen
    }

    /// It tries three times, unless it is connected before.
    fn want(&mut self, node: usize, peer: usize) {
        let first = READY + self.up_to(1000 * MS);
        for n in 0..3 {
            let relay = self.any_common_relay(node, peer);
            self.attempt_through(relay, first + n * RETRY, node, peer);
        }
    }

    fn any_common_relay(&mut self, node: usize, peer: usize) -> usize {
        let relays = &self.nodes[node].relays;
        let common: Vec<usize> =
            relays.iter().copied().filter(|relay| self.nodes[peer].relays.contains(relay)).collect();
        common[self.random.usize(..common.len())]
    }

    fn relay(&mut self) {
        let ip = self.public_ip();
        self.delays.insert(ip, self.random.u64(MS..10 * MS));
        self.owners.insert((INTERNET, ip), Owner::Relay(self.relays.len()));
        let config = RelayConfig { accept_rate: 10_000, ..RelayConfig::default() };
        self.relays.push(Relay {
            ip,
            book: Book::new(&config, self.start),
            coordinator: Coordinator::default(),
            nodes: HashMap::new(),
            registered: HashMap::new(),
        });
    }

    fn behind(&mut self, kind: Kind, outer: usize, ip: Option<IpAddr>) -> usize {
        let (network, gate) = (self.uplinks.len(), self.gates.len());
        self.uplinks.push(Some(gate));
        self.gates.push(Gate::new(kind, network, outer, ip, &mut self.random));
        if let Some(ip) = ip {
            self.owners.insert((outer, ip), Owner::Gate(gate));
        }
        network
    }

    fn public_ip(&mut self) -> IpAddr {
        self.next_ip += 1;
        let ip = IpAddr::V4(Ipv4Addr::from(0x1400_0000 + self.next_ip));
        self.delays.insert(ip, self.random.u64(5 * MS..45 * MS));
        ip
    }

    /// The same ones in every network.
    fn inner_ip(&self, network: usize, [a, b]: [u8; 2]) -> IpAddr {
        let free = |n: &u8| !self.owners.contains_key(&(network, IpAddr::from([a, b, 0, *n])));
        IpAddr::from([a, b, 0, (2..).find(free).unwrap()])
    }

    pub(super) fn attempt_at(&mut self, at: u64, node: usize, peer: usize) {
        let relay = self.common_relay(node, peer).unwrap();
        self.attempt_through(relay, at, node, peer);
    }

    pub(super) fn attempt_through(&mut self, relay: usize, at: u64, node: usize, peer: usize) {
        self.at(at, Event::Attempt { node, peer, relay });
    }

    pub(super) fn run(&mut self, until: u64) {
        while let Some(&Reverse((at, n))) = self.events.peek()
            && at <= until
        {
            self.events.pop();
            self.now = at;
            let event = self.waiting.remove(&n).unwrap();
            self.happen(event);
        }
        self.now = until;
    }
}

// What a test looks at.
impl World {
    pub(super) fn check(&self, label: impl Fn() -> String) {
        if let Some(broken) = &self.broken {
            panic!("{}: {broken}", label());
        }
    }

    pub(super) fn kind(&self, node: usize) -> Kind {
        self.nodes[node].kind
    }

    pub(super) fn profile(&self, node: usize) -> NatProfile {
        self.nodes[node].profile
    }

    /// Of a node whose NAT is sequential.
    pub(super) fn step(&self, node: usize) -> i16 {
        let gate = self.uplinks[self.nodes[node].network].unwrap();
        self.gates[gate].allocation.step().unwrap()
    }

    /// How its attempts ended, and how long each took.
    pub(super) fn attempts(&self, node: usize) -> &[(Ended, u64)] {
        &self.nodes[node].attempts
    }

    /// Whether each of two nodes is connected with the other.
    pub(super) fn connected_with(&self, a: usize, b: usize) -> [bool; 2] {
        [(a, b), (b, a)].map(|(node, peer)| self.nodes[node].links.get(&peer).is_some_and(|link| link.connected))
    }

    pub(super) fn meet_locally(&self, node: usize, peer: usize) -> bool {
        self.nodes[node].links[&peer].local
    }

    /// To how many addresses of bystanders something was sent, and how many packets to one at most.
    pub(super) fn disturbed(&self) -> (usize, u32) {
        (self.disturbed.len(), self.disturbed.values().copied().max().unwrap_or(0))
    }

    /// Once all must have expired.
    pub(super) fn sessions_at_relays(&mut self) -> usize {
        let now = self.instant(self.now + 60_000 * MS);
        let nobody = Id::new("nobody").unwrap();
        self.relays
            .iter_mut()
            .filter_map(|relay| {
                let (node, _) = relay.registered.values().next()?;
                relay.coordinator.result(*node, &nobody, false, now);
                Some(relay.coordinator.sessions())
            })
            .sum()
    }
}

// The network.
impl World {
    fn at(&mut self, time: u64, event: Event) {
        self.counter += 1;
        self.waiting.insert(self.counter, event);
        self.events.push(Reverse((time, self.counter)));
    }

    fn instant(&self, time: u64) -> Instant {
        self.start + Duration::from_micros(time)
    }

    /// Timers are 1 ms coarse.
    fn micros(&self, instant: Instant) -> u64 {
        let nanos = u64::try_from(instant.saturating_duration_since(self.start).as_nanos()).unwrap();
        nanos.div_ceil(1000).next_multiple_of(MS)
    }

    fn transmit(&mut self, mut network: usize, mut packet: Packet) {
        if self.bystanders.contains(&packet.to.ip()) {
            *self.disturbed.entry(packet.to).or_default() += 1;
            return;
        }
        loop {
            if self.owners.contains_key(&(network, packet.to.ip())) {
                return self.carry(network, packet);
            }
            let Some(gate) = self.uplinks[network] else { return };
            let to_relay = matches!(self.owners.get(&(INTERNET, packet.to.ip())), Some(Owner::Relay(_)));
            let gate = &mut self.gates[gate];
            let Some(outside) = gate.out(packet.from, packet.to, to_relay, self.now) else { return };
            packet.from = outside;
            network = gate.outer;
        }
    }

    fn carry(&mut self, network: usize, packet: Packet) {
        let delay = match [packet.from.ip(), packet.to.ip()].map(|ip| self.delays.get(&ip)) {
            [Some(from), Some(to)] if network == INTERNET && packet.from.ip() != packet.to.ip() => {
                // A connection repeats what is lost.
                let connection = matches!(packet.body, Body::ToRelay { .. } | Body::ToNode { .. });
                if !connection && self.random.f64() < self.loss {
                    return;
                }
                from + to + self.random.u64(0..self.jitter)
            }
            _ => LOCAL_DELAY,
        };
        self.at(self.now + delay, Event::Arrive { network, packet });
    }

    fn arrive(&mut self, mut network: usize, mut packet: Packet) {
        loop {
            match self.owners.get(&(network, packet.to.ip())) {
                Some(&Owner::Gate(gate)) => {
                    let from_relay = matches!(self.owners.get(&(INTERNET, packet.from.ip())), Some(Owner::Relay(_)));
                    let gate = &mut self.gates[gate];
                    let inside = gate.into(packet.from, packet.to, self.now);
                    let Some(inside) = inside.filter(|_| from_relay || !gate.only_relays) else { return };
                    packet.to = inside;
                    network = gate.inner;
                }
                Some(&Owner::Relay(relay)) => return self.at_relay(relay, packet),
                Some(&Owner::Node(node)) => return self.at_node(node, packet),
                None => return,
            }
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Arrive { network, packet } => self.arrive(network, packet),
            Event::Join { node } => self.join(node),
            Event::Alive { node } => self.keep_alive(node),
            Event::Look { node } => self.look(node),
            Event::Detect { node } => self.detect(node),
            Event::Sample { node, session } => self.sample(node, session),
            Event::Wake { node, session } => self.wake(node, session),
            Event::Dial { node, session, tries } => self.dial(node, session, tries),
            Event::Forget { node, session } => self.forget(node, session),
            Event::Attempt { node, peer, relay } => self.attempt(node, peer, relay),
            Event::Spoof { node, session, n } => self.spoof(node, session, n),
        }
    }
}

// The relays.
impl World {
    fn at_relay(&mut self, relay: usize, packet: Packet) {
        let Packet { from, to, body } = packet;
        match body {
            Body::Probe(asked) => self.answer(relay, from, to, asked),
            Body::ToRelay { node, said } => self.hear(relay, node, from, said),
            _ => {}
        }
    }

    /// Answers only to the address that the node is registered from.
    fn answer(&mut self, relay: usize, from: SocketAddr, to: SocketAddr, asked: signal::Signal) {
        let signal::Body::ProbeRequest { from: answer_from, to_port } = asked.body else { return };
        let registered = self.relays[relay].registered.get(&(asked.id as usize));
        if registered.is_none_or(|(_, seen)| seen.ip() != from.ip()) {
            return;
        }
        let source = match answer_from {
            AnswerFrom::Same => to.port(),
            AnswerFrom::OtherPort if to.port() == RELAY_PORT => OTHER_PORT,
            AnswerFrom::OtherPort => RELAY_PORT,
            AnswerFrom::OtherAddress => return,
        };
        let port = to_port.map_or(from.port(), NonZeroU16::get);
        let (source, to) = (SocketAddr::new(to.ip(), source), SocketAddr::new(from.ip(), port));
        let body = signal::Body::ProbeReply { observed: from };
        let body = Body::Probe(signal::Signal { body, ..asked });
        self.transmit(INTERNET, Packet { from: source, to, body });
    }

    fn hear(&mut self, relay: usize, node: usize, seen: SocketAddr, said: ToRelay) {
        let now = self.instant(self.now);
        let (id, key) = (self.nodes[node].id.clone(), self.nodes[node].key);
        let at = &mut self.relays[relay];
        if let ToRelay::Join = said {
            let generation = at.book.register(id, key, seen.ip(), now).unwrap().generation;
            at.coordinator.join(generation, now);
            at.nodes.insert(generation, node);
            at.registered.insert(node, (generation, seen));
            return;
        }
        let Some((generation, known)) = at.registered.get_mut(&node) else { return };
        *known = seen;
        let generation = *generation;
        match said {
            ToRelay::Join | ToRelay::Alive => {}
            ToRelay::Describe(profile, candidates) => at.coordinator.describe(generation, profile, &candidates),
            ToRelay::Request { session, target } => self.request(relay, generation, session, target),
            ToRelay::Execute { session, ports } => {
                if let Some(execute) = at.coordinator.execute(generation, &session, &ports, now) {
                    self.tell(relay, execute.to, ToNode::Execute { session, ports: execute.ports });
                }
            }
            ToRelay::Result { session, success } => {
                if let Some(to) = at.coordinator.result(generation, &session, success, now) {
                    self.tell(relay, to, ToNode::Over { session });
                }
            }
        }
    }

    fn request(&mut self, relay: usize, from: Generation, session: Id, target: Id) {
        let now = self.instant(self.now);
        let mut secret = [0; 32];
        secret[..8].copy_from_slice(&self.next_session.to_be_bytes());
        self.next_session += 1;
        let coordinated = match self.relays[relay].book.find(from, &target) {
            Some(found) => {
                let [from, found] = [from, found].map(|generation| self.party(relay, generation));
                self.relays[relay].coordinator.request(&from, &found, session, secret, now)
            }
            None => Err(Refused::NotRegistered),
        };
        match coordinated {
            Ok(both) => both.into_iter().for_each(|told| self.tell(relay, told.to, ToNode::Coordinate(told))),
            Err(error) => self.tell(relay, from, ToNode::Refused { target, error }),
        }
    }

    fn party(&mut self, relay: usize, generation: Generation) -> Party {
        let Relay { ip, nodes, registered, .. } = &self.relays[relay];
        let node = nodes[&generation];
        let (_, seen) = registered[&node];
        let real = 2 * (self.delays[ip] + self.delays[&seen.ip()]);
        let measured = real * self.random.u64(90..130) / 100;
        Party {
            node: generation,
            id: self.nodes[node].id.clone(),
            key: self.nodes[node].key,
            seen,
            round_trip: Duration::from_micros(measured),
        }
    }

    fn tell(&mut self, relay: usize, to: Generation, told: ToNode) {
        let Relay { ip, nodes, registered, .. } = &self.relays[relay];
        let (from, to) = (SocketAddr::new(*ip, RELAY_PORT), registered[&nodes[&to]].1);
        self.transmit(INTERNET, Packet { from, to, body: Body::ToNode { relay, told: Box::new(told) } });
    }

    fn common_relay(&self, a: usize, b: usize) -> Option<usize> {
        self.nodes[a].relays.iter().copied().find(|relay| self.nodes[b].relays.contains(relay))
    }
}

// The nodes.
impl World {
    fn at_node(&mut self, node: usize, packet: Packet) {
        let Packet { from, to, body } = packet;
        let Some(&socket) = self.nodes[node].sockets.get(&to.port()) else { return };
        match body {
            Body::Probe(answer) => self.answered(node, socket, from, answer),
            Body::ToNode { relay, told } => match *told {
                ToNode::Coordinate(told) => self.begin(node, relay, told),
                ToNode::Execute { session, ports } => self.learn_ports(node, relay, &session, &ports),
                ToNode::Refused { target, error } => self.refused(node, &target, error),
                ToNode::Over { session } => self.over(node, relay, &session),
            },
            Body::Signal { session, by, signal } => self.signalled(node, socket, from, session, by, signal),
            Body::Connect { session } => self.accept(node, to, from, session),
            Body::Accept { session } => self.accepted(node, session),
            Body::ToRelay { .. } => {}
        }
    }

    fn send(&mut self, node: usize, port: u16, to: SocketAddr, body: Body) {
        let Node { ip, network, .. } = self.nodes[node];
        self.transmit(network, Packet { from: SocketAddr::new(ip, port), to, body });
    }

    fn say(&mut self, node: usize, relay: usize, said: ToRelay) {
        let to = SocketAddr::new(self.relays[relay].ip, RELAY_PORT);
        self.send(node, self.nodes[node].main, to, Body::ToRelay { node, said });
    }

    fn socket(&mut self, node: usize, socket: Socket) -> u16 {
        loop {
            let port = self.random.u16(1024..);
            if let std::collections::hash_map::Entry::Vacant(free) = self.nodes[node].sockets.entry(port) {
                free.insert(socket);
                return port;
            }
        }
    }

    fn join(&mut self, node: usize) {
        for relay in self.nodes[node].relays.clone() {
            self.say(node, relay, ToRelay::Join);
        }
        self.at(self.now + REGISTERED, Event::Look { node });
        self.at(self.now + 15_000 * MS, Event::Alive { node });
    }

    fn keep_alive(&mut self, node: usize) {
        for relay in self.nodes[node].relays.clone() {
            self.say(node, relay, ToRelay::Alive);
        }
        self.at(self.now + 15_000 * MS, Event::Alive { node });
    }

    fn look(&mut self, node: usize) {
        let now = self.instant(self.now);
        self.nodes[node].detector.wanted(false, now);
        self.follow(node);
    }

    fn detect(&mut self, node: usize) {
        let now = self.instant(self.now);
        self.nodes[node].detector.timeout(false, now);
        self.follow(node);
    }

    /// Carries out what the detector decides.
    fn follow(&mut self, node: usize) {
        while let Some(action) = self.nodes[node].detector.poll() {
            let now = self.instant(self.now);
            match action {
                detection::Action::Begin => {
                    let relays = Relays { usual: self.probed(node), to_check: Vec::new() };
                    let (main, seed) = (self.nodes[node].main, self.random.u64(..));
                    self.nodes[node].detector.begin(relays, main, seed, now);
                }
                detection::Action::Open(count) => {
                    let asking: Vec<u16> = (0..count).map(|n| self.socket(node, Socket::Asking(n))).collect();
                    self.nodes[node].detector.opened(&asking, now);
                    self.nodes[node].asking = asking;
                }
                detection::Action::Send(probe) => {
                    let port = match probe.by {
                        detection::Socket::Main => self.nodes[node].main,
                        detection::Socket::New(n) => self.nodes[node].asking[n],
                    };
                    self.send(node, port, probe.to, Body::Probe(probe.signal));
                }
                detection::Action::Close => {
                    for port in std::mem::take(&mut self.nodes[node].asking) {
                        self.nodes[node].sockets.remove(&port);
                    }
                }
                detection::Action::Describe(profile) => self.describe(node, profile),
                _ => {}
            }
        }
        let next = self.nodes[node].detector.next_timeout().map(|next| self.micros(next));
        let armed = self.nodes[node].detect_at.filter(|at| *at > self.now);
        if let Some(next) = next.filter(|next| armed.is_none_or(|at| *next < at)) {
            self.nodes[node].detect_at = Some(next);
            self.at(next, Event::Detect { node });
        }
    }

    /// The relays of a node, which are all registered.
    fn probed(&self, node: usize) -> Vec<Probed> {
        let probed = |relay: usize| {
            let Relay { ip, registered, .. } = &self.relays[relay];
            let (_, seen_at) = *registered.get(&node)?;
            let secret = Secret::from([0; SECRET_LEN]);
            let probes = Probes { id: node as u64, secret, port: OTHER_PORT, ip: None };
            Some(Probed { relay: SocketAddr::new(*ip, RELAY_PORT), seen_at, probes })
        };
        self.nodes[node].relays.iter().filter_map(|relay| probed(*relay)).collect()
    }

    fn answered(&mut self, node: usize, socket: Socket, from: SocketAddr, answer: signal::Signal) {
        let by = match socket {
            Socket::Main => detection::Socket::Main,
            Socket::Asking(n) => detection::Socket::New(n),
            Socket::Sampling(session) => return self.sampled(node, session, from, answer),
            Socket::Extra { .. } => return,
        };
        let now = self.instant(self.now);
        self.nodes[node].detector.heard(by, from, answer, now);
        self.follow(node);
    }

    fn describe(&mut self, node: usize, profile: NatProfile) {
        self.nodes[node].profile = profile;
        let Node { ip, main, hostile, kind, .. } = self.nodes[node];
        let mut candidates = Vec::new();
        if hostile {
            for n in 0..20 {
                candidates.push(SocketAddr::new(self.bystander(n), 53 + 1000 * n as u16));
            }
        } else if kind.has_network() {
            candidates.push(SocketAddr::new(ip, main));
        }
        for relay in self.nodes[node].relays.clone() {
            self.say(node, relay, ToRelay::Describe(profile, candidates.clone()));
        }
    }

    fn attempt(&mut self, node: usize, peer: usize, relay: usize) {
        let link = self.nodes[node].links.entry(peer).or_default();
        if link.connected || link.asked.is_some() {
            return;
        }
        link.asked = Some(self.now);
        let session = Id::new(format!("{node} {}", self.now)).unwrap();
        let target = self.nodes[peer].id.clone();
        self.say(node, relay, ToRelay::Request { session, target });
    }

    fn refused(&mut self, node: usize, target: &Id, error: Refused) {
        let Some(peer) = self.nodes.iter().position(|node| node.id == *target) else { return };
        self.ended(node, peer, Ended::Refused(error));
    }

    /// An attempt of this node ended.
    fn ended(&mut self, node: usize, peer: usize, ended: Ended) {
        let now = self.now;
        let trying = &mut self.nodes[node];
        let Some(asked) = trying.links.get_mut(&peer).and_then(|link| link.asked.take()) else { return };
        trying.attempts.push((ended, now - asked));
    }

    fn begin(&mut self, node: usize, relay: usize, told: Coordinate) {
        let number = u64::from_be_bytes(told.secret[..8].try_into().unwrap());
        let now = self.instant(self.now);
        let Some(peer) = self.nodes.iter().position(|peer| peer.id == told.peer) else { return };
        let ours = self.nodes[node].profile;
        let strategy = Strategy::choose(&ours, &told.profile, true);
        let seen = self.relays[relay].registered[&peer].1;
        if told.seen != seen {
            self.breaks(format!("{} was never at {}", self.nodes[peer].id.as_bytes().escape_ascii(), told.seen));
        }
        let begin = now + told.delay;
        let setup = Setup {
            role: told.role,
            ours,
            theirs: told.profile,
            peer: told.seen,
            ports: Vec::new(),
            candidates: told.candidates.clone(),
            hard: true,
            begin,
            seed: self.random.u64(..),
        };
        let session = Session {
            punch: Punch::new(setup, now),
            role: told.role,
            peer,
            relay,
            id: told.session,
            seen: told.seen,
            candidates: told.candidates,
            birthday: matches!(strategy, Strategy::BirthdayOpen | Strategy::BirthdayProbe),
            extra: Vec::new(),
            sample: None,
            wake: None,
            path: None,
            connected: false,
            heard: HashSet::new(),
            sent: HashMap::new(),
            strangers: HashSet::new(),
            packets: 0,
        };
        self.nodes[node].sessions.insert(number, session);
        self.at(self.micros(begin) + 6000 * MS, Event::Forget { node, session: number });
        if self.nodes[node].hostile {
            return self.at(self.now, Event::Spoof { node, session: number, n: 0 });
        }
        if strategy.predicts(&ours) {
            let port = self.socket(node, Socket::Sampling(number));
            let relay = SocketAddr::new(self.relays[relay].ip, RELAY_PORT);
            let probed = self.probed(node).into_iter().find(|probed| probed.relay == relay);
            let round = Round::sample(probed.unwrap(), self.random.u64(..), now);
            self.nodes[node].sessions.get_mut(&number).unwrap().sample = Some((port, round));
            self.sample(node, number);
        }
        self.wake(node, number);
    }

    fn sample(&mut self, node: usize, number: u64) {
        let now = self.instant(self.now);
        loop {
            let Some(session) = self.nodes[node].sessions.get_mut(&number) else { return };
            let Some((port, round)) = &mut session.sample else { return };
            let port = *port;
            match round.poll(now) {
                Turn::Ask(probes) => {
                    probes.iter().for_each(|probe| self.send(node, port, probe.to, Body::Probe(probe.signal)));
                }
                Turn::Wait(until) => return self.at(self.micros(until), Event::Sample { node, session: number }),
                Turn::Over => {
                    let seen = round.sampled();
                    session.sample = None;
                    let (relay, id) = (session.relay, session.id.clone());
                    self.nodes[node].sockets.remove(&port);
                    if let Some(seen) = seen {
                        let ports = self.nodes[node].profile.predict(seen.port());
                        self.say(node, relay, ToRelay::Execute { session: id, ports });
                    }
                    return;
                }
            }
        }
    }

    fn sampled(&mut self, node: usize, number: u64, from: SocketAddr, answer: signal::Signal) {
        let now = self.instant(self.now);
        let Some(session) = self.nodes[node].sessions.get_mut(&number) else { return };
        if let Some((_, round)) = &mut session.sample {
            round.heard(detection::Socket::New(0), from, answer, now);
            self.sample(node, number);
        }
    }

    fn learn_ports(&mut self, node: usize, relay: usize, id: &Id, ports: &[u16]) {
        let now = self.instant(self.now);
        let known = |(_, session): &(&u64, &mut Session)| session.relay == relay && session.id == *id;
        let Some((&number, session)) = self.nodes[node].sessions.iter_mut().find(known) else { return };
        session.punch.learn_ports(ports, now);
        self.wake(node, number);
    }

    /// The other one's attempt is over.
    fn over(&mut self, node: usize, relay: usize, id: &Id) {
        let now = self.instant(self.now);
        let known = |(_, session): &(&u64, &mut Session)| session.relay == relay && session.id == *id;
        let Some((&number, session)) = self.nodes[node].sessions.iter_mut().find(known) else { return };
        session.punch.stop(now);
        self.wake(node, number);
    }

    fn signalled(&mut self, node: usize, socket: Socket, from: SocketAddr, number: u64, by: Role, signal: Signal) {
        let now = self.instant(self.now);
        let via = match socket {
            Socket::Main => Via::Main,
            Socket::Extra { session, n } if session == number => Via::Extra(n),
            Socket::Extra { .. } | Socket::Asking(_) | Socket::Sampling(_) => return,
        };
        let Some(session) = self.nodes[node].sessions.get_mut(&number) else { return };
        // Not its own, sent back.
        if session.role != by {
            session.heard.insert((via, from));
            session.punch.received(via, from, signal, now);
            self.wake(node, number);
        }
    }

    fn wake(&mut self, node: usize, number: u64) {
        let now = self.instant(self.now);
        loop {
            let Node { hostile: false, sessions, .. } = &mut self.nodes[node] else { return };
            let Some(session) = sessions.get_mut(&number) else { return };
            match session.punch.poll(now) {
                Some(action) => self.act(node, number, action),
                None => break,
            }
        }
        let Some(session) = self.nodes[node].sessions.get(&number) else { return };
        if let Some(next) = session.punch.next(now) {
            let (next, wake) = (self.micros(next), session.wake);
            if next <= self.now {
                return self.breaks(format!("to be polled again at once, {next} at {}", self.now));
            }
            // One that is no longer needed does no harm.
            if wake.is_none_or(|wake| wake <= self.now || next < wake) {
                self.nodes[node].sessions.get_mut(&number).unwrap().wake = Some(next);
                self.at(next, Event::Wake { node, session: number });
            }
        }
    }

    fn act(&mut self, node: usize, number: u64, action: Action) {
        match action {
            Action::Open(sockets) => {
                let extra: Vec<u16> =
                    (0..sockets).map(|n| self.socket(node, Socket::Extra { session: number, n })).collect();
                let session = self.nodes[node].sessions.get_mut(&number).unwrap();
                session.extra = extra;
                session.punch.opened(sockets);
            }
            Action::Send { via, to, signal } => {
                self.account(node, number, via, to);
                let by = self.nodes[node].sessions[&number].role;
                let port = self.port(node, number, via);
                self.send(node, port, to, Body::Signal { session: number, by, signal });
            }
            Action::Proven { via, to } => {
                let session = self.nodes[node].sessions.get_mut(&number).unwrap();
                if session.role == Role::Initiator {
                    if session.path.replace((via, to)).is_some() {
                        self.breaks("two decisions".to_owned());
                    }
                    self.dial(node, number, 0);
                }
            }
            Action::Over(failure) => {
                let Session { role, peer, relay, ref id, .. } = self.nodes[node].sessions[&number];
                let id = id.clone();
                self.say(node, relay, ToRelay::Result { session: id, success: false });
                if role == Role::Initiator {
                    self.ended(node, peer, Ended::Failed(failure));
                }
            }
        }
    }

    fn port(&self, node: usize, number: u64, via: Via) -> u16 {
        match via {
            Via::Main => self.nodes[node].main,
            Via::Extra(n) => self.nodes[node].sessions[&number].extra[usize::from(n)],
        }
    }

    /// Whom a node may send to, and how much.
    fn account(&mut self, node: usize, number: u64, via: Via, to: SocketAddr) {
        let session = self.nodes[node].sessions.get_mut(&number).unwrap();
        let named = to.ip() == session.seen.ip() || session.candidates.iter().any(|named| named.ip() == to.ip());
        let known = to.ip() == session.seen.ip() || session.candidates.contains(&to);
        let heard = session.heard.contains(&(via, to));
        session.packets += 1;
        let sent = session.sent.entry((via, to)).or_default();
        *sent += 1;
        let sent = *sent;
        let most = match (named, session.birthday && to == session.seen) {
            (false, _) => MAX_PER_STRANGER,
            (true, false) => MAX_PER_PAIR + 1,
            (true, true) => MAX_PER_PAIR + 2,
        };
        if !named {
            session.strangers.insert((via, to));
        }
        let all = if session.birthday { MAX_BIRTHDAY_PACKETS } else { MAX_PACKETS };
        let (packets, strangers) = (session.packets, session.strangers.len());
        if !known && !heard {
            self.breaks(format!("sent to {to}, which nobody named"));
        }
        if sent > most || packets > all || strangers > MAX_STRANGERS {
            self.breaks(format!("{sent} packets to {to}, {packets} in all, {strangers} strangers"));
        }
    }

    fn dial(&mut self, node: usize, number: u64, tries: u32) {
        let Some(session) = self.nodes[node].sessions.get(&number) else { return };
        if let Some((via, to)) = session.path
            && !session.connected
        {
            if tries == 10 {
                return self.breaks(format!("no connection on the proven path to {to}"));
            }
            let port = self.port(node, number, via);
            self.send(node, port, to, Body::Connect { session: number });
            self.at(self.now + 250 * MS, Event::Dial { node, session: number, tries: tries + 1 });
        }
    }

    fn accept(&mut self, node: usize, at: SocketAddr, from: SocketAddr, number: u64) {
        let Some(session) = self.nodes[node].sessions.get_mut(&number) else { return };
        let (peer, known) = (session.peer, std::mem::replace(&mut session.connected, true));
        self.send(node, at.port(), from, Body::Accept { session: number });
        if !known {
            self.connected(node, peer, from);
        }
    }

    fn accepted(&mut self, node: usize, number: u64) {
        let Some(session) = self.nodes[node].sessions.get_mut(&number) else { return };
        if std::mem::replace(&mut session.connected, true) {
            return;
        }
        let (peer, relay, id, path) = (session.peer, session.relay, session.id.clone(), session.path);
        self.connected(node, peer, path.unwrap().1);
        self.say(node, relay, ToRelay::Result { session: id, success: true });
        self.ended(node, peer, Ended::Direct);
    }

    fn connected(&mut self, node: usize, peer: usize, to: SocketAddr) {
        let link = self.nodes[node].links.entry(peer).or_default();
        link.connected = true;
        link.local |= matches!(to.ip(), IpAddr::V4(ip) if ip.is_private());
    }

    fn forget(&mut self, node: usize, number: u64) {
        if let Some(session) = self.nodes[node].sessions.remove(&number) {
            for port in session.extra {
                self.nodes[node].sockets.remove(&port);
            }
        }
    }

    /// Pings with others' addresses on them, and ports and addresses that are not the node's.
    fn spoof(&mut self, node: usize, number: u64, n: u64) {
        let Some(session) = self.nodes[node].sessions.get(&number) else { return };
        let (to, by, relay, id) = (session.seen, session.role, session.relay, session.id.clone());
        if n == 0 {
            let ports = (0..60).map(|n| n * 700 + 22).collect();
            self.say(node, relay, ToRelay::Execute { session: id, ports });
        }
        let mut body = || Body::Signal { session: number, by, signal: Signal::Ping { nonce: self.random.u64(..) } };
        let (spoofed, own) = (body(), body());
        let from = SocketAddr::new(self.bystander(number % 100 * 50 + n % 50), 53);
        self.at(self.now + 20 * MS, Event::Arrive { network: INTERNET, packet: Packet { from, to, body: spoofed } });
        self.send(node, self.nodes[node].main, to, own);
        if n < 2000 {
            self.at(self.now + 2 * MS, Event::Spoof { node, session: number, n: n + 1 });
        }
    }

    fn bystander(&mut self, n: u64) -> IpAddr {
        let ip = IpAddr::V4(Ipv4Addr::from(0x0909_0000 + n as u32));
        self.bystanders.insert(ip);
        ip
    }

    fn breaks(&mut self, what: String) {
        self.broken.get_or_insert(what);
    }
}
