//! One attempt of two nodes to reach each other through their NATs, as one of them takes part in it.
//!
//! Both send pings to where the other may be, from the same moment on, and answer pings with a pong. A NAT lets in what
//! looks like an answer, so each side's pings open the path for the other's. A node that gets a pong knows that packets
//! pass in both directions between exactly that socket and that address.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::nat::{Filtering, NatProfile};
use super::proto::control::PunchFailure;
use super::proto::signal::Role;

/// The first pings go out in this pause: less than most round trips, so that a lost one costs little time.
const FAST: Duration = Duration::from_millis(30);

/// For 300 ms, within which the two sides have begun for certain, and the answers of all but far peers come.
const FAST_PINGS: u32 = 10;

/// The later ones: what is still unanswered waits for a lost packet or a late peer.
const SLOW: Duration = Duration::from_millis(100);

/// Pauses differ by up to this much, so that two nodes do not hit the same queue at the same time again and again.
const JITTER: Duration = Duration::from_millis(5);

/// After that it is over. Several round trips of any usable path, and little enough for a caller to wait.
pub const LONGEST: Duration = Duration::from_secs(3);

/// As `LONGEST`, where only local addresses are tried: they answer at once, or not.
const LONGEST_LOCAL: Duration = Duration::from_secs(1);

/// A better path that is proven so shortly after the first one is taken instead: on a local network a round trip is
/// shorter than that.
const GRACE: Duration = Duration::from_millis(10);

/// Sockets that a node opens whose NAT gives each an unpredictable port. With as many, and `PROBES`, two of the 64,512
/// ports meet with a probability of 98 %: 1 - (1 - 256 / 64,512)^1,024.
const EXTRA_SOCKETS: u16 = 256;

/// Ports that the other side tries.
const PROBES: u32 = 1024;

/// In which they are tried, and the extra sockets used: some 100 kB/s, which no home's uplink drops.
const PACE: Duration = Duration::from_millis(1);

/// How many of the birthday's packets may leave at once: timers are 1 ms coarse, and fire late on a busy machine.
const LATE: Duration = Duration::from_millis(10);

/// When the extra sockets are used once more: all probes have left by then, and what they opened is open.
const SECOND_ROUND: Duration = Duration::from_millis(1300);

/// Ports of the peer that are told, and looked at.
pub const MAX_PORTS: usize = 16;

/// The lowest port that a node may name: those below are servers', and no NAT gives them away.
pub(super) const LOWEST_PORT: u16 = 1024;

/// Local addresses of the peer that are looked at.
pub const MAX_CANDIDATES: usize = 4;

/// Unknown addresses at which the peer was heard, and which are answered.
const MAX_SOURCES: usize = 8;

/// Of these, addresses that were never named. Only the peer can make a ping, but it can forge the ping's source
/// address.
pub(super) const MAX_STRANGERS: usize = 2;

/// Packets to one address and port from one socket: pings for as long as it takes, and as many pongs.
pub(super) const MAX_PER_PAIR: u32 = 80;

/// As `MAX_PER_PAIR`, to a local address that the peer has named: only the peer knows which host is there. It answers at
/// once, or not; each ping that comes from there is worth two more packets, the answer and a ping.
pub(super) const MAX_PER_LOCAL: u32 = FAST_PINGS;
const PER_LOCAL_PING: u32 = 2;

/// As `MAX_PER_PAIR`, to a stranger.
pub(super) const MAX_PER_STRANGER: u32 = 8;

/// Packets in all, and in all with the birthday's.
pub(super) const MAX_PACKETS: u32 = 768;
pub(super) const MAX_BIRTHDAY_PACKETS: u32 = MAX_PACKETS + PROBES;

/// How a node goes about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    /// Pings to the addresses that are known.
    Plain,
    /// As `Plain`, but a sequential NAT's node tells the ports that it gets next, and those are pinged.
    Predicted,
    /// This node opens many sockets, each with an unknown port, and the peer guesses.
    BirthdayOpen,
    /// This node guesses the ports of the peer.
    BirthdayProbe,
    /// None is of use.
    None(PunchFailure),
}

/// What a session begins with.
#[derive(Debug, Clone)]
pub struct Setup {
    pub role: Role,
    pub ours: NatProfile,
    pub theirs: NatProfile,
    /// Where the relay sees the peer.
    pub peer: SocketAddr,
    /// More ports of that address which the peer has told, at most `MAX_PORTS`, the likeliest first.
    pub ports: Vec<u16>,
    /// Local addresses of the peer, at most `MAX_CANDIDATES`. Of those only what this node would send to anyway.
    pub candidates: Vec<SocketAddr>,
    /// Whether hundreds of sockets and packets may be used.
    pub hard: bool,
    /// When both sides begin.
    pub begin: Instant,
    pub seed: u64,
}

/// One of this node's sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Via {
    Main,
    /// Of the sockets that were opened for this session, the first is 0.
    Extra(u16),
}

/// What is said. A pong has the nonce of its ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    Ping { nonce: u64 },
    Pong { nonce: u64 },
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Open that many sockets, and report their number (`opened`).
    Open(u16),
    Send {
        via: Via,
        to: SocketAddr,
        signal: Signal,
    },
    /// Packets pass in both directions between this socket and that address. The initiator is told once, of the path to
    /// take. The responder is told of each path, for the initiator may take any.
    Proven {
        via: Via,
        to: SocketAddr,
    },
    /// Nothing was proven, and nothing follows.
    Over(PunchFailure),
}

impl Strategy {
    /// What a node does, given both profiles. The peer, given the same, does what belongs to it.
    pub fn choose(ours: &NatProfile, theirs: &NatProfile, hard: bool) -> Self {
        let birthday = |strategy| if hard { strategy } else { Self::None(PunchFailure::NotAllowed) };
        match (Kind::of(ours), Kind::of(theirs)) {
            (Kind::Random, Kind::Random | Kind::Sequential) | (Kind::Sequential, Kind::Random) => {
                Self::None(PunchFailure::BothHard)
            }
            (Kind::Random, Kind::Strict) => birthday(Self::BirthdayOpen),
            (Kind::Strict, Kind::Random) => birthday(Self::BirthdayProbe),
            // A node that sends first to an open one need not be known to it.
            (Kind::Open, _) | (_, Kind::Open) => Self::Plain,
            (Kind::Sequential, _) | (_, Kind::Sequential) => Self::Predicted,
            (Kind::Strict | Kind::Unknown | Kind::Random, _) => Self::Plain,
        }
    }

    /// Whether the node, with such a NAT, is to find out the last port that it was given, just before the session begins,
    /// and to tell the peer what follows (`NatProfile::predict`).
    pub fn predicts(self, ours: &NatProfile) -> bool {
        self == Self::Predicted && ours.is_sequential()
    }
}

/// A profile, as far as it matters to the other side.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// One port for all destinations, and filtering by address.
    Open,
    /// One port for all destinations, and filtering by address and port.
    Strict,
    /// As far as is known nothing is against one port for all.
    Unknown,
    Sequential,
    Random,
}

impl Kind {
    fn of(profile: &NatProfile) -> Self {
        match profile.filtering {
            _ if profile.is_sequential() => Self::Sequential,
            _ if profile.is_hard() => Self::Random,
            Some(Filtering::EndpointIndependent | Filtering::HostDependent) => Self::Open,
            Some(Filtering::PortDependent) => Self::Strict,
            None => Self::Unknown,
        }
    }
}

/// The session.
#[derive(Debug)]
pub struct Punch {
    setup: Setup,
    strategy: Strategy,
    random: fastrand::Rng,
    end: Instant,
    /// Actions that are due now.
    ready: VecDeque<Action>,
    /// In the order in which they are pinged, which a sequential NAT's ports follow.
    pairs: Vec<Pair>,
    birthday: Option<Birthday>,
    /// The pings that were sent: at most the initial `packets_left`.
    pings: HashMap<u64, (Via, SocketAddr)>,
    /// The pings that were answered; as many as there are pongs.
    answered: HashSet<u64>,
    packets_left: u32,
    /// The best so far, and when it is good enough.
    best: Option<(Instant, Rank, Via, SocketAddr)>,
    /// Whether a path is proven and chosen.
    settled: bool,
    over: bool,
}

/// A candidate pair (RFC 8445): a socket of this node and an address of the peer.
#[derive(Debug)]
struct Pair {
    via: Via,
    to: SocketAddr,
    origin: Origin,
    next: Instant,
    pings: u32,
    pings_heard: u32,
    packets_left: u32,
    proven: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Named,
    /// A local address that the peer has named.
    Local,
    /// A ping came from there.
    Learned,
    Stranger,
}

/// The paths that are better come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Local,
    Main,
    Extra,
}

/// What is done once for each of many sockets or ports.
#[derive(Debug)]
struct Birthday {
    /// When the next one is due.
    next: Instant,
    done: u32,
    /// The extra sockets that there are.
    sockets: u16,
    probed: HashSet<u16>,
}

impl Punch {
    pub fn new(mut setup: Setup, now: Instant) -> Self {
        // A node has one socket: several ports of a host are not all the peer's.
        let mut hosts = HashSet::new();
        setup.candidates.retain(|candidate| hosts.insert(candidate.ip()));
        setup.candidates.truncate(MAX_CANDIDATES);
        let strategy = Strategy::choose(&setup.ours, &setup.theirs, setup.hard);
        let birthday = matches!(strategy, Strategy::BirthdayOpen | Strategy::BirthdayProbe).then(|| Birthday {
            next: setup.begin,
            done: 0,
            sockets: 0,
            probed: HashSet::new(),
        });
        let mut punch = Self {
            strategy,
            random: fastrand::Rng::with_seed(setup.seed),
            end: setup.begin + LONGEST,
            ready: VecDeque::new(),
            pairs: Vec::new(),
            packets_left: if birthday.is_some() { MAX_BIRTHDAY_PACKETS } else { MAX_PACKETS },
            birthday,
            pings: HashMap::new(),
            answered: HashSet::new(),
            best: None,
            settled: false,
            over: false,
            setup,
        };
        punch.start(now);
        punch
    }

    fn start(&mut self, now: Instant) {
        match self.strategy {
            Strategy::None(failure) if self.setup.candidates.is_empty() => return self.fail(failure),
            Strategy::None(_) => self.end = self.setup.begin + LONGEST_LOCAL,
            Strategy::BirthdayOpen => self.ready.push_back(Action::Open(EXTRA_SOCKETS)),
            Strategy::BirthdayProbe => {}
            // The peer is not at the port that the relay sees.
            Strategy::Predicted if self.setup.theirs.is_hard() => {}
            Strategy::Plain | Strategy::Predicted => self.name(self.setup.peer, Origin::Named, now),
        }
        let ports = std::mem::take(&mut self.setup.ports);
        self.learn_ports(&ports, now);
        // After the others: usually no NAT is on the path to these, but if one is, it assigns a port.
        for n in 0..self.setup.candidates.len() {
            self.name(self.setup.candidates[n], Origin::Local, now);
        }
    }

    /// What to do now. To be called until there is nothing.
    pub fn poll(&mut self, now: Instant) -> Option<Action> {
        if let Some(action) = self.ready.pop_front() {
            return Some(action);
        }
        if self.over || now < self.setup.begin {
            return None;
        }
        if let Some((good, _, via, to)) = self.best
            && good <= now
            && !self.settled
        {
            self.settled = true;
            return Some(Action::Proven { via, to });
        }
        if now >= self.end {
            if !self.settled {
                self.fail(match self.strategy {
                    Strategy::None(failure) => failure,
                    _ => PunchFailure::TimedOut,
                });
            }
            self.over = true;
            return self.ready.pop_front();
        }
        if self.settled {
            return None;
        }
        self.ping(now).or_else(|| self.guess(now))
    }

    /// When to call `poll` again, if nothing comes before. `None`: the session is over, and can be dropped.
    pub fn next(&self, now: Instant) -> Option<Instant> {
        if !self.ready.is_empty() {
            return Some(now);
        }
        if self.over {
            return None;
        }
        let mut next = self.end;
        if !self.settled {
            next = self.best.map_or(next, |(good, ..)| next.min(good));
            if self.packets_left > 0 {
                let pairs =
                    self.pairs.iter().filter(|pair| pair.packets_left > 0 && !pair.proven).map(|pair| pair.next);
                let birthday = self.birthday.as_ref().filter(|birthday| birthday.is_due(self.strategy));
                next = pairs.chain(birthday.map(|birthday| birthday.next)).fold(next, Instant::min);
            }
        }
        Some(next.max(self.setup.begin))
    }

    /// That many extra sockets were opened.
    pub fn opened(&mut self, sockets: u16) {
        if let Some(birthday) = &mut self.birthday {
            birthday.sockets = sockets.min(EXTRA_SOCKETS);
        }
    }

    /// The peer has told more ports.
    pub fn learn_ports(&mut self, ports: &[u16], now: Instant) {
        if matches!(self.strategy, Strategy::None(_)) {
            return;
        }
        let mut peer = self.setup.peer;
        for &port in ports {
            peer.set_port(port);
            let told = |pair: &&Pair| pair.to.ip() == peer.ip() && pair.origin == Origin::Named;
            if port >= LOWEST_PORT && self.pairs.iter().filter(told).count() < MAX_PORTS {
                self.name(peer, Origin::Named, now);
            }
        }
    }

    /// The peer's attempt is over, or the connection is there: what is proven now is all that will be.
    pub fn stop(&mut self, now: Instant) {
        self.setup.begin = self.setup.begin.min(now);
        self.end = self.end.min(now);
        if let Some((good, ..)) = &mut self.best {
            *good = now.min(*good);
        }
    }

    /// An authentic signal of the peer came.
    pub fn received(&mut self, via: Via, from: SocketAddr, signal: Signal, now: Instant) {
        if self.over {
            return;
        }
        match signal {
            Signal::Ping { nonce } => self.pinged(via, from, nonce, now),
            Signal::Pong { nonce } => self.ponged(via, from, nonce, now),
        }
    }

    fn pinged(&mut self, via: Via, from: SocketAddr, nonce: u64, now: Instant) {
        // Once only: an attacker may have kept the packet to send it again, from another address.
        if self.answered.contains(&nonce) {
            return;
        }
        // Where it has come from is pinged at once, though it is not time yet.
        self.setup.begin = self.setup.begin.min(now);
        self.learn_source(via, from, now);
        let Some(pair) = self.pairs.iter_mut().find(|pair| (pair.via, pair.to) == (via, from)) else { return };
        if pair.origin == Origin::Local && pair.pings_heard < MAX_PER_PAIR {
            pair.pings_heard += 1;
            pair.packets_left += PER_LOCAL_PING;
        }
        if pair.packets_left > 0 && self.packets_left > 0 {
            self.answered.insert(nonce);
            pair.packets_left -= 1;
            self.packets_left -= 1;
            self.ready.push_back(Action::Send { via, to: from, signal: Signal::Pong { nonce } });
        }
    }

    fn ponged(&mut self, via: Via, from: SocketAddr, nonce: u64, now: Instant) {
        // It counts only if it came on the same path: a connection needs that too.
        if self.pings.get(&nonce) != Some(&(via, from)) {
            return;
        }
        self.learn_source(via, from, now);
        let rank = self.rank(via, from);
        match self.setup.role {
            Role::Initiator => {
                let good = if rank == Rank::Local || !self.hopes_for_better(rank) { now } else { now + GRACE };
                let good = good.min(self.end);
                self.best = Some(match self.best {
                    None => (good, rank, via, from),
                    Some(best) if best.1 <= rank => best,
                    Some((earlier, ..)) => (good.min(earlier), rank, via, from),
                });
            }
            Role::Responder => {
                let pair = self.pairs.iter_mut().find(|pair| (pair.via, pair.to) == (via, from) && !pair.proven);
                if let Some(pair) = pair {
                    pair.proven = true;
                    self.settled = true;
                    self.ready.push_back(Action::Proven { via, to: from });
                }
            }
        }
    }

    fn rank(&self, via: Via, to: SocketAddr) -> Rank {
        match via {
            _ if self.setup.candidates.contains(&to) => Rank::Local,
            Via::Main => Rank::Main,
            Via::Extra(_) => Rank::Extra,
        }
    }

    fn hopes_for_better(&self, rank: Rank) -> bool {
        self.pairs.iter().any(|pair| self.rank(pair.via, pair.to) < rank)
    }

    /// Adds the path on which the peer was heard to those that are pinged.
    fn learn_source(&mut self, via: Via, from: SocketAddr, now: Instant) {
        if self.pairs.iter().any(|pair| (pair.via, pair.to) == (via, from)) {
            return;
        }
        let count = |origin| self.pairs.iter().filter(|pair| pair.origin == origin).count();
        let named = self.setup.peer.ip() == from.ip() || self.setup.candidates.iter().any(|to| to.ip() == from.ip());
        if named && count(Origin::Learned) < MAX_SOURCES {
            self.add_pair(via, from, Origin::Learned, now);
        } else if !named && count(Origin::Stranger) < MAX_STRANGERS {
            self.add_pair(via, from, Origin::Stranger, now);
        }
    }

    fn name(&mut self, to: SocketAddr, origin: Origin, now: Instant) {
        if self.pairs.iter().all(|pair| (pair.via, pair.to) != (Via::Main, to)) {
            self.add_pair(Via::Main, to, origin, now);
        }
    }

    fn add_pair(&mut self, via: Via, to: SocketAddr, origin: Origin, now: Instant) {
        let packets_left = match origin {
            Origin::Named | Origin::Learned => MAX_PER_PAIR,
            Origin::Local => MAX_PER_LOCAL,
            Origin::Stranger => MAX_PER_STRANGER,
        };
        let next = now.max(self.setup.begin);
        self.pairs.push(Pair { via, to, origin, next, pings: 0, pings_heard: 0, packets_left, proven: false });
    }

    fn ping(&mut self, now: Instant) -> Option<Action> {
        let pair = self.pairs.iter_mut().find(|pair| pair.next <= now && pair.packets_left > 0 && !pair.proven)?;
        let pause = if pair.pings < FAST_PINGS { FAST } else { SLOW };
        pair.next = now + pause - JITTER + JITTER.mul_f64(2.0 * self.random.f64());
        pair.pings += 1;
        let left = pair.packets_left - 1;
        let (via, to) = (pair.via, pair.to);
        pair.packets_left = left;
        self.send_ping(via, to)
    }

    /// The next of the birthday's pings.
    fn guess(&mut self, now: Instant) -> Option<Action> {
        let strategy = self.strategy;
        let birthday = self.birthday.as_mut().filter(|birthday| birthday.next <= now && birthday.is_due(strategy))?;
        let n = birthday.done;
        birthday.done += 1;
        // A timer that was late is made up for, but not all at once.
        birthday.next = (birthday.next + PACE).max(now.checked_sub(LATE).unwrap_or(now));
        if strategy == Strategy::BirthdayProbe {
            let mut to = self.setup.peer;
            to.set_port(loop {
                let port = self.random.u16(1024..);
                if birthday.probed.insert(port) {
                    break port;
                }
            });
            return self.send_ping(Via::Main, to);
        }
        let sockets = u32::from(birthday.sockets);
        if birthday.done == sockets {
            birthday.next = birthday.next.max(self.setup.begin + SECOND_ROUND);
        }
        // Less than the number of sockets, which fits.
        self.send_ping(Via::Extra((n % sockets) as u16), self.setup.peer)
    }

    fn send_ping(&mut self, via: Via, to: SocketAddr) -> Option<Action> {
        self.packets_left = self.packets_left.checked_sub(1)?;
        let nonce = self.random.u64(..);
        self.pings.insert(nonce, (via, to));
        Some(Action::Send { via, to, signal: Signal::Ping { nonce } })
    }

    fn fail(&mut self, failure: PunchFailure) {
        self.over = true;
        self.ready.push_back(Action::Over(failure));
    }
}

impl Birthday {
    fn is_due(&self, strategy: Strategy) -> bool {
        let all = if strategy == Strategy::BirthdayProbe { PROBES } else { 2 * u32::from(self.sockets) };
        self.done < all
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::net::IpAddr;

    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::strategy::Strategy as _;

    use super::super::nat::{Allocation, Mapping};
    use super::{Strategy, *};

    const UNKNOWN: NatProfile = NatProfile { mapping: None, filtering: None, allocation: None };
    const OPEN: NatProfile = profile(Mapping::EndpointIndependent, Filtering::HostDependent, Allocation::Preserving);
    const STRICT: NatProfile = profile(Mapping::EndpointIndependent, Filtering::PortDependent, Allocation::Preserving);
    const SEQUENTIAL: NatProfile = profile(Mapping::PortDependent, Filtering::PortDependent, Allocation::Contiguous(1));
    const RANDOM: NatProfile = profile(Mapping::PortDependent, Filtering::PortDependent, Allocation::Random);

    const fn profile(mapping: Mapping, filtering: Filtering, allocation: Allocation) -> NatProfile {
        NatProfile { mapping: Some(mapping), filtering: Some(filtering), allocation: Some(allocation) }
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn peer() -> SocketAddr {
        address("20.0.0.2:7000")
    }

    fn local() -> SocketAddr {
        address("192.168.0.7:5000")
    }

    /// A session, driven as a node would, and what it did when.
    struct Side {
        punch: Punch,
        start: Instant,
        ms: u64,
        log: Vec<(u64, Action)>,
    }

    impl Side {
        fn new(ours: NatProfile, theirs: NatProfile, change: impl FnOnce(&mut Setup)) -> Self {
            let start = Instant::now();
            let mut setup = Setup {
                role: Role::Initiator,
                ours,
                theirs,
                peer: peer(),
                ports: Vec::new(),
                candidates: Vec::new(),
                hard: true,
                begin: start,
                seed: 1,
            };
            change(&mut setup);
            let mut side = Self { punch: Punch::new(setup, start), start, ms: 0, log: Vec::new() };
            side.run(0);
            side
        }

        fn now(&self) -> Instant {
            self.start + Duration::from_millis(self.ms)
        }

        /// Until then, or until it is over. Polled when it wants to be, to the next millisecond.
        fn run(&mut self, until: u64) {
            loop {
                while let Some(action) = self.punch.poll(self.now()) {
                    if let Action::Open(sockets) = action {
                        self.punch.opened(sockets);
                    }
                    self.log.push((self.ms, action));
                }
                let Some(next) = self.punch.next(self.now()) else { return };
                assert!(next > self.now(), "to be polled again at once");
                let nanos = (next - self.start).as_nanos() as u64;
                if nanos.div_ceil(1_000_000) > until {
                    self.ms = until;
                    return;
                }
                self.ms = nanos.div_ceil(1_000_000);
            }
        }

        fn hear(&mut self, via: Via, from: SocketAddr, signal: Signal) {
            self.punch.received(via, from, signal, self.now());
            self.run(self.ms);
        }

        /// The pings so far.
        fn pings(&self) -> Vec<(u64, Via, SocketAddr, u64)> {
            let ping = |(at, action): &(u64, Action)| match *action {
                Action::Send { via, to, signal: Signal::Ping { nonce } } => Some((*at, via, to, nonce)),
                _ => None,
            };
            self.log.iter().filter_map(ping).collect()
        }

        fn pinged(&self) -> Vec<SocketAddr> {
            self.pings().into_iter().map(|(_, _, to, _)| to).collect()
        }

        /// The peer answers the last ping to an address.
        fn answer(&mut self, to: SocketAddr) {
            let (_, via, to, nonce) = self.pings().into_iter().rfind(|ping| ping.2 == to).unwrap();
            self.hear(via, to, Signal::Pong { nonce });
        }

        fn pongs(&self) -> usize {
            self.sent(|action| matches!(action, Action::Send { signal: Signal::Pong { .. }, .. }))
        }

        fn sent(&self, which: impl Fn(&Action) -> bool) -> usize {
            self.log.iter().filter(|(_, action)| which(action)).count()
        }

        fn proven(&self) -> Vec<(Via, SocketAddr)> {
            let proven = |(_, action): &(u64, Action)| match *action {
                Action::Proven { via, to } => Some((via, to)),
                _ => None,
            };
            self.log.iter().filter_map(proven).collect()
        }

        fn last(&self) -> (u64, Action) {
            *self.log.last().unwrap()
        }
    }

    #[test]
    fn the_roles_of_both_sides_match() {
        let all = [UNKNOWN, OPEN, STRICT, SEQUENTIAL, RANDOM];
        for ours in &all {
            for theirs in &all {
                let there = match Strategy::choose(theirs, ours, true) {
                    Strategy::BirthdayOpen => Strategy::BirthdayProbe,
                    Strategy::BirthdayProbe => Strategy::BirthdayOpen,
                    same => same,
                };
                assert_eq!(Strategy::choose(ours, theirs, true), there, "{ours:?} {theirs:?}");
            }
        }
    }

    #[test]
    fn the_strategy_is_the_simplest_for_the_two_nats() {
        let choose = |ours, theirs| Strategy::choose(&ours, &theirs, true);
        for theirs in [UNKNOWN, OPEN, STRICT] {
            assert_eq!(choose(UNKNOWN, theirs), Strategy::Plain);
            assert_eq!(choose(STRICT, theirs), Strategy::Plain);
        }
        for hard in [SEQUENTIAL, RANDOM] {
            assert_eq!(choose(hard, OPEN), Strategy::Plain, "an open one sees where it is sent from");
        }
        assert_eq!(choose(RANDOM, UNKNOWN), Strategy::Plain);
        for theirs in [UNKNOWN, STRICT, SEQUENTIAL] {
            assert_eq!(choose(SEQUENTIAL, theirs), Strategy::Predicted);
        }
        assert_eq!(choose(RANDOM, STRICT), Strategy::BirthdayOpen);
        assert_eq!(choose(RANDOM, SEQUENTIAL), Strategy::None(PunchFailure::BothHard));
        assert_eq!(Strategy::choose(&RANDOM, &STRICT, false), Strategy::None(PunchFailure::NotAllowed));
        assert_eq!(Strategy::choose(&STRICT, &RANDOM, false), Strategy::None(PunchFailure::NotAllowed));
        let by_host = NatProfile { mapping: Some(Mapping::HostDependent), ..RANDOM };
        assert_eq!(choose(by_host, STRICT), Strategy::BirthdayOpen);

        let predicts = |ours, theirs| choose(ours, theirs).predicts(&ours);
        assert!(predicts(SEQUENTIAL, STRICT) && predicts(SEQUENTIAL, SEQUENTIAL));
        assert!(!predicts(STRICT, SEQUENTIAL) && !predicts(SEQUENTIAL, OPEN) && !predicts(SEQUENTIAL, RANDOM));
    }

    #[test]
    fn pings_begin_together_are_fast_then_slow_and_end_after_three_seconds() {
        let mut side = Side::new(UNKNOWN, UNKNOWN, |setup| setup.begin += Duration::from_millis(50));
        assert_eq!(side.pings(), [], "too early");
        side.run(10_000);
        let pings = side.pings();
        assert!(pings.iter().all(|(_, via, to, _)| (*via, *to) == (Via::Main, peer())));
        assert_eq!(pings[0].0, 50);
        let pauses: Vec<u64> = pings.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
        assert!(pauses[..10].iter().all(|pause| (25..=36).contains(pause)), "{pauses:?}");
        assert!(pauses[10..].iter().all(|pause| (95..=106).contains(pause)), "{pauses:?}");
        let mut nonces: Vec<u64> = pings.iter().map(|ping| ping.3).collect();
        nonces.sort_unstable();
        nonces.dedup();
        assert_eq!(nonces.len(), pings.len());
        assert_eq!(side.last(), (3050, Action::Over(PunchFailure::TimedOut)));
        assert_eq!(side.punch.next(side.now()), None);
        side.hear(Via::Main, peer(), Signal::Ping { nonce: 7 });
        assert_eq!(side.pongs(), 0, "over is over");
    }

    #[test]
    fn a_pong_proves_only_the_path_of_its_ping() {
        let mut side = Side::new(STRICT, STRICT, |_| ());
        let (_, _, _, nonce) = side.pings()[0];
        side.hear(Via::Main, peer(), Signal::Pong { nonce: nonce ^ 1 });
        side.hear(Via::Main, address("20.0.0.2:7001"), Signal::Pong { nonce });
        side.hear(Via::Extra(0), peer(), Signal::Pong { nonce });
        side.run(100);
        assert_eq!(side.proven(), []);
        side.hear(Via::Main, peer(), Signal::Pong { nonce });
        assert_eq!(side.last(), (100, Action::Proven { via: Via::Main, to: peer() }), "nothing better can come");
        let sent = side.pings().len();
        side.run(10_000);
        assert_eq!(side.pings().len(), sent, "proven is enough");
        assert_eq!(side.sent(|action| matches!(action, Action::Over(_))), 0);
    }

    #[test]
    fn the_initiator_waits_a_moment_for_a_local_path_and_decides_once() {
        for wins in [true, false] {
            let mut side = Side::new(STRICT, STRICT, |setup| setup.candidates = vec![local()]);
            assert_eq!(side.pinged(), [peer(), local()]);
            side.answer(peer());
            assert_eq!(side.proven(), []);
            side.run(if wins { 9 } else { 10 });
            side.answer(local());
            side.answer(peer());
            side.run(10_000);
            assert_eq!(side.proven(), [(Via::Main, if wins { local() } else { peer() })]);
        }
        let mut side = Side::new(STRICT, STRICT, |setup| setup.candidates = vec![local()]);
        side.answer(local());
        assert_eq!(side.proven(), [(Via::Main, local())], "at once");
    }

    #[test]
    fn of_equal_paths_the_first_is_taken() {
        let second = address("20.0.0.2:7001");
        let mut side = Side::new(STRICT, STRICT, |setup| {
            setup.ports = vec![second.port()];
            setup.candidates = vec![local()];
        });
        side.answer(peer());
        side.run(5);
        side.answer(second);
        side.run(9);
        assert_eq!(side.proven(), []);
        side.run(10);
        assert_eq!(side.proven(), [(Via::Main, peer())]);
    }

    #[test]
    fn a_path_that_is_proven_in_the_last_moment_counts() {
        let mut side = Side::new(STRICT, STRICT, |setup| setup.candidates = vec![local()]);
        side.run(2995);
        side.answer(peer());
        side.run(10_000);
        assert_eq!(side.proven(), [(Via::Main, peer())]);
        assert!(matches!(side.last().1, Action::Proven { .. }));
    }

    #[test]
    fn when_the_peer_stops_it_is_over_unless_a_path_is_proven() {
        for role in [Role::Initiator, Role::Responder] {
            for begun in [true, false] {
                let mut side = Side::new(RANDOM, STRICT, |setup| {
                    setup.role = role;
                    setup.begin += Duration::from_millis(100);
                });
                side.run(if begun { 200 } else { 50 });
                let sent = side.pings().len();
                assert_eq!(sent > 0, begun);
                side.punch.stop(side.now());
                side.run(10_000);
                assert_eq!(side.pings().len(), sent);
                let at = if begun { 200 } else { 50 };
                assert_eq!(side.last(), (at, Action::Over(PunchFailure::TimedOut)));
                assert_eq!(side.punch.next(side.now()), None);
            }
        }

        // It waits for a better one.
        let mut side = Side::new(STRICT, STRICT, |setup| setup.candidates = vec![local()]);
        side.answer(peer());
        assert_eq!(side.proven(), []);
        side.punch.stop(side.now());
        side.run(0);
        assert_eq!(side.proven(), [(Via::Main, peer())]);

        let mut side = Side::new(STRICT, STRICT, |setup| setup.role = Role::Responder);
        side.answer(peer());
        side.punch.stop(side.now());
        side.run(0);
        side.hear(Via::Main, peer(), Signal::Ping { nonce: 7 });
        assert_eq!((side.proven(), side.pongs()), (vec![(Via::Main, peer())], 0));
        assert_eq!(side.punch.next(side.now()), None);
        assert_eq!(side.sent(|action| matches!(action, Action::Over(_))), 0);
    }

    #[test]
    fn the_responder_says_each_path_for_the_initiator_may_take_any() {
        let mut side = Side::new(STRICT, STRICT, |setup| {
            setup.role = Role::Responder;
            setup.candidates = vec![local()];
        });
        for _ in 0..2 {
            side.answer(peer());
            side.answer(local());
        }
        assert_eq!(side.proven(), [(Via::Main, peer()), (Via::Main, local())]);
        let sent = side.pings().len();
        side.hear(Via::Main, peer(), Signal::Ping { nonce: 7 });
        side.run(10_000);
        assert_eq!((side.pings().len(), side.pongs()), (sent, 1), "the initiator may still need answers");
    }

    #[test]
    fn a_ping_is_answered_once_and_pinged_back_from_where_it_came() {
        let mut side = Side::new(OPEN, RANDOM, |_| ());
        let (from, other) = (address("20.0.0.2:40000"), address("20.0.0.2:40001"));
        side.hear(Via::Main, from, Signal::Ping { nonce: 7 });
        let expected = Action::Send { via: Via::Main, to: from, signal: Signal::Pong { nonce: 7 } };
        assert!(side.log.contains(&(0, expected)));
        assert_eq!(side.pinged(), [peer(), from]);
        side.hear(Via::Main, from, Signal::Ping { nonce: 7 });
        side.hear(Via::Main, other, Signal::Ping { nonce: 7 });
        side.run(100);
        assert_eq!(side.pongs(), 1, "an attacker may have kept it");
        assert!(!side.pinged().contains(&other));
        side.answer(from);
        assert_eq!(side.proven(), [(Via::Main, from)]);
    }

    #[test]
    fn a_ping_that_comes_before_the_time_is_answered() {
        let mut side = Side::new(STRICT, STRICT, |setup| setup.begin += Duration::from_millis(500));
        side.run(100);
        side.hear(Via::Main, address("20.0.0.2:7001"), Signal::Ping { nonce: 7 });
        assert_eq!((side.pongs(), side.pinged()), (1, vec![address("20.0.0.2:7001")]));
        side.run(499);
        assert!(!side.pinged().contains(&peer()));
        side.run(500);
        assert!(side.pinged().contains(&peer()));
    }

    #[test]
    fn both_hard_is_said_at_once_unless_there_is_a_local_address() {
        for (ours, theirs) in [(RANDOM, RANDOM), (SEQUENTIAL, RANDOM), (RANDOM, SEQUENTIAL)] {
            let side = Side::new(ours, theirs, |setup| setup.begin += LONGEST);
            assert_eq!(side.log, [(0, Action::Over(PunchFailure::BothHard))]);
            assert_eq!(side.punch.next(side.now()), None);
        }
        let side = Side::new(RANDOM, STRICT, |setup| setup.hard = false);
        assert_eq!(side.log, [(0, Action::Over(PunchFailure::NotAllowed))]);

        let mut side = Side::new(RANDOM, RANDOM, |setup| setup.candidates = vec![local()]);
        side.punch.learn_ports(&[7001], side.now());
        side.run(10_000);
        assert!(side.pinged().iter().all(|to| *to == local()));
        assert_eq!(side.pinged().len() as u32, MAX_PER_LOCAL);
        assert_eq!(side.last(), (1000, Action::Over(PunchFailure::BothHard)));
    }

    #[test]
    fn of_a_sequential_peer_only_the_ports_that_it_told_are_pinged_in_their_order() {
        for ours in [SEQUENTIAL, STRICT] {
            let mut side = Side::new(ours, SEQUENTIAL, |setup| setup.candidates = vec![local()]);
            side.run(20);
            assert_eq!(side.pinged(), [local()], "the peer is not where the relay sees it");
            side.punch.learn_ports(&[7003, 7002, 7001], side.now());
            side.run(20);
            let told = [7003, 7002, 7001].map(|port| SocketAddr::new(peer().ip(), port));
            assert_eq!(side.pinged()[1..], told);
        }
        let side = Side::new(SEQUENTIAL, STRICT, |setup| setup.candidates = vec![local()]);
        assert_eq!(side.pinged(), [peer(), local()], "the first port is for the peer");
    }

    #[test]
    fn ports_and_local_addresses_are_bounded() {
        let candidates = (1..100).map(|n| SocketAddr::new([192, 168, 0, n].into(), 5000)).collect();
        let mut side = Side::new(STRICT, SEQUENTIAL, |setup| {
            setup.ports = (1020..1030).collect();
            setup.candidates = candidates;
        });
        side.punch.learn_ports(&[2000; 100], side.now());
        side.punch.learn_ports(&(0..10_000).collect::<Vec<_>>(), side.now());
        side.run(0);
        assert_eq!(side.pinged().len(), MAX_PORTS + MAX_CANDIDATES);
        assert!(side.pinged().iter().all(|to| to.port() >= LOWEST_PORT));
    }

    #[test]
    fn a_birthday_opens_sockets_and_uses_each_twice() {
        let mut side = Side::new(RANDOM, STRICT, |_| ());
        assert_eq!(side.log[0], (0, Action::Open(256)));
        side.run(10_000);
        let pings = side.pings();
        assert!(pings.iter().all(|(_, _, to, _)| *to == peer()));
        let sockets: Vec<Via> = pings.iter().map(|(_, via, _, _)| *via).collect();
        let round: Vec<Via> = (0..256).map(Via::Extra).collect();
        assert_eq!(sockets, [round.clone(), round].concat());
        assert!(pings[255].0 < 300 && pings[256].0 >= 1300, "{} {}", pings[255].0, pings[256].0);
        assert_eq!(side.last(), (3000, Action::Over(PunchFailure::TimedOut)));
    }

    #[test]
    fn a_birthday_works_with_the_sockets_that_there_are() {
        for sockets in [0, 1, 100, 1000] {
            let mut side = Side::new(RANDOM, STRICT, |setup| setup.begin += Duration::from_millis(100));
            side.punch.opened(sockets);
            side.run(10_000);
            assert_eq!(side.pings().len(), 2 * usize::from(sockets.min(256)));
        }
    }

    #[test]
    fn the_other_side_of_a_birthday_tries_each_port_once_and_keeps_its_pace() {
        let mut side = Side::new(STRICT, RANDOM, |_| ());
        side.run(500);
        // The machine was busy.
        side.ms = 700;
        side.run(10_000);
        let pings = side.pings();
        assert_eq!(pings.len(), 1024);
        let ports: HashSet<u16> = pings.iter().map(|(_, _, to, _)| to.port()).collect();
        assert!(ports.len() == 1024 && ports.iter().all(|port| *port >= 1024));
        assert!(pings.iter().all(|(_, via, to, _)| *via == Via::Main && to.ip() == peer().ip()));
        let at = |ms| pings.iter().filter(|ping| ping.0 == ms).count();
        assert!((0..2000).all(|ms| at(ms) <= if ms == 700 { 12 } else { 1 }), "{} at once", at(700));
    }

    #[test]
    fn the_hard_side_keeps_the_socket_that_was_hit() {
        let mut side = Side::new(RANDOM, STRICT, |_| ());
        side.run(400);
        side.hear(Via::Extra(77), peer(), Signal::Ping { nonce: 7 });
        let pong = Action::Send { via: Via::Extra(77), to: peer(), signal: Signal::Pong { nonce: 7 } };
        assert!(side.log.contains(&(400, pong)));
        side.answer(peer());
        assert_eq!(side.proven(), [(Via::Extra(77), peer())]);
    }

    #[test]
    fn strangers_get_a_few_packets_and_only_two_of_them_any() {
        let mut side = Side::new(STRICT, STRICT, |_| ());
        for n in 0..1000 {
            let from = SocketAddr::new([30, 0, 0, (n % 50) as u8].into(), 53);
            side.hear(Via::Main, from, Signal::Ping { nonce: n });
            side.run(side.ms + 1);
        }
        for n in 0..50 {
            let sent =
                |action: &Action| matches!(action, Action::Send { to, .. } if to.ip() == IpAddr::from([30, 0, 0, n]));
            assert_eq!(side.sent(sent), if n < 2 { MAX_PER_STRANGER as usize } else { 0 });
        }
    }

    #[test]
    fn a_peer_that_pings_without_end_uses_up_the_budget() {
        let mut side = Side::new(STRICT, STRICT, |setup| setup.ports = (8000..8016).collect());
        let mut nonce = 0;
        while side.punch.next(side.now()).is_some() {
            for port in 8000..8030 {
                nonce += 1;
                side.hear(Via::Main, SocketAddr::new(peer().ip(), port), Signal::Ping { nonce });
            }
            side.run(side.ms + 10);
        }
        let packets = side.sent(|action| matches!(action, Action::Send { .. }));
        assert_eq!(packets, MAX_PACKETS as usize);
        assert_eq!(side.last(), (3000, Action::Over(PunchFailure::TimedOut)));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Run(u64),
        Stop,
        Ping(u16, u8, u64),
        /// Answers one of the sent pings, and whether on its path.
        Pong(prop::sample::Index, bool),
        Ports(Vec<u16>),
    }

    fn steps() -> impl proptest::strategy::Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            50 => (0..200u64).prop_map(Step::Run),
            1 => Just(Step::Stop),
            50 => (0..4u16, 0..4u8, 0..50u64).prop_map(|(port, ip, nonce)| Step::Ping(port, ip, nonce)),
            50 => (any::<prop::sample::Index>(), prop::bool::weighted(0.1)).prop_map(|(which, same_path)| Step::Pong(which, same_path)),
            50 => vec(any::<u16>(), 0..20).prop_map(Step::Ports),
        ];
        vec(step, 0..200)
    }

    proptest! {
        /// After any input, it ends, reports how exactly once, sends only to addresses it was told or heard from, and
        /// no more than it may.
        #[test]
        fn a_session_ends_and_keeps_to_its_bounds(
            ours in 0..5usize, theirs in 0..5usize, responds: bool, near: bool, seed: u64, steps in steps(),
        ) {
            let all = [UNKNOWN, OPEN, STRICT, SEQUENTIAL, RANDOM];
            let mut side = Side::new(all[ours], all[theirs], |setup| {
                setup.role = if responds { Role::Responder } else { Role::Initiator };
                setup.candidates = if near { vec![local()] } else { Vec::new() };
                setup.seed = seed;
            });
            let mut heard = HashSet::new();
            for step in steps {
                match step {
                    Step::Run(ms) => side.run(side.ms + ms),
                    Step::Stop => side.punch.stop(side.now()),
                    Step::Ping(port, ip, nonce) => {
                        let from = SocketAddr::new([20, 0, 0, ip].into(), 7000 + port);
                        heard.insert(from);
                        side.hear(if port == 3 { Via::Extra(3) } else { Via::Main }, from, Signal::Ping { nonce });
                    }
                    Step::Pong(which, same_path) => {
                        let pings = side.pings();
                        if !pings.is_empty() {
                            let (_, via, to, nonce) = *which.get(&pings);
                            let from = if same_path { to } else { address("20.0.0.2:1") };
                            side.hear(via, from, Signal::Pong { nonce });
                        }
                    }
                    Step::Ports(ports) => side.punch.learn_ports(&ports, side.now()),
                }
            }
            side.run(side.ms + 10_000);
            prop_assert_eq!(side.punch.next(side.now()), None);
            prop_assert!(side.ms <= 3000 + 40_000);
            let over = side.sent(|action| matches!(action, Action::Over(_)));
            let proven = side.proven();
            prop_assert_eq!(over, usize::from(proven.is_empty()));
            prop_assert!(responds || proven.len() <= 1);
            let mut sent: HashMap<_, u32> = HashMap::new();
            for (_, action) in &side.log {
                if let Action::Send { via, to, .. } = *action {
                    *sent.entry((via, to)).or_default() += 1;
                    prop_assert!(to.ip() == peer().ip() || to == local() || heard.contains(&to), "{}", to);
                }
            }
            prop_assert!(sent.values().sum::<u32>() <= MAX_BIRTHDAY_PACKETS);
            prop_assert!(sent.values().all(|packets| *packets <= MAX_PER_PAIR + 2));
        }
    }
}
