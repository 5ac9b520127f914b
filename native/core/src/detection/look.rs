//! A look at the NAT, in three rounds of questions: where relays see the main socket; where they see new sockets, of which the first
//! asks at all of their addresses and the others at one; and whether the last of these hears from addresses that it has sent
//! nothing to. [`crate::nat`] says what the answers mean.

use std::mem;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use super::round::{Asker, At, Elsewhere, Probe, Probed, Question, Round, Socket, Turn};
use crate::nat::{Mapping, NatProfile, Observations, Unsolicited};
use crate::proto::signal::Signal;

/// More relays tell nothing new.
pub(super) const MAX_RELAYS: usize = 3;

/// New sockets whose ports are compared: with four steps between them, one may be out of line.
pub(super) const NEW_SOCKETS: usize = 4;

/// How long the first answers may take: three times a long round trip.
pub(super) const FIRST_PATIENCE: Duration = Duration::from_secs(1);

/// Later rounds take as many times the longest round trip of the first, for what is lost and sent again, and no less than
/// a busy relay may need.
const ROUND_TRIPS: u32 = 5;
pub(super) const LEAST_PATIENCE: Duration = Duration::from_millis(150);

/// What a look has found out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    pub profile: NatProfile,
    /// Where relays see the main socket.
    pub observed: SocketAddr,
}

/// What a look does next.
#[derive(Debug)]
pub(super) enum Step {
    Ask(Vec<Probe>),
    /// Open so many sockets, and call [`Look::opened`].
    Open(usize),
    Wait,
    /// `None`: no relay answers.
    Over(Option<Found>),
}

#[derive(Debug)]
enum Stage {
    /// The main socket asks.
    Main(Round),
    /// The new sockets are about to be opened.
    Opening(Main),
    /// The new sockets ask.
    New(Main, Round),
    /// The last of them waits for what it has not asked for.
    Unsolicited(Main, Observations, Round),
    Over(Option<Found>),
}

/// What the first round has shown.
#[derive(Debug)]
struct Main {
    /// Where the relay below sees the main socket.
    seen: SocketAddr,
    mapping: Option<Mapping>,
    /// The quickest relay, which all new sockets ask.
    first: usize,
    answering: Vec<(usize, At)>,
    /// How long each of the other rounds may take.
    patience: Duration,
}

#[derive(Debug)]
pub(super) struct Look {
    asker: Asker,
    stage: Stage,
}

impl Look {
    pub(super) fn new(relays: Vec<Probed>, main_port: u16, seed: u64, now: Instant) -> Self {
        let mut asker = Asker::new(relays, seed);
        let mut questions = Vec::new();
        for relay in 0..asker.relays.len() {
            let by = (Socket::Main, main_port);
            questions.extend(At::ALL.into_iter().filter_map(|at| asker.question(by, relay, at, None)));
        }
        let stage = Stage::Main(Round::new(questions, FIRST_PATIENCE, now));
        Self { asker, stage }
    }

    pub(super) fn poll(&mut self, now: Instant) -> Step {
        loop {
            let round = match &mut self.stage {
                Stage::Main(round) | Stage::New(_, round) | Stage::Unsolicited(_, _, round) => round,
                Stage::Opening(_) => return Step::Wait,
                Stage::Over(found) => return Step::Over(*found),
            };
            match round.poll(now) {
                Turn::Ask(probes) => return Step::Ask(probes),
                Turn::Wait(_) => return Step::Wait,
                Turn::Over => self.next_round(now),
            }
            if matches!(self.stage, Stage::Opening(_)) {
                return Step::Open(NEW_SOCKETS);
            }
        }
    }

    /// When to poll at the latest.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.round().map(Round::due)
    }

    /// The sockets are open, and have these local ports. Fewer than asked for: the system refused the others.
    pub(super) fn opened(&mut self, local_ports: &[u16], now: Instant) {
        let Stage::Opening(main) = mem::replace(&mut self.stage, Stage::Over(None)) else { return };
        if local_ports.len() < NEW_SOCKETS {
            return;
        }
        let mut questions = Vec::new();
        for (n, local_port) in local_ports.iter().take(NEW_SOCKETS).enumerate() {
            let by = (Socket::New(n), *local_port);
            match n {
                0 => {
                    let all = main.answering.iter();
                    questions.extend(all.filter_map(|&(relay, at)| self.asker.question(by, relay, at, None)));
                }
                _ => questions.extend(self.asker.question(by, main.first, At::Relay, None)),
            }
        }
        let round = Round::new(questions, main.patience, now);
        self.stage = Stage::New(main, round);
    }

    pub(super) fn received(&mut self, by: Socket, from: SocketAddr, bytes: &[u8], now: Instant) -> Option<SocketAddr> {
        self.round_mut()?.received(by, from, bytes, now)
    }

    pub(super) fn heard(&mut self, by: Socket, from: SocketAddr, signal: Signal, now: Instant) -> Option<SocketAddr> {
        self.round_mut()?.heard(by, from, signal, now)
    }

    pub(super) fn is_heard_by_main(&self) -> bool {
        self.round().is_some_and(Round::is_heard_by_main)
    }

    fn round(&self) -> Option<&Round> {
        match &self.stage {
            Stage::Main(round) | Stage::New(_, round) | Stage::Unsolicited(_, _, round) => Some(round),
            Stage::Opening(_) | Stage::Over(_) => None,
        }
    }

    fn round_mut(&mut self) -> Option<&mut Round> {
        match &mut self.stage {
            Stage::Main(round) | Stage::New(_, round) | Stage::Unsolicited(_, _, round) => Some(round),
            Stage::Opening(_) | Stage::Over(_) => None,
        }
    }

    fn next_round(&mut self, now: Instant) {
        self.stage = match mem::replace(&mut self.stage, Stage::Over(None)) {
            Stage::Main(round) => Main::of(&round).map_or(Stage::Over(None), Stage::Opening),
            Stage::New(main, round) => {
                let observations = observed(&round);
                // The last one has asked nothing else.
                let last = round.questions.last().and_then(|last| Some((last, last.answer?.seen)));
                match last {
                    Some((last, seen)) => {
                        let questions = self.ask_elsewhere(&main, last, seen);
                        let round = Round::new(questions, main.patience, now);
                        Stage::Unsolicited(main, observations, round)
                    }
                    None => Stage::Over(Some(main.conclude(&observations))),
                }
            }
            Stage::Unsolicited(main, mut observations, round) => {
                for question in &round.questions {
                    let same_ip = self.asker.relays[main.first].relay.relay.ip() == question.answered_at.1.ip();
                    let from = if same_ip { Unsolicited::OtherPort } else { Unsolicited::OtherAddress };
                    observations.answered(from, question.answer.is_some());
                }
                Stage::Over(Some(main.conclude(&observations)))
            }
            stage @ (Stage::Opening(_) | Stage::Over(_)) => stage,
        };
    }

    /// Asks for answers to a socket from where it has sent nothing. It has asked `known`, and is seen at `seen`.
    fn ask_elsewhere(&mut self, main: &Main, known: &Question, seen: SocketAddr) -> Vec<Question> {
        let by = (known.probe.by, known.local_port);
        let mut questions = Vec::new();
        for &(relay, at) in &main.answering {
            questions.extend(match (relay == known.relay, at) {
                (true, At::Relay) => None,
                (true, elsewhere) => self.asker.question(by, relay, At::Relay, Some(Elsewhere::From(elsewhere))),
                // A relay answers only to the address where it sees the node.
                (false, At::Relay) if self.asker.relays[relay].relay.seen_at.ip() == seen.ip() => {
                    let to = NonZeroU16::new(seen.port()).map(|port| Elsewhere::To(known.probe.by, port));
                    to.and_then(|to| self.asker.question((Socket::Main, 0), relay, At::Relay, Some(to)))
                }
                (false, _) => None,
            });
        }
        questions
    }
}

impl Main {
    /// `None`: no relay has answered where this node is registered.
    fn of(round: &Round) -> Option<Self> {
        let at_relay = round.answers().filter(|(question, _)| question.probe.at == At::Relay);
        let (first, answer) = at_relay.min_by_key(|(_, answer)| answer.after)?;
        let longest = round.answers().map(|(_, answer)| answer.after).max()?;
        Some(Self {
            seen: answer.seen,
            mapping: observed(round).profile().mapping,
            first: first.relay,
            answering: round.answers().map(|(question, _)| (question.relay, question.probe.at)).collect(),
            patience: (longest * ROUND_TRIPS).clamp(LEAST_PATIENCE, FIRST_PATIENCE),
        })
    }

    /// `observations`: those of the new sockets.
    fn conclude(&self, observations: &Observations) -> Found {
        let profile = observations.profile();
        // That of the main socket is what counts, if it is known.
        let mapping = self.mapping.or(profile.mapping);
        Found { profile: NatProfile { mapping, ..profile }, observed: self.seen }
    }
}

fn observed(round: &Round) -> Observations {
    let mut observations = Observations::default();
    for (question, answer) in round.answers() {
        observations.mapped(question.local_port, question.probe.to, answer.seen);
    }
    observations
}

/// The relays that tell the most: of one family, IPv4 if there are any, and at different addresses.
pub(super) fn choose(mut relays: Vec<Probed>) -> Vec<Probed> {
    let v4 = relays.iter().any(|probed| probed.relay.is_ipv4());
    relays.retain(|probed| probed.relay.is_ipv4() == v4);
    // The same ones in the same order each time.
    relays.sort_by_key(|probed| probed.relay);
    let mut seen: Vec<IpAddr> = Vec::new();
    relays.sort_by_cached_key(|probed| {
        let again = seen.contains(&probed.relay.ip());
        seen.push(probed.relay.ip());
        again
    });
    relays.truncate(MAX_RELAYS);
    relays
}
