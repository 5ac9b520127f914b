//! A node at its relays: registrations, and circuits over them.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use super::network::{MS, SECOND, Time};
use super::node::{Node, Use};
use super::quic::{Carrier, ConnId, Item, KNOWN_PATH_RTT, QuicPacket, StreamId, Timeouts, Why};
use super::world::{World, trace};
use crate::errors::{CircuitError, ConnectError};
use crate::liveness::{Liveness, Seen};
use crate::proto::control::{FromNode, FromRelay, Id, Reason, Refusal};
use crate::race::{AttemptId, Ended};
use crate::retry::{Backoff, Registering};
use crate::silence::{Counted, SILENCE, Silence};

/// As the engine's.
const TIMEOUTS: Timeouts = Timeouts { keep_alive: 15 * SECOND, idle: 45 * SECOND };
const CONNECT_TIMEOUT: Time = 5 * SECOND;
const LOOK_EVERY: Time = 100 * MS;
const LOOK_QUIET_EVERY: Time = 2 * SECOND;
const ASK_AGAIN: Time = 100 * MS;
const LONGEST_PAUSE_WANTED: Time = SECOND;

/// This node at one relay.
pub(super) struct Registration {
    pub(super) relay: SocketAddr,
    pub(super) phase: Phase,
    /// What the relay sees the node at.
    pub(super) seen: Option<SocketAddr>,
    standing: bool,
    again: Registering,
    silence: Silence,
    liveness: Liveness,
    /// The relay has been silent too long: another connection is tried.
    suspect: bool,
    beside: Option<ConnId>,
    beside_at: Time,
    beside_pauses: Backoff,
    look_at: Time,
    pub(super) asks: Vec<Ask>,
    pub(super) circuits: Vec<Circuit>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Down { again: Time },
    Dialling { conn: ConnId, until: Time },
    Registering { conn: ConnId, stream: StreamId, until: Time },
    Up { conn: ConnId, stream: StreamId, since: Time },
}

/// An attempt of a peer's that waits for the relay's word.
pub(super) struct Ask {
    pub(super) peer: usize,
    pub(super) attempt: AttemptId,
    pub(super) punch: bool,
    pub(super) session: Option<Id>,
    target: Id,
    /// When it is said.
    at: Time,
    tries: u32,
    /// A circuit ends with its attempt.
    until: Time,
}

/// One end of a circuit.
pub(super) struct Circuit {
    circuit: u32,
    ours: bool,
    conn: Option<ConnId>,
}

impl Registration {
    fn up(&self) -> Option<(ConnId, StreamId)> {
        match self.phase {
            Phase::Up { conn, stream, .. } => Some((conn, stream)),
            _ => None,
        }
    }

    fn next(&self) -> Time {
        let phase = match self.phase {
            Phase::Down { again } => again,
            Phase::Dialling { until, .. } | Phase::Registering { until, .. } => until,
            Phase::Up { .. } => self.look_at,
        };
        let asks = self.asks.iter().filter(|ask| ask.session.is_none() && self.up().is_some() && !self.suspect);
        let phase = asks.map(|ask| ask.at).fold(phase, Time::min);
        let phase = self.asks.iter().map(|ask| ask.until).fold(phase, Time::min);
        if self.suspect && self.beside.is_none() { phase.min(self.beside_at) } else { phase }
    }
}

impl Node {
    pub(super) fn next_registration(&self) -> Time {
        self.registrations.iter().map(Registration::next).min().unwrap_or(Time::MAX)
    }

    /// Whether a connection may begin over this circuit.
    pub(super) fn is_free_circuit(&self, outer: ConnId, circuit: u32) -> bool {
        let at = self.registrations.iter().find(|at| at.up().is_some_and(|(conn, _)| conn == outer));
        at.is_some_and(|at| at.circuits.iter().all(|known| known.circuit != circuit))
    }

    fn registration(&self, relay: SocketAddr) -> Option<usize> {
        self.registrations.iter().position(|at| at.relay == relay)
    }
}

impl World {
    pub(super) fn want_registration(&mut self, node: usize, relay: usize, standing: bool) {
        let address = self.relay_address(relay);
        self.registration_at(node, address, standing);
    }

    /// The registration at a relay, which is begun if there is none.
    pub(super) fn registration_at(&mut self, node: usize, relay: SocketAddr, standing: bool) -> usize {
        if let Some(known) = self.nodes[node].registration(relay) {
            return known;
        }
        let clock = self.clock();
        self.nodes[node].earned.insert(relay);
        self.nodes[node].registrations.push(Registration {
            relay,
            phase: Phase::Down { again: self.now },
            seen: None,
            standing,
            again: Registering::default(),
            silence: Silence::new(Counted::default()),
            liveness: Liveness::new(clock),
            suspect: false,
            beside: None,
            beside_at: 0,
            beside_pauses: Backoff::new(Duration::from_millis(100), Duration::from_secs(1)),
            look_at: Time::MAX,
            asks: Vec::new(),
            circuits: Vec::new(),
        });
        self.arm_node(node, self.now);
        self.nodes[node].registrations.len() - 1
    }

    pub(super) fn tend_registrations(&mut self, node: usize) {
        for at in 0..self.nodes[node].registrations.len() {
            self.end_asks(node, at);
            let registration = &self.nodes[node].registrations[at];
            let due = registration.next() <= self.now;
            match registration.phase {
                Phase::Down { .. } if due && (registration.standing || !registration.asks.is_empty()) => {
                    self.dial_relay(node, at);
                }
                Phase::Down { .. } if due => {
                    self.nodes[node].registrations[at].phase = Phase::Down { again: Time::MAX };
                }
                Phase::Dialling { conn, .. } if due => {
                    self.nodes[node].uses.remove(&conn);
                    self.close(conn, 0);
                    self.not_registered(node, at, CircuitError::Relay(ConnectError::TimedOut));
                }
                Phase::Registering { conn, .. } if due => {
                    self.nodes[node].uses.remove(&conn);
                    self.close(conn, 0);
                    self.not_registered(node, at, CircuitError::RelayLost);
                }
                Phase::Up { conn, .. } if due => {
                    self.say_asks(node, at);
                    self.look_at_relay(node, at, conn);
                }
                _ => {}
            }
        }
    }

    fn relay_conn(&mut self, node: usize, at: usize, used: Use) -> ConnId {
        let Node { host, key, port, .. } = self.nodes[node];
        let to = self.nodes[node].registrations[at].relay;
        let conn = self.connect(host, key, Carrier::Udp { port, to }, None, TIMEOUTS);
        self.nodes[node].uses.insert(conn, used);
        conn
    }

    fn dial_relay(&mut self, node: usize, at: usize) {
        let conn = self.relay_conn(node, at, Use::Registration(at));
        self.nodes[node].registrations[at].phase = Phase::Dialling { conn, until: self.now + CONNECT_TIMEOUT };
    }

    /// The relay has answered.
    pub(super) fn register_on(&mut self, node: usize, at: usize, conn: ConnId) {
        let name = self.id_of(self.nodes[node].name);
        let stream = self.open_stream(conn);
        let hello = FromNode::Connect { node_id: name, proof: None, successions: Vec::new() };
        self.write(conn, stream, Item::FromNode(Rc::new(hello)));
        let until = self.now + CONNECT_TIMEOUT;
        self.nodes[node].registrations[at].phase = Phase::Registering { conn, stream, until };
        self.arm_node(node, until);
    }

    pub(super) fn id_of(&self, name: usize) -> Id {
        Id::new(self.names[name].to_bytes()).unwrap()
    }

    /// The relay was silent on the old connection and answers on this one.
    pub(super) fn replace_registration(&mut self, node: usize, at: usize, conn: ConnId) {
        let registration = &mut self.nodes[node].registrations[at];
        (registration.suspect, registration.beside) = (false, None);
        let old = registration.up();
        self.nodes[node].uses.insert(conn, Use::Registration(at));
        if let Some((old, _)) = old {
            self.nodes[node].uses.remove(&old);
            self.end_circuits(node, at);
            self.close(old, 0);
        }
        self.register_on(node, at, conn);
    }

    pub(super) fn beside_failed(&mut self, node: usize, at: usize) {
        let draw = self.random.f64();
        let registration = &mut self.nodes[node].registrations[at];
        registration.beside = None;
        let pause = registration.beside_pauses.pause(draw).as_micros() as Time;
        registration.beside_at = self.now + pause;
        let next = registration.beside_at;
        self.arm_node(node, next);
        // Attempts that wait have waited for this dial.
        if self.nodes[node].registrations[at].suspect {
            self.fail_asks(node, at, &CircuitError::Relay(ConnectError::TimedOut));
        }
    }

    pub(super) fn registration_lost(&mut self, node: usize, at: usize, why: Why) {
        let error = match (self.nodes[node].registrations[at].phase, why) {
            (Phase::Dialling { .. }, Why::Unreachable) => CircuitError::Relay(ConnectError::Unreachable),
            (Phase::Dialling { .. }, _) => CircuitError::Relay(ConnectError::TimedOut),
            _ => CircuitError::RelayLost,
        };
        self.not_registered(node, at, error);
    }

    fn not_registered(&mut self, node: usize, at: usize, error: CircuitError) {
        let (now, draw) = (self.now, self.random.f64());
        trace!(self, "node {node} is not registered at {}: {error}", self.nodes[node].registrations[at].relay);
        self.end_circuits(node, at);
        let registration = &mut self.nodes[node].registrations[at];
        let was_up = matches!(registration.phase, Phase::Up { .. });
        if let Phase::Up { since, .. } = registration.phase {
            registration.again.lasted(Duration::from_micros(now - since));
        }
        let pause = match &error {
            CircuitError::Refused(Refusal::TakenOver) => registration.again.pause_taken_over(draw).0,
            CircuitError::Refused(_) => Registering::pause_refused(draw),
            _ => registration.again.pause(draw),
        };
        let mut pause = pause.as_micros() as Time;
        if !registration.asks.is_empty() {
            pause = pause.min(LONGEST_PAUSE_WANTED);
        }
        registration.phase = Phase::Down { again: now + pause };
        registration.suspect = false;
        if let Some(beside) = registration.beside.take() {
            self.close(beside, 0);
        }
        self.arm_node(node, now + pause);
        let registration = &mut self.nodes[node].registrations[at];
        match was_up && !matches!(error, CircuitError::Refused(_)) {
            // They wait for the next registration.
            true => registration.asks.iter_mut().for_each(|ask| ask.session = None),
            false => self.fail_asks(node, at, &error),
        }
    }

    fn end_asks(&mut self, node: usize, at: usize) {
        let now = self.now;
        let (late, left) =
            std::mem::take(&mut self.nodes[node].registrations[at].asks).into_iter().partition(|ask| ask.until <= now);
        self.nodes[node].registrations[at].asks = left;
        let late: Vec<Ask> = late;
        late.into_iter().for_each(|ask| self.ask_failed(node, &ask, CircuitError::Relay(ConnectError::TimedOut)));
    }

    fn fail_asks(&mut self, node: usize, at: usize, error: &CircuitError) {
        let asks = std::mem::take(&mut self.nodes[node].registrations[at].asks);
        asks.into_iter().for_each(|ask| self.ask_failed(node, &ask, error.clone()));
    }

    fn ask_failed(&mut self, node: usize, ask: &Ask, error: CircuitError) {
        let how = if ask.punch { Ended::NotPunched(error.into()) } else { Ended::NoCircuit(error) };
        self.attempt_failed(node, ask.peer, ask.attempt, how);
    }

    fn look_at_relay(&mut self, node: usize, at: usize, conn: ConnId) {
        let (now, clock) = (self.now, self.clock());
        let Some(quic) = self.conn(conn) else { return };
        let counted = Counted { asked: quic.asked, heard: quic.heard };
        let round_trip = Duration::from_micros(quic.round_trip.unwrap_or(0));
        let registration = &mut self.nodes[node].registrations[at];
        let soon = registration.silence.look(counted, clock);
        registration.look_at = now + if soon || registration.suspect { LOOK_EVERY } else { LOOK_QUIET_EVERY };
        let patience = SILENCE.max(registration.liveness.expected_silence(clock)).max(round_trip * 6);
        let since = registration.silence.unanswered_since();
        match registration.liveness.look(counted.heard, since, patience, clock) {
            Seen::Silent(silence) if !registration.suspect => {
                registration.suspect = true;
                registration.liveness.suspect(counted.heard, silence, clock);
                (registration.beside_at, registration.look_at) = (now, now + LOOK_EVERY);
                registration.beside_pauses.reset();
                trace!(self, "node {node} suspects its relay");
            }
            Seen::Heard if registration.suspect => {
                registration.suspect = false;
                if let Some(beside) = registration.beside.take() {
                    self.nodes[node].uses.remove(&beside);
                    self.close(beside, 0);
                }
                self.say_asks(node, at);
            }
            _ => {}
        }
        let registration = &self.nodes[node].registrations[at];
        if registration.suspect && registration.beside.is_none() && registration.beside_at <= now {
            let beside = self.relay_conn(node, at, Use::Beside(at));
            self.nodes[node].registrations[at].beside = Some(beside);
        }
    }

    /// A peer wants a circuit, or a direct path, with the help of a relay.
    pub(super) fn ask_relay(&mut self, node: usize, relay: SocketAddr, peer: usize, attempt: AttemptId, punch: bool) {
        let at = self.registration_at(node, relay, false);
        let target = self.id_of(self.nodes[node].peers[peer].name);
        let until = if punch { self.now + CONNECT_TIMEOUT } else { Time::MAX };
        self.arm_node(node, until);
        let registration = &mut self.nodes[node].registrations[at];
        registration.asks.push(Ask { peer, attempt, punch, session: None, target, at: self.now, tries: 0, until });
        if let Phase::Down { again } = registration.phase {
            let again = again.min(self.now + LONGEST_PAUSE_WANTED);
            registration.phase = Phase::Down { again };
            self.arm_node(node, again);
        }
        self.say_asks(node, at);
    }

    pub(super) fn forget_asks(&mut self, node: usize, peer: usize, attempt: AttemptId) {
        for registration in &mut self.nodes[node].registrations {
            registration.asks.retain(|ask| (ask.peer, ask.attempt) != (peer, attempt));
        }
    }

    fn say_asks(&mut self, node: usize, at: usize) {
        let now = self.now;
        let registration = &self.nodes[node].registrations[at];
        let Some((conn, stream)) = registration.up().filter(|_| !registration.suspect) else { return };
        for place in 0..self.nodes[node].registrations[at].asks.len() {
            let session = Id::new(self.random.u64(..).to_be_bytes().to_vec()).unwrap();
            let ask = &mut self.nodes[node].registrations[at].asks[place];
            if ask.session.is_some() || ask.at > now {
                continue;
            }
            ask.session = Some(session.clone());
            let target_id = ask.target.clone();
            let said = match ask.punch {
                true => FromNode::PunchRequest { session_id: session, target_id },
                false => FromNode::RelayRequest { session_id: session, target_id },
            };
            self.say(node, conn, stream, said);
        }
    }

    fn say(&mut self, node: usize, conn: ConnId, stream: StreamId, said: FromNode) {
        self.write(conn, stream, Item::FromNode(Rc::new(said)));
        self.look_soon(node, conn);
    }

    /// Something was sent that the relay must answer.
    fn look_soon(&mut self, node: usize, conn: ConnId) {
        let soon = self.now + LOOK_EVERY;
        let looking = self.nodes[node].registrations.iter_mut().find(|at| at.up().is_some_and(|(up, _)| up == conn));
        if let Some(registration) = looking.filter(|registration| registration.look_at > soon) {
            registration.look_at = soon;
            self.arm_node(node, soon);
        }
    }

    pub(super) fn say_to_relay(&mut self, node: usize, relay: SocketAddr, said: FromNode) {
        let at = self.nodes[node].registration(relay);
        if let Some((conn, stream)) = at.and_then(|at| self.nodes[node].registrations[at].up()) {
            self.say(node, conn, stream, said);
        }
    }

    pub(super) fn describe_to_all(&mut self, node: usize) {
        let Some((profile, candidates)) = self.nodes[node].nat.description.clone() else { return };
        for at in 0..self.nodes[node].registrations.len() {
            if let Some((conn, stream)) = self.nodes[node].registrations[at].up() {
                let candidates = candidates.clone();
                self.say(node, conn, stream, FromNode::Describe { profile, candidates });
            }
        }
    }

    pub(super) fn relay_told(&mut self, node: usize, id: ConnId, told: &FromRelay) {
        let uses = |at: &Registration| match at.phase {
            Phase::Registering { conn, .. } | Phase::Up { conn, .. } => conn == id,
            Phase::Down { .. } | Phase::Dialling { .. } => false,
        };
        let Some(at) = self.nodes[node].registrations.iter().position(uses) else { return };
        match told {
            FromRelay::Registered { address, .. } => self.registered(node, at, *address),
            FromRelay::Refused { error } => {
                self.nodes[node].uses.remove(&id);
                self.not_registered(node, at, CircuitError::Refused(*error));
                self.close(id, 0);
            }
            FromRelay::Opened { session_id, circuit } => self.circuit_opened(node, at, session_id, *circuit),
            FromRelay::NotOpened { session_id, error } | FromRelay::NotPunched { session_id, error } => {
                let asks = &mut self.nodes[node].registrations[at].asks;
                let Some(place) = asks.iter().position(|ask| ask.session.as_ref() == Some(session_id)) else { return };
                let mut ask = asks.swap_remove(place);
                if *error == Refusal::NotReady && ask.tries < 4 {
                    // The other node is about to find out what NAT it is behind.
                    (ask.session, ask.at, ask.tries) = (None, self.now + (ASK_AGAIN << ask.tries), ask.tries + 1);
                    asks.push(ask);
                    return self.arm_node(node, self.now + ASK_AGAIN);
                }
                let error = match error {
                    Refusal::NotRegistered => CircuitError::NotRegistered,
                    error => CircuitError::Refused(*error),
                };
                self.ask_failed(node, &ask, error);
            }
            FromRelay::Disconnect { circuit, reason } => self.circuit_disconnected(node, at, *circuit, *reason),
            FromRelay::Dropped { .. } => {}
            FromRelay::PunchCoordinate(told) => self.coordinated(node, at, told),
            FromRelay::PunchExecute { session_id, ports } => self.ports_told(node, session_id, ports),
            FromRelay::PunchResult { session_id, result } => self.punch_over(node, session_id, *result),
        }
    }

    fn registered(&mut self, node: usize, at: usize, address: SocketAddr) {
        let clock = self.clock();
        let Phase::Registering { conn, stream, .. } = self.nodes[node].registrations[at].phase else {
            self.nodes[node].registrations[at].seen = Some(address);
            return self.network_moved(node);
        };
        let counted =
            self.conn(conn).map_or(Counted::default(), |conn| Counted { asked: conn.asked, heard: conn.heard });
        let registration = &mut self.nodes[node].registrations[at];
        registration.phase = Phase::Up { conn, stream, since: self.now };
        registration.seen = Some(address);
        registration.silence = Silence::new(counted);
        registration.liveness.linked(clock);
        registration.look_at = self.now + LOOK_EVERY;
        trace!(self, "node {node} is registered at {}, seen at {address}", self.nodes[node].registrations[at].relay);
        self.arm_node(node, self.now + LOOK_EVERY);
        self.describe_to_all(node);
        self.look_at_nat(node);
        self.say_asks(node, at);
    }

    fn circuit_opened(&mut self, node: usize, at: usize, session: &Id, circuit: u32) {
        let Node { host, key, timeouts, .. } = self.nodes[node];
        let registration = &mut self.nodes[node].registrations[at];
        let Some((outer, stream)) = registration.up() else { return };
        let Some(place) = registration.asks.iter().position(|ask| ask.session.as_ref() == Some(session)) else {
            // Nobody waits any more.
            let said = FromNode::Disconnect { circuit, reason: Reason::Closed };
            return self.say(node, outer, stream, said);
        };
        let Ask { peer, attempt, .. } = registration.asks.swap_remove(place);
        let conn = self.connect(host, key, Carrier::Circuit { outer, circuit }, Some(KNOWN_PATH_RTT), timeouts);
        self.nodes[node].registrations[at].circuits.push(Circuit { circuit, ours: true, conn: Some(conn) });
        self.nodes[node].uses.insert(conn, Use::Attempt(peer, attempt));
        self.attempt_connects(node, peer, attempt, conn);
    }

    /// Another node has begun a connection over a circuit, if it is one.
    pub(super) fn circuit_carries(&mut self, node: usize, id: ConnId) {
        let Some(Carrier::Circuit { outer, circuit }) = self.conn(id).map(|conn| conn.carrier) else { return };
        let registrations = &mut self.nodes[node].registrations;
        if let Some(at) = registrations.iter_mut().find(|at| at.up().is_some_and(|(conn, _)| conn == outer)) {
            at.circuits.push(Circuit { circuit, ours: false, conn: Some(id) });
        }
    }

    /// An inner connection has ended.
    pub(super) fn circuit_closed(&mut self, node: usize, id: ConnId) {
        for at in 0..self.nodes[node].registrations.len() {
            let registration = &mut self.nodes[node].registrations[at];
            let Some(place) = registration.circuits.iter().position(|known| known.conn == Some(id)) else { continue };
            let Circuit { circuit, ours, .. } = registration.circuits.swap_remove(place);
            // The node that accepted leaves the circuit to the one that asked for it.
            if let (true, Some((conn, stream))) = (ours, registration.up()) {
                self.say(node, conn, stream, FromNode::Disconnect { circuit, reason: Reason::Closed });
            }
        }
    }

    fn circuit_disconnected(&mut self, node: usize, at: usize, circuit: u32, _reason: Reason) {
        let circuits = &mut self.nodes[node].registrations[at].circuits;
        let Some(place) = circuits.iter().position(|known| known.circuit == circuit) else { return };
        if let Some(conn) = circuits.swap_remove(place).conn {
            self.end(conn, Why::Carrier);
        }
    }

    fn end_circuits(&mut self, node: usize, at: usize) {
        let circuits = std::mem::take(&mut self.nodes[node].registrations[at].circuits);
        circuits.into_iter().filter_map(|circuit| circuit.conn).for_each(|conn| self.end(conn, Why::Carrier));
    }

    /// A packet of a circuit has come over a registration.
    pub(super) fn datagram(&mut self, outer: ConnId, circuit: u32, packet: &Rc<QuicPacket>) {
        let Some(conn) = self.conn(outer) else { return };
        let host = conn.host;
        match self.hosts[host].is {
            super::network::Is::Relay(relay) => self.forward(relay, outer, circuit, packet),
            super::network::Is::Node(_) => {
                self.quic_packet(host, Carrier::Circuit { outer, circuit }, (**packet).clone());
            }
            super::network::Is::Closed | super::network::Is::Silent => {}
        }
    }
}
