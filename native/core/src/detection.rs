//! Finds out what NAT this node is behind, by asking its relays: when to look, and what the relays are told of it.
//!
//! Every input may add actions, which [`Detector::poll`] hands out in order. At most one look is under way. It asks at most
//! [`MAX_CHECKED`] relays whether they answer the usual port again, and then at most three relays in three rounds.

use std::cmp::Reverse;
use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use self::look::{FIRST_PATIENCE, Look, Step, choose};
use self::round::Asker;
use crate::config::HolePunching;
use crate::coordinate::is_local;
use crate::nat::NatProfile;
use crate::proto::signal::Signal;
use crate::punch::MAX_CANDIDATES;
use crate::retry::Backoff;
use crate::shares::Bucket;

mod look;
mod round;

pub use self::look::Found;
pub use self::round::{At, Probe, Probed, Round, Socket, Turn};

/// A node registers at all its relays at once. They answer within a round trip of each other, or a lost packet later.
const SETTLE: Duration = Duration::from_millis(500);

/// Between two looks: registrations that come and go must not cost more than a few packets a second.
const PAUSE: Duration = Duration::from_secs(2);

/// A relay may say all the time that this node has moved, or is registered. After so many looks at once, there is one in this
/// time. The same holds for telling the relays again what they know.
const AT_ONCE: u64 = 8;
const EACH_IN: Duration = Duration::from_secs(15);

/// Relays that do not answer at all are asked again after this long, and ever longer: most likely their packets are filtered on
/// the way, and that rarely changes.
const RETRY: Duration = Duration::from_secs(10);
const LONGEST_RETRY: Duration = Duration::from_secs(600);

/// Relays that are asked at once whether they answer the usual port again. Each has an open socket until then.
pub const MAX_CHECKED: usize = 32;

/// A host's addresses beyond these are not told: each costs a peer packets.
const MAX_LOCAL: usize = 16;

/// What to do.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a probe is sent at once, and most actions are probes")]
pub enum Action {
    /// Call [`Detector::begin`] with the relays.
    Begin,
    /// Open so many sockets beside the main one, and call [`Detector::opened`].
    Open(usize),
    Send(Probe),
    /// The relay at this address got a question: its answer came.
    Heard(SocketAddr),
    /// Close the sockets that were opened.
    Close,
    /// Packets to this relay leave by the usual port again.
    ReturnToUsual(SocketAddr),
    /// The relays are told this profile and the host's addresses, unless they know.
    Describe(NatProfile),
    /// The relays are told nothing of this node, which looks for no direct paths.
    DescribeNothing,
    /// The relays are told again what they know.
    TellAgain,
    /// This is known now. `news`: it was not before.
    Found {
        found: Found,
        news: bool,
    },
}

/// The relays at which this node is registered and that answer probes.
#[derive(Debug, Clone, Default)]
pub struct Relays {
    /// Those to which packets leave by the main socket, which can reach their family.
    pub usual: Vec<Probed>,
    /// Those that answered only another port, and should be tried by the usual one now.
    pub to_check: Vec<Probed>,
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a node has one")]
enum Mode {
    /// Nothing is asked. Relays that did not answer are asked again then.
    Idle { again: Option<Instant> },
    /// Some relays have not said yet whether they register this node: two tell more than one.
    Settling { until: Instant },
    /// There were many looks lately.
    Held { until: Instant },
    /// `wanted`: another look is.
    Busy { doing: Doing, wanted: bool },
}

#[derive(Debug)]
enum Doing {
    /// The owner is about to name the relays.
    Beginning,
    /// Relays that answered only another port are asked from the usual one.
    Checking {
        round: Round,
        usual: Vec<Probed>,
        main_port: u16,
        seed: u64,
    },
    Looking(Look),
    /// The look is over.
    Pausing {
        until: Instant,
        answered: bool,
    },
}

/// How often something may happen that others cause.
#[derive(Debug)]
struct Pace(Bucket);

impl Pace {
    fn new(now: Instant) -> Self {
        // A token is a second.
        Self(Bucket::new(1, AT_ONCE * EACH_IN.as_secs(), now))
    }

    fn allows(&mut self, now: Instant) -> bool {
        self.0.take(EACH_IN.as_secs(), now)
    }
}

/// What this node knows of its NAT, and is about to find out.
#[derive(Debug)]
pub struct Detector {
    hole_punching: HolePunching,
    mode: Mode,
    looks: Pace,
    retry: Backoff,
    tells: Pace,
    /// When the relays are told again what they know.
    tell_at: Option<Instant>,
    /// Whether the relays were told anything.
    described: bool,
    found: Option<Found>,
    actions: VecDeque<Action>,
}

impl Detector {
    pub fn new(hole_punching: HolePunching, now: Instant) -> Self {
        Self {
            hole_punching,
            mode: Mode::Idle { again: None },
            looks: Pace::new(now),
            retry: Backoff::new(RETRY, LONGEST_RETRY),
            tells: Pace::new(now),
            tell_at: None,
            described: false,
            found: None,
            actions: VecDeque::new(),
        }
    }

    pub fn poll(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to call [`Detector::timeout`] at the latest.
    pub fn next_timeout(&self) -> Option<Instant> {
        let mode = match &self.mode {
            Mode::Idle { again } => *again,
            Mode::Settling { until } | Mode::Held { until } => Some(*until),
            Mode::Busy { doing, .. } => match doing {
                Doing::Beginning => None,
                Doing::Checking { round, .. } => Some(round.due()),
                Doing::Looking(look) => look.next_timeout(),
                Doing::Pausing { until, .. } => Some(*until),
            },
        };
        mode.into_iter().chain(self.tell_at).min()
    }

    /// `registering`: some relays have not said yet whether they register this node.
    pub fn timeout(&mut self, registering: bool, now: Instant) {
        if self.tell_at.is_some_and(|at| at <= now) {
            self.tell(now);
        }
        match &self.mode {
            Mode::Idle { again: Some(at) } if *at <= now => self.start(),
            Mode::Settling { until } | Mode::Held { until } if *until <= now => self.start_if_allowed(now),
            Mode::Busy { doing: Doing::Pausing { until, answered }, wanted } if *until <= now => {
                let (answered, wanted) = (*answered, *wanted);
                let again = (!answered).then(|| now + self.retry.pause(1.0));
                self.mode = Mode::Idle { again };
                if wanted {
                    self.wanted(registering, now);
                }
            }
            _ => self.follow(now),
        }
    }

    /// Something has changed, so a look is due. `registering`: as in [`Detector::timeout`].
    pub fn wanted(&mut self, registering: bool, now: Instant) {
        match &mut self.mode {
            Mode::Idle { .. } if registering => self.mode = Mode::Settling { until: now + SETTLE },
            Mode::Idle { .. } => self.start_if_allowed(now),
            Mode::Settling { .. } if !registering => self.start_if_allowed(now),
            // The look is yet to begin.
            Mode::Settling { .. } | Mode::Held { .. } => {}
            Mode::Busy { wanted, .. } => *wanted = true,
        }
    }

    /// A relay sees this node at another address. Other relays see it there with the next packet: told again what they know, they
    /// get one now, and not with the next keep-alive. And a direct path that failed before may work now.
    pub fn moved(&mut self, registering: bool, now: Instant) {
        if self.tell_at.is_none() {
            self.tell(now);
        }
        self.wanted(registering, now);
    }

    /// The answer to [`Action::Begin`].
    pub fn begin(&mut self, relays: Relays, main_port: u16, seed: u64, now: Instant) {
        let Mode::Busy { doing: doing @ Doing::Beginning, .. } = &mut self.mode else { return };
        let Relays { usual, mut to_check } = relays;
        if to_check.is_empty() {
            return self.look(usual, main_port, seed, now);
        }
        to_check.truncate(MAX_CHECKED);
        let mut asker = Asker::new(to_check, seed);
        let by = (Socket::Main, main_port);
        let questions = (0..asker.relays.len()).filter_map(|relay| asker.question(by, relay, At::Relay, None));
        let round = Round::new(questions.collect(), FIRST_PATIENCE, now);
        // Another one than that of the first nonces.
        *doing = Doing::Checking { round, usual, main_port, seed: seed.wrapping_add(1) };
        self.follow(now);
    }

    /// The answer to [`Action::Open`]: the local ports of the sockets. Fewer than asked for: the system refused the others.
    pub fn opened(&mut self, local_ports: &[u16], now: Instant) {
        if let Mode::Busy { doing: Doing::Looking(look), .. } = &mut self.mode {
            look.opened(local_ports, now);
            self.follow(now);
        }
    }

    /// Something that may be an answer has come to a socket.
    pub fn received(&mut self, by: Socket, from: SocketAddr, bytes: &[u8], now: Instant) {
        let asked = match &mut self.mode {
            Mode::Busy { doing: Doing::Checking { round, .. }, .. } => round.received(by, from, bytes, now),
            Mode::Busy { doing: Doing::Looking(look), .. } => look.received(by, from, bytes, now),
            _ => None,
        };
        self.answered(asked, now);
    }

    /// The same for a signal that was verified with the relay's key.
    pub fn heard(&mut self, by: Socket, from: SocketAddr, signal: Signal, now: Instant) {
        let asked = match &mut self.mode {
            Mode::Busy { doing: Doing::Checking { round, .. }, .. } => round.heard(by, from, signal, now),
            Mode::Busy { doing: Doing::Looking(look), .. } => look.heard(by, from, signal, now),
            _ => None,
        };
        self.answered(asked, now);
    }

    /// Whether an answer is expected at the main socket.
    pub fn is_heard_by_main(&self) -> bool {
        match &self.mode {
            Mode::Busy { doing: Doing::Checking { round, .. }, .. } => round.is_heard_by_main(),
            Mode::Busy { doing: Doing::Looking(look), .. } => look.is_heard_by_main(),
            _ => false,
        }
    }

    fn answered(&mut self, asked: Option<SocketAddr>, now: Instant) {
        if let Some(asked) = asked {
            self.actions.push_back(Action::Heard(asked));
            self.follow(now);
        }
    }

    fn tell(&mut self, now: Instant) {
        let allowed = self.tells.allows(now);
        self.tell_at = (!allowed).then(|| now + PAUSE);
        if allowed {
            self.actions.push_back(Action::TellAgain);
        }
    }

    fn start_if_allowed(&mut self, now: Instant) {
        match self.looks.allows(now) {
            true => self.start(),
            false => self.mode = Mode::Held { until: now + PAUSE },
        }
    }

    fn start(&mut self) {
        self.mode = Mode::Busy { doing: Doing::Beginning, wanted: false };
        self.actions.push_back(Action::Begin);
    }

    /// Asks what is due, and draws the conclusions once all is answered or it has taken too long.
    fn follow(&mut self, now: Instant) {
        loop {
            let Mode::Busy { doing, .. } = &mut self.mode else { return };
            match doing {
                Doing::Checking { round, .. } => match round.poll(now) {
                    Turn::Ask(probes) => self.actions.extend(probes.into_iter().map(Action::Send)),
                    Turn::Wait(_) => return,
                    Turn::Over => self.checked(now),
                },
                Doing::Looking(look) => match look.poll(now) {
                    Step::Ask(probes) => self.actions.extend(probes.into_iter().map(Action::Send)),
                    Step::Open(sockets) => return self.actions.push_back(Action::Open(sockets)),
                    Step::Wait => return,
                    Step::Over(found) => return self.looked(found, now),
                },
                Doing::Beginning | Doing::Pausing { .. } => return,
            }
        }
    }

    /// Relays that answer the usual port get a packet from there now, and see this node at it.
    fn checked(&mut self, now: Instant) {
        let Mode::Busy { doing, .. } = &mut self.mode else { return };
        let Doing::Checking { round, usual, main_port, seed } = std::mem::replace(doing, Doing::Beginning) else {
            return;
        };
        let answering: Vec<SocketAddr> = round.answers().map(|(question, _)| question.probe.to).collect();
        if !answering.is_empty() {
            self.actions.extend(answering.into_iter().map(Action::ReturnToUsual));
            self.actions.push_back(Action::TellAgain);
        }
        self.look(usual, main_port, seed, now);
    }

    fn look(&mut self, relays: Vec<Probed>, main_port: u16, seed: u64, now: Instant) {
        let relays = choose(relays);
        if self.hole_punching == HolePunching::Off {
            // What the NAT is like matters for direct paths alone.
            if !std::mem::replace(&mut self.described, true) {
                self.actions.push_back(Action::DescribeNothing);
            }
            if let Some(relay) = relays.first() {
                self.learn(Found { profile: NatProfile::default(), observed: relay.seen_at });
            }
            return self.pause(true, now);
        }
        if relays.is_empty() {
            // No relay answers probes. They are told something at once, because other nodes wait for it.
            if !self.described {
                self.describe(NatProfile::default());
            }
            return self.pause(true, now);
        }
        if let Mode::Busy { doing, .. } = &mut self.mode {
            *doing = Doing::Looking(Look::new(relays, main_port, seed, now));
        }
        self.follow(now);
    }

    fn looked(&mut self, found: Option<Found>, now: Instant) {
        self.actions.push_back(Action::Close);
        self.describe(found.map_or_else(NatProfile::default, |found| found.profile));
        if let Some(found) = found {
            self.learn(found);
        }
        self.pause(found.is_some(), now);
    }

    fn describe(&mut self, profile: NatProfile) {
        self.described = true;
        self.actions.push_back(Action::Describe(profile));
    }

    fn learn(&mut self, found: Found) {
        let news = self.found.replace(found) != Some(found);
        self.actions.push_back(Action::Found { found, news });
    }

    fn pause(&mut self, answered: bool, now: Instant) {
        if answered {
            self.retry.reset();
        }
        if let Mode::Busy { doing, .. } = &mut self.mode {
            *doing = Doing::Pausing { until: now + PAUSE, answered };
        }
    }
}

/// Those of the host's addresses at which others in its networks may reach a socket that is bound to `bound`.
pub fn local_addresses(
    interfaces: Vec<IpAddr>,
    bound: SocketAddr,
    is_reachable: impl Fn(SocketAddr) -> bool,
) -> Vec<SocketAddr> {
    let of_socket = |ip: &IpAddr| bound.ip().is_unspecified() || *ip == bound.ip().to_canonical();
    let reachable = |ip: &IpAddr| is_reachable((*ip, bound.port()).into());
    let mut ips: Vec<IpAddr> =
        interfaces.into_iter().filter(|ip| of_socket(ip) && reachable(ip) && is_told(ip)).collect();
    // Where two networks are in reach, the one of the older family is more often behind the NAT in the way.
    ips.sort_by_key(|ip| (Reverse(ip.is_ipv4()), *ip));
    ips.dedup();
    ips.truncate(MAX_LOCAL);
    ips.into_iter().map(|ip| (ip, bound.port()).into()).collect()
}

/// Loopback and link-local addresses mean something else on each host.
fn is_told(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !(ip.is_loopback() || ip.is_link_local() || ip.is_unspecified()),
        IpAddr::V6(ip) => !(ip.is_loopback() || ip.is_unicast_link_local() || ip.is_unspecified()),
    }
}

/// Those of the host's addresses that other nodes are told.
pub fn candidates(local: Vec<SocketAddr>) -> Vec<SocketAddr> {
    local.into_iter().filter(|address| is_local(*address)).take(MAX_CANDIDATES).collect()
}

#[cfg(test)]
mod tests;
