//! A relay's tables: which nodes are registered, which circuits exist, and what a circuit may carry.
//!
//! Names and circuits are limited in total, for one key and for one address ([`super::shares`]). A name takes a share
//! as long as its owner is registered, and then as long as the owner had it, within the grace period. For the rest of
//! that period it is still kept, but evicted when the relay is full, first those that their owners had for the shortest
//! time. So a node that restarts finds its name even on a full relay, and nodes that come and go leave little behind.

use std::cmp::{max, min};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::shares::{Bucket, Client, Counts, Exceeded, Limits, Rates};
use crate::proto::control::{Id, Limit, Refusal};
use crate::types::{Fingerprint, RelayConfig};

/// What a circuit may carry at once, however small its bandwidth: less than one batch of packets that a sender hands to
/// its kernel (64 KiB, UDP segmentation offload) would drop part of every one.
const MIN_BURST: u64 = 64 << 10;

/// The burst is what the bandwidth carries in this time: the packets that a congestion controller has in flight over a
/// long round trip may arrive together.
const BURST: Duration = Duration::from_millis(250);

/// A node is told of one limit of one circuit this often: it can do nothing about a single packet.
const NOTICE_EVERY: Duration = Duration::from_secs(1);

/// At once come as many registrations as in this time.
const ACCEPT_BURST: Duration = Duration::from_secs(1);

/// Expired names that one call removes. A call adds at most one, so they do not pile up; and when ten thousand
/// nodes have left together, no single call removes all of them.
const SETTLED_AT_ONCE: usize = 64;

/// One registration of one node id. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Generation(pub u64);

/// A circuit that has just ended, and the node it belonged to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    pub circuit: u32,
    pub ends: [Generation; 2],
}

#[derive(Debug, PartialEq, Eq)]
pub struct Registered {
    pub generation: Generation,
    /// The same owner's earlier registration, which has ended, and its circuits.
    pub replaced: Option<(Generation, Vec<Ended>)>,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Opened {
    pub circuit: u32,
    pub target: Generation,
}

/// The registered nodes and their circuits.
#[derive(Debug)]
pub struct Book {
    max_registrations: usize,
    /// Of the circuits to one node, which may open as many as they are in total.
    incoming_limits: Limits,
    grace: Duration,
    accepting: Rates,
    /// Of the names that are neither vacant for too long nor free.
    name_shares: Counts,
    /// At most `max_registrations`.
    names: HashMap<Id, Name>,
    /// The names without a registered owner, by when they are free.
    vacant: BTreeMap<(Instant, Generation), Id>,
    /// Of these, those that take a share, by until when.
    kept: BTreeMap<(Instant, Generation), Id>,
    /// The others, by how long their owners had them.
    yielding: BTreeMap<(Duration, Generation), Id>,
    live: HashMap<Generation, Live>,
    /// Of the circuits, by the node that opened them.
    circuit_shares: Counts,
    circuits: HashMap<u32, Circuit>,
    next_generation: u64,
    next_circuit: u32,
}

#[derive(Debug)]
struct Name {
    owner: Fingerprint,
    /// The client whose share it takes.
    client: Client,
    generation: Generation,
    since: Instant,
    /// How long its owner was registered before.
    had: Duration,
    /// Its owner is not registered.
    vacant: Option<Vacant>,
}

#[derive(Debug, Clone, Copy)]
struct Vacant {
    /// Until when it is kept for its owner.
    until: Instant,
    /// Until when it takes a share. `None`: it does no longer.
    kept_until: Option<Instant>,
}

#[derive(Debug)]
struct Live {
    node_id: Id,
    client: Client,
    /// At most `max_sessions_per_node` of each direction.
    circuits: HashSet<u32>,
    /// How many of them this node has opened.
    opened: usize,
    /// The others, by the node that opened them.
    incoming: Counts,
}

#[derive(Debug)]
struct Circuit {
    /// The node that opened it first.
    ends: [Generation; 2],
    opener: Client,
}

impl Book {
    pub fn new(config: &RelayConfig, now: Instant) -> Self {
        let shares = |total| Limits::percent(total, config.key_share, config.address_share);
        let accept_rate = shares(usize::try_from(config.accept_rate).unwrap_or(usize::MAX));
        Self {
            max_registrations: config.max_registrations,
            incoming_limits: shares(config.max_sessions_per_node),
            grace: config.grace,
            accepting: Rates::new(accept_rate, ACCEPT_BURST, now),
            name_shares: Counts::new(shares(config.max_registrations)),
            names: HashMap::new(),
            vacant: BTreeMap::new(),
            kept: BTreeMap::new(),
            yielding: BTreeMap::new(),
            live: HashMap::new(),
            circuit_shares: Counts::new(shares(config.max_sessions)),
            circuits: HashMap::new(),
            next_generation: 0,
            next_circuit: 0,
        }
    }

    pub fn register(
        &mut self,
        node_id: Id,
        owner: Fingerprint,
        address: IpAddr,
        now: Instant,
    ) -> Result<Registered, Refusal> {
        self.settle(now);
        if self.names.get(&node_id).is_some_and(|name| name.is_free(now)) {
            self.remove(&node_id);
        }
        let client = Client::new(owner, address);
        if let Err(refusal) = self.may_have(&node_id, &client, owner) {
            // Nothing that others use is taken from for what comes to nothing.
            self.accepting.take_own(&client, 1, now).map_err(too_fast)?;
            return Err(refusal);
        }
        self.accepting.take(&client, 1, now).map_err(too_fast)?;
        let previous = self.remove(&node_id);
        let client = self.take_share(client, previous.as_ref());
        let (replaced, had) = match previous {
            Some(Name { vacant: Some(_), had, .. }) => (None, had),
            Some(Name { generation, had, since, .. }) => {
                let had = had + now.saturating_duration_since(since);
                (Some((generation, self.end_live(generation))), had)
            }
            None => (None, Duration::ZERO),
        };
        let generation = Generation(self.next_generation);
        self.next_generation += 1;
        let live = Live {
            node_id: node_id.clone(),
            client: Client::new(owner, address),
            circuits: HashSet::new(),
            opened: 0,
            incoming: Counts::new(self.incoming_limits),
        };
        self.live.insert(generation, live);
        self.names.insert(node_id, Name { owner, client, generation, since: now, had, vacant: None });
        Ok(Registered { generation, replaced })
    }

    /// The key that has a name, or had it a short time ago.
    pub fn owner(&self, node_id: &Id) -> Option<Fingerprint> {
        self.names.get(node_id).map(|name| name.owner)
    }

    /// The holder of the key that has a name has said that it belongs to another one from now on.
    pub fn hand_on(&mut self, node_id: &Id, from: Fingerprint, to: Fingerprint) {
        if let Some(name) = self.names.get_mut(node_id).filter(|name| name.owner == from) {
            name.owner = to;
        }
    }

    /// The registration has ended, unless another one replaced it already.
    pub fn end(&mut self, generation: Generation, now: Instant) -> Vec<Ended> {
        self.settle(now);
        if let Some(Live { node_id, .. }) = self.live.get(&generation)
            && let Some(name) = self.names.get_mut(node_id)
        {
            name.had += now.saturating_duration_since(name.since);
            let (until, kept_until) = (now + self.grace, now + min(name.had, self.grace));
            name.vacant = Some(Vacant { until, kept_until: Some(kept_until) });
            self.vacant.insert((until, generation), node_id.clone());
            self.kept.insert((kept_until, generation), node_id.clone());
        }
        self.end_live(generation)
    }

    /// A circuit from one node to another. There is none from a node to itself: no *other* node has that id. What one
    /// node opens and what others open to it are counted separately: no other node can keep it from opening its own.
    pub fn open(&mut self, from: Generation, target: &Id) -> Result<Opened, Refusal> {
        let target = self.find(from, target).ok_or(Refusal::NotRegistered)?;
        // It may have been replaced a moment ago.
        let opening = self.live.get(&from).ok_or(Refusal::NotRegistered)?;
        let opener = opening.client;
        if opening.opened >= self.incoming_limits.total {
            return Err(Refusal::SessionsPerNode);
        }
        self.circuit_shares.allows(&opener, 1).map_err(|exceeded| match exceeded {
            Exceeded::Total => Refusal::Sessions,
            other => share_of_sessions(other),
        })?;
        let asked = self.live.get_mut(&target).ok_or(Refusal::NotRegistered)?;
        asked.incoming.take(&opener, 1).map_err(share_of_sessions)?;
        // As it has just allowed.
        let _ = self.circuit_shares.take(&opener, 1);
        // A number comes back as late as possible, so that nothing of an old circuit is taken for a new one's.
        while self.circuits.contains_key(&self.next_circuit) {
            self.next_circuit = self.next_circuit.wrapping_add(1);
        }
        let circuit = self.next_circuit;
        self.next_circuit = circuit.wrapping_add(1);
        let ends = [from, target];
        self.circuits.insert(circuit, Circuit { ends, opener });
        for end in ends {
            if let Some(live) = self.live.get_mut(&end) {
                live.circuits.insert(circuit);
                live.opened += usize::from(end == from);
            }
        }
        Ok(Opened { circuit, target })
    }

    /// Another node than the requesting one.
    pub fn find(&self, from: Generation, target: &Id) -> Option<Generation> {
        let name = self.names.get(target).filter(|name| name.vacant.is_none() && name.generation != from);
        name.map(|name| name.generation)
    }

    /// Ends a circuit, if it is one of this registration.
    pub fn close(&mut self, by: Generation, circuit: u32) -> Option<Ended> {
        self.circuits.get(&circuit).filter(|circuit| circuit.ends.contains(&by))?;
        self.end_circuit(circuit)
    }

    pub fn registrations(&self) -> usize {
        self.live.len()
    }

    pub fn circuits(&self) -> usize {
        self.circuits.len()
    }

    /// The owner of the name, or whether there is room for it.
    fn may_have(&self, node_id: &Id, client: &Client, owner: Fingerprint) -> Result<(), Refusal> {
        match self.names.get(node_id) {
            Some(name) if name.owner != owner => Err(Refusal::NodeIdTaken),
            Some(name) if name.takes_share() => Ok(()),
            _ => self.name_shares.allows(client, 1).map_err(|exceeded| match exceeded {
                Exceeded::Key => Refusal::RegistrationsPerKey,
                Exceeded::Address => Refusal::RegistrationsPerAddress,
                Exceeded::Total => Refusal::Registrations,
            }),
        }
    }

    /// Takes a share for a free name, and returns whose it is: an owner that comes back from an address without a share
    /// left keeps the share that it had at the other one.
    fn take_share(&mut self, client: Client, previous: Option<&Name>) -> Client {
        if self.name_shares.take(&client, 1).is_ok() {
            self.make_room();
            return client;
        }
        let before = previous.map_or(client, |name| name.client);
        // It has just been given back.
        let _ = self.name_shares.take(&before, 1);
        before
    }

    /// With all names taken, one that takes no share is evicted, if there is one.
    fn make_room(&mut self) {
        if self.names.len() >= self.max_registrations
            && let Some(weakest) = self.yielding.first_key_value().map(|(_, node_id)| node_id.clone())
        {
            self.remove(&weakest);
        }
    }

    /// Does what it is time for.
    fn settle(&mut self, now: Instant) {
        for _ in 0..SETTLED_AT_ONCE {
            if let Some(entry) = self.kept.first_entry()
                && entry.key().0 <= now
            {
                let ((_, generation), node_id) = entry.remove_entry();
                if let Some(name) = self.names.get_mut(&node_id) {
                    name.vacant = name.vacant.map(|vacant| Vacant { kept_until: None, ..vacant });
                    self.name_shares.give_back(&name.client, 1);
                    self.yielding.insert((name.had, generation), node_id);
                }
            } else if let Some((&(until, _), node_id)) = self.vacant.first_key_value()
                && until <= now
            {
                let free = node_id.clone();
                self.remove(&free);
            } else {
                return;
            }
        }
    }

    /// Takes a name off the book, and back what it takes of a share.
    fn remove(&mut self, node_id: &Id) -> Option<Name> {
        let name = self.names.remove(node_id)?;
        if let Some(Vacant { until, kept_until }) = name.vacant {
            self.vacant.remove(&(until, name.generation));
            match kept_until {
                Some(until) => self.kept.remove(&(until, name.generation)),
                None => self.yielding.remove(&(name.had, name.generation)),
            };
        }
        if name.takes_share() {
            self.name_shares.give_back(&name.client, 1);
        }
        Some(name)
    }

    fn end_live(&mut self, generation: Generation) -> Vec<Ended> {
        let Some(live) = self.live.remove(&generation) else { return Vec::new() };
        live.circuits.into_iter().filter_map(|circuit| self.end_circuit(circuit)).collect()
    }

    fn end_circuit(&mut self, circuit: u32) -> Option<Ended> {
        let Circuit { ends, opener } = self.circuits.remove(&circuit)?;
        self.circuit_shares.give_back(&opener, 1);
        let [from, target] = ends;
        if let Some(live) = self.live.get_mut(&from) {
            live.circuits.remove(&circuit);
            live.opened -= 1;
        }
        if let Some(live) = self.live.get_mut(&target) {
            live.circuits.remove(&circuit);
            live.incoming.give_back(&opener, 1);
        }
        Some(Ended { circuit, ends })
    }
}

impl Name {
    fn takes_share(&self) -> bool {
        self.vacant.is_none_or(|vacant| vacant.kept_until.is_some())
    }

    fn is_free(&self, now: Instant) -> bool {
        self.vacant.is_some_and(|vacant| vacant.until <= now)
    }
}

fn too_fast(exceeded: Exceeded) -> Refusal {
    match exceeded {
        Exceeded::Key => Refusal::AcceptRatePerKey,
        Exceeded::Address => Refusal::AcceptRatePerAddress,
        Exceeded::Total => Refusal::AcceptRate,
    }
}

fn share_of_sessions(exceeded: Exceeded) -> Refusal {
    match exceeded {
        Exceeded::Key => Refusal::SessionsPerKey,
        Exceeded::Address => Refusal::SessionsPerAddress,
        Exceeded::Total => Refusal::SessionsPerNode,
    }
}

/// What one circuit carries, both directions together.
#[derive(Debug)]
pub struct Traffic {
    bandwidth: Bucket,
    used: Instant,
}

impl Traffic {
    pub fn new(config: &RelayConfig, now: Instant) -> Self {
        let burst = u128::from(config.bandwidth) * BURST.as_millis() / 1000;
        let burst = max(MIN_BURST, u64::try_from(burst).unwrap_or(u64::MAX));
        Self { bandwidth: Bucket::new(config.bandwidth, burst, now), used: now }
    }

    /// Whether that many bytes may pass.
    pub fn pass(&mut self, bytes: usize, now: Instant) -> bool {
        self.used = now;
        self.bandwidth.take(bytes as u64, now)
    }

    /// When a packet last came.
    pub fn used(&self) -> Instant {
        self.used
    }
}

/// When a node was last told of a circuit's limits.
#[derive(Debug, Default)]
pub struct Notices([Option<Instant>; Limit::ALL.len()]);

impl Notices {
    /// Whether to tell the node now.
    pub fn due(&mut self, limit: Limit, now: Instant) -> bool {
        let Some(last) = self.0.get_mut(limit as usize) else { return false };
        let due = last.is_none_or(|last| now >= last + NOTICE_EVERY);
        if due {
            *last = Some(now);
        }
        due
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const HOME: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
    const AWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));

    /// Where shares are not what is looked at.
    fn unshared() -> RelayConfig {
        RelayConfig { key_share: 100, address_share: 100, ..RelayConfig::default() }
    }

    fn alice() -> Fingerprint {
        [1; 32].into()
    }

    fn bob() -> Fingerprint {
        [2; 32].into()
    }

    fn id(name: impl Into<String>) -> Id {
        Id::new(name.into().into_bytes()).unwrap()
    }

    fn clock() -> (Instant, impl Fn(u64) -> Instant) {
        let start = Instant::now();
        (start, move |ms| start + Duration::from_millis(ms))
    }

    fn book(config: &RelayConfig, now: Instant) -> Book {
        Book::new(config, now)
    }

    fn registered(book: &mut Book, name: &str, owner: Fingerprint, now: Instant) -> Generation {
        book.register(id(name), owner, HOME, now).unwrap().generation
    }

    #[test]
    fn a_node_id_is_its_first_owners_while_registered_and_for_the_grace_period() {
        let (start, at) = clock();
        let mut book = book(&unshared(), start);
        let generation = registered(&mut book, "a", alice(), start);
        assert_eq!(book.register(id("a"), bob(), HOME, at(1)), Err(Refusal::NodeIdTaken));
        assert_eq!(book.end(generation, at(1000)), []);
        assert_eq!(book.register(id("a"), bob(), HOME, at(1000 + 299_999)), Err(Refusal::NodeIdTaken));
        assert!(book.register(id("a"), bob(), HOME, at(1000 + 300_000)).is_ok());
        assert_eq!(book.register(id("a"), alice(), HOME, at(400_000)), Err(Refusal::NodeIdTaken));
    }

    #[test]
    fn an_owner_that_returns_within_the_grace_period_restarts_it() {
        let (start, at) = clock();
        let mut book = book(&unshared(), start);
        let first = registered(&mut book, "a", alice(), start);
        book.end(first, start);
        let second = book.register(id("a"), alice(), HOME, at(1000)).unwrap();
        assert_eq!(second.replaced, None);
        assert_eq!(book.register(id("a"), bob(), HOME, at(600_000)), Err(Refusal::NodeIdTaken), "registered since");
        book.end(second.generation, at(600_000));
        assert_eq!(book.register(id("a"), bob(), HOME, at(899_999)), Err(Refusal::NodeIdTaken));
        assert!(book.register(id("a"), bob(), HOME, at(900_000)).is_ok());
    }

    #[test]
    fn the_same_key_replaces_its_registration_and_ends_its_circuits() {
        let (start, at) = clock();
        let mut book = book(&unshared(), start);
        let old = registered(&mut book, "a", alice(), start);
        let other = registered(&mut book, "b", bob(), start);
        let Opened { circuit, target } = book.open(other, &id("a")).unwrap();
        assert_eq!(target, old);
        let new = book.register(id("a"), alice(), HOME, at(1)).unwrap();
        assert_eq!(new.replaced, Some((old, vec![Ended { circuit, ends: [other, old] }])));
        assert_eq!(book.circuits(), 0);

        assert_eq!(book.end(old, at(2)), [], "ended already");
        assert_eq!(book.open(old, &id("b")), Err(Refusal::NotRegistered));
        assert_eq!(book.open(other, &id("a")).unwrap().target, new.generation, "the end of the old one took nothing");
    }

    #[test]
    fn only_one_of_its_two_ends_closes_a_circuit() {
        let (start, _) = clock();
        let mut book = book(&unshared(), start);
        let [a, b, c] = ["a", "b", "c"].map(|name| registered(&mut book, name, alice(), start));
        let circuits = [(); 2].map(|()| book.open(a, &id("b")).unwrap().circuit);
        assert_eq!(book.close(c, circuits[0]), None);
        assert_eq!(book.close(b, circuits[0]), Some(Ended { circuit: circuits[0], ends: [a, b] }));
        assert_eq!(book.close(a, circuits[0]), None, "ended already");
        assert_eq!(book.end(a, start), [Ended { circuit: circuits[1], ends: [a, b] }]);
        assert_eq!(book.circuits(), 0);
    }

    #[test]
    fn a_circuit_needs_another_node_that_is_there() {
        let (start, _) = clock();
        let mut book = book(&unshared(), start);
        let a = registered(&mut book, "a", alice(), start);
        assert_eq!(book.open(a, &id("unknown")), Err(Refusal::NotRegistered));
        assert_eq!(book.open(a, &id("a")), Err(Refusal::NotRegistered));
        let b = registered(&mut book, "b", alice(), start);
        book.end(b, start);
        assert_eq!(book.open(a, &id("b")), Err(Refusal::NotRegistered));
    }

    #[test]
    fn circuits_are_limited_in_total_and_per_node_in_each_direction() {
        let (start, _) = clock();
        let config = RelayConfig { max_sessions: 8, max_sessions_per_node: 3, ..unshared() };
        let mut book = book(&config, start);
        let [a, b, c, d] = ["a", "b", "c", "d"].map(|name| registered(&mut book, name, alice(), start));
        let ended = book.open(a, &id("b")).unwrap().circuit;
        for _ in 0..2 {
            book.open(c, &id("b")).unwrap();
        }
        assert_eq!(book.open(a, &id("b")), Err(Refusal::SessionsPerNode), "three lead to the target");
        for _ in 0..3 {
            book.open(b, &id("d")).unwrap();
        }
        assert_eq!(book.open(b, &id("c")), Err(Refusal::SessionsPerNode), "it has opened three");
        for _ in 0..2 {
            book.open(a, &id("c")).unwrap();
        }
        assert_eq!(book.open(c, &id("a")), Err(Refusal::Sessions));
        book.close(b, ended).unwrap();
        book.open(d, &id("b")).unwrap();
        assert_eq!(book.open(d, &id("c")), Err(Refusal::Sessions));
    }

    #[test]
    fn one_key_and_one_address_leave_circuits_to_others_at_a_node_and_at_the_relay() {
        let (start, _) = clock();
        let config = RelayConfig {
            max_sessions: 40,
            max_sessions_per_node: 8,
            max_registrations: 1000,
            accept_rate: 1000,
            ..RelayConfig::default()
        };
        let mut book = book(&config, start);
        let victim = registered(&mut book, "victim", bob(), start);
        let mut named = 0..;
        let mut fill = |book: &mut Book, key: u8, target: &str| -> usize {
            let mut open = |_| {
                let name = id(format!("{key} {}", named.next().unwrap()));
                let node = book.register(name, [key; 32].into(), HOME, start).unwrap().generation;
                (0..8).filter(|_| book.open(node, &id(target)).is_ok()).count()
            };
            (0..6).map(&mut open).sum()
        };
        assert_eq!(fill(&mut book, 10, "victim"), 2, "six nodes of one key");
        assert_eq!([11, 12].map(|key| fill(&mut book, key, "victim")), [2, 0], "other keys at its address");
        let friend = book.register(id("friend"), alice(), AWAY, start).unwrap().generation;
        book.open(friend, &id("victim")).unwrap();
        let own = (0..8).filter(|_| book.open(victim, &id("friend")).is_ok()).count();
        assert_eq!((own, book.open(victim, &id("friend"))), (2, Err(Refusal::SessionsPerKey)), "at one node");
        for n in 0..10 {
            book.register(id(format!("sink {n}")), [99; 32].into(), AWAY, start).unwrap();
        }
        let opened: Vec<usize> =
            (20..24).map(|key| (0..10).map(|n| fill(&mut book, key, &format!("sink {n}"))).sum()).collect();
        assert_eq!(opened, [10, 4, 0, 0], "a quarter of all for each key, half for the address");
        assert!(book.open(friend, &id("victim")).is_ok());
    }

    #[test]
    fn a_circuits_number_comes_back_as_late_as_possible() {
        let (start, _) = clock();
        let mut book = book(&unshared(), start);
        let [a, _] = ["a", "b"].map(|name| registered(&mut book, name, alice(), start));
        let mut next = || book.open(a, &id("b")).unwrap().circuit;
        let kept = next();
        let ended = next();
        book.close(a, ended).unwrap();
        assert_ne!(book.open(a, &id("b")).unwrap().circuit, ended);
        book.next_circuit = kept;
        assert!(![kept, ended + 1].contains(&book.open(a, &id("b")).unwrap().circuit), "in use");
    }

    #[test]
    fn a_full_relay_gives_up_names_that_their_owners_have_left_for_longer_than_they_had_them() {
        let (start, at) = clock();
        let mut book = book(&RelayConfig { max_registrations: 3, ..unshared() }, start);
        let [a, b, _] = ["a", "b", "c"].map(|name| registered(&mut book, name, alice(), start));
        assert_eq!(book.register(id("d"), alice(), HOME, start), Err(Refusal::Registrations));
        book.end(b, at(10));
        book.end(a, at(15));
        assert_eq!(book.register(id("d"), bob(), AWAY, at(19)), Err(Refusal::Registrations));
        assert_eq!(book.names.len(), 3);
        registered(&mut book, "d", bob(), at(20));
        assert_eq!(book.register(id("a"), bob(), AWAY, at(20)), Err(Refusal::NodeIdTaken), "b was evicted");
        assert_eq!(book.register(id("b"), bob(), AWAY, at(29)), Err(Refusal::Registrations));
        assert!(book.register(id("b"), bob(), AWAY, at(30)).is_ok());
        assert_eq!(book.register(id("a"), alice(), HOME, at(30)), Err(Refusal::Registrations));
        assert_eq!((book.names.len(), book.vacant.len()), (3, 0));
    }

    #[test]
    fn filling_a_relay_does_not_evict_a_name_held_for_the_grace_period() {
        let (start, at) = clock();
        let config = RelayConfig { max_registrations: 50, accept_rate: 1000, ..RelayConfig::default() };
        let mut book = book(&config, start);
        let owner = registered(&mut book, "name", alice(), start);
        let mut ms = 300_000;
        book.end(owner, at(ms));
        let (mut refused, mut registered) = (HashSet::new(), 0);
        for key in 10..20u8 {
            for n in 0..50 {
                ms += 1;
                let address = [10, 0, 1, key / 2].into();
                match book.register(id(format!("{key} {n}")), [key; 32].into(), address, at(ms)) {
                    Ok(_) => registered += 1,
                    Err(refusal) => drop(refused.insert(refusal)),
                }
            }
        }
        let named = [Refusal::RegistrationsPerKey, Refusal::RegistrationsPerAddress, Refusal::Registrations];
        assert_eq!((registered, refused), (49, named.into()));
        assert_eq!(book.register(id("name"), bob(), AWAY, at(599_999)), Err(Refusal::NodeIdTaken));
        assert!(book.register(id("name"), alice(), AWAY, at(599_999)).is_ok());
    }

    #[test]
    fn one_key_and_one_address_leave_names_to_others() {
        let (start, _) = clock();
        let config = RelayConfig { max_registrations: 50, accept_rate: 1000, ..RelayConfig::default() };
        let mut book = book(&config, start);
        let mut fill = |key: u8, ip: IpAddr| {
            let name = |n: u32| id(format!("{key} {ip} {n}"));
            (0..100).filter(|&n| book.register(name(n), [key; 32].into(), ip, start).is_ok()).count()
        };
        assert_eq!(fill(1, HOME), 13);
        assert_eq!(fill(2, HOME), 12, "half of all");
        assert_eq!(fill(3, HOME), 0);
        assert_eq!(fill(1, AWAY), 0, "the same key elsewhere");
        assert_eq!(fill(3, AWAY), 13);
    }

    #[test]
    fn an_owner_is_registered_again_from_an_address_that_has_its_share() {
        let (start, at) = clock();
        let config = RelayConfig { max_registrations: 4, accept_rate: 1000, key_share: 50, ..RelayConfig::default() };
        let mut book = book(&config, start);
        for n in 0..2 {
            book.register(id(format!("neighbour {n}")), bob(), AWAY, start).unwrap();
        }
        let refused = book.register(id("new"), alice(), AWAY, start);
        assert_eq!(refused, Err(Refusal::RegistrationsPerAddress));
        let first = registered(&mut book, "a", alice(), start);
        book.end(first, at(1000));
        assert!(book.register(id("a"), alice(), AWAY, at(1500)).is_ok());
        assert!(book.register(id("b"), alice(), HOME, at(1500)).is_ok());
        let other = [3; 32].into();
        assert_eq!(book.register(id("c"), other, HOME, at(1500)), Err(Refusal::RegistrationsPerAddress));
    }

    /// Attempts at names of others use up nothing that honest nodes need.
    #[test]
    fn attempts_at_taken_names_use_up_no_registrations() {
        let (start, at) = clock();
        let config = RelayConfig { accept_rate: 20, ..RelayConfig::default() };
        let mut book = book(&config, start);
        registered(&mut book, "taken", alice(), start);
        let mut refused = HashMap::new();
        for ms in 0..10_000 {
            let refusal = book.register(id("taken"), bob(), HOME, at(ms)).unwrap_err();
            *refused.entry(refusal).or_insert(0) += 1;
            if ms % 250 == 0 {
                // Behind the same NAT.
                book.register(id(format!("honest {ms}")), alice(), HOME, at(ms)).unwrap();
            }
        }
        let slow = 5 + 5 * 10 - 1;
        assert_eq!(refused[&Refusal::NodeIdTaken], slow);
        assert_eq!(refused[&Refusal::AcceptRatePerKey], 10_000 - slow);
    }

    #[test]
    fn long_held_names_outlast_short_lived_ones() {
        let (start, at) = clock();
        let mut book = book(&RelayConfig { max_registrations: 3, ..unshared() }, start);
        let mut ms = 0;
        for had in [20_000, 1] {
            // Away for a moment, and back for another: that is no weaker claim.
            let generation = registered(&mut book, "a", alice(), at(ms));
            ms += had;
            assert_eq!(book.end(generation, at(ms)), []);
        }
        for n in 0..100 {
            let generation = registered(&mut book, &n.to_string(), bob(), at(ms));
            ms += 100;
            book.end(generation, at(ms));
        }
        assert_eq!(book.names.len(), 3);
        assert_eq!(book.register(id("a"), bob(), HOME, at(ms)), Err(Refusal::NodeIdTaken));
        assert!(book.register(id("a"), alice(), HOME, at(ms)).is_ok());
    }

    #[test]
    fn registrations_come_at_a_rate() {
        let (start, at) = clock();
        let config = RelayConfig { accept_rate: 10, ..unshared() };
        let mut book = book(&config, start);
        let mut burst = |now| (0..50).filter(|n| book.register(id(n.to_string()), alice(), HOME, now).is_ok()).count();
        assert_eq!(burst(start), 10);
        assert_eq!(burst(at(99)), 0);
        assert_eq!(burst(at(100)), 1);
        assert_eq!(burst(at(10_000)), 10, "what was not used does not add up");
    }

    #[test]
    fn unused_claims_expire() {
        let (start, at) = clock();
        let mut book = book(&unshared(), start);
        let a = registered(&mut book, "a", alice(), start);
        book.end(a, start);
        let b = registered(&mut book, "b", alice(), at(200_000));
        book.end(b, at(300_000));
        assert_eq!((book.names.len(), book.vacant.len()), (1, 1));
    }

    #[test]
    fn a_circuit_carries_a_burst_and_then_its_bandwidth() {
        let (start, at) = clock();
        let mut traffic = Traffic::new(&RelayConfig { bandwidth: 1_000_000, ..unshared() }, start);
        let mut bytes = |now| (0..1000).filter(|_| traffic.pass(1000, now)).count() * 1000;
        assert_eq!(bytes(start), 250_000);
        assert_eq!(bytes(at(100)), 100_000);
        let carried: usize = (101..=1100).map(|ms| bytes(at(ms))).sum();
        assert_eq!(carried, 1_000_000);
        assert_eq!(bytes(at(60_000)), 250_000);
    }

    #[test]
    fn a_narrow_circuit_carries_a_whole_batch_and_one_without_bandwidth_stays_shut() {
        let (start, at) = clock();
        let mut traffic = Traffic::new(&RelayConfig { bandwidth: 1000, ..unshared() }, start);
        assert!(traffic.pass(64 << 10, start));
        assert!(!traffic.pass(1, start));
        assert!(!traffic.pass(1200, at(1000)));
        assert!(traffic.pass(1000, at(1000)));

        let mut closed = Traffic::new(&RelayConfig { bandwidth: 0, ..unshared() }, start);
        assert!(!(0..100).any(|_| closed.pass(70_000, at(1000))));
        let mut open = Traffic::new(&RelayConfig { bandwidth: u64::MAX, ..unshared() }, start);
        assert!((0..1000).all(|_| open.pass(usize::MAX >> 16, start)));
    }

    #[test]
    fn packets_keep_a_circuit_in_use_even_those_that_are_dropped() {
        let (start, at) = clock();
        let mut traffic = Traffic::new(&unshared(), start);
        assert_eq!(traffic.used(), start);
        assert!(!traffic.pass(1 << 30, at(5)));
        assert_eq!(traffic.used(), at(5));
    }

    #[test]
    fn a_node_is_told_of_each_limit_once_a_second() {
        let (start, at) = clock();
        let mut notices = Notices::default();
        assert!(notices.due(Limit::Bandwidth, start));
        assert!(notices.due(Limit::PacketQueue, start));
        assert!(!notices.due(Limit::Bandwidth, at(999)));
        assert!(notices.due(Limit::Bandwidth, at(1000)));
        assert!(!notices.due(Limit::Bandwidth, at(1999)));
        assert!(notices.due(Limit::PacketSize, at(1999)));
    }

    /// What honest and hostile nodes do at random. Honest ones are two keys, each at an address of its own; the hostile ones
    /// are six keys at two other addresses. Their shares are the whole of everything.
    #[derive(Debug, Clone)]
    enum Step {
        Register { key: u8, name: u8 },
        End(prop::sample::Index),
        Open(prop::sample::Index, u8),
        Close(prop::sample::Index, u32),
        Wait(u64),
    }

    const HONEST: u8 = 2;
    const SHARED: RelayConfig = RelayConfig {
        max_registrations: 20,
        max_sessions: 20,
        max_sessions_per_node: 10,
        key_share: 20,
        address_share: 30,
        accept_rate: 20,
        grace: Duration::from_millis(300),
        bandwidth: 0,
        packet_queue: 0,
        max_packet: 0,
        idle_timeout: Duration::ZERO,
        realm_secret: None,
        probe_port: 0,
        probe_ip: None,
    };

    fn address_of(key: u8) -> IpAddr {
        let host = if key < HONEST { key } else { HONEST + key % 2 };
        [10, 0, 0, host].into()
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let index = any::<prop::sample::Index>;
        let step = prop_oneof![
            3 => (0..HONEST + 6, 0..24u8).prop_map(|(key, name)| Step::Register { key, name }),
            1 => index().prop_map(Step::End),
            4 => (index(), 0..24u8).prop_map(|(from, to)| Step::Open(from, to)),
            1 => (index(), 0..60u32).prop_map(|(by, circuit)| Step::Close(by, circuit)),
            1 => (0..200u64).prop_map(Step::Wait),
        ];
        vec(step, 0..300)
    }

    /// What is known of a name from outside.
    #[derive(Debug, Clone, Copy)]
    struct Seen {
        key: u8,
        generation: Generation,
        since: u64,
        had: u64,
        left: Option<u64>,
    }

    #[derive(Debug)]
    struct World {
        book: Book,
        start: Instant,
        ms: u64,
        names: HashMap<u8, Seen>,
        /// All nodes that were ever registered.
        all: Vec<(Generation, u8)>,
        /// By the node that opened them.
        circuits: HashMap<u32, (u8, [Generation; 2])>,
        /// What honest keys may register at the moment.
        rates: [Bucket; HONEST as usize],
    }

    impl World {
        fn new() -> Self {
            let start = Instant::now();
            let rate = Bucket::new(4, 4, start);
            Self {
                book: Book::new(&SHARED, start),
                start,
                ms: 0,
                names: HashMap::new(),
                all: vec![(Generation(u64::MAX), HONEST)],
                circuits: HashMap::new(),
                rates: [rate; HONEST as usize],
            }
        }

        fn now(&self) -> Instant {
            self.start + Duration::from_millis(self.ms)
        }

        fn forget(&mut self, ended: &[Ended]) {
            for Ended { circuit, ends } in ended {
                assert_eq!(self.circuits.remove(circuit).map(|(_, ends)| ends), Some(*ends));
            }
        }

        fn register(&mut self, key: u8, name: u8) {
            let now = self.now();
            let grace = SHARED.grace.as_millis() as u64;
            let is_kept = |seen: &Seen| seen.left.is_none_or(|left| self.ms < left + grace);
            let seen = self.names.get(&name).copied().filter(is_kept);
            // What the key has without this name, as far as it takes a share.
            let takes = |seen: &Seen| seen.left.is_none_or(|left| self.ms < left + seen.had.min(grace));
            let others = self.names.iter().filter(|(other, seen)| **other != name && seen.key == key && takes(seen));
            let others = others.count();
            let result = self.book.register(id(name.to_string()), [key; 32].into(), address_of(key), now);
            if key < HONEST {
                let allowed = self.rates[usize::from(key)].take(1, now);
                let taken = seen.is_some_and(|seen| seen.key != key);
                let expected = match () {
                    () if !allowed => Err(Refusal::AcceptRatePerKey),
                    () if taken => Err(Refusal::NodeIdTaken),
                    () if others >= 4 => Err(Refusal::RegistrationsPerKey),
                    () => Ok(()),
                };
                assert_eq!(result.as_ref().map(|_| ()), expected.as_ref().map(|_| ()), "an honest node gets its share");
            }
            let Ok(Registered { generation, replaced }) = result else { return };
            let had = match seen {
                Some(seen) => {
                    assert_eq!(seen.key, key, "a name is its owner's");
                    seen.had + if seen.left.is_none() { self.ms - seen.since } else { 0 }
                }
                None => 0,
            };
            let was_live = seen.filter(|seen| seen.left.is_none()).map(|seen| seen.generation);
            assert_eq!(replaced.as_ref().map(|(old, _)| *old), was_live);
            replaced.iter().for_each(|(_, ended)| self.forget(ended));
            self.names.insert(name, Seen { key, generation, since: self.ms, had, left: None });
            self.all.push((generation, key));
        }

        fn end(&mut self, generation: Generation) {
            let ended = self.book.end(generation, self.now());
            self.forget(&ended);
            let ms = self.ms;
            if let Some(seen) =
                self.names.values_mut().find(|seen| seen.generation == generation && seen.left.is_none())
            {
                seen.had += ms - seen.since;
                seen.left = Some(ms);
            }
        }

        fn open(&mut self, from: Generation, key: u8, name: u8) {
            let result = self.book.open(from, &id(name.to_string()));
            let is_live =
                |generation| self.names.values().any(|seen| seen.generation == generation && seen.left.is_none());
            let target = self.names.get(&name).filter(|seen| seen.left.is_none() && seen.generation != from);
            if let (true, true, Some(target)) = (key < HONEST, is_live(from), target) {
                let mine = self.circuits.values().filter(|(opener, _)| *opener == key);
                let (all, to_target) = mine
                    .fold((0, 0), |(all, same), (_, ends)| (all + 1, same + usize::from(ends[1] == target.generation)));
                assert_eq!(result.is_ok(), all < 4 && to_target < 2, "an honest node opens its share: {result:?}");
            }
            if let Ok(Opened { circuit, target: end }) = result {
                assert_eq!(Some(end), target.map(|seen| seen.generation));
                self.circuits.insert(circuit, (key, [from, end]));
            }
        }

        fn close(&mut self, by: Generation, circuit: u32) {
            let ended = self.book.close(by, circuit);
            let mine = self.circuits.get(&circuit).is_some_and(|(_, ends)| ends.contains(&by));
            assert_eq!(ended.is_some(), mine);
            self.forget(ended.as_slice());
        }

        /// Names that are gone were free to go, and everything agrees.
        fn check(&mut self, was_full: bool) {
            let Self { book, names, circuits, ms, .. } = self;
            let grace = SHARED.grace.as_millis() as u64;
            names.retain(|name, seen| {
                if book.names.contains_key(&id(name.to_string())) {
                    return true;
                }
                let left = seen.left.unwrap();
                assert!(*ms >= left + seen.had.min(grace), "kept as long as its owner had it");
                assert!(was_full || *ms >= left + grace, "kept for the grace period where there is room");
                false
            });
            assert_eq!(book.names.len(), names.len());
            assert!(book.names.len() <= 20 && book.circuits.len() <= 20);
            assert_eq!(
                (book.live.len() + book.vacant.len(), book.kept.len() + book.yielding.len()),
                (names.len(), book.vacant.len())
            );
            for (generation, live) in &book.live {
                let name = &book.names[&live.node_id];
                assert!(name.generation == *generation && name.vacant.is_none());
                let opened =
                    live.circuits.iter().filter(|circuit| book.circuits[circuit].ends[0] == *generation).count();
                assert_eq!((live.opened, live.incoming.total()), (opened, live.circuits.len() - opened));
                assert!(live.opened <= 10 && live.incoming.total() <= 10);
            }
            for (circuit, Circuit { ends, .. }) in &book.circuits {
                assert_eq!(circuits[circuit].1, *ends);
                assert!(ends[0] != ends[1] && ends.iter().all(|end| book.live[end].circuits.contains(circuit)));
            }
            assert_eq!((book.circuits.len(), book.circuit_shares.total()), (circuits.len(), circuits.len()));
            let taking = book.names.values().filter(|name| name.takes_share());
            assert_eq!(taking.count(), book.name_shares.total());
            for key in 0..HONEST + 6 {
                let taking = book.names.values().filter(|name| name.owner == [key; 32].into() && name.takes_share());
                let opened = circuits.values().filter(|(opener, _)| *opener == key);
                let key = [key; 32].into();
                let counted = (book.name_shares.of_key(&key), book.circuit_shares.of_key(&key));
                assert_eq!((taking.count(), opened.count()), counted);
                assert!(counted.0 <= 4 && counted.1 <= 4);
            }
            for hostile in 0..2 {
                let opened = circuits.values().filter(|(key, _)| *key >= HONEST && key % 2 == hostile);
                assert!(opened.count() <= 6, "one address");
            }
            for ((until, generation), node_id) in &book.vacant {
                let name = &book.names[node_id];
                let Vacant { until: free, kept_until } = name.vacant.unwrap();
                assert_eq!((free, name.generation), (*until, *generation));
                let listed = match kept_until {
                    Some(until) => book.kept.get(&(until, *generation)),
                    None => book.yielding.get(&(name.had, *generation)),
                };
                assert_eq!(listed, Some(node_id));
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// Whatever hostile nodes do: an honest one is registered and opens circuits whenever its own share allows, no
        /// name passes to another key too early, no table exceeds its bound, and all of them agree.
        #[test]
        fn the_books_keep_their_promises(steps in steps()) {
            let mut world = World::new();
            for step in steps {
                let was_full = world.book.names.len() == 20;
                match step {
                    Step::Register { key, name } => world.register(key, name),
                    Step::End(which) => world.end(which.get(&world.all).0),
                    Step::Open(from, to) => {
                        let (from, key) = *from.get(&world.all);
                        world.open(from, key, to);
                    }
                    Step::Close(by, circuit) => world.close(by.get(&world.all).0, circuit),
                    Step::Wait(more) => world.ms += more,
                }
                world.check(was_full);
            }
        }
    }
}
