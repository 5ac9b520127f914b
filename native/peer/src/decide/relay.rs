//! A relay's book-keeping: who is registered, which circuits exist, what one of them may carry.

use std::cmp::max;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use super::shares::Bucket;
use crate::identity::Fingerprint;
use crate::relay::RelayConfig;
use crate::relay::control::{Id, Limit, Refusal};

/// What a circuit may carry at once, however small its bandwidth: less than one batch of packets that a sender hands to
/// its kernel (64 KiB, UDP segmentation offload) would drop part of every one.
const MIN_BURST: u64 = 64 << 10;

/// The burst is what the bandwidth carries in this time: the packets that a congestion controller has in flight over a
/// long round trip may arrive together.
const BURST: Duration = Duration::from_millis(250);

/// A node is told of one limit of one circuit this often: it can do nothing about a single packet.
const NOTICE_EVERY: Duration = Duration::from_secs(1);

/// One registration of one node id. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Generation(pub(crate) u64);

/// A circuit that has just ended, and whose it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) circuit: u32,
    pub(crate) ends: [Generation; 2],
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Registered {
    pub(crate) generation: Generation,
    /// The same owner's earlier registration, which has ended, and its circuits.
    pub(crate) replaced: Option<(Generation, Vec<Ended>)>,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Opened {
    pub(crate) circuit: u32,
    pub(crate) target: Generation,
}

/// Who is registered, and which circuits exist.
#[derive(Debug)]
pub(crate) struct Book {
    max_registrations: usize,
    max_sessions: usize,
    max_sessions_per_node: usize,
    grace: Duration,
    accepting: Bucket,
    /// At most `max_registrations`.
    names: HashMap<Id, Name>,
    /// The names that nobody has at the moment, by when that ends, and by how long their owners had them.
    vacant: BTreeMap<(Instant, Generation), Id>,
    claims: BTreeMap<(Duration, Generation), Id>,
    live: HashMap<Generation, Live>,
    circuits: HashMap<u32, [Generation; 2]>,
    next_generation: u64,
    next_circuit: u32,
}

#[derive(Debug)]
struct Name {
    owner: Fingerprint,
    generation: Generation,
    since: Instant,
    /// How long its owner was registered before.
    had: Duration,
    /// Until when it is kept for its owner, who is not registered.
    vacant_until: Option<Instant>,
}

#[derive(Debug)]
struct Live {
    node_id: Id,
    /// At most `max_sessions_per_node`.
    circuits: HashSet<u32>,
}

impl Book {
    pub(crate) fn new(config: &RelayConfig, now: Instant) -> Self {
        Self {
            max_registrations: config.max_registrations,
            max_sessions: config.max_sessions,
            max_sessions_per_node: config.max_sessions_per_node,
            grace: config.grace,
            accepting: Bucket::new(config.accept_rate, config.accept_rate, now),
            names: HashMap::new(),
            vacant: BTreeMap::new(),
            claims: BTreeMap::new(),
            live: HashMap::new(),
            circuits: HashMap::new(),
            next_generation: 0,
            next_circuit: 0,
        }
    }

    pub(crate) fn register(&mut self, node_id: Id, owner: Fingerprint, now: Instant) -> Result<Registered, Refusal> {
        if !self.accepting.take(1, now) {
            return Err(Refusal::AcceptRate);
        }
        self.forget(now);
        let previous = self.names.get(&node_id);
        if previous.is_some_and(|name| name.owner != owner) {
            return Err(Refusal::NodeIdTaken);
        }
        let (replaced, had) = match previous {
            Some(&Name { generation, had, vacant_until: Some(until), .. }) => {
                self.vacant.remove(&(until, generation));
                self.claims.remove(&(had, generation));
                (None, had)
            }
            Some(&Name { generation, had, since, .. }) => {
                let had = had + now.saturating_duration_since(since);
                (Some((generation, self.end_live(generation))), had)
            }
            None => {
                self.make_room()?;
                (None, Duration::ZERO)
            }
        };
        let generation = Generation(self.next_generation);
        self.next_generation += 1;
        self.live.insert(generation, Live { node_id: node_id.clone(), circuits: HashSet::new() });
        self.names.insert(node_id, Name { owner, generation, since: now, had, vacant_until: None });
        Ok(Registered { generation, replaced })
    }

    /// The key that has a name, or had it a short time ago.
    pub(crate) fn owner(&self, node_id: &Id) -> Option<Fingerprint> {
        self.names.get(node_id).map(|name| name.owner)
    }

    /// The holder of the key that has a name has said that it belongs to another one from now on.
    pub(crate) fn hand_on(&mut self, node_id: &Id, from: Fingerprint, to: Fingerprint) {
        if let Some(name) = self.names.get_mut(node_id).filter(|name| name.owner == from) {
            name.owner = to;
        }
    }

    /// The registration has ended, unless another one replaced it already.
    pub(crate) fn end(&mut self, generation: Generation, now: Instant) -> Vec<Ended> {
        self.forget(now);
        if let Some(Live { node_id, .. }) = self.live.get(&generation)
            && let Some(name) = self.names.get_mut(node_id)
        {
            let until = now + self.grace;
            name.vacant_until = Some(until);
            name.had += now.saturating_duration_since(name.since);
            self.vacant.insert((until, generation), node_id.clone());
            self.claims.insert((name.had, generation), node_id.clone());
        }
        self.end_live(generation)
    }

    /// A circuit from one node to another. There is none from a node to itself: to it, no *other* node has that id.
    pub(crate) fn open(&mut self, from: Generation, target: &Id) -> Result<Opened, Refusal> {
        let target = self.find(from, target).ok_or(Refusal::NotRegistered)?;
        if self.circuits.len() >= self.max_sessions {
            return Err(Refusal::Sessions);
        }
        let ends = [from, target];
        for end in ends {
            // `from` may have been replaced a moment ago.
            let live = self.live.get(&end).ok_or(Refusal::NotRegistered)?;
            if live.circuits.len() >= self.max_sessions_per_node {
                return Err(Refusal::SessionsPerNode);
            }
        }
        // A number comes back as late as possible, so that nothing of an old circuit is taken for a new one's.
        while self.circuits.contains_key(&self.next_circuit) {
            self.next_circuit = self.next_circuit.wrapping_add(1);
        }
        let circuit = self.next_circuit;
        self.next_circuit = circuit.wrapping_add(1);
        self.circuits.insert(circuit, ends);
        for end in ends {
            if let Some(live) = self.live.get_mut(&end) {
                live.circuits.insert(circuit);
            }
        }
        Ok(Opened { circuit, target })
    }

    /// Another node than the one that asks.
    pub(crate) fn find(&self, from: Generation, target: &Id) -> Option<Generation> {
        let name = self.names.get(target).filter(|name| name.vacant_until.is_none() && name.generation != from);
        name.map(|name| name.generation)
    }

    /// Ends a circuit, if it is one of this registration.
    pub(crate) fn close(&mut self, by: Generation, circuit: u32) -> Option<Ended> {
        self.circuits.get(&circuit).filter(|ends| ends.contains(&by))?;
        self.end_circuit(circuit)
    }

    pub(crate) fn registrations(&self) -> usize {
        self.live.len()
    }

    pub(crate) fn circuits(&self) -> usize {
        self.circuits.len()
    }

    /// The names whose time is over.
    fn forget(&mut self, now: Instant) {
        while let Some(entry) = self.vacant.first_entry()
            && entry.key().0 <= now
        {
            let (_, generation) = *entry.key();
            if let Some(name) = self.names.remove(&entry.remove()) {
                self.claims.remove(&(name.had, generation));
            }
        }
    }

    /// Nodes that are there are worth more than the claims of those that are not. Of these the weakest gives way: were it
    /// the oldest, who registers one name after the other would get at those of nodes that are restarting.
    fn make_room(&mut self) -> Result<(), Refusal> {
        if self.names.len() >= self.max_registrations {
            let ((_, generation), weakest) = self.claims.pop_first().ok_or(Refusal::Registrations)?;
            if let Some(until) = self.names.remove(&weakest).and_then(|name| name.vacant_until) {
                self.vacant.remove(&(until, generation));
            }
        }
        Ok(())
    }

    fn end_live(&mut self, generation: Generation) -> Vec<Ended> {
        let Some(live) = self.live.remove(&generation) else { return Vec::new() };
        live.circuits.into_iter().filter_map(|circuit| self.end_circuit(circuit)).collect()
    }

    fn end_circuit(&mut self, circuit: u32) -> Option<Ended> {
        let ends = self.circuits.remove(&circuit)?;
        for end in ends {
            if let Some(live) = self.live.get_mut(&end) {
                live.circuits.remove(&circuit);
            }
        }
        Some(Ended { circuit, ends })
    }
}

/// What one circuit carries, both directions together.
#[derive(Debug)]
pub(crate) struct Traffic {
    bandwidth: Bucket,
    used: Instant,
}

impl Traffic {
    pub(crate) fn new(config: &RelayConfig, now: Instant) -> Self {
        let burst = u128::from(config.bandwidth) * BURST.as_millis() / 1000;
        let burst = max(MIN_BURST, u64::try_from(burst).unwrap_or(u64::MAX));
        Self { bandwidth: Bucket::new(config.bandwidth, burst, now), used: now }
    }

    /// Whether so many bytes may pass.
    pub(crate) fn pass(&mut self, bytes: usize, now: Instant) -> bool {
        self.used = now;
        self.bandwidth.take(bytes as u64, now)
    }

    /// When a packet last came.
    pub(crate) fn used(&self) -> Instant {
        self.used
    }
}

/// When a node was last told of a circuit's limits.
#[derive(Debug, Default)]
pub(crate) struct Notices([Option<Instant>; Limit::ALL.len()]);

impl Notices {
    /// Whether the node is to be told now.
    pub(crate) fn due(&mut self, limit: Limit, now: Instant) -> bool {
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
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

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
        book.register(id(name), owner, now).unwrap().generation
    }

    #[test]
    fn a_node_id_is_its_first_owners_while_registered_and_for_the_grace_period() {
        let (start, at) = clock();
        let mut book = book(&RelayConfig::default(), start);
        let generation = registered(&mut book, "a", alice(), start);
        assert_eq!(book.register(id("a"), bob(), at(1)), Err(Refusal::NodeIdTaken));
        assert_eq!(book.end(generation, at(1000)), []);
        assert_eq!(book.register(id("a"), bob(), at(1000 + 299_999)), Err(Refusal::NodeIdTaken));
        assert!(book.register(id("a"), bob(), at(1000 + 300_000)).is_ok());
        assert_eq!(book.register(id("a"), alice(), at(400_000)), Err(Refusal::NodeIdTaken));
    }

    #[test]
    fn the_owner_may_come_back_within_the_grace_period_and_it_then_starts_anew() {
        let (start, at) = clock();
        let mut book = book(&RelayConfig::default(), start);
        let first = registered(&mut book, "a", alice(), start);
        book.end(first, start);
        let second = book.register(id("a"), alice(), at(1000)).unwrap();
        assert_eq!(second.replaced, None);
        assert_eq!(book.register(id("a"), bob(), at(600_000)), Err(Refusal::NodeIdTaken), "registered since");
        book.end(second.generation, at(600_000));
        assert_eq!(book.register(id("a"), bob(), at(899_999)), Err(Refusal::NodeIdTaken));
        assert!(book.register(id("a"), bob(), at(900_000)).is_ok());
    }

    #[test]
    fn the_same_key_replaces_its_registration_and_ends_its_circuits() {
        let (start, at) = clock();
        let mut book = book(&RelayConfig::default(), start);
        let old = registered(&mut book, "a", alice(), start);
        let other = registered(&mut book, "b", bob(), start);
        let Opened { circuit, target } = book.open(other, &id("a")).unwrap();
        assert_eq!(target, old);
        let new = book.register(id("a"), alice(), at(1)).unwrap();
        assert_eq!(new.replaced, Some((old, vec![Ended { circuit, ends: [other, old] }])));
        assert_eq!(book.circuits(), 0);

        assert_eq!(book.end(old, at(2)), [], "ended already");
        assert_eq!(book.open(old, &id("b")), Err(Refusal::NotRegistered));
        assert_eq!(book.open(other, &id("a")).unwrap().target, new.generation, "the end of the old one took nothing");
    }

    #[test]
    fn only_one_of_its_two_ends_closes_a_circuit() {
        let (start, _) = clock();
        let mut book = book(&RelayConfig::default(), start);
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
        let mut book = book(&RelayConfig::default(), start);
        let a = registered(&mut book, "a", alice(), start);
        assert_eq!(book.open(a, &id("nobody")), Err(Refusal::NotRegistered));
        assert_eq!(book.open(a, &id("a")), Err(Refusal::NotRegistered));
        let b = registered(&mut book, "b", alice(), start);
        book.end(b, start);
        assert_eq!(book.open(a, &id("b")), Err(Refusal::NotRegistered));
    }

    #[test]
    fn circuits_are_limited_in_all_and_at_either_end() {
        let (start, _) = clock();
        let config = RelayConfig { max_sessions: 5, max_sessions_per_node: 3, ..RelayConfig::default() };
        let mut book = book(&config, start);
        let [a, b, c, d] = ["a", "b", "c", "d"].map(|name| registered(&mut book, name, alice(), start));
        let ended = book.open(a, &id("b")).unwrap().circuit;
        for _ in 0..2 {
            book.open(c, &id("b")).unwrap();
        }
        assert_eq!(book.open(a, &id("b")), Err(Refusal::SessionsPerNode), "the target has three");
        assert_eq!(book.open(b, &id("d")), Err(Refusal::SessionsPerNode), "the asker has three");
        for _ in 0..2 {
            book.open(a, &id("d")).unwrap();
        }
        assert_eq!(book.open(c, &id("d")), Err(Refusal::Sessions));
        book.close(b, ended).unwrap();
        book.open(d, &id("c")).unwrap();
        assert_eq!(book.open(b, &id("c")), Err(Refusal::Sessions));
    }

    #[test]
    fn a_circuits_number_comes_back_as_late_as_possible() {
        let (start, _) = clock();
        let mut book = book(&RelayConfig::default(), start);
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
    fn registrations_are_limited_and_the_weakest_claim_gives_way_to_a_node_that_is_there() {
        let (start, at) = clock();
        let mut book = book(&RelayConfig { max_registrations: 3, ..RelayConfig::default() }, start);
        let [a, b, _] = ["a", "b", "c"].map(|name| registered(&mut book, name, alice(), start));
        assert_eq!(book.register(id("d"), alice(), start), Err(Refusal::Registrations));
        book.end(b, at(1));
        book.end(a, at(2));
        assert_eq!(book.names.len(), 3);
        registered(&mut book, "d", alice(), at(3));
        assert_eq!(book.register(id("a"), bob(), at(3)), Err(Refusal::NodeIdTaken), "b's claim was weaker");
        assert!(book.register(id("b"), bob(), at(3)).is_ok());
        assert_eq!(book.register(id("a"), bob(), at(3)), Err(Refusal::Registrations));
        assert_eq!((book.names.len(), book.vacant.len()), (3, 0));
    }

    #[test]
    fn who_had_a_name_for_long_keeps_it_longer_than_those_who_come_and_go() {
        let (start, at) = clock();
        let mut book = book(&RelayConfig { max_registrations: 3, ..RelayConfig::default() }, start);
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
        assert_eq!(book.register(id("a"), bob(), at(ms)), Err(Refusal::NodeIdTaken));
        assert!(book.register(id("a"), alice(), at(ms)).is_ok());
    }

    #[test]
    fn registrations_come_at_a_rate() {
        let (start, at) = clock();
        let config = RelayConfig { accept_rate: 10, ..RelayConfig::default() };
        let mut book = book(&config, start);
        let mut burst = |now| (0..50).filter(|n| book.register(id(n.to_string()), alice(), now).is_ok()).count();
        assert_eq!(burst(start), 10);
        assert_eq!(burst(at(99)), 0);
        assert_eq!(burst(at(100)), 1);
        assert_eq!(burst(at(10_000)), 10, "what was not used does not add up");
    }

    #[test]
    fn claims_are_forgotten_though_nobody_asks_for_them() {
        let (start, at) = clock();
        let mut book = book(&RelayConfig::default(), start);
        let a = registered(&mut book, "a", alice(), start);
        book.end(a, start);
        let b = registered(&mut book, "b", alice(), at(200_000));
        book.end(b, at(300_000));
        assert_eq!((book.names.len(), book.vacant.len()), (1, 1));
    }

    #[test]
    fn a_circuit_carries_a_burst_and_then_its_bandwidth() {
        let (start, at) = clock();
        let mut traffic = Traffic::new(&RelayConfig { bandwidth: 1_000_000, ..RelayConfig::default() }, start);
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
        let mut traffic = Traffic::new(&RelayConfig { bandwidth: 1000, ..RelayConfig::default() }, start);
        assert!(traffic.pass(64 << 10, start));
        assert!(!traffic.pass(1, start));
        assert!(!traffic.pass(1200, at(1000)));
        assert!(traffic.pass(1000, at(1000)));

        let mut shut = Traffic::new(&RelayConfig { bandwidth: 0, ..RelayConfig::default() }, start);
        assert!(!(0..100).any(|_| shut.pass(70_000, at(1000))));
        let mut open = Traffic::new(&RelayConfig { bandwidth: u64::MAX, ..RelayConfig::default() }, start);
        assert!((0..1000).all(|_| open.pass(usize::MAX >> 16, start)));
    }

    #[test]
    fn packets_keep_a_circuit_in_use_even_those_that_are_dropped() {
        let (start, at) = clock();
        let mut traffic = Traffic::new(&RelayConfig::default(), start);
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

    #[derive(Debug, Clone)]
    enum Step {
        Register(u8, u8),
        End(prop::sample::Index),
        Open(prop::sample::Index, u8),
        Close(prop::sample::Index, u32),
        Wait(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let index = any::<prop::sample::Index>;
        let step = prop_oneof![
            (0..8u8, 0..3u8).prop_map(|(name, owner)| Step::Register(name, owner)),
            index().prop_map(Step::End),
            (index(), 0..8u8).prop_map(|(from, to)| Step::Open(from, to)),
            (index(), 0..40u32).prop_map(|(by, circuit)| Step::Close(by, circuit)),
            (0..200u64).prop_map(Step::Wait),
        ];
        vec(step, 0..200)
    }

    proptest! {
        /// Whatever happens, no limit is passed, no name has two owners, and every circuit has two ends that know of it.
        #[test]
        fn the_tables_agree_and_stay_within_their_bounds(steps in steps()) {
            let config = RelayConfig {
                max_registrations: 5,
                max_sessions: 6,
                max_sessions_per_node: 3,
                accept_rate: 1000,
                grace: Duration::from_millis(300),
                ..RelayConfig::default()
            };
            let (start, at) = clock();
            let mut ms = 0;
            let mut book = book(&config, start);
            let mut all = vec![Generation(u64::MAX)];
            for step in steps {
                let now = at(ms);
                match step {
                    Step::Register(name, owner) => {
                        if let Ok(registered) = book.register(id(name.to_string()), [owner; 32].into(), now) {
                            all.push(registered.generation);
                        }
                    }
                    Step::End(which) => drop(book.end(*which.get(&all), now)),
                    Step::Open(from, to) => drop(book.open(*from.get(&all), &id(to.to_string()))),
                    Step::Close(by, circuit) => drop(book.close(*by.get(&all), circuit)),
                    Step::Wait(more) => ms += more,
                }
                prop_assert!(book.names.len() <= 5 && book.circuits.len() <= 6);
                prop_assert_eq!(book.names.len(), book.live.len() + book.vacant.len());
                prop_assert_eq!(book.claims.len(), book.vacant.len());
                for (generation, live) in &book.live {
                    let name = &book.names[&live.node_id];
                    prop_assert!(name.generation == *generation && name.vacant_until.is_none());
                    prop_assert!(live.circuits.len() <= 3);
                    prop_assert!(live.circuits.iter().all(|circuit| book.circuits[circuit].contains(generation)));
                }
                for (circuit, ends) in &book.circuits {
                    prop_assert!(ends[0] != ends[1]);
                    prop_assert!(ends.iter().all(|end| book.live[end].circuits.contains(circuit)));
                }
                for ((until, generation), node_id) in &book.vacant {
                    let name = &book.names[node_id];
                    prop_assert_eq!((name.vacant_until, name.generation), (Some(*until), *generation));
                    prop_assert_eq!(book.claims.get(&(name.had, *generation)), Some(node_id));
                }
            }
        }
    }
}
