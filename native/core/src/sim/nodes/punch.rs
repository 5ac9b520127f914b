//! A node takes part in attempts to pass two NATs.

use std::net::SocketAddr;
use std::time::Duration;

use super::detection::Use;
use super::network::{Body, MS, Time};
use super::node::{self, Node};
use super::quic::{Carrier, ConnId, KNOWN_PATH_RTT};
use super::world::{World, trace};
use crate::coordinate::is_local;
use crate::detection::{self, Round, Turn};
use crate::proto::control::{Coordinate, FromNode, Id, PunchFailure};
use crate::proto::signal::{self, Role};
use crate::punch::{Action, Punch, Setup, Signal, Strategy, Via};
use crate::race::{AttemptId, Ended};
use crate::types::Fingerprint;

const CONNECT_TIMEOUT: Time = 3000 * MS;
/// How long a session is kept once it is over: packets of it may still come.
const LINGER: Time = 3000 * MS;

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
    sample: Option<Sample>,
    met: bool,
    over: Option<Time>,
    next: Time,
}

/// A new socket asks the relay where it is seen.
struct Sample {
    port: u16,
    round: Round,
    next: Time,
}

impl World {
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
        if strategy.predicts(&ours)
            && let Some(probed) = self.probed(node).into_iter().find(|probed| probed.relay == relay)
        {
            let port = self.new_socket(node, Use::Sampling { session: number });
            let round = Round::sample(probed, self.random.u64(..), clock);
            if let Some(session) = self.nodes[node].punches.last_mut() {
                session.sample = Some(Sample { port, round, next: now });
            }
        }
        self.arm_node(node, now);
    }

    pub(super) fn sample_answered(&mut self, node: usize, number: u64, from: SocketAddr, answer: signal::Signal) {
        let clock = self.clock();
        let sampled = |session: &&mut Session| session.number == number;
        let Some(session) = self.nodes[node].punches.iter_mut().find(sampled) else { return };
        if let Some(sample) = &mut session.sample {
            sample.round.heard(detection::Socket::New(0), from, answer, clock);
            self.poll_sample(node, number);
        }
    }

    fn poll_sample(&mut self, node: usize, number: u64) {
        let clock = self.clock();
        let Some(place) = self.nodes[node].punches.iter().position(|session| session.number == number) else { return };
        loop {
            let session = &mut self.nodes[node].punches[place];
            let Some(sample) = &mut session.sample else { return };
            let port = sample.port;
            match sample.round.poll(clock) {
                Turn::Ask(probes) => probes.iter().for_each(|probe| self.send_probe_from(node, port, probe)),
                Turn::Wait(until) => {
                    let next = self.time(until);
                    if let Some(sample) = &mut self.nodes[node].punches[place].sample {
                        sample.next = next;
                    }
                    return self.arm_node(node, next);
                }
                Turn::Over => {
                    let seen = sample.round.sampled();
                    session.sample = None;
                    let (relay, session_id) = (session.relay, session.id.clone());
                    self.nodes[node].nat.sockets.remove(&port);
                    let profile = self.nodes[node].nat.description.as_ref().map(|(profile, _)| *profile);
                    if let Some(seen) = seen {
                        let ports = profile.unwrap_or_default().predict(seen.port());
                        self.say_to_relay(node, relay, FromNode::PunchExecute { session_id, ports });
                    }
                    return;
                }
            }
        }
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
            *socket = Use::Kept;
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
            Some(&Use::Extra { session, n }) if session == number => Via::Extra(n),
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
        let next =
            |session: &Session| session.sample.as_ref().map_or(session.next, |sample| session.next.min(sample.next));
        self.nodes[node].punches.iter().map(next).min().unwrap_or(Time::MAX)
    }

    pub(super) fn tend_punches(&mut self, node: usize) {
        let now = self.now;
        let due = |session: &&Session| session.next <= now;
        let due: Vec<Id> = self.nodes[node].punches.iter().filter(due).map(|session| session.id.clone()).collect();
        due.into_iter().for_each(|id| self.poll_punch(node, id));
        let sampling = |session: &&Session| session.sample.as_ref().is_some_and(|sample| sample.next <= now);
        let sampling: Vec<u64> =
            self.nodes[node].punches.iter().filter(sampling).map(|session| session.number).collect();
        sampling.into_iter().for_each(|number| self.poll_sample(node, number));
        let mut ended = Vec::new();
        let Node { punches, nat, .. } = &mut self.nodes[node];
        punches.retain(|session| {
            let gone = session.over.is_some_and(|at| at + LINGER <= now);
            if gone {
                ended.push((session.relay, session.id.clone()));
                session.extra.iter().for_each(|port| {
                    if !matches!(nat.sockets.get(port), Some(Use::Kept)) {
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
                    (0..sockets).map(|n| self.new_socket(node, Use::Extra { session: number, n })).collect();
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
            *socket = Use::Kept;
        }
        let Node { host, key, timeouts, .. } = self.nodes[node];
        let conn = self.connect(host, key, Carrier::Udp { port, to }, Some(KNOWN_PATH_RTT), timeouts);
        self.nodes[node].nat.punched.insert(conn);
        self.nodes[node].uses.insert(conn, node::Use::Attempt(peer, attempt));
        self.attempt_connects(node, peer, attempt, conn);
        self.attempt_ends_by(node, peer, attempt, self.now + CONNECT_TIMEOUT);
    }

    /// The socket is another one: what was proven for the old one is not for this.
    pub(super) fn interrupt_punches(&mut self, node: usize) {
        for session in std::mem::take(&mut self.nodes[node].punches) {
            self.punch_ended(node, session.relay, &session.id);
            if let Some(sample) = &session.sample {
                self.nodes[node].nat.sockets.remove(&sample.port);
            }
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
