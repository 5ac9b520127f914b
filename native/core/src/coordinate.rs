//! A relay's book-keeping for punches: which nodes are told of each other, and what of what they say is passed on.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::nat::NatProfile;
use super::punch::{LONGEST, LOWEST_PORT, MAX_CANDIDATES, MAX_PORTS, Strategy};
use super::relay::Generation;
use super::shares::{Bucket, Client, Counts, Limits};
use crate::proto::control::Id;
use crate::proto::control::{self, Refusal};
use crate::proto::signal::Role;
use crate::types::Fingerprint;

/// Sessions in all: at a few seconds each a relay so begins some hundreds a second.
const MAX_SESSIONS: usize = 2048;

/// Sessions that a node has requested, and as many that others have requested with it. A node has one for each peer,
/// and retries them after pauses.
const MAX_SESSIONS_PER_NODE: usize = 16;

/// Of the sessions that others have requested with one node: the share of one key, whatever its names, and of one
/// address, whatever its keys.
const WITH_ONE_NODE: Limits =
    Limits { total: MAX_SESSIONS_PER_NODE, per_key: 2, per_address: MAX_SESSIONS_PER_NODE / 2 };

/// All sessions, by the node that requested them.
const ALL: Limits = Limits { total: MAX_SESSIONS, per_key: MAX_SESSIONS / 32, per_address: MAX_SESSIONS / 4 };

/// Sessions that a node asks for, per second, after a burst of as many as it may have.
const REQUESTS_PER_SECOND: u64 = 4;

/// Round trips count as no longer than that: a node that delays its acknowledgements does not delay others for long.
const LONGEST_ROUND_TRIP: Duration = Duration::from_millis(500);

/// What a node needs to get ready, to open hundreds of sockets for instance.
const PREPARATION: Duration = Duration::from_millis(20);

/// How long a session lives: until both have begun, at the latest, until it is over, and its result is reported.
const LIFE: Duration = Duration::from_secs(6);
const _: () = assert!(LIFE.as_millis() > 3 * LONGEST_ROUND_TRIP.as_millis() + LONGEST.as_millis() + 500);

/// How long a node that has just registered may take to find out what NAT it is behind: three rounds of questions of a relay
/// that is not near. An attempt of the wrong kind would take longer and fail.
pub const DESCRIBED_WITHIN: Duration = Duration::from_millis(1500);

/// Why there is no session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Refused {
    #[error("one of the two is not registered, or both are the same")]
    NotRegistered,
    #[error("the other node is still finding out what its NAT does")]
    NotReady,
    #[error("a session of the two is in progress")]
    InProgress,
    #[error("one of the two has another session of that id")]
    IdInUse,
    #[error("one has an IPv4 address, the other an IPv6 address")]
    Family,
    #[error("as many sessions exist as may, or of this key or network")]
    Sessions,
    #[error(
        "the node has requested as many sessions as it may, or others with the target have, or the node's key or network"
    )]
    SessionsPerNode,
    #[error("the node asked too often")]
    Rate,
}

/// A node, as the relay knows it at the moment.
#[derive(Debug, Clone)]
pub struct Party {
    pub node: Generation,
    pub id: Id,
    pub key: Fingerprint,
    /// Where the relay sees it.
    pub seen: SocketAddr,
    /// Of its connection.
    pub round_trip: Duration,
}

/// What one of the two is told when a session begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coordinate {
    pub to: Generation,
    pub session: Id,
    pub role: Role,
    /// The other node.
    pub peer: Id,
    pub key: Fingerprint,
    pub seen: SocketAddr,
    pub profile: NatProfile,
    pub candidates: Vec<SocketAddr>,
    pub secret: [u8; 32],
    /// From when it is told until it is to begin.
    pub delay: Duration,
}

/// What one of the two is told when the other has told ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Execute {
    pub to: Generation,
    pub session: Id,
    pub ports: Vec<u16>,
}

/// The nodes and their sessions.
#[derive(Debug)]
pub struct Coordinator {
    /// As many as are registered.
    nodes: HashMap<Generation, Node>,
    /// At most `MAX_SESSIONS`.
    sessions: HashMap<u64, Session>,
    /// When each ends.
    expiring: BTreeSet<(Instant, u64)>,
    /// The node that requested them.
    asked: Counts,
    next_session: u64,
}

#[derive(Debug)]
struct Node {
    requests: Bucket,
    /// Until when it is waited for that it describes itself, if it has not.
    ready_at: Option<Instant>,
    profile: NatProfile,
    /// At most `MAX_CANDIDATES`.
    candidates: Vec<SocketAddr>,
    /// At most `MAX_SESSIONS_PER_NODE` that it requested, and as many that others did.
    sessions: HashMap<Id, u64>,
    /// The sessions that others requested.
    asked: Counts,
}

#[derive(Debug)]
struct Session {
    id: Id,
    until: Instant,
    /// The first is the node that requested it.
    ends: [Generation; 2],
    asking: Client,
    /// How many more ports each may name.
    ports_left: [usize; 2],
}

impl Default for Coordinator {
    fn default() -> Self {
        Self {
            nodes: HashMap::new(),
            sessions: HashMap::new(),
            expiring: BTreeSet::new(),
            asked: Counts::new(ALL),
            next_session: 0,
        }
    }
}

impl Coordinator {
    /// A node has registered.
    pub fn join(&mut self, node: Generation, now: Instant) {
        let requests = Bucket::new(REQUESTS_PER_SECOND, MAX_SESSIONS_PER_NODE as u64, now);
        let (profile, candidates) = (NatProfile::default(), Vec::new());
        let ready_at = Some(now + DESCRIBED_WITHIN);
        let (sessions, asked) = (HashMap::new(), Counts::new(WITH_ONE_NODE));
        self.nodes.insert(node, Node { requests, ready_at, profile, candidates, sessions, asked });
    }

    /// A registration has ended.
    pub fn end(&mut self, node: Generation) {
        let sessions = self.nodes.remove(&node).map(|node| node.sessions).unwrap_or_default();
        for session in sessions.into_values() {
            self.end_session(session);
        }
    }

    /// A node tells what NAT it is behind, and its local addresses.
    pub fn describe(&mut self, node: Generation, profile: NatProfile, candidates: &[SocketAddr]) {
        if let Some(node) = self.nodes.get_mut(&node) {
            node.ready_at = None;
            node.profile = profile;
            node.candidates.clear();
            for &candidate in candidates {
                // A node has one socket: if it names several ports of a host, all but one belong to others.
                if node.candidates.len() < MAX_CANDIDATES
                    && is_local(candidate)
                    && node.candidates.iter().all(|known| known.ip() != candidate.ip())
                {
                    node.candidates.push(candidate);
                }
            }
        }
    }

    /// A node requests a session with another. Returns what to tell both.
    pub fn request(
        &mut self,
        from: &Party,
        target: &Party,
        session: Id,
        secret: [u8; 32],
        now: Instant,
    ) -> Result<[Coordinate; 2], Refused> {
        self.expire(now);
        let asking = self.nodes.get_mut(&from.node).ok_or(Refused::NotRegistered)?;
        // Counts whatever the answer is: a node that is told to wait must not ask without limit either.
        if !asking.requests.take(1, now) {
            return Err(Refused::Rate);
        }
        let ready_at = match self.nodes.get(&target.node) {
            Some(asked) if from.node != target.node => asked.ready_at,
            _ => return Err(Refused::NotRegistered),
        };
        if ready_at.is_some_and(|ready_at| now < ready_at) {
            return Err(Refused::NotReady);
        }
        let asking = Client::new(from.key, from.seen.ip());
        self.allow([from, target], &asking, &session)?;
        let number = self.next_session;
        self.next_session += 1;
        let ends = [from.node, target.node];
        for end in ends {
            if let Some(node) = self.nodes.get_mut(&end) {
                node.sessions.insert(session.clone(), number);
            }
        }
        let ports_left = [MAX_PORTS; 2];
        let kept = Session { id: session.clone(), until: now + LIFE, ends, asking, ports_left };
        self.sessions.insert(number, kept);
        self.expiring.insert((now + LIFE, number));

        let profiles = ends.map(|end| self.nodes.get(&end).map(|node| node.profile).unwrap_or_default());
        let delays = delays([from.round_trip, target.round_trip], profiles);
        let told = |to: &Party, role, peer: &Party, profile, delay| Coordinate {
            to: to.node,
            session: session.clone(),
            role,
            peer: peer.id.clone(),
            key: peer.key,
            seen: peer.seen,
            profile,
            // Seen at one address they may be in one network. At two, a local address of one belongs to another host at
            // the other.
            candidates: match self.nodes.get(&peer.node) {
                Some(node) if to.seen.ip() == peer.seen.ip() => node.candidates.clone(),
                _ => Vec::new(),
            },
            secret,
            delay,
        };
        Ok([
            told(from, Role::Initiator, target, profiles[1], delays[0]),
            told(target, Role::Responder, from, profiles[0], delays[1]),
        ])
    }

    /// One of the two names ports of its address. Returns what to tell the other, unless there is no such session.
    pub fn execute(&mut self, from: Generation, session: &Id, ports: &[u16], now: Instant) -> Option<Execute> {
        self.expire(now);
        let number = self.nodes.get(&from)?.sessions.get(session)?;
        let Session { ends, ports_left, .. } = self.sessions.get_mut(number)?;
        let side = usize::from(ends[1] == from);
        let mut passed = Vec::new();
        for &port in ports {
            if port >= LOWEST_PORT && passed.len() < ports_left[side] && !passed.contains(&port) {
                passed.push(port);
            }
        }
        ports_left[side] -= passed.len();
        let execute = Execute { to: ends[1 - side], session: session.clone(), ports: passed };
        (!execute.ports.is_empty()).then_some(execute)
    }

    /// One of the two reports how its attempt went. That ends the session, unless the responder claims a path: only the
    /// initiator chooses one. Returns the other node, which must be told, if the session has ended.
    pub fn result(&mut self, from: Generation, session: &Id, success: bool, now: Instant) -> Option<Generation> {
        self.expire(now);
        let number = *self.nodes.get(&from)?.sessions.get(session)?;
        let [initiator, responder] = self.sessions.get(&number)?.ends;
        if success && from != initiator {
            return None;
        }
        self.end_session(number);
        Some(if from == initiator { responder } else { initiator })
    }

    #[cfg(test)]
    pub fn sessions(&self) -> usize {
        self.sessions.len()
    }

    /// From here on it counts.
    fn allow(&mut self, parties: [&Party; 2], asking: &Client, id: &Id) -> Result<(), Refused> {
        let nodes = parties.map(|party| self.nodes.get(&party.node));
        let [Some(from), Some(target)] = nodes else { return Err(Refused::NotRegistered) };
        let pair = parties.map(|party| party.node);
        let ends = |number| self.sessions.get(number).map(|session| session.ends);
        if from.sessions.values().filter_map(ends).any(|ends| ends.contains(&pair[1])) {
            return Err(Refused::InProgress);
        }
        if from.sessions.contains_key(id) || target.sessions.contains_key(id) {
            return Err(Refused::IdInUse);
        }
        if parties[0].seen.is_ipv4() != parties[1].seen.is_ipv4() {
            return Err(Refused::Family);
        }
        self.asked.allows(asking, 1).map_err(|_| Refused::Sessions)?;
        if from.sessions.len() - from.asked.total() >= MAX_SESSIONS_PER_NODE {
            return Err(Refused::SessionsPerNode);
        }
        let target = self.nodes.get_mut(&pair[1]).ok_or(Refused::NotRegistered)?;
        target.asked.take(asking, 1).map_err(|_| Refused::SessionsPerNode)?;
        self.asked.take(asking, 1).map_err(|_| Refused::Sessions)
    }

    fn expire(&mut self, now: Instant) {
        while let Some(&(until, number)) = self.expiring.first()
            && until <= now
        {
            self.expiring.pop_first();
            self.end_session(number);
        }
    }

    fn end_session(&mut self, number: u64) {
        let Some(Session { id, until, ends, asking, .. }) = self.sessions.remove(&number) else { return };
        self.expiring.remove(&(until, number));
        self.asked.give_back(&asking, 1);
        if let Some(target) = self.nodes.get_mut(&ends[1]) {
            target.asked.give_back(&asking, 1);
        }
        for end in ends {
            if let Some(node) = self.nodes.get_mut(&end) {
                node.sessions.remove(&id);
            }
        }
    }
}

/// How long each of the two waits, so that they begin at the same moment, and not before they know what they need.
fn delays(round_trips: [Duration; 2], profiles: [NatProfile; 2]) -> [Duration; 2] {
    let [a, b] = round_trips.map(|round_trip| round_trip.min(LONGEST_ROUND_TRIP));
    // The message, a probe and its answer, the message with the ports, and that to the other node.
    let predicted = |ours: usize, own: Duration, other: Duration| {
        let (ours, theirs) = (&profiles[ours], &profiles[1 - ours]);
        let predicts = Strategy::choose(ours, theirs, true).predicts(ours);
        if predicts { own * 2 + other / 2 } else { own / 2 }
    };
    let begin = predicted(0, a, b).max(predicted(1, b, a)) + PREPARATION;
    [begin - a / 2, begin - b / 2]
}

/// Whether only a node in the same network can be reached at an address.
pub fn is_local(address: SocketAddr) -> bool {
    let local = match address.ip() {
        IpAddr::V4(ip) => {
            let shared = ip.octets()[0] == 100 && ip.octets()[1] & 0xC0 == 64;
            ip.is_private() || shared
        }
        IpAddr::V6(ip) => ip.is_unique_local(),
    };
    local && address.port() >= LOWEST_PORT
}

impl From<Coordinate> for control::Coordinate {
    fn from(told: Coordinate) -> Self {
        let Coordinate { session, role, peer, key, seen, profile, candidates, secret, delay, .. } = told;
        Self { session_id: session, role, peer_id: peer, key, address: seen, profile, candidates, secret, delay }
    }
}

impl From<Refused> for Refusal {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::NotRegistered => Self::NotRegistered,
            Refused::NotReady => Self::NotReady,
            Refused::InProgress => Self::InProgress,
            Refused::IdInUse => Self::Malformed,
            Refused::Family => Self::AddressFamily,
            Refused::Sessions => Self::Sessions,
            Refused::SessionsPerNode => Self::SessionsPerNode,
            Refused::Rate => Self::RequestRate,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::{any, prop_assert, prop_assert_eq, prop_oneof, proptest};
    use proptest::strategy::Strategy as Values;

    use super::super::nat::{Allocation, Filtering, Mapping};
    use super::super::relay::Book;
    use super::*;
    use crate::types::RelayConfig;

    const SECRET: [u8; 32] = [7; 32];

    const SEQUENTIAL: NatProfile = NatProfile {
        mapping: Some(Mapping::PortDependent),
        filtering: Some(Filtering::PortDependent),
        allocation: Some(Allocation::Contiguous(1)),
    };

    fn id(name: impl ToString) -> Id {
        Id::new(name.to_string().into_bytes()).unwrap()
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A key that none of `Relay::node` has.
    fn another_key() -> Fingerprint {
        let mut key = [9; 32];
        key[0] = 0;
        key.into()
    }

    struct Relay {
        book: Book,
        coordinator: Coordinator,
        start: Instant,
    }

    impl Relay {
        fn new() -> Self {
            let start = Instant::now();
            let config = RelayConfig { accept_rate: 100_000, ..RelayConfig::default() };
            Self { book: Book::new(&config, start), coordinator: Coordinator::default(), start }
        }

        fn node(&mut self, n: usize, seen: &str) -> Party {
            let (key, seen) = ([n as u8; 32].into(), address(seen));
            let node = self.book.register(id(n), key, seen.ip(), self.start).unwrap().generation;
            self.coordinator.join(node, self.start);
            self.coordinator.describe(node, NatProfile::default(), &[]);
            Party { node, id: id(n), key, seen, round_trip: ms(40) }
        }

        fn nodes<const N: usize>(&mut self) -> [Party; N] {
            let mut n = 0;
            [(); N].map(|()| {
                n += 1;
                self.node(n, &format!("20.0.0.{n}:7000"))
            })
        }

        fn request(&mut self, from: &Party, target: &Party, session: &str) -> Result<[Coordinate; 2], Refused> {
            self.coordinator.request(from, target, id(session), SECRET, self.start)
        }

        fn refused(&mut self, from: &Party, target: &Party, session: &str) -> Option<Refused> {
            self.request(from, target, session).err()
        }
    }

    #[test]
    fn a_node_that_has_just_registered_is_waited_for_until_it_describes_itself_or_should_have() {
        let mut relay = Relay::new();
        let [a, b, c] = relay.nodes();
        for party in [&b, &c] {
            relay.coordinator.end(party.node);
            relay.coordinator.join(party.node, relay.start);
        }
        assert_eq!(relay.refused(&a, &b, "s"), Some(Refused::NotReady));
        relay.coordinator.describe(b.node, NatProfile::default(), &[]);
        assert_eq!(relay.refused(&a, &b, "s"), None);
        let late = relay.start + DESCRIBED_WITHIN;
        assert!(relay.coordinator.request(&a, &c, id("t"), SECRET, late).is_ok());
    }

    #[test]
    fn both_are_told_of_each_other() {
        let mut relay = Relay::new();
        let [a, b] = relay.nodes();
        relay.coordinator.describe(a.node, SEQUENTIAL, &[]);
        let [to_a, to_b] = relay.request(&a, &b, "s").unwrap();
        let expected = Coordinate {
            to: a.node,
            session: id("s"),
            role: Role::Initiator,
            peer: b.id.clone(),
            key: b.key,
            seen: b.seen,
            profile: NatProfile::default(),
            candidates: Vec::new(),
            secret: SECRET,
            delay: to_a.delay,
        };
        assert_eq!(to_a, expected);
        let expected = Coordinate {
            to: b.node,
            role: Role::Responder,
            peer: a.id.clone(),
            key: a.key,
            seen: a.seen,
            profile: SEQUENTIAL,
            delay: to_b.delay,
            ..expected
        };
        assert_eq!(to_b, expected);
    }

    #[test]
    fn both_begin_at_the_same_moment_and_not_too_early() {
        let mut relay = Relay::new();
        let [mut a, mut b] = relay.nodes();
        (a.round_trip, b.round_trip) = (ms(20), ms(100));
        let [to_a, to_b] = relay.request(&a, &b, "s").unwrap();
        assert_eq!(to_a.delay + ms(10), to_b.delay + ms(50));
        assert_eq!(to_b.delay, PREPARATION);

        assert!(relay.coordinator.result(a.node, &id("s"), true, relay.start).is_some());
        relay.coordinator.describe(b.node, SEQUENTIAL, &[]);
        let [to_a, to_b] = relay.request(&a, &b, "s").unwrap();
        assert_eq!(to_a.delay + ms(10), to_b.delay + ms(50));
        // It is told, probes, tells its ports, and they are told.
        assert_eq!(to_b.delay, ms(100) + ms(50) + ms(10) + PREPARATION);

        assert!(relay.coordinator.result(a.node, &id("s"), true, relay.start).is_some());
        b.round_trip = ms(3_600_000);
        let [to_a, to_b] = relay.request(&a, &b, "s").unwrap();
        assert!(to_a.delay < ms(1100) && to_b.delay < ms(1100), "{to_a:?}");
    }

    #[test]
    fn local_addresses_are_told_only_where_both_are_seen_at_one_address() {
        let mut relay = Relay::new();
        let a = relay.node(1, "20.0.0.1:7000");
        let neighbour = relay.node(2, "20.0.0.1:7001");
        let other = relay.node(3, "20.0.0.2:7000");
        let local = [address("192.168.0.2:5000"), address("[fd00::1]:5000"), address("100.64.0.9:5000")];
        relay.coordinator.describe(a.node, NatProfile::default(), &local);
        assert_eq!(relay.request(&neighbour, &a, "s").unwrap()[0].candidates, local);
        assert_eq!(relay.request(&other, &a, "t").unwrap()[0].candidates, []);
    }

    #[test]
    fn only_local_addresses_can_be_named() {
        let mut relay = Relay::new();
        let [a, b] = [1, 2].map(|n| relay.node(n, "20.0.0.1:7000"));
        let named = [
            "20.0.0.1:5000",
            "8.8.8.8:5353",
            "127.0.0.1:5000",
            "0.0.0.0:5000",
            "169.254.169.254:8080",
            "224.0.0.251:5353",
            "255.255.255.255:5000",
            "100.128.0.1:5000",
            "192.168.0.2:53",
            "[2001:db8::1]:5000",
            "[::1]:5000",
            "[::ffff:8.8.8.8]:5000",
            "[ff02::fb]:5353",
        ];
        relay.coordinator.describe(a.node, NatProfile::default(), &named.map(address));
        assert_eq!(relay.request(&b, &a, "s").unwrap()[0].candidates, []);
        relay.coordinator.result(b.node, &id("s"), false, relay.start);

        let many: Vec<SocketAddr> = (0..100).map(|n| SocketAddr::new([10, 0, 0, n / 2].into(), 5000)).collect();
        relay.coordinator.describe(a.node, NatProfile::default(), &many);
        let told = relay.request(&b, &a, "s").unwrap()[0].candidates.clone();
        assert_eq!(told, [many[0], many[2], many[4], many[6]]);
    }

    #[test]
    fn ports_are_passed_on_within_bounds_between_the_two_ends_only() {
        let mut relay = Relay::new();
        let [a, b, c] = relay.nodes();
        relay.request(&a, &b, "s").unwrap();
        let start = relay.start;
        let mut execute = |from: &Party, session, ports: &[u16]| {
            let execute = relay.coordinator.execute(from.node, &id(session), ports, start)?;
            assert_eq!(execute.session, id(session));
            Some((execute.to, execute.ports))
        };
        assert_eq!(execute(&a, "s", &[0, 22, 1023, 1024, 5000, 5000]), Some((b.node, vec![1024, 5000])));
        assert_eq!(execute(&b, "s", &[7001]), Some((a.node, vec![7001])));
        assert_eq!(execute(&b, "s", &[53]), None, "none is left");
        assert_eq!(execute(&c, "s", &[7001]), None);
        assert_eq!(execute(&a, "t", &[7001]), None);
        let many: Vec<u16> = (2000..3000).collect();
        assert_eq!(execute(&a, "s", &many), Some((b.node, many[..MAX_PORTS - 2].to_vec())));
        assert_eq!(execute(&a, "s", &many), None);
    }

    #[test]
    fn two_nodes_share_one_session_until_one_ends_it() {
        let mut relay = Relay::new();
        let [a, b, c] = relay.nodes();
        relay.request(&a, &b, "s").unwrap();
        assert_eq!(relay.refused(&b, &a, "t"), Some(Refused::InProgress));
        assert_eq!(relay.refused(&a, &b, "t"), Some(Refused::InProgress));
        assert_eq!(relay.refused(&a, &c, "s"), Some(Refused::IdInUse), "at the requesting node");
        assert_eq!(relay.refused(&c, &b, "s"), Some(Refused::IdInUse), "at the other");
        let mut result =
            |from: &Party, session, success| relay.coordinator.result(from.node, &id(session), success, relay.start);
        assert_eq!(result(&b, "s", true), None, "the initiator decides for a path");
        for success in [true, false] {
            assert_eq!(result(&c, "s", success), None, "it is neither of the two");
            assert_eq!(result(&a, "t", success), None, "there is no such session");
        }
        assert_eq!(result(&a, "s", true), Some(b.node));
        for (one, other) in [(&a, &b), (&b, &a)] {
            assert_eq!((result(one, "s", false), result(other, "s", false)), (None, None), "ended already");
        }

        for gives_up in [0, 1] {
            let [asking, asked] = [&b, &a];
            relay.request(asking, asked, "s").unwrap();
            let ends = [asking.node, asked.node];
            assert_eq!(
                relay.coordinator.result(ends[gives_up], &id("s"), false, relay.start),
                Some(ends[1 - gives_up])
            );
            assert_eq!(relay.coordinator.sessions(), 0);
        }
    }

    #[test]
    fn a_session_is_forgotten_after_its_time_and_with_either_node() {
        let mut relay = Relay::new();
        let [a, b, c] = relay.nodes();
        relay.request(&a, &b, "s").unwrap();
        let end = relay.start + LIFE;
        let refused = relay.coordinator.request(&b, &a, id("t"), SECRET, end - ms(1));
        assert_eq!(refused, Err(Refused::InProgress));
        assert!(relay.coordinator.execute(a.node, &id("s"), &[7001], end).is_none());
        assert!(relay.coordinator.request(&b, &a, id("t"), SECRET, end).is_ok());
        assert!(relay.coordinator.request(&c, &a, id("u"), SECRET, end).is_ok());
        relay.coordinator.end(a.node);
        assert_eq!(relay.coordinator.sessions(), 0);
        relay.start = end;
        assert_eq!(relay.refused(&a, &b, "v"), Some(Refused::NotRegistered));
        assert_eq!(relay.refused(&b, &a, "v"), Some(Refused::NotRegistered));
        assert_eq!(relay.refused(&b, &b, "v"), Some(Refused::NotRegistered));
        assert!(relay.request(&b, &c, "v").is_ok());
    }

    #[test]
    fn two_families_do_not_meet() {
        let mut relay = Relay::new();
        let (a, b) = (relay.node(1, "20.0.0.1:7000"), relay.node(2, "[2001:db8::1]:7000"));
        assert_eq!(relay.refused(&a, &b, "s"), Some(Refused::Family));
    }

    #[test]
    fn sessions_and_requests_of_a_node_are_limited() {
        let mut relay = Relay::new();
        let all: [Party; 40] = relay.nodes();
        let target = &all[0];
        for (n, asking) in all[1..=MAX_SESSIONS_PER_NODE].iter().enumerate() {
            relay.request(asking, target, &n.to_string()).unwrap();
        }
        assert_eq!(relay.refused(&all[30], target, "x"), Some(Refused::SessionsPerNode));
        for (n, other) in all[18..18 + MAX_SESSIONS_PER_NODE - 1].iter().enumerate() {
            relay.request(target, other, &format!("own {n}")).unwrap();
        }
        relay.start += ms(1000);
        relay.request(target, &all[38], "own last").unwrap();
        assert_eq!(relay.refused(target, &all[39], "x"), Some(Refused::SessionsPerNode));

        let asking = &all[31];
        for n in 0..MAX_SESSIONS_PER_NODE {
            relay.request(asking, &all[1], &format!("y{n}")).unwrap();
            relay.coordinator.result(asking.node, &id(format!("y{n}")), false, relay.start);
        }
        assert_eq!(relay.refused(asking, &all[1], "z"), Some(Refused::Rate));
        relay.start += ms(250);
        assert!(relay.request(asking, &all[1], "z").is_ok());
        assert_eq!(relay.refused(asking, &all[2], "z2"), Some(Refused::Rate));
        assert!(relay.request(&all[32], &all[2], "z2").is_ok(), "others may");
    }

    /// A node could ask as often as it liked for one that has just registered.
    #[test]
    fn to_be_told_to_wait_counts_as_asking() {
        let mut relay = Relay::new();
        let [a, b, c] = relay.nodes();
        relay.coordinator.end(b.node);
        relay.coordinator.join(b.node, relay.start);
        for n in 0..MAX_SESSIONS_PER_NODE {
            assert_eq!(relay.refused(&a, &b, &n.to_string()), Some(Refused::NotReady));
        }
        assert_eq!(relay.refused(&a, &b, "s"), Some(Refused::Rate));
        assert_eq!(relay.refused(&a, &c, "s"), Some(Refused::Rate));
        assert_eq!(relay.refused(&c, &b, "s"), Some(Refused::NotReady), "others may");
    }

    /// Names and keys cost nothing.
    #[test]
    fn neither_one_key_with_many_names_nor_one_address_with_many_keys_takes_a_node_from_others() {
        let mut relay = Relay::new();
        let target = relay.node(0, "20.0.0.1:7000");
        let names: Vec<Party> =
            (1..20).map(|n| Party { key: another_key(), ..relay.node(n, "20.0.1.1:7000") }).collect();
        let got = names.iter().filter(|name| relay.refused(name, &target, &format!("{:?}", name.id)).is_none()).count();
        assert_eq!(got, WITH_ONE_NODE.per_key);
        let keys: Vec<Party> = (20..60).map(|n| relay.node(n, &format!("20.0.1.2:{}", 7000 + n))).collect();
        let got = keys.iter().filter(|one| relay.refused(one, &target, &format!("{:?}", one.id)).is_none()).count();
        assert_eq!(got, WITH_ONE_NODE.per_address);
        let honest = relay.node(60, "20.0.1.3:7000");
        assert_eq!(relay.refused(&honest, &target, "honest"), None);
        assert_eq!(relay.refused(&target, &keys[39], "its own"), None);
    }

    #[test]
    fn one_key_and_one_network_have_a_share_of_all_sessions() {
        let mut relay = Relay::new();
        let (key, many) = (another_key(), ALL.per_key + 1);
        let one_key: Vec<Party> =
            (0..many).map(|n| Party { key, ..relay.node(n, &format!("20.0.{}.{}:7000", n / 200, n % 200)) }).collect();
        let mut target = many;
        let mut refused = |relay: &mut Relay, asking: &Party| {
            target += 1;
            let to = relay.node(target, "20.0.9.9:7000");
            relay.refused(asking, &to, "s")
        };
        let (last, first) = one_key.split_last().unwrap();
        assert!(first.iter().all(|asking| refused(&mut relay, asking).is_none()));
        assert_eq!(refused(&mut relay, last), Some(Refused::Sessions));
        let network: Vec<Party> = (0..=ALL.per_address).map(|n| relay.node(10_000 + n, "20.1.0.1:7000")).collect();
        let (last, first) = network.split_last().unwrap();
        assert!(first.iter().all(|asking| refused(&mut relay, asking).is_none()));
        assert_eq!(refused(&mut relay, last), Some(Refused::Sessions));
        let other = relay.node(20_000, "20.2.0.1:7000");
        assert_eq!(refused(&mut relay, &other), None);
        for asking in first.iter().chain(&one_key) {
            relay.coordinator.end(asking.node);
        }
        assert_eq!(relay.coordinator.asked.total(), 1);
    }

    #[test]
    fn sessions_are_limited_in_all() {
        let mut relay = Relay::new();
        let at = |n: usize| format!("20.0.{}.{}:7000", n / 200, n % 200);
        let parties: Vec<Party> = (0..2 * (MAX_SESSIONS + 1)).map(|n| relay.node(n, &at(n))).collect();
        let mut pairs = parties.chunks(2);
        for pair in pairs.by_ref().take(MAX_SESSIONS) {
            relay.request(&pair[0], &pair[1], "s").unwrap();
        }
        let last = pairs.next().unwrap();
        assert_eq!(relay.refused(&last[0], &last[1], "s"), Some(Refused::Sessions));
        relay.coordinator.end(parties[0].node);
        assert!(relay.request(&last[0], &last[1], "s").is_ok());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Request(usize, usize, u8),
        Execute(usize, u8),
        Result(usize, u8, bool),
        End(usize),
        Wait(u64),
    }

    fn steps() -> impl Values<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0..6usize, 0..6usize, 0..8u8).prop_map(|(from, to, session)| Step::Request(from, to, session)),
            1 => (0..6usize, 0..8u8).prop_map(|(from, session)| Step::Execute(from, session)),
            1 => (0..6usize, 0..8u8, any::<bool>()).prop_map(|(from, id, success)| Step::Result(from, id, success)),
            1 => (0..6usize).prop_map(Step::End),
            1 => (0..4000u64).prop_map(Step::Wait),
        ];
        vec(step, 0..200)
    }

    proptest! {
        /// After any sequence, each session has two ends that know of it, each pair has one, and all are gone in time.
        #[test]
        fn the_tables_agree(steps in steps()) {
            let mut relay = Relay::new();
            let parties: [Party; 6] = relay.nodes();
            let mut now = relay.start;
            for step in steps {
                let coordinator = &mut relay.coordinator;
                match step {
                    Step::Request(from, to, session) => {
                        drop(coordinator.request(&parties[from], &parties[to], id(session), SECRET, now));
                    }
                    Step::Execute(from, session) => {
                        drop(coordinator.execute(parties[from].node, &id(session), &[5000], now));
                    }
                    Step::Result(from, session, success) => {
                        coordinator.result(parties[from].node, &id(session), success, now);
                    }
                    Step::End(node) => {
                        coordinator.end(parties[node].node);
                        coordinator.join(parties[node].node, now);
                    }
                    Step::Wait(more) => now += ms(more),
                }
                let mut pairs = Vec::new();
                for (number, session) in &coordinator.sessions {
                    let known = |end| coordinator.nodes[end].sessions[&session.id] == *number;
                    prop_assert!(session.ends.iter().all(known));
                    prop_assert!(coordinator.expiring.contains(&(session.until, *number)));
                    let mut pair = session.ends;
                    pair.sort_unstable();
                    prop_assert!(pair[0] != pair[1] && !pairs.contains(&pair));
                    pairs.push(pair);
                }
                prop_assert_eq!(coordinator.expiring.len(), coordinator.sessions.len());
                let at_nodes: usize = coordinator.nodes.values().map(|node| node.sessions.len()).sum();
                prop_assert_eq!(at_nodes, 2 * coordinator.sessions.len());
                let asked: usize = coordinator.nodes.values().map(|node| node.asked.total()).sum();
                prop_assert_eq!((asked, coordinator.asked.total()), (coordinator.sessions.len(), asked));
            }
            relay.coordinator.result(parties[0].node, &id("none"), false, now + LIFE);
            prop_assert_eq!(relay.coordinator.sessions(), 0);
        }
    }
}
