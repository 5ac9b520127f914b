//! A node finds out what NAT it is behind, and takes part in attempts to pass two of them.

use std::net::SocketAddr;
use std::time::Duration;

use hashbrown::{HashMap, HashSet};

use super::network::{Body, INTERNET, MS, Time};
use super::node::{Node, Use};
use super::quic::{Carrier, ConnId, KNOWN_PATH_RTT};
use super::relay::{OTHER_PORT, RELAY_PORT};
use super::world::{World, trace};
use crate::coordinate::is_local;
use crate::nat::{NatProfile, Observations, Unsolicited};
use crate::proto::control::{Coordinate, FromNode, Id, PunchFailure};
use crate::proto::signal::Role;
use crate::punch::{Action, Punch, Setup, Signal, Strategy, Via};
use crate::race::{AttemptId, Ended};
use crate::types::Fingerprint;

const CONNECT_TIMEOUT: Time = 3000 * MS;
const SETTLE: Time = 300 * MS;
const PATIENCE: Time = 600 * MS;
/// How long a session is kept once it is over: packets of it may still come.
const LINGER: Time = 3000 * MS;

/// What a node knows of its NAT, and its sockets beside the main one.
#[derive(Default)]
pub(super) struct Nat {
    pub(super) description: Option<(NatProfile, Vec<SocketAddr>)>,
    /// Connections on paths that were punched.
    pub(super) punched: HashSet<ConnId>,
    sockets: HashMap<u16, Socket>,
    round: Round,
    /// Which sockets asked where, in the order in which they first did, and how they were seen there.
    asked: Vec<Asked>,
    other_port_answered: bool,
    mapping_of_main: Option<crate::nat::Mapping>,
}

#[derive(Debug, Clone, Copy)]
struct Asked {
    port: u16,
    to: SocketAddr,
    seen: Option<SocketAddr>,
    from_other_port: bool,
}

/// What is asked at the moment, until when, and when it is asked again.
#[derive(Debug, Clone, Copy, Default)]
enum Round {
    #[default]
    Idle,
    Settling(Time),
    Main(Time, Time),
    New(Time, Time),
    Filter(Time, Time),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Socket {
    /// For questions only.
    Asking,
    Extra {
        session: u64,
        n: u16,
    },
    /// A connection uses it.
    Kept,
}

/// One attempt.
pub(super) struct Session {
    number: u64,
    id: Id,
    role: Role,
    relay: SocketAddr,
    key: Fingerprint,
    attempt: Option<(usize, AttemptId)>,
    punch: Punch,
    extra: Vec<u16>,
    sample: Option<u16>,
    met: bool,
    over: Option<Time>,
    next: Time,
}

impl Nat {
    pub(super) fn next(&self) -> Time {
        match self.round {
            Round::Idle => Time::MAX,
            Round::Settling(at) => at,
            Round::Main(until, again) | Round::New(until, again) | Round::Filter(until, again) => until.min(again),
        }
    }
}

impl Node {
    pub(super) fn has_socket(&self, port: u16) -> bool {
        matches!(self.nat.sockets.get(&port), Some(Socket::Extra { .. } | Socket::Kept))
    }
}

impl World {
    pub(super) fn look_at_nat(&mut self, node: usize) {
        if matches!(self.nodes[node].nat.round, Round::Idle) {
            self.nodes[node].nat.round = Round::Settling(self.now + SETTLE);
            self.arm_node(node, self.now + SETTLE);
        }
    }

    /// A relay sees the node at another address.
    pub(super) fn network_moved(&mut self, node: usize) {
        self.describe_to_all(node);
        self.look_at_nat(node);
    }

    fn asked_relays(&self, node: usize) -> Vec<SocketAddr> {
        let up = self.nodes[node].registrations.iter().filter(|at| at.seen.is_some());
        up.map(|at| at.relay).take(3).collect()
    }

    fn new_socket(&mut self, node: usize, socket: Socket) -> u16 {
        loop {
            let port = self.random.u16(2048..);
            let nat = &mut self.nodes[node].nat;
            if let hashbrown::hash_map::Entry::Vacant(free) = nat.sockets.entry(port) {
                free.insert(socket);
                return port;
            }
        }
    }

    fn probe(&mut self, node: usize, port: u16, to: SocketAddr, from_other_port: bool) {
        let nat = &mut self.nodes[node].nat;
        if !nat.asked.iter().any(|asked| (asked.port, asked.to, asked.from_other_port) == (port, to, from_other_port)) {
            nat.asked.push(Asked { port, to, seen: None, from_other_port });
        }
        let host = self.nodes[node].host;
        self.nodes[node].earned.insert(to);
        self.transmit(host, port, to, Body::Probe { from_other_port });
    }

    /// Asks again what was not answered.
    fn probe_again(&mut self, node: usize) {
        let open: Vec<Asked> =
            self.nodes[node].nat.asked.iter().filter(|asked| asked.seen.is_none()).copied().collect();
        for Asked { port, to, from_other_port, .. } in open {
            self.probe(node, port, to, from_other_port);
        }
    }

    pub(super) fn tend_nat(&mut self, node: usize) {
        let now = self.now;
        let round = self.nodes[node].nat.round;
        let (until, again) = (now + PATIENCE, now + PATIENCE / 3);
        self.nodes[node].nat.round = match round {
            Round::Settling(at) if at <= now => {
                self.nodes[node].nat.asked.clear();
                let port = self.nodes[node].port;
                for relay in self.asked_relays(node) {
                    for at in [RELAY_PORT, OTHER_PORT] {
                        self.probe(node, port, SocketAddr::new(relay.ip(), at), false);
                    }
                }
                Round::Main(until, again)
            }
            Round::Main(end, _) if end <= now => {
                let main = self.observed(node).profile();
                self.nodes[node].nat.mapping_of_main = main.mapping;
                let answering: Vec<SocketAddr> = self.nodes[node]
                    .nat
                    .asked
                    .iter()
                    .filter(|asked| asked.seen.is_some())
                    .map(|asked| asked.to)
                    .collect();
                self.nodes[node].nat.asked.clear();
                match answering.first().copied() {
                    Some(first) => {
                        for n in 0..4 {
                            let port = self.new_socket(node, Socket::Asking);
                            let all = if n == 0 { &answering[..] } else { &[first][..] };
                            all.iter().for_each(|to| self.probe(node, port, *to, false));
                        }
                        Round::New(until, again)
                    }
                    None => {
                        self.described(node, NatProfile::default());
                        Round::Idle
                    }
                }
            }
            Round::New(end, _) if end <= now => {
                let last = self.nodes[node].nat.asked.last().copied();
                self.nodes[node].nat.other_port_answered = false;
                if let Some(Asked { port, to, .. }) = last {
                    self.probe(node, port, SocketAddr::new(to.ip(), RELAY_PORT), true);
                }
                Round::Filter(until, again)
            }
            Round::Filter(end, _) if end <= now => {
                let mut observations = self.observed(node);
                observations.answered(Unsolicited::OtherPort, self.nodes[node].nat.other_port_answered);
                let profile = observations.profile();
                let mapping = self.nodes[node].nat.mapping_of_main.or(profile.mapping);
                self.nodes[node].nat.sockets.retain(|_, socket| *socket != Socket::Asking);
                self.described(node, NatProfile { mapping, ..profile });
                Round::Idle
            }
            Round::Main(end, at) if at <= now => {
                self.probe_again(node);
                Round::Main(end, again)
            }
            Round::New(end, at) if at <= now => {
                self.probe_again(node);
                Round::New(end, again)
            }
            Round::Filter(end, at) if at <= now => {
                self.probe_again(node);
                Round::Filter(end, again)
            }
            round => round,
        };
    }

    fn observed(&self, node: usize) -> Observations {
        let mut observations = Observations::default();
        for Asked { port, to, seen, .. } in &self.nodes[node].nat.asked {
            if let Some(seen) = seen {
                observations.mapped(*port, *to, *seen);
            }
        }
        observations
    }

    fn described(&mut self, node: usize, profile: NatProfile) {
        let Node { host, port, .. } = self.nodes[node];
        let host = &self.hosts[host];
        let local = SocketAddr::new(host.ip, port);
        let candidates = if host.network != INTERNET && is_local(local) { vec![local] } else { Vec::new() };
        let known = self.nodes[node].nat.description.replace((profile, candidates.clone()));
        if known != Some((profile, candidates)) {
            trace!(self, "node {node} is behind {profile:?}");
            self.describe_to_all(node);
            self.peers_network_changed(node);
        }
    }

    pub(super) fn probe_answered(
        &mut self,
        node: usize,
        port: u16,
        asked_at: SocketAddr,
        seen: SocketAddr,
        from_other_port: bool,
    ) {
        let nat = &mut self.nodes[node].nat;
        nat.other_port_answered |= from_other_port;
        let known = nat.asked.iter_mut().filter(|asked| (asked.port, asked.to) == (port, asked_at));
        known.for_each(|asked| {
            asked.seen.get_or_insert(seen);
        });
        let sampled = |session: &&mut Session| session.sample == Some(port);
        let Some(session) = self.nodes[node].punches.iter_mut().find(sampled) else { return };
        session.sample = None;
        let (relay, session_id) = (session.relay, session.id.clone());
        let profile = self.nodes[node].nat.description.as_ref().map(|(profile, _)| *profile).unwrap_or_default();
        self.say_to_relay(node, relay, FromNode::PunchExecute { session_id, ports: profile.predict(seen.port()) });
    }

    /// A relay brings this node together with another one.
    pub(super) fn coordinated(&mut self, node: usize, at: usize, told: &Coordinate) {
        let (now, clock) = (self.now, self.clock());
        let registration = &mut self.nodes[node].registrations[at];
        let relay = registration.relay;
        let asked = registration.asks.iter().position(|ask| ask.session.as_ref() == Some(&told.session_id));
        let attempt = asked.map(|place| registration.asks.swap_remove(place)).map(|ask| (ask.peer, ask.attempt));
        if let Some((peer, attempt)) = attempt {
            self.attempt_punches(node, peer, attempt, told.key);
        }
        if attempt.is_none() && told.role == Role::Initiator {
            self.punch_ended(node, relay, &told.session_id);
            return self.give_up_punch(node, relay, told.session_id.clone(), PunchFailure::Unwanted);
        }
        let mut candidates = told.candidates.clone();
        let (ours, own) = self.nodes[node].nat.description.clone().unwrap_or_default();
        candidates.retain(|to| is_local(*to) && !own.contains(to));
        let hard = self.scenario.hard;
        let strategy = Strategy::choose(&ours, &told.profile, hard);
        let number = u64::from_be_bytes(told.secret[..8].try_into().unwrap());
        let setup = Setup {
            role: told.role,
            ours,
            theirs: told.profile,
            peer: told.address,
            ports: Vec::new(),
            candidates: candidates.clone(),
            hard,
            begin: clock + told.delay.min(Duration::from_secs(3)),
            seed: self.random.u64(..),
        };
        let punching = &mut self.nodes[node];
        punching.earned.insert(told.address);
        punching.earned.extend(candidates);
        if !punching.guessed.contains(&told.address.ip()) {
            punching.guessed.push(told.address.ip());
        }
        punching.punches.push(Session {
            number,
            id: told.session_id.clone(),
            role: told.role,
            relay,
            key: told.key,
            attempt,
            punch: Punch::new(setup, clock),
            extra: Vec::new(),
            sample: None,
            met: false,
            over: None,
            next: now,
        });
        trace!(self, "node {node} punches: {:?} {strategy:?} to {}", told.role, told.address);
        if strategy.predicts(&ours) {
            let port = self.new_socket(node, Socket::Asking);
            if let Some(session) = self.nodes[node].punches.last_mut() {
                session.sample = Some(port);
            }
            self.probe(node, port, relay, false);
        }
        self.arm_node(node, now);
    }

    fn give_up_punch(&mut self, node: usize, relay: SocketAddr, session_id: Id, why: PunchFailure) {
        self.say_to_relay(node, relay, FromNode::PunchResult { session_id, result: Err(why) });
    }

    pub(super) fn ports_told(&mut self, node: usize, id: &Id, ports: &[u16]) {
        let clock = self.clock();
        if let Some(session) = self.nodes[node].punches.iter_mut().find(|session| session.id == *id) {
            session.punch.learn_ports(ports, clock);
            self.poll_punch(node, id.clone());
        }
    }

    /// The other node's attempt is over.
    pub(super) fn punch_over(&mut self, node: usize, id: &Id, result: Result<(), PunchFailure>) {
        let clock = self.clock();
        if let Some(session) = self.nodes[node].punches.iter_mut().find(|session| session.id == *id) {
            session.met |= result.is_ok();
            session.punch.stop(clock);
            self.poll_punch(node, id.clone());
        }
    }

    /// Another node has begun a connection at a socket beside the main one.
    pub(super) fn socket_carries(&mut self, node: usize, id: ConnId) {
        if let Some(Carrier::Udp { port, .. }) = self.conn(id).map(|conn| conn.carrier)
            && let Some(socket) = self.nodes[node].nat.sockets.get_mut(&port)
        {
            *socket = Socket::Kept;
        }
    }

    /// The other node has connected.
    pub(super) fn punched_by(&mut self, node: usize, key: Fingerprint) {
        let clock = self.clock();
        let open =
            |session: &&mut Session| session.key == key && session.over.is_none() && session.role == Role::Responder;
        let Some(session) = self.nodes[node].punches.iter_mut().find(open) else { return };
        session.met = true;
        session.punch.stop(clock);
        let id = session.id.clone();
        self.poll_punch(node, id);
    }

    pub(super) fn signalled(
        &mut self,
        node: usize,
        port: u16,
        from: SocketAddr,
        number: u64,
        by: Role,
        signal: Signal,
    ) {
        let clock = self.clock();
        let via = match self.nodes[node].nat.sockets.get(&port) {
            _ if port == self.nodes[node].port => Via::Main,
            Some(&Socket::Extra { session, n }) if session == number => Via::Extra(n),
            _ => return,
        };
        let hearing = &mut self.nodes[node];
        // Not its own, sent back.
        let own = |session: &&mut Session| session.number == number && session.role != by;
        let Some(session) = hearing.punches.iter_mut().find(own) else { return };
        hearing.earned.insert(from);
        session.punch.received(via, from, signal, clock);
        let id = session.id.clone();
        self.poll_punch(node, id);
    }

    pub(super) fn next_punch(&self, node: usize) -> Time {
        self.nodes[node].punches.iter().map(|session| session.next).min().unwrap_or(Time::MAX)
    }

    pub(super) fn tend_punches(&mut self, node: usize) {
        let now = self.now;
        let due = |session: &&Session| session.next <= now;
        let due: Vec<Id> = self.nodes[node].punches.iter().filter(due).map(|session| session.id.clone()).collect();
        due.into_iter().for_each(|id| self.poll_punch(node, id));
        let mut ended = Vec::new();
        let Node { punches, nat, .. } = &mut self.nodes[node];
        punches.retain(|session| {
            let gone = session.over.is_some_and(|at| at + LINGER <= now);
            if gone {
                ended.push((session.relay, session.id.clone()));
                session.extra.iter().for_each(|port| {
                    if !matches!(nat.sockets.get(port), Some(Socket::Kept)) {
                        nat.sockets.remove(port);
                    }
                });
            }
            !gone
        });
        ended.into_iter().for_each(|(relay, id)| self.punch_ended(node, relay, &id));
    }

    fn poll_punch(&mut self, node: usize, id: Id) {
        let clock = self.clock();
        loop {
            let Some(place) = self.nodes[node].punches.iter().position(|session| session.id == id) else { return };
            let session = &mut self.nodes[node].punches[place];
            let Some(action) = session.punch.poll(clock) else { break };
            self.punch_action(node, place, action);
        }
        let Some(place) = self.nodes[node].punches.iter().position(|session| session.id == id) else { return };
        let next = self.nodes[node].punches[place].punch.next(clock).map(|next| self.time(next));
        let now = self.now;
        let session = &mut self.nodes[node].punches[place];
        session.next = match next {
            Some(next) if session.over.is_none() => next.max(now + MS),
            _ => *session.over.get_or_insert(now) + LINGER,
        };
        let next = session.next;
        self.arm_node(node, next);
    }

    fn punch_action(&mut self, node: usize, place: usize, action: Action) {
        let host = self.nodes[node].host;
        let session = &self.nodes[node].punches[place];
        let (number, role, relay, id, attempt) =
            (session.number, session.role, session.relay, session.id.clone(), session.attempt);
        match action {
            Action::Open(sockets) => {
                let extra: Vec<u16> =
                    (0..sockets).map(|n| self.new_socket(node, Socket::Extra { session: number, n })).collect();
                let session = &mut self.nodes[node].punches[place];
                session.extra = extra;
                session.punch.opened(sockets);
            }
            Action::Send { via, to, signal } => {
                let port = self.port_of(node, place, via);
                self.transmit(host, port, to, Body::Signal { session: number, by: role, signal });
            }
            Action::Proven { via, to } if role == Role::Initiator => {
                let port = self.port_of(node, place, via);
                self.nodes[node].punches[place].over = Some(self.now);
                self.say_to_relay(node, relay, FromNode::PunchResult { session_id: id, result: Ok(()) });
                if let Some((peer, attempt)) = attempt {
                    self.dial_punched(node, peer, attempt, port, to);
                }
            }
            Action::Proven { .. } => self.nodes[node].punches[place].met = true,
            Action::Over(failure) => {
                let session = &mut self.nodes[node].punches[place];
                session.over = Some(self.now);
                if session.met {
                    return;
                }
                self.give_up_punch(node, relay, id, failure);
                if let Some((peer, attempt)) = attempt {
                    self.attempt_failed(node, peer, attempt, Ended::NotPunched(failure.into()));
                }
            }
        }
    }

    fn port_of(&self, node: usize, place: usize, via: Via) -> u16 {
        match via {
            Via::Main => self.nodes[node].port,
            Via::Extra(n) => self.nodes[node].punches[place].extra[usize::from(n)],
        }
    }

    fn dial_punched(&mut self, node: usize, peer: usize, attempt: AttemptId, port: u16, to: SocketAddr) {
        if let Some(socket) = self.nodes[node].nat.sockets.get_mut(&port) {
            *socket = Socket::Kept;
        }
        let Node { host, key, timeouts, .. } = self.nodes[node];
        let conn = self.connect(host, key, Carrier::Udp { port, to }, Some(KNOWN_PATH_RTT), timeouts);
        self.nodes[node].nat.punched.insert(conn);
        self.nodes[node].uses.insert(conn, Use::Attempt(peer, attempt));
        self.attempt_connects(node, peer, attempt, conn);
        self.attempt_ends_by(node, peer, attempt, self.now + CONNECT_TIMEOUT);
    }

    /// The socket is another one: what was proven for the old one is not for this.
    pub(super) fn interrupt_punches(&mut self, node: usize) {
        for session in std::mem::take(&mut self.nodes[node].punches) {
            self.punch_ended(node, session.relay, &session.id);
            if session.over.is_some() {
                continue;
            }
            self.give_up_punch(node, session.relay, session.id.clone(), PunchFailure::Interrupted);
            if let Some((peer, attempt)) = session.attempt {
                self.attempt_failed(node, peer, attempt, Ended::NotPunched(PunchFailure::Interrupted.into()));
            }
        }
    }
}
