//! One round of questions to relays. A question is sent again while it is unanswered. The round is over once all are answered, or
//! its time is up.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::proto::control::Probes;
use crate::proto::signal::{AnswerFrom, Body, Encoded, Key, Signal, Unverified};

/// An unanswered question is sent again after this share of a round's time, and once more after twice as much.
const AGAIN: u32 = 4;
const TRIES: u32 = 3;

/// How long the answer of the one relay that is asked in a sample may take: long round trips are below this.
const SAMPLE_PATIENCE: Duration = Duration::from_millis(500);

/// A relay that answers probes, at which this node is registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probed {
    /// Where it is.
    pub relay: SocketAddr,
    /// Where it sees this node.
    pub seen_at: SocketAddr,
    pub probes: Probes,
}

impl Probed {
    /// `None`: it has no such address, or none of the same family.
    fn address(&self, at: At) -> Option<SocketAddr> {
        match at {
            At::Relay => Some(self.relay),
            At::OtherPort => Some(SocketAddr::new(self.relay.ip(), self.probes.port)),
            At::OtherAddress => {
                let relay = self.relay.ip();
                let ip = self.probes.ip.filter(|&ip| ip.is_ipv4() == relay.is_ipv4() && ip != relay)?;
                Some(SocketAddr::new(ip, self.probes.port))
            }
        }
    }
}

/// A socket of this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Socket {
    Main,
    /// One that was opened to ask with, counted from 0.
    New(usize),
}

/// An address of a relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// Where this node is registered.
    Relay,
    OtherPort,
    OtherAddress,
}

impl At {
    pub(super) const ALL: [Self; 3] = [Self::Relay, Self::OtherPort, Self::OtherAddress];
}

/// Where an answer comes from or goes to, if it does not take the question's path back.
#[derive(Debug, Clone, Copy)]
pub(super) enum Elsewhere {
    /// It comes from there.
    From(At),
    /// It goes to this socket, which the NAT shows at this port.
    To(Socket, std::num::NonZeroU16),
}

/// A request to send.
#[derive(Debug, Clone)]
pub struct Probe {
    pub by: Socket,
    pub to: SocketAddr,
    pub at: At,
    pub signal: Signal,
    key: Key,
}

impl Probe {
    pub fn encode(&self) -> Encoded {
        self.signal.encode(&self.key)
    }
}

/// What a relay has answered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Answer {
    pub(super) seen: SocketAddr,
    /// Since the question was first sent.
    pub(super) after: Duration,
}

#[derive(Debug)]
pub(super) struct Question {
    /// The number of the relay among those that are asked.
    pub(super) relay: usize,
    pub(super) probe: Probe,
    pub(super) local_port: u16,
    /// The socket that hears the answer, and where the answer comes from.
    pub(super) answered_at: (Socket, SocketAddr),
    sent: Option<Instant>,
    pub(super) answer: Option<Answer>,
}

/// A relay to ask, with what requests to it are signed with.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) relay: Probed,
    key: Key,
}

impl Asked {
    pub(super) fn new(relay: Probed) -> Self {
        let key = Key::from(&relay.probes.secret);
        Self { relay, key }
    }
}

/// Makes questions to some relays.
#[derive(Debug)]
pub(super) struct Asker {
    pub(super) relays: Vec<Asked>,
    random: fastrand::Rng,
}

impl Asker {
    pub(super) fn new(relays: Vec<Probed>, seed: u64) -> Self {
        Self { relays: relays.into_iter().map(Asked::new).collect(), random: fastrand::Rng::with_seed(seed) }
    }

    /// `by`: the socket that asks, and its local port. `None`: the relay has no such address.
    pub(super) fn question(
        &mut self,
        by: (Socket, u16),
        relay: usize,
        at: At,
        elsewhere: Option<Elsewhere>,
    ) -> Option<Question> {
        let Asked { relay: probed, key } = &self.relays[relay];
        let (to, (by, local_port)) = (probed.address(at)?, by);
        let (from, to_port, answered_at) = match elsewhere {
            None => (AnswerFrom::Same, None, (by, to)),
            Some(Elsewhere::From(at)) => {
                let from = match at {
                    At::Relay => AnswerFrom::Same,
                    At::OtherPort => AnswerFrom::OtherPort,
                    At::OtherAddress => AnswerFrom::OtherAddress,
                };
                (from, None, (by, probed.address(at)?))
            }
            Some(Elsewhere::To(socket, port)) => (AnswerFrom::Same, Some(port), (socket, to)),
        };
        let body = Body::ProbeRequest { from, to_port };
        let signal = Signal { id: probed.probes.id, nonce: self.random.u64(..), body };
        let probe = Probe { by, to, at, signal, key: key.clone() };
        Some(Question { relay, probe, local_port, answered_at, sent: None, answer: None })
    }
}

/// What a round does next.
#[derive(Debug)]
pub enum Turn {
    /// Send these, in this order.
    Ask(Vec<Probe>),
    /// Poll again then.
    Wait(Instant),
    Over,
}

/// Some questions and their answers.
#[derive(Debug)]
pub struct Round {
    pub(super) questions: Vec<Question>,
    begun: Instant,
    patience: Duration,
    tries: u32,
}

impl Round {
    pub(super) fn new(questions: Vec<Question>, patience: Duration, now: Instant) -> Self {
        Self { questions, begun: now, patience, tries: 0 }
    }

    /// Asks one relay where it sees a new socket, which is number 0. A sequential NAT gives the next ports to the sockets that
    /// follow.
    pub fn sample(relay: Probed, seed: u64, now: Instant) -> Self {
        let question = Asker::new(vec![relay], seed).question((Socket::New(0), 0), 0, At::Relay, None);
        Self::new(question.into_iter().collect(), SAMPLE_PATIENCE, now)
    }

    /// Where the socket of a sample is seen.
    pub fn sampled(&self) -> Option<SocketAddr> {
        self.questions.first()?.answer.map(|answer| answer.seen)
    }

    /// Goes on.
    pub fn poll(&mut self, now: Instant) -> Turn {
        if self.is_answered() || now >= self.begun + self.patience {
            return Turn::Over;
        }
        if now < self.due() {
            return Turn::Wait(self.due());
        }
        self.tries += 1;
        let unanswered = self.questions.iter_mut().filter(|question| question.answer.is_none());
        Turn::Ask(
            unanswered
                .map(|question| {
                    question.sent.get_or_insert(now);
                    question.probe.clone()
                })
                .collect(),
        )
    }

    /// Something has come to a socket. Returns the address that was asked, if this is its answer.
    pub fn received(&mut self, by: Socket, from: SocketAddr, bytes: &[u8], now: Instant) -> Option<SocketAddr> {
        let unverified = Unverified::parse(bytes)?;
        let asked = |question: &&Question| question.probe.signal.nonce == unverified.nonce();
        let key = &self.questions.iter().find(asked)?.probe.key;
        let signal = unverified.verify(key)?;
        self.heard(by, from, signal, now)
    }

    /// The same for a signal that was verified with the relay's key.
    pub fn heard(&mut self, by: Socket, from: SocketAddr, signal: Signal, now: Instant) -> Option<SocketAddr> {
        let Body::ProbeReply { observed } = signal.body else { return None };
        let asked = |question: &&mut Question| question.probe.signal.nonce == signal.nonce;
        let question = self.questions.iter_mut().find(asked)?;
        if question.probe.signal.id != signal.id || question.answered_at != (by, from) {
            return None;
        }
        let after = now.saturating_duration_since(question.sent?);
        question.answer.get_or_insert(Answer { seen: observed, after });
        Some(question.probe.to)
    }

    /// Whether an answer is expected at the main socket.
    pub(super) fn is_heard_by_main(&self) -> bool {
        self.questions.iter().any(|question| question.answered_at.0 == Socket::Main)
    }

    /// Those that were answered.
    pub(super) fn answers(&self) -> impl Iterator<Item = (&Question, Answer)> {
        self.questions.iter().filter_map(|question| Some((question, question.answer?)))
    }

    /// When to poll at the latest.
    pub(super) fn due(&self) -> Instant {
        let again = self.patience / AGAIN;
        self.begun + if self.tries < TRIES { again * self.tries } else { self.patience }
    }

    fn is_answered(&self) -> bool {
        self.questions.iter().all(|question| question.answer.is_some())
    }
}
