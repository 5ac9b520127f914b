//! The relays: control streams, circuits and punches, with the real books behind them.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::rc::Rc;
use std::time::Duration;

use super::network::{Body, Event, HostId, Packet, SECOND, Time};
use super::quic::{Carrier, ConnId, Item, KeyId, Notice, QuicPacket, StreamId, Timeouts};
use super::world::{World, trace};
use crate::coordinate::{Coordinate, Coordinator, Party};
use crate::proto::control::{FromNode, FromRelay, Id, Probes, Reason, Refusal};
use crate::proto::signal::{self, AnswerFrom, SECRET_LEN, Secret, Signal};
use crate::relay::{Book, Ended, Generation, Opened, Registered, Traffic};
use crate::types::RelayConfig;

const RELAY_PORT: u16 = 9443;
const OTHER_PORT: u16 = 9444;

/// As the engine's.
pub(super) const TIMEOUTS: Timeouts = Timeouts { keep_alive: 0, idle: 45 * SECOND };

pub(super) struct Relay {
    pub(super) host: HostId,
    pub(super) key: KeyId,
    pub(super) lies: Lies,
    /// Its second address, from which it can answer probes.
    other_ip: Option<IpAddr>,
    config: RelayConfig,
    book: Book,
    coordinator: Coordinator,
    members: Vec<Member>,
    legs: Vec<Leg>,
    secrets: u64,
}

/// What a relay says that is not so.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Lies {
    /// It gives circuits to a node of its own, whatever node is asked for.
    pub(super) misleads: bool,
    /// It names addresses of others to those that punch.
    pub(super) misnames: bool,
}

struct Member {
    generation: Generation,
    conn: ConnId,
    stream: StreamId,
    name: Id,
    key: KeyId,
    seen: SocketAddr,
    /// Of the node's probes.
    probes: u64,
}

/// A circuit.
struct Leg {
    circuit: u32,
    ends: [Generation; 2],
    traffic: Traffic,
}

impl Relay {
    pub(super) fn new(host: HostId, key: KeyId, now: std::time::Instant) -> Self {
        let config = RelayConfig { accept_rate: 1000, ..RelayConfig::default() };
        Self {
            host,
            key,
            lies: Lies::default(),
            other_ip: None,
            book: Book::new(&config, now),
            config,
            coordinator: Coordinator::default(),
            members: Vec::new(),
            legs: Vec::new(),
            secrets: 0,
        }
    }

    fn member(&self, generation: Generation) -> Option<&Member> {
        self.members.iter().find(|member| member.generation == generation)
    }

    fn by_conn(&self, conn: ConnId) -> Option<Generation> {
        self.members.iter().find(|member| member.conn == conn).map(|member| member.generation)
    }

    pub(super) fn registrations(&self) -> usize {
        self.book.registrations()
    }

    pub(super) fn circuits(&self) -> usize {
        self.book.circuits()
    }

    /// Punches that are left once all that are in progress must be over.
    pub(super) fn punches_left(&mut self, later: std::time::Instant) -> usize {
        if let Some(member) = self.members.first() {
            self.coordinator.result(member.generation, &Id::new("none").unwrap(), false, later);
            return self.coordinator.sessions();
        }
        0
    }

    /// Whether its tables agree with each other.
    pub(super) fn agrees(&self) -> bool {
        let alive = |leg: &Leg| leg.ends.iter().all(|end| self.member(*end).is_some());
        let counts = self.members.len() == self.book.registrations() && self.legs.len() == self.book.circuits();
        counts && self.legs.iter().all(alive)
    }
}

impl World {
    pub(super) fn add_relay(&mut self) -> usize {
        let relay = self.relays.len();
        let (ip, key) = (self.public_ip(), self.new_key());
        let host = self.add_host(super::network::Is::Relay(relay), super::network::INTERNET, ip);
        self.relay_ips.insert(ip);
        let other_ip = (self.random.u8(..4) == 0).then(|| self.public_ip());
        if let Some(ip) = other_ip {
            self.owners.insert((super::network::INTERNET, ip), super::network::Owner::Host(host));
            self.relay_ips.insert(ip);
        }
        let now = self.clock();
        self.relays.push(Relay { other_ip, ..Relay::new(host, key, now) });
        relay
    }

    pub(super) fn relay_address(&self, relay: usize) -> SocketAddr {
        SocketAddr::new(self.hosts[self.relays[relay].host].ip, RELAY_PORT)
    }

    /// It is back at once and knows of nothing. Without its key, it cannot tell nodes that their connections are gone.
    pub(super) fn restart_relay(&mut self, relay: usize, keeps_key: bool) {
        let Relay { host, key, lies, other_ip, .. } = self.relays[relay];
        let key = if keeps_key { key } else { self.new_key() };
        self.drop_conns_of(host);
        let now = self.clock();
        self.relays[relay] = Relay { lies, other_ip, ..Relay::new(host, key, now) };
        trace!(self, "relay {relay} restarts");
    }

    pub(super) fn drop_conns_of(&mut self, host: HostId) {
        let all: Vec<ConnId> =
            self.conns.iter().flatten().filter(|conn| conn.host == host).map(|conn| conn.id).collect();
        all.into_iter().for_each(|id| self.drop_conn(id));
    }

    pub(super) fn at_relay(&mut self, relay: usize, packet: Packet) {
        let Packet { from, to, body } = packet;
        let host = self.relays[relay].host;
        match body {
            Body::Quic(packet) if to.port() == RELAY_PORT => {
                self.quic_packet(host, Carrier::Udp { port: to.port(), to: from }, packet);
            }
            Body::Probe(asked) => self.answer_probe(relay, from, to, asked),
            _ => {}
        }
    }

    /// Answers only to the address that the node is registered from.
    fn answer_probe(&mut self, relay: usize, from: SocketAddr, to: SocketAddr, asked: Signal) {
        let signal::Body::ProbeRequest { from: answer_from, to_port } = asked.body else { return };
        let Relay { host, other_ip, ref members, .. } = self.relays[relay];
        let Some(member) = members.iter().find(|member| member.probes == asked.id) else { return };
        if self.seen(member.conn).map(|seen| seen.ip()) != Some(from.ip()) {
            return;
        }
        let source = match answer_from {
            AnswerFrom::Same => Some(to),
            AnswerFrom::OtherPort if to == self.relay_address(relay) => Some(SocketAddr::new(to.ip(), OTHER_PORT)),
            AnswerFrom::OtherPort => Some(self.relay_address(relay)),
            AnswerFrom::OtherAddress => other_ip.map(|ip| SocketAddr::new(ip, OTHER_PORT)),
        };
        let port = to_port.map_or(from.port(), NonZeroU16::get);
        let answer = Signal { body: signal::Body::ProbeReply { observed: from }, ..asked };
        if let Some(source) = source {
            self.transmit_from(host, source, SocketAddr::new(from.ip(), port), Body::Probe(answer));
        }
    }

    pub(super) fn relay_notice(&mut self, relay: usize, id: ConnId, notice: Notice) {
        match notice {
            Notice::Open => self.allow_streams(id),
            Notice::Item(stream, Item::FromNode(said)) => self.relay_hears(relay, id, stream, &said),
            Notice::Closed(_) => self.member_left(relay, id),
            Notice::Item(stream, Item::Session(_) | Item::Ask(_)) => {
                // A relay is no node.
                self.stop_stream(id, stream, super::node::WRONG_NODE);
                self.reset_stream(id, stream, super::node::WRONG_NODE);
            }
            _ => {}
        }
    }

    fn seen(&self, id: ConnId) -> Option<SocketAddr> {
        match self.conn(id)?.carrier {
            Carrier::Udp { to, .. } => Some(to),
            Carrier::Circuit { .. } => None,
        }
    }

    fn tell(&mut self, relay: usize, to: Generation, told: FromRelay) {
        if let Some(Member { conn, stream, .. }) = self.relays[relay].member(to) {
            let (conn, stream) = (*conn, *stream);
            self.write(conn, stream, Item::FromRelay(Rc::new(told)));
        }
    }

    fn relay_hears(&mut self, relay: usize, id: ConnId, stream: StreamId, said: &FromNode) {
        let now = self.clock();
        if let FromNode::Connect { node_id, .. } = said {
            return self.register(relay, id, stream, node_id.clone());
        }
        let at = &mut self.relays[relay];
        let Some(generation) = at.by_conn(id) else { return };
        match said {
            FromNode::Connect { .. } => {}
            FromNode::RelayRequest { session_id, target_id } => {
                self.open_circuit(relay, generation, session_id, target_id)
            }
            FromNode::Disconnect { circuit, .. } => {
                if let Some(ended) = at.book.close(generation, *circuit) {
                    self.circuit_ended(relay, &[ended], Some(generation), Reason::Closed);
                }
            }
            FromNode::Describe { profile, candidates } => at.coordinator.describe(generation, *profile, candidates),
            FromNode::PunchRequest { session_id, target_id } => {
                self.coordinate(relay, generation, session_id, target_id)
            }
            FromNode::PunchExecute { session_id, ports } => {
                if let Some(execute) = at.coordinator.execute(generation, session_id, ports, now) {
                    let told = FromRelay::PunchExecute { session_id: session_id.clone(), ports: execute.ports };
                    self.tell(relay, execute.to, told);
                }
            }
            FromNode::PunchResult { session_id, result } => {
                if let Some(to) = at.coordinator.result(generation, session_id, result.is_ok(), now) {
                    self.tell(relay, to, FromRelay::PunchResult { session_id: session_id.clone(), result: *result });
                }
            }
        }
    }

    fn register(&mut self, relay: usize, id: ConnId, stream: StreamId, name: Id) {
        let now = self.clock();
        let Some(seen) = self.seen(id) else { return };
        let Some(key) = self.conn(id).and_then(|conn| conn.shown) else { return };
        let owner = self.keys[key];
        let registered = self.relays[relay].book.register(name.clone(), owner, seen.ip(), now);
        let Registered { generation, replaced } = match registered {
            Ok(registered) => registered,
            Err(error) => return self.write(id, stream, Item::FromRelay(Rc::new(FromRelay::Refused { error }))),
        };
        if let Some((old, circuits)) = replaced {
            self.tell(relay, old, FromRelay::Refused { error: Refusal::TakenOver });
            let at = &mut self.relays[relay];
            at.coordinator.end(old);
            at.members.retain(|member| member.generation != old);
            self.circuit_ended(relay, &circuits, None, Reason::Gone);
        }
        let probes = self.random.u64(..);
        let at = &mut self.relays[relay];
        at.coordinator.join(generation, now);
        at.members.push(Member { generation, conn: id, stream, name, key, seen, probes });
        let (secret, port, ip) = (Secret::from([0; SECRET_LEN]), OTHER_PORT, at.other_ip);
        let probes = Some(Probes { id: probes, secret, port, ip });
        self.tell(relay, generation, FromRelay::Registered { address: seen, probes });
    }

    fn member_left(&mut self, relay: usize, id: ConnId) {
        let now = self.clock();
        let at = &mut self.relays[relay];
        let Some(generation) = at.by_conn(id) else { return };
        at.members.retain(|member| member.generation != generation);
        at.coordinator.end(generation);
        let ended = at.book.end(generation, now);
        self.circuit_ended(relay, &ended, None, Reason::Gone);
    }

    fn open_circuit(&mut self, relay: usize, from: Generation, session_id: &Id, target: &Id) {
        let now = self.clock();
        let at = &mut self.relays[relay];
        let liar = at.members.iter().find(|member| at.lies.misleads && member.generation != from);
        let target = liar.map_or_else(|| target.clone(), |member| member.name.clone());
        let session_id = session_id.clone();
        match at.book.open(from, &target) {
            Ok(Opened { circuit, target }) => {
                at.legs.push(Leg { circuit, ends: [from, target], traffic: Traffic::new(&at.config, now) });
                self.tell(relay, from, FromRelay::Opened { session_id, circuit });
            }
            Err(error) => self.tell(relay, from, FromRelay::NotOpened { session_id, error }),
        }
    }

    /// `by`: the end that knows it.
    fn circuit_ended(&mut self, relay: usize, ended: &[Ended], by: Option<Generation>, reason: Reason) {
        // In the order of their numbers: a table that keeps none gives them.
        let mut ended = ended.to_vec();
        ended.sort_by_key(|ended| ended.circuit);
        for Ended { circuit, ends } in ended {
            self.relays[relay].legs.retain(|leg| leg.circuit != circuit);
            for end in ends.into_iter().filter(|end| Some(*end) != by) {
                self.tell(relay, end, FromRelay::Disconnect { circuit, reason });
            }
        }
    }

    /// A packet of a circuit has come.
    pub(super) fn forward(&mut self, relay: usize, id: ConnId, circuit: u32, packet: &Rc<QuicPacket>) {
        let now = self.clock();
        let at = &mut self.relays[relay];
        let Some(from) = at.by_conn(id) else { return };
        let Some(leg) = at.legs.iter_mut().find(|leg| leg.circuit == circuit && leg.ends.contains(&from)) else {
            return;
        };
        if !leg.traffic.pass(packet.len() as usize, now) {
            return;
        }
        let other = leg.ends[usize::from(leg.ends[0] == from)];
        if let Some(Member { conn, .. }) = at.member(other) {
            let conn = *conn;
            self.send_datagram(conn, circuit, packet.clone());
        }
    }

    fn coordinate(&mut self, relay: usize, from: Generation, session_id: &Id, target: &Id) {
        let now = self.clock();
        let at = &mut self.relays[relay];
        at.secrets += 1;
        let mut secret = [0; 32];
        secret[..8].copy_from_slice(&(at.secrets << 8 | relay as u64).to_be_bytes());
        let told = match at.book.find(from, target) {
            Some(found) => {
                let [from, found] = [from, found].map(|generation| self.party(relay, generation));
                match (from, found) {
                    (Some(from), Some(found)) => {
                        self.relays[relay].coordinator.request(&from, &found, session_id.clone(), secret, now)
                    }
                    _ => Err(crate::coordinate::Refused::NotRegistered),
                }
            }
            None => Err(crate::coordinate::Refused::NotRegistered),
        };
        match told {
            Ok([ours, theirs]) => {
                for told in [theirs, ours] {
                    let to = told.to;
                    let told = self.misname(relay, told);
                    self.tell(relay, to, FromRelay::PunchCoordinate(Box::new(told.into())));
                }
            }
            Err(refused) => {
                let (session_id, error) = (session_id.clone(), refused.into());
                self.tell(relay, from, FromRelay::NotPunched { session_id, error });
            }
        }
    }

    fn party(&self, relay: usize, generation: Generation) -> Option<Party> {
        let member = self.relays[relay].member(generation)?;
        let conn = self.conn(member.conn)?;
        let seen = self.seen(member.conn)?;
        Some(Party {
            node: generation,
            id: member.name.clone(),
            key: self.keys[member.key],
            seen,
            round_trip: Duration::from_micros(conn.round_trip.unwrap_or(0)),
        })
    }

    fn misname(&mut self, relay: usize, mut told: Coordinate) -> Coordinate {
        if self.relays[relay].lies.misnames {
            let bystander = self.scenario.bystander;
            told.seen = SocketAddr::new(bystander, 5000 + self.random.u16(..1000));
            told.candidates = vec![SocketAddr::from(([192, 168, 7, 7], 53)), SocketAddr::from(([10, 0, 0, 9], 5000))];
        }
        told
    }

    /// Tells nodes that have moved where they are seen now.
    pub(super) fn relay_timer(&mut self, relay: usize) {
        for place in 0..self.relays[relay].members.len() {
            let Member { generation, conn, seen, .. } = self.relays[relay].members[place];
            if let Some(address) = self.seen(conn).filter(|address| *address != seen) {
                self.relays[relay].members[place].seen = address;
                self.tell(relay, generation, FromRelay::Registered { address, probes: None });
            }
        }
        let next: Time = self.now + SECOND;
        self.at(next, Event::Relay(relay as u32));
    }
}
