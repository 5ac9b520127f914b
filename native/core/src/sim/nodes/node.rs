//! A node, but for its peers: the connections that it accepts, the sessions of those that send to it, and whose key a node
//! id may have. What is decided here, the real code decides.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use hashbrown::{HashMap, HashSet};

use super::detection::Nat;
use super::network::{Body, Event, HostId, Is, MS, Packet, SECOND, Time};
use super::peer::Peer;
use super::punch::Session;
use super::quic::{Carrier, Conn, ConnId, Item, KeyId, Notice, Opened, Serves, StreamId, Timeouts};
use super::registration::Registration;
use super::world::{World, trace};
use crate::accepted::{self, GivenUp};
use crate::proto::session::{NO_RUN, Run};
use crate::race::AttemptId;
use crate::requests::Requests;
use crate::session::Arrival;
use crate::session_receiver::{Channel, Greeting, met};
use crate::session_table::{KEEP, Refused, SessionKey, SessionTable};
use crate::sim::gate::Kind;
use crate::trust::{self, Facts, Mismatch, TofuStore, Verdict};
use crate::types::{Dialect, Fingerprint, Link, LinkId, Path};

/// Error codes of streams.
pub(super) const TOO_MANY: u8 = 3;
pub(super) const WRONG_NODE: u8 = 7;
pub(super) const FORGOTTEN: u8 = 11;

/// Requests and sessions that a node remembers.
const MAX_KNOWN_REQUESTS: usize = 256;
const MAX_KNOWN_SESSIONS: usize = 256;

pub(super) struct Node {
    pub(super) host: HostId,
    pub(super) key: KeyId,
    /// The number of its node id.
    pub(super) name: usize,
    pub(super) kind: Kind,
    pub(super) port: u16,
    pub(super) up: bool,
    /// How often it has been started.
    pub(super) starts: u32,
    pub(super) run: Run,
    pub(super) timeouts: Timeouts,
    /// Where it is registered.
    pub(super) relays: Vec<usize>,
    /// Addresses that it was told by somebody who knows, or that have proved to be somebody's.
    pub(super) earned: HashSet<SocketAddr>,
    /// Hosts of which it may try ports.
    pub(super) guessed: Vec<IpAddr>,
    pub(super) tofu: TofuStore,
    pub(super) peers: Vec<Peer>,
    pub(super) accepted: Vec<ConnId>,
    /// Those that were given up as silent.
    pub(super) given_up: HashMap<ConnId, GivenUp>,
    pub(super) uses: HashMap<ConnId, Use>,
    table: SessionTable<usize>,
    incoming: Vec<[Channel; 2]>,
    reading: Vec<Reading>,
    /// What it was asked, and where the answers go.
    pub(super) requests: Requests<(ConnId, StreamId)>,
    pub(super) registrations: Vec<Registration>,
    /// Where there was no relay, and until when that is believed.
    pub(super) not_relays: HashMap<SocketAddr, Time>,
    pub(super) nat: Nat,
    /// Of the next socket beside the main one.
    pub(super) next_port: u16,
    pub(super) punches: Vec<Session>,
    /// When the earliest event for its timers comes.
    pub(super) armed: Time,
}

/// What a connection that this node began is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    Registration(usize),
    Attempt(usize, AttemptId),
    Link,
}

/// A stream of a session that comes in.
struct Reading {
    conn: ConnId,
    stream: StreamId,
    key: SessionKey,
    session: usize,
    channel: usize,
    number: Option<u64>,
}

impl Node {
    pub(super) fn may_guess(&self, to: SocketAddr, body: &Body) -> bool {
        matches!(body, Body::Signal { .. }) && self.guessed.contains(&to.ip())
    }

    pub(super) fn sessions(&self) -> usize {
        self.table.count()
    }
}

pub(super) fn link_id(conn: ConnId) -> LinkId {
    LinkId::new(u64::from(conn.number) << 32 | u64::from(conn.place))
}

impl World {
    /// A node behind a gate of its own, or in a network that is there.
    pub(super) fn add_node(&mut self, kind: Kind, network: Option<usize>, relays: Vec<usize>) -> usize {
        let node = self.nodes.len();
        let network = network.unwrap_or_else(|| self.network(kind));
        let ip = self.ip_in(network, kind);
        let host = self.add_host(Is::Node(node), network, ip);
        let key = self.new_key();
        let name = self.names.len();
        self.names.push(crate::types::NodeId::new(format!("node {node}").as_bytes()).unwrap());
        let keep_alive = [5 * SECOND, 20 * SECOND][self.random.usize(..2)];
        let port = self.random.u16(2048..);
        self.nodes.push(Node {
            host,
            key,
            name,
            kind,
            port,
            up: true,
            starts: 0,
            run: NO_RUN,
            timeouts: Timeouts { keep_alive, idle: 3 * keep_alive },
            relays,
            earned: HashSet::new(),
            guessed: Vec::new(),
            tofu: TofuStore::default(),
            peers: Vec::new(),
            accepted: Vec::new(),
            given_up: HashMap::new(),
            uses: HashMap::new(),
            table: SessionTable::new(MAX_KNOWN_SESSIONS),
            incoming: Vec::new(),
            reading: Vec::new(),
            requests: Requests::new(MAX_KNOWN_REQUESTS),
            registrations: Vec::new(),
            not_relays: HashMap::new(),
            nat: Nat::new(self.clock()),
            next_port: port,
            punches: Vec::new(),
            armed: Time::MAX,
        });
        self.start_node(node);
        node
    }

    pub(super) fn start_node(&mut self, node: usize) {
        let mut run = Run::default();
        self.random.fill(&mut run);
        let starting = &mut self.nodes[node];
        (starting.up, starting.run) = (true, run);
        starting.starts += 1;
        starting.armed = Time::MAX;
        for relay in starting.relays.clone() {
            self.want_registration(node, relay, true);
        }
    }

    /// As if the process had been killed. What it owed is lost with it.
    pub(super) fn stop_node(&mut self, node: usize) {
        let host = self.nodes[node].host;
        self.drop_conns_of(host);
        self.promises_of_stopped(node);
        let now = self.clock();
        let stopped = &mut self.nodes[node];
        stopped.up = false;
        stopped.peers.clear();
        stopped.accepted.clear();
        stopped.given_up.clear();
        stopped.uses.clear();
        stopped.table = SessionTable::new(MAX_KNOWN_SESSIONS);
        stopped.incoming.clear();
        stopped.reading.clear();
        stopped.requests = Requests::new(MAX_KNOWN_REQUESTS);
        stopped.registrations.clear();
        stopped.not_relays.clear();
        stopped.nat = Nat::new(now);
        stopped.punches.clear();
        stopped.tofu = TofuStore::default();
        stopped.earned.clear();
        stopped.guessed.clear();
        trace!(self, "node {node} stops");
    }

    pub(super) fn new_session_id(&mut self) -> [u8; 16] {
        let mut id = [0; 16];
        self.random.fill(&mut id);
        id
    }

    pub(super) fn node_accepts(&self, node: usize, carrier: Carrier) -> Option<Serves> {
        let node = &self.nodes[node];
        let fits = match carrier {
            Carrier::Udp { .. } => node.up,
            Carrier::Circuit { outer, circuit } => node.is_free_circuit(outer, circuit),
        };
        fits.then(|| Serves::peer1(node.key, Timeouts { keep_alive: 0, ..node.timeouts }))
    }

    pub(super) fn at_node(&mut self, node: usize, packet: Packet) {
        let Packet { from, to, body } = packet;
        let host = self.nodes[node].host;
        let port = to.port();
        if !self.nodes[node].up {
            if !matches!(body, Body::Unreachable(_)) {
                self.refuse(host, to, from);
            }
            return;
        }
        let main = port == self.nodes[node].port;
        match body {
            Body::Quic(packet) if main || self.nodes[node].has_socket(port) => {
                // What it answers goes back to where the packet came from.
                self.earn(host, from);
                self.quic_packet(host, Carrier::Udp { port, to: from }, packet);
            }
            Body::Probe(signal) => self.probe_answered(node, port, from, signal),
            Body::Signal { session, by, signal } => self.signalled(node, port, from, session, by, signal),
            Body::Unreachable(at) => self.unreachable(node, at),
            Body::Quic(_) => {}
        }
    }

    /// ICMP says that nobody listens at an address.
    fn unreachable(&mut self, node: usize, at: SocketAddr) {
        let host = self.nodes[node].host;
        let there = |conn: &&super::quic::Conn| {
            conn.host == host && matches!(conn.carrier, Carrier::Udp { to, .. } if to == at)
        };
        let found: Vec<(ConnId, bool)> =
            self.conns.iter().flatten().filter(there).map(|conn| (conn.id, conn.is_open())).collect();
        for (id, open) in found {
            match open {
                true => self.link_refused(node, id),
                false => self.end(id, super::quic::Why::Unreachable),
            }
        }
    }

    pub(super) fn node_notice(&mut self, node: usize, id: ConnId, notice: Notice) {
        let Some(conn) = self.conn(id) else { return };
        let client = conn.client;
        match notice {
            Notice::Open if client => self.opened(node, id),
            Notice::Open => self.accept(node, id),
            Notice::Allowed => self.allowed(node, id),
            Notice::Credit => self.credit_came(node, id),
            Notice::Acknowledged(stream) => self.whole_arrived(node, id, stream),
            Notice::Closed(why) => self.conn_closed(node, id, why),
            Notice::Item(stream, item) => self.take_item(node, id, stream, item),
            Notice::WasReset(stream, code) | Notice::WasStopped(stream, code) => {
                self.stream_ended(node, id, stream, code)
            }
        }
    }

    fn opened(&mut self, node: usize, id: ConnId) {
        self.prove(id);
        match self.nodes[node].uses.get(&id) {
            Some(&Use::Registration(at)) => self.relay_dialled(node, at, id),
            // A gateway's streams are allowed from the handshake on.
            _ if self.conn(id).is_some_and(|conn| conn.dialect == Dialect::Macula) => self.allowed(node, id),
            _ => {}
        }
    }

    /// Another node has begun a connection.
    fn accept(&mut self, node: usize, id: ConnId) {
        self.prove(id);
        self.allow_streams(id);
        self.nodes[node].accepted.push(id);
        self.circuit_carries(node, id);
        self.socket_carries(node, id);
        if let Some(key) = self.conn(id).and_then(|conn| conn.shown) {
            let key = self.keys[key];
            self.punched_by(node, key);
        }
        self.offer_to_peers(node, id);
    }

    /// Peers that may be who began a connection can use it too.
    fn offer_to_peers(&mut self, node: usize, id: ConnId) {
        let Some(key) = self.conn(id).and_then(|conn| conn.shown) else { return };
        let key = self.keys[key];
        for peer in 0..self.nodes[node].peers.len() {
            if self.expects(node, peer, key) {
                self.arrived(node, peer);
            }
        }
    }

    fn conn_closed(&mut self, node: usize, id: ConnId, why: super::quic::Why) {
        let closing = &mut self.nodes[node];
        closing.accepted.retain(|known| *known != id);
        closing.given_up.remove(&id);
        let (ended, left): (Vec<_>, Vec<_>) =
            std::mem::take(&mut closing.reading).into_iter().partition(|reading| reading.conn == id);
        closing.reading = left;
        ended.into_iter().for_each(|reading| self.read_no_more(node, &reading));
        self.requests_lost(node, id);
        let used = self.nodes[node].uses.remove(&id);
        self.circuit_closed(node, id);
        match used {
            Some(Use::Registration(at)) => self.relay_closed(node, at, id, why),
            Some(Use::Attempt(peer, attempt)) => self.attempt_closed(node, peer, attempt, why),
            Some(Use::Link) | None => {}
        }
        self.adopted_closed(node, id);
        self.link_closed(node, id);
    }

    fn take_item(&mut self, node: usize, id: ConnId, stream: StreamId, item: Item) {
        match item {
            Item::Session(opened) => self.session_opened(node, id, stream, &opened),
            Item::Number(number) => self.number_came(node, id, stream, number),
            Item::Message(message) => self.message_came(node, id, stream, message),
            Item::Ask(name) => {
                let node = &self.nodes[node];
                let asked = self.names[name].as_bytes();
                match trust::answer(Some(&self.names[node.name]), &self.keys[node.key], asked) {
                    Some(answer) => self.write(id, stream, Item::Answer(answer)),
                    None => self.refuse_stream(id, stream, WRONG_NODE),
                }
            }
            Item::Greeting { .. } | Item::Expected(_) => self.sender_hears(node, id, stream, &item),
            Item::Answer(answer) => self.asked(node, id, stream, Ok(answer)),
            Item::FromRelay(told) => self.relay_told(node, id, &told),
            Item::Request(requested) => self.request_came(node, id, stream, &requested),
            Item::Reply => self.reply_came(node, id, stream),
            Item::Part | Item::Whole(_) | Item::FromNode(_) => {}
        }
    }

    pub(super) fn refuse_stream(&mut self, id: ConnId, stream: StreamId, code: u8) {
        self.stop_stream(id, stream, code);
        self.reset_stream(id, stream, code);
    }

    fn session_opened(&mut self, node: usize, id: ConnId, stream: StreamId, opened: &Rc<Opened>) {
        let Some(shown) = self.conn(id).and_then(|conn| conn.shown) else { return };
        let key = self.keys[shown];
        let remote = self.remote_ip(id);
        let now = self.now / MS;
        let serving = &mut self.nodes[node];
        let own = trust::answer(
            Some(&self.names[serving.name]),
            &self.keys[serving.key],
            self.names[opened.target].as_bytes(),
        );
        if own.is_none() {
            return self.refuse_stream(id, stream, WRONG_NODE);
        }
        let met = met(opened.run, serving.run);
        let key = (key, opened.id);
        let incoming = &mut serving.incoming;
        let made = serving.table.open(key, remote.into(), met, now, || {
            incoming.push(<[Channel; 2]>::default());
            incoming.len() - 1
        });
        let made = match made {
            Ok(made) => made,
            Err(Refused::Forgotten) => return self.refuse_stream(id, stream, FORGOTTEN),
            Err(Refused::TooMany) => return self.refuse_stream(id, stream, TOO_MANY),
        };
        let Greeting { known, expected } = serving.incoming[made.session][opened.channel].greet(made.known, opened.run);
        let run = serving.run;
        serving.reading.push(Reading {
            conn: id,
            stream,
            key,
            session: made.session,
            channel: opened.channel,
            number: None,
        });
        trace!(self, "node {node} greets {:?}: known {known}, expects {expected}", key.0);
        self.write(id, stream, Item::Greeting { known, run, expected });
    }

    fn number_came(&mut self, node: usize, id: ConnId, stream: StreamId, number: u64) {
        let reader = &mut self.nodes[node];
        let Some(reading) = reader.reading.iter_mut().find(|known| (known.conn, known.stream) == (id, stream)) else {
            return;
        };
        if reading.number.replace(number).is_none() {
            reader.incoming[reading.session][reading.channel].begin(number);
        }
    }

    fn message_came(&mut self, node: usize, id: ConnId, stream: StreamId, message: u32) {
        self.heard_again(node, id);
        let reader = &mut self.nodes[node];
        let Some(reading) = reader.reading.iter_mut().find(|known| (known.conn, known.stream) == (id, stream)) else {
            return;
        };
        let Some(number) = reading.number else { return };
        reading.number = Some(number + 1);
        let incoming = &mut reader.incoming[reading.session][reading.channel];
        let arrival = incoming.accept(number);
        let expected = incoming.expected(reading.number);
        if arrival == Arrival::New {
            self.delivered(node, message);
        }
        self.write(id, stream, Item::Expected(expected));
    }

    /// A connection that was given up as silent may be the one that the other node keeps.
    pub(super) fn heard_again(&mut self, node: usize, id: ConnId) {
        if self.nodes[node].given_up.get(&id).is_some_and(GivenUp::is_heard_again) {
            self.offer_to_peers(node, id);
        }
    }

    fn read_no_more(&mut self, node: usize, reading: &Reading) {
        let now = self.now / MS;
        self.nodes[node].table.close(reading.key, KEEP, now);
    }

    fn stream_ended(&mut self, node: usize, id: ConnId, stream: StreamId, code: u8) {
        let reader = &mut self.nodes[node];
        if let Some(place) = reader.reading.iter().position(|known| (known.conn, known.stream) == (id, stream)) {
            let reading = reader.reading.swap_remove(place);
            return self.read_no_more(node, &reading);
        }
        if code == WRONG_NODE {
            self.asked(node, id, stream, Err(()));
        }
        self.request_refused(node, id, stream, code);
        self.sender_stream_ended(node, id, stream, code);
    }

    pub(super) fn remote_ip(&self, id: ConnId) -> IpAddr {
        match self.conn(id).map(|conn| conn.carrier) {
            Some(Carrier::Udp { to, .. }) => to.ip(),
            Some(Carrier::Circuit { outer, .. }) => self.remote_ip(outer),
            None => IpAddr::from([0, 0, 0, 0]),
        }
    }

    /// What decisions know of a connection.
    pub(super) fn link(&self, node: usize, id: ConnId) -> Option<Link> {
        let conn = self.conn(id)?;
        let path = match conn.carrier {
            Carrier::Udp { port, .. } if port != self.nodes[node].port => Path::HolePunch,
            Carrier::Udp { .. } if self.nodes[node].nat.punched.contains(&id) => Path::HolePunch,
            Carrier::Udp { .. } => Path::Direct,
            Carrier::Circuit { outer, .. } => match self.conn(outer)?.carrier {
                Carrier::Udp { to, .. } => Path::Relay(to),
                Carrier::Circuit { .. } => return None,
            },
        };
        let shown = conn.shown.map(|key| self.keys[key]);
        Some(Link { id: link_id(id), path, dialect: conn.dialect, dialled: conn.client, shown })
    }

    /// Connections that the holder of a key began and that can serve as a link.
    pub(super) fn accepted_from(&self, node: usize, key: Fingerprint) -> Vec<ConnId> {
        let accepting = &self.nodes[node];
        let has_key =
            |id: &ConnId| self.conn(*id).and_then(|conn| conn.shown).is_some_and(|shown| self.keys[shown] == key);
        let is_live = |id: &ConnId| {
            let is_silent = |heard| accepting.given_up.get(id).is_some_and(|given_up| given_up.is_silent(heard));
            self.conn(*id).is_some_and(|conn| conn.is_open() && !is_silent(conn.heard))
        };
        let is_relayed = |id: &ConnId| matches!(self.conn(*id).map(|conn| conn.carrier), Some(Carrier::Circuit { .. }));
        let all = accepting.accepted.iter().copied().filter(has_key).collect();
        accepted::usable(all, is_live, is_relayed)
    }

    /// What the real rule says of a connection, for a peer.
    pub(super) fn with_facts<T>(
        &mut self,
        node: usize,
        peer: usize,
        id: ConnId,
        said: Said,
        decide: impl FnOnce(&Facts<'_>) -> T,
    ) -> Option<T> {
        let Conn { shown, dialect, .. } = *self.conn(id)?;
        let (shown, now) = (shown.map(|key| self.keys[key]), self.clock());
        let own = self.keys[self.nodes[node].key];
        let waiting = self.keys_of_waiting(node, peer);
        let name = self.names[self.nodes[node].peers[peer].name].clone();
        let tofu = &mut self.nodes[node].tofu;
        let (bound, disowned) = (tofu.key_of(&name, now), tofu.is_disowned(&name, shown));
        Some(decide(&Facts {
            own,
            shown,
            dialect,
            named: said.key,
            registered: said.registered,
            bound,
            disowned,
            enforced: true,
            waiting: &waiting,
        }))
    }

    pub(super) fn judge(&mut self, node: usize, peer: usize, id: ConnId, said: Said) -> Option<Verdict> {
        self.with_facts(node, peer, id, said, |facts| facts.judge())
    }

    /// Remembers the key of a node that was reached. `answer`: to whether it has the node id, if it was asked.
    pub(super) fn learn_key(
        &mut self,
        node: usize,
        peer: usize,
        id: ConnId,
        said: Said,
        answer: Option<trust::Answer>,
    ) {
        let learns = self.with_facts(node, peer, id, said, |facts| facts.learns(answer)) == Some(true);
        let Some(shown) = self.conn(id).and_then(|conn| conn.shown) else { return };
        if learns {
            let (name, key, now) =
                (self.names[self.nodes[node].peers[peer].name].clone(), self.keys[shown], self.clock());
            self.nodes[node].tofu.bind(name, key, now);
        }
    }

    pub(super) fn arm_node(&mut self, node: usize, at: Time) {
        let arming = &mut self.nodes[node];
        if at < arming.armed {
            arming.armed = at;
            self.at(at, Event::Node(node as u32));
        }
    }

    pub(super) fn node_timer(&mut self, node: usize) {
        // Another event is the timer's.
        if self.nodes[node].armed > self.now || !self.nodes[node].up {
            return;
        }
        let paused = self.hosts[self.nodes[node].host].paused_until;
        if paused > self.now {
            self.nodes[node].armed = paused;
            return self.at(paused, Event::Node(node as u32));
        }
        self.nodes[node].armed = Time::MAX;
        self.tend_registrations(node);
        self.tend_nat(node);
        self.tend_punches(node);
        let next = self.next_registration(node).min(self.next_detection(node)).min(self.next_punch(node));
        if next < Time::MAX {
            self.arm_node(node, next.max(self.now + MS));
        }
    }
}

/// What is known of a peer's key beside what its name is bound to.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Said {
    pub(super) key: Option<Fingerprint>,
    /// The relay says that the holder of the key is registered under the name.
    pub(super) registered: bool,
}

/// Why a link may not carry a peer's messages, as the engine reports it.
pub(super) fn refusal(mismatch: Mismatch) -> crate::errors::ConnectError {
    match mismatch {
        Mismatch::Ourselves => crate::errors::ConnectError::WrongNode,
        Mismatch::Named | Mismatch::Bound(_) => crate::errors::ConnectError::Untrusted,
    }
}
