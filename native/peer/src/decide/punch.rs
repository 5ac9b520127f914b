//! One attempt of two nodes to reach each other through their NATs, as one of them takes part in it.
//!
//! Both send pings to where the other may be, from the same moment on, and answer those that come with a pong. A NAT
//! lets in what looks like an answer, so each side's pings open the way for the other's. Who gets a pong knows that
//! packets go both ways between exactly that socket and that address.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::nat::{Filtering, NatProfile};

/// The first pings go out in this pause: less than most round trips, so that a lost one costs little time.
const FAST: Duration = Duration::from_millis(30);

/// So many of them: 300 ms, in which the two sides have begun for certain, and the answers of all but far peers come.
const FAST_PINGS: u32 = 10;

/// The later ones: what is still unanswered waits for a lost packet or a late peer.
const SLOW: Duration = Duration::from_millis(100);

/// Pauses differ by up to this much, so that two nodes do not hit the same queue at the same time again and again.
const JITTER: Duration = Duration::from_millis(5);

/// After that it is over. Several round trips of any usable path, and little enough for a caller to wait.
pub(crate) const LONGEST: Duration = Duration::from_secs(3);

/// As `LONGEST`, where only local addresses are tried: they answer at once, or not.
const LONGEST_LOCAL: Duration = Duration::from_secs(1);

/// A better path that is proven so shortly after the first one is taken instead: on a local network a round trip is
/// shorter than that.
const GRACE: Duration = Duration::from_millis(10);

/// Sockets that a node opens whose NAT gives each a port that nobody can tell. With as many, and `PROBES`, two of the 64,512
/// ports meet with a probability of 98 %: 1 - (1 - 256 / 64,512)^1,024.
const EXTRA_SOCKETS: u16 = 256;

/// Ports that the other side tries.
const PROBES: u32 = 1024;

/// In which they are tried, and the extra sockets used: some 100 kB/s, which no home's uplink drops.
const PACE: Duration = Duration::from_millis(1);

/// Of the birthday's packets so many may leave at once: timers are 1 ms coarse, and fire late on a busy machine.
const LATE: Duration = Duration::from_millis(10);

/// When the extra sockets are used once more: all probes have left by then, and what they opened is open.
const SECOND_ROUND: Duration = Duration::from_millis(1300);

/// Ports of the peer that are told, and looked at.
pub(crate) const MAX_PORTS: usize = 16;

/// Local addresses of the peer that are looked at.
pub(crate) const MAX_CANDIDATES: usize = 4;

/// Ways on which the peer was heard, other than those that were known, and that are answered.
const MAX_SOURCES: usize = 8;

/// Of these, those with an address that nobody named. Nobody but the peer can make a ping, but the peer can write
/// somebody else's address on it.
pub(super) const MAX_STRANGERS: usize = 2;

/// Packets to one address and port from one socket: pings for as long as it takes, and as many pongs.
pub(super) const MAX_PER_WAY: u32 = 80;

/// As `MAX_PER_WAY`, to a stranger.
pub(super) const MAX_PER_STRANGER: u32 = 8;

/// Packets in all, and in all with the birthday's.
pub(super) const MAX_PACKETS: u32 = 768;
pub(super) const MAX_BIRTHDAY_PACKETS: u32 = MAX_PACKETS + PROBES;

/// Which side a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// It asked, decides for a path, and makes the connection.
    Initiator,
    /// It was asked for.
    Responder,
}

/// How a node goes about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Strategy {
    /// Pings to the addresses that are known.
    Plain,
    /// As `Plain`, but a sequential NAT's node tells the ports that it gets next, and those are pinged.
    Predicted,
    /// This node opens many sockets, each with a port that nobody knows, and the peer guesses.
    BirthdayOpen,
    /// This node guesses the ports of the peer.
    BirthdayProbe,
    /// None is of use.
    None(Failure),
}

/// Why there is no path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Neither side's port can be known to the other.
    BothHard,
    /// It would take hundreds of packets, which is not allowed.
    NotAllowed,
    /// No pong came.
    TimedOut,
    /// No pong came, for as many packets as may be sent.
    Budget,
}

/// What a session begins with.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) role: Role,
    pub(crate) ours: NatProfile,
    pub(crate) theirs: NatProfile,
    /// Where the relay sees the peer.
    pub(crate) peer: SocketAddr,
    /// More ports of that address which the peer has told, at most `MAX_PORTS`, the likeliest first.
    pub(crate) ports: Vec<u16>,
    /// Local addresses of the peer, at most `MAX_CANDIDATES`. Of those only what this node would send to anyway.
    pub(crate) candidates: Vec<SocketAddr>,
    /// Whether hundreds of sockets and packets may be used.
    pub(crate) hard: bool,
    /// When both sides begin.
    pub(crate) begin: Instant,
    pub(crate) seed: u64,
}

/// One of this node's sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Via {
    Main,
    /// Of those that were opened for this session, the first is 0.
    Extra(u16),
}

/// What is said. A pong has the nonce of its ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    Ping { nonce: u64 },
    Pong { nonce: u64 },
}

/// What the node is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Open so many sockets, and say how many there are (`opened`).
    Open(u16),
    Send {
        via: Via,
        to: SocketAddr,
        signal: Signal,
    },
    /// Packets go both ways between this socket and that address. To the initiator it is said once, of the path that it
    /// shall take. To the responder of each path, for the initiator may take any.
    Proven {
        via: Via,
        to: SocketAddr,
    },
    /// Nothing was proven, and nothing follows.
    Over(Failure),
}

impl Strategy {
    /// What a node does, given both profiles. The peer, given the same, does what belongs to it.
    pub(crate) fn choose(ours: &NatProfile, theirs: &NatProfile, hard: bool) -> Self {
        let birthday = |strategy| if hard { strategy } else { Self::None(Failure::NotAllowed) };
        match (Kind::of(ours), Kind::of(theirs)) {
            (Kind::Random, Kind::Random | Kind::Sequential) | (Kind::Sequential, Kind::Random) => {
                Self::None(Failure::BothHard)
            }
            (Kind::Random, Kind::Strict) => birthday(Self::BirthdayOpen),
            (Kind::Strict, Kind::Random) => birthday(Self::BirthdayProbe),
            // Who sends first to an open one needs not be known to it.
            (Kind::Open, _) | (_, Kind::Open) => Self::Plain,
            (Kind::Sequential, _) | (_, Kind::Sequential) => Self::Predicted,
            (Kind::Strict | Kind::Unknown | Kind::Random, _) => Self::Plain,
        }
    }

    /// Whether the node, with such a NAT, is to find out the last port that it was given, just before the session begins,
    /// and to tell the peer what follows (`NatProfile::predict`).
    pub(crate) fn predicts(self, ours: &NatProfile) -> bool {
        self == Self::Predicted && ours.is_sequential()
    }
}

/// A profile, as far as it matters to the other side.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// One port for all, and it lets in whom it has sent to from any port.
    Open,
    /// One port for all, and it lets in only who is where it has sent to.
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
pub(crate) struct Punch {
    setup: Setup,
    strategy: Strategy,
    random: fastrand::Rng,
    end: Instant,
    /// To be done at once.
    ready: VecDeque<Action>,
    /// In the order in which they are pinged, which a sequential NAT's ports follow.
    ways: Vec<Way>,
    birthday: Option<Birthday>,
    /// The pings that were sent, at most `packets_left` of the beginning.
    pings: HashMap<u64, (Via, SocketAddr)>,
    /// The pings that were answered; as many as there are pongs.
    answered: HashSet<u64>,
    packets_left: u32,
    /// The best so far, and when it is good enough.
    best: Option<(Instant, Rank, Via, SocketAddr)>,
    /// Whether a path is proven, and decided for.
    settled: bool,
    over: bool,
}

/// A socket of ours with an address of the peer's.
#[derive(Debug)]
struct Way {
    via: Via,
    to: SocketAddr,
    origin: Origin,
    next: Instant,
    pings: u32,
    packets_left: u32,
    proven: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Named,
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
    pub(crate) fn new(mut setup: Setup, now: Instant) -> Self {
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
            ways: Vec::new(),
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
            // Nobody is at the port that the relay sees.
            Strategy::Predicted if self.setup.theirs.is_hard() => {}
            Strategy::Plain | Strategy::Predicted => self.name(self.setup.peer, now),
        }
        let ports = std::mem::take(&mut self.setup.ports);
        self.learn_ports(&ports, now);
        // After the others: no NAT is on the way to these, but if it is, it gives them a port.
        for n in 0..self.setup.candidates.len() {
            self.name(self.setup.candidates[n], now);
        }
    }

    /// What to do now. To be called until there is nothing.
    pub(crate) fn poll(&mut self, now: Instant) -> Option<Action> {
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
                    _ if self.packets_left == 0 => Failure::Budget,
                    _ => Failure::TimedOut,
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
    pub(crate) fn next(&self, now: Instant) -> Option<Instant> {
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
                let ways = self.ways.iter().filter(|way| way.packets_left > 0 && !way.proven).map(|way| way.next);
                let birthday = self.birthday.as_ref().filter(|birthday| birthday.is_due(self.strategy));
                next = ways.chain(birthday.map(|birthday| birthday.next)).fold(next, Instant::min);
            }
        }
        Some(next.max(self.setup.begin))
    }

    /// So many extra sockets were opened.
    pub(crate) fn opened(&mut self, sockets: u16) {
        if let Some(birthday) = &mut self.birthday {
            birthday.sockets = sockets.min(EXTRA_SOCKETS);
        }
    }

    /// The peer has told more ports.
    pub(crate) fn learn_ports(&mut self, ports: &[u16], now: Instant) {
        if matches!(self.strategy, Strategy::None(_)) {
            return;
        }
        let mut peer = self.setup.peer;
        for &port in ports {
            peer.set_port(port);
            let told = |way: &&Way| way.to.ip() == peer.ip() && way.origin == Origin::Named;
            if port != 0 && self.ways.iter().filter(told).count() < MAX_PORTS {
                self.name(peer, now);
            }
        }
    }

    /// An authentic signal of the peer came.
    pub(crate) fn received(&mut self, via: Via, from: SocketAddr, signal: Signal, now: Instant) {
        if self.over {
            return;
        }
        match signal {
            Signal::Ping { nonce } => self.pinged(via, from, nonce, now),
            Signal::Pong { nonce } => self.ponged(via, from, nonce, now),
        }
    }

    fn pinged(&mut self, via: Via, from: SocketAddr, nonce: u64, now: Instant) {
        // The peer has begun, so it is time.
        self.setup.begin = self.setup.begin.min(now);
        self.learn_source(via, from, now);
        let Some(way) = self.ways.iter_mut().find(|way| (way.via, way.to) == (via, from)) else { return };
        // Once only: somebody may have kept the packet to send it again, with another's address.
        if way.packets_left > 0 && self.packets_left > 0 && self.answered.insert(nonce) {
            way.packets_left -= 1;
            self.packets_left -= 1;
            self.ready.push_back(Action::Send { via, to: from, signal: Signal::Pong { nonce } });
        }
    }

    fn ponged(&mut self, via: Via, from: SocketAddr, nonce: u64, now: Instant) {
        // It counts only if it came on the same way: a connection needs that too.
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
                let way = self.ways.iter_mut().find(|way| (way.via, way.to) == (via, from) && !way.proven);
                if let Some(way) = way {
                    way.proven = true;
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
        self.ways.iter().any(|way| self.rank(way.via, way.to) < rank)
    }

    /// Takes the way on which the peer was heard among those to be pinged.
    fn learn_source(&mut self, via: Via, from: SocketAddr, now: Instant) {
        if self.ways.iter().any(|way| (way.via, way.to) == (via, from)) {
            return;
        }
        let count = |origin| self.ways.iter().filter(|way| way.origin == origin).count();
        let named = self.setup.peer.ip() == from.ip() || self.setup.candidates.iter().any(|to| to.ip() == from.ip());
        if named && count(Origin::Learned) < MAX_SOURCES {
            self.way(via, from, Origin::Learned, now);
        } else if !named && count(Origin::Stranger) < MAX_STRANGERS {
            self.way(via, from, Origin::Stranger, now);
        }
    }

    fn name(&mut self, to: SocketAddr, now: Instant) {
        if self.ways.iter().all(|way| (way.via, way.to) != (Via::Main, to)) {
            self.way(Via::Main, to, Origin::Named, now);
        }
    }

    fn way(&mut self, via: Via, to: SocketAddr, origin: Origin, now: Instant) {
        let packets_left = if origin == Origin::Stranger { MAX_PER_STRANGER } else { MAX_PER_WAY };
        let next = now.max(self.setup.begin);
        self.ways.push(Way { via, to, origin, next, pings: 0, packets_left, proven: false });
    }

    fn ping(&mut self, now: Instant) -> Option<Action> {
        let way = self.ways.iter_mut().find(|way| way.next <= now && way.packets_left > 0 && !way.proven)?;
        let pause = if way.pings < FAST_PINGS { FAST } else { SLOW };
        way.next = now + pause - JITTER + JITTER.mul_f64(2.0 * self.random.f64());
        way.pings += 1;
        let left = way.packets_left - 1;
        let (via, to) = (way.via, way.to);
        way.packets_left = left;
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

    fn fail(&mut self, failure: Failure) {
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
