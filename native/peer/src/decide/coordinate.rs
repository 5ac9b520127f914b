//! A relay's book-keeping for punches: which nodes are told of each other, and what of what they say is passed on.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::nat::NatProfile;
use super::punch::{LONGEST, MAX_CANDIDATES, MAX_PORTS, Role, Strategy};
use super::relay::{Bucket, Generation};
use crate::identity::Fingerprint;
use crate::relay::control::Id;

/// Sessions in all: at a few seconds each a relay so begins some hundreds a second.
const MAX_SESSIONS: usize = 2048;

/// Sessions that a node takes part in, whoever asked. A node has one for each peer, and retries them after pauses.
const MAX_SESSIONS_PER_NODE: usize = 16;

/// Sessions that a node asks for, per second, after a burst of as many as it may have.
const REQUESTS_PER_SECOND: u64 = 4;

/// Round trips count as no longer than that: a node that keeps back its acknowledgements makes nobody wait for long.
const LONGEST_ROUND_TRIP: Duration = Duration::from_millis(500);

/// What a node needs to get ready, to open hundreds of sockets for instance.
const PREPARATION: Duration = Duration::from_millis(20);

/// How long a session lives: until both have begun, at the latest, until it is over, and the result is said.
const LIFE: Duration = Duration::from_secs(6);
const _: () = assert!(LIFE.as_millis() > 3 * LONGEST_ROUND_TRIP.as_millis() + LONGEST.as_millis() + 500);

/// The lowest port that a node may name: those below are servers', and no NAT gives them away.
const LOWEST_PORT: u16 = 1024;

/// Why there is no session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(crate) enum Refused {
    #[error("one of the two is not registered, or both are the same")]
    NotRegistered,
    #[error("a session of the two is in progress")]
    InProgress,
    #[error("one of the two has another session of that id")]
    IdInUse,
    #[error("one has an IPv4 address, the other an IPv6 address")]
    Family,
    #[error("as many sessions exist as may")]
    Sessions,
    #[error("one of the two takes part in as many sessions as may be")]
    SessionsPerNode,
    #[error("the node asked too often")]
    Rate,
}

/// A node, as the relay knows it at the moment.
#[derive(Debug, Clone)]
pub(crate) struct Party {
    pub(crate) node: Generation,
    pub(crate) id: Id,
    pub(crate) key: Fingerprint,
    /// Where the relay sees it.
    pub(crate) seen: SocketAddr,
    /// Of its connection.
    pub(crate) round_trip: Duration,
}

/// What one of the two is told when a session begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Coordinate {
    pub(crate) to: Generation,
    pub(crate) session: Id,
    pub(crate) role: Role,
    /// The other one.
    pub(crate) peer: Id,
    pub(crate) key: Fingerprint,
    pub(crate) seen: SocketAddr,
    pub(crate) profile: NatProfile,
    pub(crate) candidates: Vec<SocketAddr>,
    pub(crate) secret: [u8; 32],
    /// From when it is told until it is to begin.
    pub(crate) delay: Duration,
}

/// What one of the two is told when the other has told ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Execute {
    pub(crate) to: Generation,
    pub(crate) session: Id,
    pub(crate) ports: Vec<u16>,
}

/// The nodes and their sessions.
#[derive(Debug, Default)]
pub(crate) struct Coordinator {
    /// As many as are registered.
    nodes: HashMap<Generation, Node>,
    /// At most `MAX_SESSIONS`.
    sessions: HashMap<u64, Session>,
    /// When each ends.
    expiring: BTreeSet<(Instant, u64)>,
    next_session: u64,
}

#[derive(Debug)]
struct Node {
    requests: Bucket,
    profile: NatProfile,
    /// At most `MAX_CANDIDATES`.
    candidates: Vec<SocketAddr>,
    /// At most `MAX_SESSIONS_PER_NODE`.
    sessions: HashMap<Id, u64>,
}

#[derive(Debug)]
struct Session {
    id: Id,
    until: Instant,
    /// The one that asked is the first.
    ends: [Generation; 2],
    /// How many more ports each may name.
    ports_left: [usize; 2],
}

impl Coordinator {
    /// A node has registered.
    pub(crate) fn join(&mut self, node: Generation, now: Instant) {
        let requests = Bucket::new(REQUESTS_PER_SECOND, MAX_SESSIONS_PER_NODE as u64, now);
        let (profile, candidates) = (NatProfile::default(), Vec::new());
        self.nodes.insert(node, Node { requests, profile, candidates, sessions: HashMap::new() });
    }

    /// A registration has ended.
    pub(crate) fn end(&mut self, node: Generation) {
        let sessions = self.nodes.remove(&node).map(|node| node.sessions).unwrap_or_default();
        for session in sessions.into_values() {
            self.end_session(session);
        }
    }

    /// A node tells what NAT it is behind, and its local addresses.
    pub(crate) fn describe(&mut self, node: Generation, profile: NatProfile, candidates: &[SocketAddr]) {
        if let Some(node) = self.nodes.get_mut(&node) {
            node.profile = profile;
            node.candidates.clear();
            for &candidate in candidates {
                if node.candidates.len() < MAX_CANDIDATES
                    && is_local(candidate)
                    && !node.candidates.contains(&candidate)
                {
                    node.candidates.push(candidate);
                }
            }
        }
    }

    /// One node asks to be brought together with another. What both are to be told.
    pub(crate) fn request(
        &mut self,
        from: &Party,
        target: &Party,
        session: Id,
        secret: [u8; 32],
        now: Instant,
    ) -> Result<[Coordinate; 2], Refused> {
        self.expire(now);
        if from.node == target.node || !self.nodes.contains_key(&target.node) {
            return Err(Refused::NotRegistered);
        }
        let asking = self.nodes.get_mut(&from.node).ok_or(Refused::NotRegistered)?;
        if !asking.requests.take(1, now) {
            return Err(Refused::Rate);
        }
        self.allow([from, target], &session)?;
        let number = self.next_session;
        self.next_session += 1;
        let ends = [from.node, target.node];
        for end in ends {
            if let Some(node) = self.nodes.get_mut(&end) {
                node.sessions.insert(session.clone(), number);
            }
        }
        self.sessions
            .insert(number, Session { id: session.clone(), until: now + LIFE, ends, ports_left: [MAX_PORTS; 2] });
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
            // Seen at one address they may be in one network. At two, a local address of one is somebody else's at the other.
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

    /// One of the two tells ports of its address. What the other is to be told, unless there is no such session.
    pub(crate) fn execute(&mut self, from: Generation, session: &Id, ports: &[u16], now: Instant) -> Option<Execute> {
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

    /// One of the two says how the session went. It ends with what the initiator says, who decides. Whether that was it.
    pub(crate) fn result(&mut self, from: Generation, session: &Id, now: Instant) -> bool {
        self.expire(now);
        let number = self.nodes.get(&from).and_then(|node| node.sessions.get(session)).copied();
        match number.filter(|number| self.sessions.get(number).is_some_and(|session| session.ends[0] == from)) {
            Some(number) => {
                self.end_session(number);
                true
            }
            None => false,
        }
    }

    pub(crate) fn sessions(&self) -> usize {
        self.sessions.len()
    }

    fn allow(&self, parties: [&Party; 2], id: &Id) -> Result<(), Refused> {
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
        if self.sessions.len() >= MAX_SESSIONS {
            return Err(Refused::Sessions);
        }
        if [from, target].iter().any(|node| node.sessions.len() >= MAX_SESSIONS_PER_NODE) {
            return Err(Refused::SessionsPerNode);
        }
        Ok(())
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
        let Some(Session { id, until, ends, .. }) = self.sessions.remove(&number) else { return };
        self.expiring.remove(&(until, number));
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
    // Told, a probe there and back, the ports there, and told to the other one.
    let predicted = |ours: usize, own: Duration, other: Duration| {
        let (ours, theirs) = (&profiles[ours], &profiles[1 - ours]);
        let predicts = Strategy::choose(ours, theirs, true).predicts(ours);
        if predicts { own * 2 + other / 2 } else { own / 2 }
    };
    let begin = predicted(0, a, b).max(predicted(1, b, a)) + PREPARATION;
    [begin - a / 2, begin - b / 2]
}

/// Whether nobody but a node in the same network is to be found at an address.
fn is_local(address: SocketAddr) -> bool {
    let local = match address.ip() {
        IpAddr::V4(ip) => {
            let shared = ip.octets()[0] == 100 && ip.octets()[1] & 0xC0 == 64;
            ip.is_private() || shared
        }
        IpAddr::V6(ip) => ip.is_unique_local(),
    };
    local && address.port() >= LOWEST_PORT
}
