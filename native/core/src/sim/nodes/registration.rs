//! A node at its relays: carries out what its registrations decide, and circuits over them.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::network::{MS, SECOND, Time};
use super::node::{Node, Use};
use super::quic::{Carrier, ConnId, Item, KNOWN_PATH_RTT, QuicPacket, StreamId, Timeouts, Why};
use super::world::{World, trace};
use crate::circuits::{self, Circuits};
use crate::detection::Probed;
use crate::errors::{CircuitError, ConnectError};
use crate::liveness::Liveness;
use crate::proto::control::{FromNode, FromRelay, Id, Probes, Refusal};
use crate::race::{AttemptId, Ended};
use crate::registration::{self, Action, Registrant, RegistrationState, RelayEvent, Wants, Watch};
use crate::types::Dialect;
use crate::unanswered::Counted;

/// As the engine's.
const TIMEOUTS: Timeouts = Timeouts { keep_alive: 15 * SECOND, idle: 45 * SECOND };
const CONNECT_TIMEOUT: Time = 5 * SECOND;
const ASK_AGAIN: Time = 100 * MS;
const NOT_A_RELAY_FOR: Time = registration::NOT_A_RELAY_FOR.as_micros() as Time;
const UNUSED_FOR: Duration = Duration::from_secs(60);

/// This node at one relay.
pub(super) struct Registration {
    pub(super) relay: SocketAddr,
    life: Registrant,
    liveness: Liveness,
    watch: Option<Watch>,
    /// The dial under way, and until when.
    dial: Option<(ConnId, Time)>,
    /// The connection that was just dialled.
    dialled: Option<ConnId>,
    /// Where the relay was asked to register the node, and until when it may answer.
    asking: Option<(ConnId, StreamId, Time)>,
    up: Option<(ConnId, StreamId)>,
    /// Attempts may use it.
    usable: bool,
    /// What the relay sees the node at.
    pub(super) seen: Option<SocketAddr>,
    probes: Option<Probes>,
    standing: bool,
    pub(super) asks: Vec<Ask>,
    /// While the node is registered.
    pub(super) circuits: Option<Circuits>,
    /// The connections over circuits.
    inner: Vec<(u32, ConnId)>,
}

/// An attempt of a peer's that waits for the relay's word.
pub(super) struct Ask {
    relay: SocketAddr,
    pub(super) peer: usize,
    pub(super) attempt: AttemptId,
    punch: bool,
    pub(super) session: Option<Id>,
    target: Id,
    /// When it is said.
    at: Time,
    tries: u32,
    /// A circuit ends with its attempt.
    until: Time,
}

impl Registration {
    fn wants(&self, name: &Id) -> Wants {
        let standing = self.standing.then(|| name.clone());
        Wants { standing, waiting: self.asks.len(), circuits: self.circuits.as_ref().map_or(0, Circuits::count) }
    }

    /// When to look at it, but for what the machine waits for.
    fn next(&self) -> Time {
        let unsaid = self.asks.iter().filter(|ask| ask.session.is_none() && self.usable).map(|ask| ask.at);
        let until = self.asks.iter().map(|ask| ask.until);
        let dial = self.dial.map(|(_, until)| until);
        unsaid.chain(until).chain(dial).chain(self.asking.map(|(.., until)| until)).min().unwrap_or(Time::MAX)
    }
}

/// A connection's number for the machine.
fn number(conn: ConnId) -> usize {
    (conn.place as usize) << 32 | conn.number as usize
}

impl Node {
    /// Whether a connection may begin over this circuit.
    pub(super) fn is_free_circuit(&self, outer: ConnId, circuit: u32) -> bool {
        let at = self.registrations.iter().find(|at| at.up.is_some_and(|(conn, _)| conn == outer));
        at.and_then(|at| at.circuits.as_ref()).is_some_and(|circuits| circuits.is_free(circuit))
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
    fn registration_at(&mut self, node: usize, relay: SocketAddr, standing: bool) -> usize {
        if let Some(known) = self.nodes[node].registration(relay) {
            return known;
        }
        let now = self.clock();
        let name = self.id_of(self.nodes[node].name);
        self.nodes[node].earned.insert(relay);
        self.nodes[node].registrations.push(Registration {
            relay,
            life: Registrant::new(name, UNUSED_FOR, now),
            liveness: Liveness::new(now),
            watch: None,
            dial: None,
            dialled: None,
            asking: None,
            up: None,
            usable: false,
            seen: None,
            probes: None,
            standing,
            asks: Vec::new(),
            circuits: None,
            inner: Vec::new(),
        });
        self.arm_node(node, self.now);
        self.nodes[node].registrations.len() - 1
    }

    /// Whether some relays have not said yet whether they register the node.
    pub(super) fn is_registering(&self, node: usize) -> bool {
        let connecting = |at: &Registration| *at.life.state().0 == RegistrationState::Connecting;
        self.nodes[node].registrations.iter().any(connecting)
    }

    /// The relays at which the node is registered.
    pub(super) fn probed(&self, node: usize) -> Vec<Probed> {
        let up = self.nodes[node].registrations.iter().filter(|at| at.up.is_some());
        up.filter_map(|at| Some(Probed { relay: at.relay, seen_at: at.seen?, probes: at.probes.clone()? })).collect()
    }

    /// Those of them that were told so before a time.
    pub(super) fn registered_before(&self, node: usize, before: Instant) -> Vec<SocketAddr> {
        let up = self.nodes[node].registrations.iter().filter(|at| at.up.is_some());
        up.filter(|at| at.life.state().1 < before).map(|at| at.relay).collect()
    }

    pub(super) fn id_of(&self, name: usize) -> Id {
        Id::new(self.names[name].to_bytes()).unwrap()
    }

    pub(super) fn next_registration(&self, node: usize) -> Time {
        let next = |at: &Registration| {
            let overdue = at.circuits.as_ref().and_then(Circuits::overdue);
            let life = [at.life.next_timeout(), at.watch.as_ref().map(Watch::look_at), overdue];
            life.into_iter().flatten().map(|at| self.time(at)).fold(at.next(), Time::min)
        };
        self.nodes[node].registrations.iter().map(next).min().unwrap_or(Time::MAX)
    }

    pub(super) fn tend_registrations(&mut self, node: usize) {
        for at in 0..self.nodes[node].registrations.len() {
            self.end_asks(node, at);
            self.look_at_relay(node, at);
            let (now, clock) = (self.now, self.clock());
            if let Some((conn, _)) = self.nodes[node].registrations[at].dial.filter(|(_, until)| *until <= now) {
                self.nodes[node].uses.remove(&conn);
                self.close(conn, 0);
                self.dial_ended(node, at, Err(CircuitError::Relay(ConnectError::TimedOut)));
            }
            if let Some((conn, ..)) = self.nodes[node].registrations[at].asking.filter(|(.., until)| *until <= now) {
                self.nodes[node].uses.remove(&conn);
                self.close(conn, 0);
                self.relay_answers(node, at, Err(CircuitError::RelayLost));
            }
            self.nodes[node].registrations[at].life.timeout(clock);
            let overdue = self.nodes[node].registrations[at].circuits.as_ref().and_then(Circuits::overdue);
            if overdue.is_some_and(|overdue| overdue <= clock) {
                self.registration_lost(node, at, CircuitError::RelayLost);
            }
            self.follow_registration(node, at);
            self.say_asks(node, at);
        }
    }

    /// Carries out what the machine decided.
    fn follow_registration(&mut self, node: usize, at: usize) {
        let clock = self.clock();
        let name = self.id_of(self.nodes[node].name);
        let registration = &mut self.nodes[node].registrations[at];
        let wants = registration.wants(&name);
        registration.life.want(wants, clock);
        let mut lost = false;
        while let Some(action) = self.nodes[node].registrations[at].life.poll() {
            match action {
                Action::Dial => self.dial_relay(node, at),
                Action::StopDial => {
                    if let Some((conn, _)) = self.nodes[node].registrations[at].dial.take() {
                        self.nodes[node].uses.remove(&conn);
                        self.close(conn, 0);
                    }
                }
                Action::Register(name) => self.ask_to_register(node, at, name),
                Action::Leave | Action::LeaveGently => {
                    lost = true;
                    self.leave_relay(node, at);
                }
                Action::Use => self.nodes[node].registrations[at].usable = true,
                Action::Hold => self.nodes[node].registrations[at].usable = false,
                // Those who had asked over a registration that was lost wait for the next.
                Action::Fail(error) if lost && !matches!(error, CircuitError::Refused(_)) => {}
                Action::Fail(error) => {
                    trace!(
                        self,
                        "node {node} is not registered at {}: {error}", self.nodes[node].registrations[at].relay
                    );
                    let asks = std::mem::take(&mut self.nodes[node].registrations[at].asks);
                    asks.into_iter().for_each(|ask| self.ask_failed(node, &ask, error.clone()));
                }
                Action::Report(event) => self.registration_event(node, at, &event),
                Action::End => {
                    let clock = self.clock();
                    self.nodes[node].registrations[at].life = Registrant::new(name.clone(), UNUSED_FOR, clock);
                }
            }
        }
        let next = self.next_registration(node);
        if next < Time::MAX {
            self.arm_node(node, next.max(self.now));
        }
    }

    fn registration_event(&mut self, node: usize, at: usize, event: &RelayEvent) {
        trace!(self, "node {node} at {}: {event:?}", self.nodes[node].registrations[at].relay);
        match event {
            RelayEvent::Registered { .. } => {
                self.describe_to_all(node);
                self.look_at_nat(node);
            }
            RelayEvent::Moved { .. } => self.network_moved(node),
            _ => {}
        }
    }

    fn dial_relay(&mut self, node: usize, at: usize) {
        let Node { host, key, port, .. } = self.nodes[node];
        let to = self.nodes[node].registrations[at].relay;
        let conn = self.connect(host, key, Carrier::Udp { port, to }, None, TIMEOUTS);
        self.nodes[node].uses.insert(conn, Use::Registration(at));
        self.nodes[node].registrations[at].dial = Some((conn, self.now + CONNECT_TIMEOUT));
    }

    /// The relay has answered a dial.
    pub(super) fn relay_dialled(&mut self, node: usize, at: usize, conn: ConnId) {
        if self.conn(conn).is_some_and(|conn| conn.dialect == Dialect::Macula) {
            self.nodes[node].uses.remove(&conn);
            self.close(conn, 0);
            return self.dial_ended(node, at, Err(CircuitError::NotARelay));
        }
        self.nodes[node].registrations[at].dialled = Some(conn);
        self.dial_ended(node, at, Ok(()));
        // The machine has no use for it if the old connection was heard again.
        if let Some(conn) = self.nodes[node].registrations[at].dialled.take() {
            self.nodes[node].uses.remove(&conn);
            self.close(conn, 0);
        }
    }

    fn dial_ended(&mut self, node: usize, at: usize, result: Result<(), CircuitError>) {
        let (clock, draw) = (self.clock(), self.random.f64());
        let up = self.nodes[node].registrations[at].up;
        let heard = up.and_then(|(conn, _)| self.conn(conn)).map_or(0, |conn| conn.heard);
        let registration = &mut self.nodes[node].registrations[at];
        registration.dial = None;
        registration.life.dialled(result, heard, draw, clock);
        self.follow_registration(node, at);
    }

    fn ask_to_register(&mut self, node: usize, at: usize, node_id: Id) {
        let Some(conn) = self.nodes[node].registrations[at].dialled.take() else { return };
        let stream = self.open_stream(conn);
        let hello = FromNode::Connect { node_id, proof: None, successions: Vec::new() };
        self.write(conn, stream, Item::FromNode(Rc::new(hello)));
        self.nodes[node].registrations[at].asking = Some((conn, stream, self.now + CONNECT_TIMEOUT));
    }

    fn relay_answers(&mut self, node: usize, at: usize, result: Result<SocketAddr, CircuitError>) {
        let (clock, draw) = (self.clock(), self.random.f64());
        let Some((conn, stream, _)) = self.nodes[node].registrations[at].asking.take() else { return };
        let counted = self.counted(conn);
        let registration = &mut self.nodes[node].registrations[at];
        if let Ok(address) = result {
            registration.up = Some((conn, stream));
            registration.seen = Some(address);
            registration.circuits = Some(Circuits::new(address));
            registration.liveness.linked(clock);
            registration.watch = Some(Watch::new(counted, clock));
        }
        registration.life.answered(result, draw, clock);
        self.follow_registration(node, at);
        self.say_asks(node, at);
    }

    fn leave_relay(&mut self, node: usize, at: usize) {
        let registration = &mut self.nodes[node].registrations[at];
        registration.circuits = None;
        let inner = std::mem::take(&mut registration.inner);
        inner.into_iter().for_each(|(_, conn)| self.end(conn, Why::Carrier));
        let registration = &mut self.nodes[node].registrations[at];
        registration.watch = None;
        registration.asks.iter_mut().for_each(|ask| ask.session = None);
        if let Some((conn, _)) = registration.up.take() {
            self.nodes[node].uses.remove(&conn);
            self.close(conn, 0);
        }
    }

    fn counted(&self, conn: ConnId) -> Counted {
        self.conn(conn).map_or(Counted::default(), |conn| Counted { asked: conn.asked, heard: conn.heard })
    }

    /// A connection to a relay has ended.
    pub(super) fn relay_closed(&mut self, node: usize, at: usize, conn: ConnId, why: Why) {
        let registration = &self.nodes[node].registrations[at];
        if registration.dial.is_some_and(|(dial, _)| dial == conn) {
            let error = if why == Why::Unreachable { ConnectError::Unreachable } else { ConnectError::TimedOut };
            self.dial_ended(node, at, Err(CircuitError::Relay(error)));
        } else if registration.asking.is_some_and(|(asking, ..)| asking == conn) {
            self.relay_answers(node, at, Err(CircuitError::RelayLost));
        } else if registration.up.is_some_and(|(up, _)| up == conn) {
            self.registration_lost(node, at, CircuitError::RelayLost);
        }
    }

    fn registration_lost(&mut self, node: usize, at: usize, error: CircuitError) {
        let (clock, draw) = (self.clock(), self.random.f64());
        self.nodes[node].registrations[at].life.lost(error, draw, clock);
        self.follow_registration(node, at);
    }

    fn ask_failed(&mut self, node: usize, ask: &Ask, error: CircuitError) {
        if error == CircuitError::NotARelay {
            self.nodes[node].not_relays.insert(ask.relay, self.now + NOT_A_RELAY_FOR);
        }
        let how = if ask.punch { Ended::NotPunched(error.into()) } else { Ended::NoCircuit(error) };
        self.attempt_failed(node, ask.peer, ask.attempt, how);
    }

    fn end_asks(&mut self, node: usize, at: usize) {
        let now = self.now;
        let asks = std::mem::take(&mut self.nodes[node].registrations[at].asks);
        let (late, left): (Vec<Ask>, Vec<Ask>) = asks.into_iter().partition(|ask| ask.until <= now);
        self.nodes[node].registrations[at].asks = left;
        late.into_iter().for_each(|ask| self.ask_failed(node, &ask, CircuitError::Relay(ConnectError::TimedOut)));
    }

    fn look_at_relay(&mut self, node: usize, at: usize) {
        let clock = self.clock();
        let Some((conn, _)) = self.nodes[node].registrations[at].up else { return };
        let counted = self.counted(conn);
        let round_trip = Duration::from_micros(self.conn(conn).and_then(|conn| conn.round_trip).unwrap_or(0));
        let registration = &mut self.nodes[node].registrations[at];
        let Some(watch) = registration.watch.as_mut().filter(|watch| watch.look_at() <= clock) else { return };
        match watch.look(&mut registration.liveness, counted, round_trip, clock).suspect {
            true => registration.life.suspected(counted.heard),
            false => registration.life.cleared(),
        }
    }

    /// A peer wants a circuit, or a direct path, with the help of a relay.
    pub(super) fn ask_relay(&mut self, node: usize, relay: SocketAddr, peer: usize, attempt: AttemptId, punch: bool) {
        if self.nodes[node].not_relays.get(&relay).is_some_and(|until| *until > self.now) {
            let error = CircuitError::NotARelay;
            let how = if punch { Ended::NotPunched(error.into()) } else { Ended::NoCircuit(error) };
            return self.attempt_failed(node, peer, attempt, how);
        }
        let at = self.registration_at(node, relay, false);
        let target = self.id_of(self.nodes[node].peers[peer].name);
        let until = if punch { self.now + CONNECT_TIMEOUT } else { Time::MAX };
        self.arm_node(node, until);
        let registration = &mut self.nodes[node].registrations[at];
        registration.asks.push(Ask {
            relay,
            peer,
            attempt,
            punch,
            session: None,
            target,
            at: self.now,
            tries: 0,
            until,
        });
        self.follow_registration(node, at);
        self.say_asks(node, at);
    }

    pub(super) fn forget_asks(&mut self, node: usize, peer: usize, attempt: AttemptId) {
        for registration in &mut self.nodes[node].registrations {
            registration.asks.retain(|ask| (ask.peer, ask.attempt) != (peer, attempt));
        }
    }

    fn say_asks(&mut self, node: usize, at: usize) {
        let (now, until) = (self.now, self.clock() + Duration::from_micros(CONNECT_TIMEOUT));
        if !self.nodes[node].registrations[at].usable {
            return;
        }
        for place in 0..self.nodes[node].registrations[at].asks.len() {
            let session = Id::new(self.random.u64(..).to_be_bytes().to_vec()).unwrap();
            let Registration { asks, circuits: Some(circuits), .. } = &mut self.nodes[node].registrations[at] else {
                return;
            };
            let ask = &mut asks[place];
            if ask.session.is_some() || ask.at > now {
                continue;
            }
            ask.session = Some(session.clone());
            match ask.punch {
                true => circuits.request_punch(session, ask.target.clone(), until),
                false => circuits.request(session, ask.target.clone(), until),
            }
        }
        self.carry_out_circuits(node, at);
    }

    fn say(&mut self, node: usize, conn: ConnId, stream: StreamId, said: FromNode) {
        self.write(conn, stream, Item::FromNode(Rc::new(said)));
        self.look_soon(node, conn);
    }

    /// Something was sent that the relay must answer.
    pub(super) fn look_soon(&mut self, node: usize, conn: ConnId) {
        let clock = self.clock();
        let looking = self.nodes[node].registrations.iter_mut().find(|at| at.up.is_some_and(|(up, _)| up == conn));
        if let Some(watch) = looking.and_then(|registration| registration.watch.as_mut()) {
            watch.asked(clock);
            let next = watch.look_at();
            self.arm_node(node, self.time(next));
        }
    }

    pub(super) fn say_to_relay(&mut self, node: usize, relay: SocketAddr, said: FromNode) {
        let at = self.nodes[node].registration(relay);
        if let Some((conn, stream)) = at.and_then(|at| self.nodes[node].registrations[at].up) {
            self.say(node, conn, stream, said);
        }
    }

    pub(super) fn describe_to_all(&mut self, node: usize) {
        let Some((profile, candidates)) = self.nodes[node].nat.description.clone() else { return };
        for at in 0..self.nodes[node].registrations.len() {
            if let Some((conn, stream)) = self.nodes[node].registrations[at].up {
                let candidates = candidates.clone();
                self.say(node, conn, stream, FromNode::Describe { profile, candidates });
            }
        }
    }

    pub(super) fn relay_told(&mut self, node: usize, id: ConnId, told: &FromRelay) {
        let uses = |at: &Registration| {
            at.up.is_some_and(|(conn, _)| conn == id) || at.asking.is_some_and(|(conn, ..)| conn == id)
        };
        let Some(at) = self.nodes[node].registrations.iter().position(uses) else { return };
        let asking = self.nodes[node].registrations[at].asking.is_some();
        match told {
            FromRelay::Registered { address, probes } if asking => {
                self.nodes[node].registrations[at].probes.clone_from(probes);
                self.relay_answers(node, at, Ok(*address));
            }
            FromRelay::Refused { error } if asking => {
                self.nodes[node].uses.remove(&id);
                self.relay_answers(node, at, Err(CircuitError::Refused(*error)));
                self.close(id, 0);
            }
            told => {
                let clock = self.clock();
                let Some(circuits) = &mut self.nodes[node].registrations[at].circuits else { return };
                if let Err(error) = circuits.told(told.clone(), clock) {
                    return self.registration_lost(node, at, error);
                }
                self.carry_out_circuits(node, at);
            }
        }
    }

    /// Carries out what was decided for circuits and punches.
    pub(super) fn carry_out_circuits(&mut self, node: usize, at: usize) {
        loop {
            let registration = &mut self.nodes[node].registrations[at];
            let Some(action) = registration.circuits.as_mut().and_then(Circuits::poll) else { return };
            match action {
                circuits::Action::Say(said) | circuits::Action::SayIfRead(said) => {
                    if let Some((conn, stream)) = registration.up {
                        self.say(node, conn, stream, said);
                    }
                }
                circuits::Action::Moved(address) => {
                    registration.seen = Some(address);
                    let clock = self.clock();
                    self.nodes[node].registrations[at].life.moved(address, clock);
                    self.follow_registration(node, at);
                }
                circuits::Action::Opened { session_id, circuit } => {
                    self.circuit_opened(node, at, &session_id, circuit);
                }
                circuits::Action::NotOpened { session_id, error }
                | circuits::Action::NotPunched { session_id, error } => {
                    self.ask_refused(node, at, &session_id, error);
                }
                circuits::Action::Ended { circuit, .. } => {
                    if let Some(place) = registration.inner.iter().position(|(known, _)| *known == circuit) {
                        let (_, conn) = registration.inner.swap_remove(place);
                        self.end(conn, Why::Carrier);
                    }
                }
                circuits::Action::Dropped { .. } => {}
                circuits::Action::Punch(coordinate) => self.coordinated(node, at, &coordinate),
                circuits::Action::Ports { session_id, ports } => self.ports_told(node, &session_id, &ports),
                circuits::Action::PunchOver { session_id, result } => self.punch_over(node, &session_id, result),
            }
        }
    }

    fn ask_refused(&mut self, node: usize, at: usize, session_id: &Id, error: CircuitError) {
        let asks = &mut self.nodes[node].registrations[at].asks;
        let Some(place) = asks.iter().position(|ask| ask.session.as_ref() == Some(session_id)) else { return };
        let mut ask = asks.swap_remove(place);
        if error == CircuitError::Refused(Refusal::NotReady) && ask.tries < 4 {
            // The other node is about to find out what NAT it is behind.
            (ask.session, ask.at, ask.tries) = (None, self.now + (ASK_AGAIN << ask.tries), ask.tries + 1);
            asks.push(ask);
            return self.arm_node(node, self.now + ASK_AGAIN);
        }
        self.ask_failed(node, &ask, error);
    }

    fn circuit_opened(&mut self, node: usize, at: usize, session: &Id, circuit: u32) {
        let Node { host, key, timeouts, .. } = self.nodes[node];
        let Registration { up: Some((outer, _)), circuits: Some(circuits), asks, .. } =
            &mut self.nodes[node].registrations[at]
        else {
            return;
        };
        let outer = *outer;
        let Some(place) = asks.iter().position(|ask| ask.session.as_ref() == Some(session)) else {
            // The attempt has ended.
            circuits.abandoned(circuit);
            return;
        };
        let Ask { peer, attempt, .. } = asks.swap_remove(place);
        let conn = self.connect(host, key, Carrier::Circuit { outer, circuit }, Some(KNOWN_PATH_RTT), timeouts);
        self.carries(node, at, circuit, conn);
        self.nodes[node].uses.insert(conn, Use::Attempt(peer, attempt));
        self.attempt_connects(node, peer, attempt, conn);
    }

    fn carries(&mut self, node: usize, at: usize, circuit: u32, conn: ConnId) {
        let registration = &mut self.nodes[node].registrations[at];
        if let Some(circuits) = &mut registration.circuits
            && circuits.carries(circuit, number(conn))
        {
            registration.inner.push((circuit, conn));
        }
    }

    /// An attempt at a direct path is over.
    pub(super) fn punch_ended(&mut self, node: usize, relay: SocketAddr, session_id: &Id) {
        let at = self.nodes[node].registration(relay);
        if let Some(circuits) = at.and_then(|at| self.nodes[node].registrations[at].circuits.as_mut()) {
            circuits.punch_ended(session_id);
        }
    }

    /// Another node has begun a connection over a circuit, if it is one.
    pub(super) fn circuit_carries(&mut self, node: usize, id: ConnId) {
        let Some(Carrier::Circuit { outer, circuit }) = self.conn(id).map(|conn| conn.carrier) else { return };
        let registrations = &mut self.nodes[node].registrations;
        let Some(at) = registrations.iter().position(|at| at.up.is_some_and(|(conn, _)| conn == outer)) else { return };
        if registrations[at].circuits.as_mut().is_some_and(|circuits| circuits.accepting(circuit)) {
            self.carries(node, at, circuit, id);
        }
    }

    /// An inner connection has ended.
    pub(super) fn circuit_closed(&mut self, node: usize, id: ConnId) {
        for at in 0..self.nodes[node].registrations.len() {
            let Registration { inner, circuits: Some(circuits), .. } = &mut self.nodes[node].registrations[at] else {
                continue;
            };
            if let Some(place) = inner.iter().position(|(_, conn)| *conn == id) {
                let (circuit, _) = inner.swap_remove(place);
                circuits.inner_ended(circuit, number(id));
                self.carry_out_circuits(node, at);
            }
        }
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
            super::network::Is::Gateway(_) | super::network::Is::Closed | super::network::Is::Silent => {}
        }
    }
}
