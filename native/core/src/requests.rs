//! The requests that this node was asked. One that is asked again, because its link died, is not handed over again: its
//! answer goes to where it was asked last, also if there was one by then.
//!
//! A request is kept until the answer has arrived, or for [`KEPT_FOR`]. A key above its share loses its own oldest.
//! When the table is full, the client with the most makes room (`weights.rs`): for a request the one with the most
//! requests, for an answer the one with the most bytes of answers. A request that is forgotten and repeated fails if
//! the requester knows that it had arrived.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::types::Fingerprint;
use crate::weights::{Owner, Queues};

/// What the requester calls a request, unique among its own.
pub type RequestId = [u8; 16];

/// As long as a message may be answered.
pub const KEPT_FOR: Duration = Duration::from_secs(300);

/// One key may have this part of all requests.
const KEYS: usize = 16;

/// Bytes of answers that have not arrived, in all and to one key.
const MAX_BYTES: usize = 64 << 20;
const MAX_BYTES_OF_KEY: usize = 16 << 20;

/// Requests forgotten at once because they are too old, so that no one waits for thousands.
const FORGOTTEN_AT_ONCE: usize = 16;

/// `R`: where an answer goes.
#[derive(Debug)]
pub struct Requests<R> {
    most: usize,
    requests: HashMap<(Fingerprint, RequestId), Request<R>>,
    /// The oldest first.
    order: BTreeMap<u64, (Fingerprint, RequestId)>,
    /// Each weighs 1.
    asked: Book,
    /// Each weighs its bytes.
    answers: Book,
    next: u64,
}

#[derive(Debug)]
struct Request<R> {
    number: u64,
    asked: Instant,
    owner: Owner,
    state: State<R>,
}

#[derive(Debug)]
enum State<R> {
    /// Its answer goes there.
    Waits(R),
    /// With a number of the same row as those of requests.
    Answered(u64, Bytes),
    /// There will be no answer, or it was too much to keep.
    Over(Ended),
}

/// What becomes of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// It is new: hand it over.
    New,
    /// It was handed over before, and is not answered yet.
    Waits,
    /// It was answered.
    Answered(Bytes),
    /// It was handed over, and has no answer any more.
    Over(Ended),
}

/// Why a request that was handed over has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// No answer will come.
    Unanswered,
    /// Nothing is known of it any more.
    Forgotten,
}

/// What has been forgotten because there was too much, by what there was too much of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MadeRoom {
    pub requests: u64,
    pub answers: u64,
}

impl<R> Requests<R> {
    /// With room for `most`.
    pub fn new(most: usize) -> Self {
        Self {
            most,
            requests: HashMap::new(),
            order: BTreeMap::new(),
            asked: Book::default(),
            answers: Book::default(),
            next: 0,
        }
    }

    /// A request came, whose answer goes to `route`. `again`: the requester knows that it came before, or it may not
    /// come twice.
    pub fn ask(&mut self, owner: Owner, id: RequestId, again: bool, route: R, now: Instant) -> Asked {
        self.expire(now);
        if let Some(request) = self.requests.get_mut(&(owner.key, id)) {
            return match &mut request.state {
                State::Waits(last) => {
                    *last = route;
                    Asked::Waits
                }
                State::Answered(_, answer) => Asked::Answered(answer.clone()),
                State::Over(ended) => Asked::Over(*ended),
            };
        }
        if again {
            return Asked::Over(Ended::Forgotten);
        }
        if let Some((key, id)) = self.makes_room(owner) {
            self.asked.made_room += 1;
            self.forget(key, id);
        }
        let number = self.next_number();
        self.order.insert(number, (owner.key, id));
        self.asked.insert(owner, (number, id), 1);
        self.requests.insert((owner.key, id), Request { number, asked: now, owner, state: State::Waits(route) });
        Asked::New
    }

    /// Which one makes room for another request of this owner, if one must.
    fn makes_room(&self, owner: Owner) -> Option<(Fingerprint, RequestId)> {
        if self.asked.of_key(&owner.key) >= (self.most / KEYS).max(1) {
            self.asked.first_of_key(owner.key)
        } else if self.requests.len() >= self.most {
            self.asked.first_of_heaviest(owner)
        } else {
            None
        }
    }

    fn next_number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// A request has its answer. Returns where that goes; `None`: the request is forgotten.
    pub fn answered(&mut self, key: Fingerprint, id: RequestId, answer: &Bytes) -> Option<R> {
        let number = self.next_number();
        let request = self.requests.get_mut(&(key, id))?;
        let fits = answer.len() <= MAX_BYTES_OF_KEY;
        let state = if fits { State::Answered(number, answer.clone()) } else { State::Over(Ended::Forgotten) };
        let before = std::mem::replace(&mut request.state, state);
        let State::Waits(route) = before else {
            request.state = before;
            return None;
        };
        let owner = request.owner;
        if fits {
            self.answers.insert(owner, (number, id), answer.len());
        } else {
            self.answers.made_room += 1;
        }
        // What has just come counts already: it is let go itself if its requester has most.
        while self.answers.of_key(&key) > MAX_BYTES_OF_KEY
            && let Some((key, id)) = self.answers.first_of_key(key)
        {
            self.forget_answer(key, id);
        }
        while self.answers.weight > MAX_BYTES
            && let Some((key, id)) = self.answers.first_of_heaviest(owner)
        {
            self.forget_answer(key, id);
        }
        Some(route)
    }

    fn forget_answer(&mut self, key: Fingerprint, id: RequestId) {
        let Some(request) = self.requests.get_mut(&(key, id)) else { return };
        if let State::Answered(number, answer) = &request.state {
            self.answers.made_room += 1;
            self.answers.remove(request.owner, (*number, id), answer.len());
            request.state = State::Over(Ended::Forgotten);
        }
    }

    /// A request will not be answered. Returns where to say so.
    pub fn unanswered(&mut self, key: Fingerprint, id: RequestId) -> Option<R> {
        let request = self.requests.get_mut(&(key, id))?;
        match std::mem::replace(&mut request.state, State::Over(Ended::Unanswered)) {
            State::Waits(route) => Some(route),
            before => {
                request.state = before;
                None
            }
        }
    }

    /// The requester has the answer, or its request was not handed over.
    pub fn forget(&mut self, key: Fingerprint, id: RequestId) {
        let Some(Request { number, owner, state, .. }) = self.requests.remove(&(key, id)) else { return };
        self.order.remove(&number);
        self.asked.remove(owner, (number, id), 1);
        if let State::Answered(number, answer) = state {
            self.answers.remove(owner, (number, id), answer.len());
        }
    }

    /// Forgets some of what is too old. Returns whether there may be more.
    pub fn expire(&mut self, now: Instant) -> bool {
        for _ in 0..FORGOTTEN_AT_ONCE {
            let Some((_, &(key, id))) = self.order.first_key_value() else { return false };
            if self.requests.get(&(key, id)).is_some_and(|request| now < request.asked + KEPT_FOR) {
                return false;
            }
            self.forget(key, id);
        }
        true
    }

    /// What has been forgotten because there was too much.
    pub fn made_room(&self) -> MadeRoom {
        MadeRoom { requests: self.asked.made_room, answers: self.answers.made_room }
    }
}

/// Entries, by client.
#[derive(Debug, Default)]
struct Book {
    weight: usize,
    keys: HashMap<Fingerprint, OfKey>,
    queues: Queues<Entry>,
    /// Entries that others took the place of.
    made_room: u64,
}

/// Its number, and the request's id.
type Entry = (u64, RequestId);

/// At all networks.
#[derive(Debug, Default)]
struct OfKey {
    weight: usize,
    entries: BTreeSet<Entry>,
}

impl Book {
    fn insert(&mut self, owner: Owner, entry: Entry, weight: usize) {
        self.weight += weight;
        let of_key = self.keys.entry(owner.key).or_default();
        of_key.weight += weight;
        of_key.entries.insert(entry);
        self.queues.insert(owner, entry, weight);
    }

    fn remove(&mut self, owner: Owner, entry: Entry, weight: usize) {
        self.weight -= weight;
        self.queues.remove(owner, entry, weight);
        let Some(of_key) = self.keys.get_mut(&owner.key) else { return };
        of_key.weight -= weight;
        of_key.entries.remove(&entry);
        if of_key.entries.is_empty() {
            self.keys.remove(&owner.key);
        }
    }

    fn of_key(&self, key: &Fingerprint) -> usize {
        self.keys.get(key).map_or(0, |of_key| of_key.weight)
    }

    fn first_of_key(&self, key: Fingerprint) -> Option<(Fingerprint, RequestId)> {
        let &(_, id) = self.keys.get(&key)?.entries.first()?;
        Some((key, id))
    }

    fn first_of_heaviest(&self, needs_room: Owner) -> Option<(Fingerprint, RequestId)> {
        let (owner, (_, id)) = self.queues.first_of_heaviest(needs_room)?;
        Some((owner.key, id))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::HashSet;
    use std::net::IpAddr;

    use super::*;

    const MOST: usize = 1600;

    fn key(n: u16) -> Fingerprint {
        let mut key = [0; 32];
        key[..2].copy_from_slice(&n.to_be_bytes());
        key.into()
    }

    fn owner(n: u16, from: u8) -> Owner {
        Owner { key: key(n), network: IpAddr::from([20, 0, 0, from]).into() }
    }

    fn id(n: u32) -> RequestId {
        u128::from(n).to_be_bytes()
    }

    fn answer(len: usize) -> Bytes {
        vec![7; len].into()
    }

    fn is_empty<R>(requests: &Requests<R>) -> bool {
        let books = [&requests.asked, &requests.answers];
        let nothing = |book: &Book| book.weight == 0 && book.keys.is_empty() && book.queues.total() == 0;
        requests.requests.is_empty() && requests.order.is_empty() && books.into_iter().all(nothing)
    }

    #[test]
    fn a_repeated_request_is_handed_over_once_and_answered_on_the_last_stream() {
        let (mut requests, now) = (Requests::new(MOST), Instant::now());
        assert_eq!(requests.ask(owner(1, 1), id(1), false, "first", now), Asked::New);
        assert_eq!(requests.ask(owner(1, 2), id(1), true, "second", now), Asked::Waits, "from elsewhere");
        assert_eq!(requests.ask(owner(2, 1), id(1), false, "another's", now), Asked::New, "ids are each key's own");
        assert_eq!(requests.answered(key(1), id(1), &answer(3)), Some("second"));
        assert_eq!(requests.answered(key(1), id(1), &answer(4)), None);
        assert_eq!(requests.ask(owner(1, 1), id(1), false, "third", now), Asked::Answered(answer(3)));
        requests.forget(key(1), id(1));
        assert_eq!(requests.ask(owner(1, 1), id(1), true, "fourth", now), Asked::Over(Ended::Forgotten));
        assert_eq!(requests.unanswered(key(2), id(1)), Some("another's"));
        assert_eq!(requests.ask(owner(2, 1), id(1), true, "again", now), Asked::Over(Ended::Unanswered));
    }

    #[test]
    fn a_restarted_node_refuses_repeated_requests() {
        let mut requests = Requests::new(MOST);
        assert_eq!(requests.ask(owner(1, 1), id(1), true, (), Instant::now()), Asked::Over(Ended::Forgotten));
        assert!(is_empty(&requests));
    }

    #[test]
    fn one_key_uses_up_its_own_room() {
        let (mut requests, now) = (Requests::new(MOST), Instant::now());
        let share = (MOST / KEYS) as u32;
        requests.ask(owner(1, 1), id(0), false, (), now);
        for n in 0..2 * share {
            requests.ask(owner(2, 1 + (n % 2) as u8), id(n), false, (), now);
        }
        assert_eq!(requests.ask(owner(1, 1), id(0), true, (), now), Asked::Waits);
        assert_eq!(requests.ask(owner(2, 1), id(0), true, (), now), Asked::Over(Ended::Forgotten));
        assert_eq!(requests.ask(owner(2, 1), id(2 * share - 1), true, (), now), Asked::Waits);
        assert_eq!(requests.order.len(), share as usize + 1);
        assert_eq!(requests.made_room(), MadeRoom { requests: share.into(), answers: 0 });
    }

    /// Keys cost nothing.
    #[test]
    fn many_keys_at_one_address_evict_only_their_own_requests() {
        let (mut requests, now) = (Requests::new(1000), Instant::now());
        let honest = |requests: &mut Requests<()>, again| -> Vec<_> {
            let all = (0..20).map(|n| (owner(1 + n % 4, 1 + (n % 4) as u8), id(n.into())));
            all.map(|(owner, id)| requests.ask(owner, id, again, (), now)).collect()
        };
        assert_eq!(honest(&mut requests, false), vec![Asked::New; 20]);
        // At the address of the flood.
        requests.ask(owner(5, 9), id(0), false, (), now);
        for n in 0..5000 {
            assert_eq!(requests.ask(owner(100 + n % 50, 9), id(n.into()), false, (), now), Asked::New);
        }
        assert_eq!(requests.requests.len(), 1000);
        assert_eq!(honest(&mut requests, true), vec![Asked::Waits; 20]);
        assert_eq!(requests.ask(owner(5, 9), id(0), true, (), now), Asked::Waits, "it has less than the others there");
        assert_eq!(requests.ask(owner(100, 9), id(0), true, (), now), Asked::Over(Ended::Forgotten));
        assert_eq!(requests.ask(owner(149, 9), id(4999), true, (), now), Asked::Waits, "the oldest go first");
        assert_eq!(requests.made_room(), MadeRoom { requests: 4021, answers: 0 });
        assert_eq!(requests.ask(owner(6, 2), id(0), false, (), now), Asked::New, "there is room for others");
        assert_eq!(honest(&mut requests, true), vec![Asked::Waits; 20]);
    }

    #[test]
    fn many_keys_at_one_address_evict_only_their_own_answers() {
        let (mut requests, now) = (Requests::new(MOST), Instant::now());
        let ask = |requests: &mut Requests<()>, owner: Owner, n, len| {
            requests.ask(owner, id(n), false, (), now);
            requests.answered(owner.key, id(n), &answer(len)).unwrap();
        };
        let kept = |requests: &mut Requests<()>, owner, n| match requests.ask(owner, id(n), true, (), now) {
            Asked::Answered(answer) => Some(answer.len()),
            _ => None,
        };
        ask(&mut requests, owner(1, 1), 0, 1000);
        for n in 0..200 {
            ask(&mut requests, owner(100 + n % 10, 9), n.into(), 1 << 20);
        }
        // As much as others have each, and then no more.
        ask(&mut requests, owner(2, 2), 0, MAX_BYTES_OF_KEY);
        ask(&mut requests, owner(3, 1), 0, 1 << 20);
        assert_eq!(kept(&mut requests, owner(1, 1), 0), Some(1000));
        assert_eq!(kept(&mut requests, owner(2, 2), 0), Some(MAX_BYTES_OF_KEY));
        assert_eq!(kept(&mut requests, owner(3, 1), 0), Some(1 << 20));
        assert_eq!(kept(&mut requests, owner(109, 9), 199), Some(1 << 20), "the oldest go first");
        assert_eq!(kept(&mut requests, owner(100, 9), 0), None);
        assert!((MAX_BYTES - (1 << 20)..=MAX_BYTES).contains(&requests.answers.weight));
        let of_flood =
            (0..200).filter(|n| kept(&mut requests, owner(100 + n % 10, 9), u32::from(*n)).is_some()).count();
        assert_eq!(requests.made_room(), MadeRoom { requests: 0, answers: 200 - of_flood as u64 });
    }

    #[test]
    fn large_answers_push_out_those_of_the_same_key() {
        let (mut requests, now) = (Requests::new(MOST), Instant::now());
        let mut ask = |k, n, len| {
            requests.ask(owner(k, 1), id(n), false, (), now);
            requests.answered(key(k), id(n), &answer(len)).unwrap();
        };
        ask(1, 0, 1000);
        (0..40).for_each(|n| ask(2, n, 1 << 20));
        (0..4).for_each(|n| ask(3, n, MAX_BYTES_OF_KEY));
        ask(4, 0, MAX_BYTES_OF_KEY + 1);
        let kept = |requests: &mut Requests<()>, k, n| requests.ask(owner(k, 1), id(n), true, (), now);
        assert_eq!(kept(&mut requests, 1, 0), Asked::Answered(answer(1000)));
        assert_eq!(kept(&mut requests, 2, 0), Asked::Over(Ended::Forgotten));
        assert_eq!(kept(&mut requests, 2, 39), Asked::Answered(answer(1 << 20)));
        assert_eq!(kept(&mut requests, 3, 3), Asked::Answered(answer(MAX_BYTES_OF_KEY)));
        assert_eq!(kept(&mut requests, 4, 0), Asked::Over(Ended::Forgotten), "more than there is room for");
        assert_eq!(requests.made_room(), MadeRoom { requests: 0, answers: 24 + 3 + 1 });
        while requests.expire(now + KEPT_FOR) {}
        assert!(is_empty(&requests));
    }

    #[test]
    fn few_are_forgotten_at_once_because_they_are_too_old() {
        let (mut requests, now) = (Requests::new(MOST), Instant::now());
        (0..40).for_each(|n| assert_eq!(requests.ask(owner(1, 1), id(n), false, (), now), Asked::New));
        assert!(!requests.expire(now + KEPT_FOR - Duration::from_millis(1)));
        let left = [(); 3].map(|()| (requests.expire(now + KEPT_FOR), requests.requests.len()));
        assert_eq!(left, [(true, 24), (true, 8), (false, 0)]);
    }

    /// After any sequence, nothing is handed over twice within the bounds, and the tables agree.
    #[test]
    fn the_tables_agree_and_nothing_is_handed_over_twice() {
        for seed in 0..300 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut requests, start, mut now) = (Requests::new(MOST), Instant::now(), 0);
            let mut handed_over = HashSet::new();
            for step in 0..400_u32 {
                now += random.u64(0..20);
                let (k, n, at) = (random.u16(0..4), random.u32(0..60), start + Duration::from_millis(now));
                match random.u8(0..8) {
                    0..4 => {
                        let asked = requests.ask(owner(k, random.u8(0..3)), id(n), random.bool(), step, at);
                        assert!(asked != Asked::New || handed_over.insert((k, n)), "SEED={seed}: {k} {n} twice");
                    }
                    4..6 => drop(requests.answered(key(k), id(n), &answer(random.usize(0..100)))),
                    6 => drop(requests.unanswered(key(k), id(n))),
                    _ => {
                        requests.forget(key(k), id(n));
                        // The requester does not ask again.
                        handed_over.remove(&(k, n));
                    }
                }
                agree(&requests);
            }
            while requests.expire(start + Duration::from_millis(now) + KEPT_FOR) {}
            assert!(is_empty(&requests), "SEED={seed}");
        }
    }

    fn agree<R>(requests: &Requests<R>) {
        let Requests { requests, order, asked, answers, .. } = requests;
        let bytes = requests.values().map(|request| match &request.state {
            State::Answered(_, answer) => answer.len(),
            _ => 0,
        });
        assert_eq!((order.len(), asked.weight), (requests.len(), requests.len()));
        assert_eq!(answers.weight, bytes.sum::<usize>());
        for book in [asked, answers] {
            assert_eq!(book.keys.values().map(|of_key| of_key.weight).sum::<usize>(), book.weight);
            assert_eq!(book.queues.total(), book.weight);
        }
    }

    /// Whatever one address does with any number of keys, others keep their requests and answers.
    #[test]
    fn no_sequence_evicts_an_entry_of_a_client_that_has_less() {
        let (large, small) = (answer(MAX_BYTES_OF_KEY), answer(10));
        for seed in 0..300 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut requests, now) = (Requests::new(48), Instant::now());
            let mut asked = HashSet::new();
            for n in 0..600 {
                if random.u8(0..4) > 0 {
                    let flood = owner(100 + random.u16(0..40), 9);
                    requests.ask(flood, id(n), false, (), now);
                    if random.bool() {
                        requests.answered(flood.key, id(n), &large.slice(..random.usize(1..=large.len())));
                    }
                } else {
                    let (k, n) = (random.u16(0..3), random.u32(0..3));
                    let expected = match asked.insert((k, n)) {
                        true => Asked::New,
                        false => Asked::Answered(small.clone()),
                    };
                    assert_eq!(
                        requests.ask(owner(k, k as u8), id(n), false, (), now),
                        expected,
                        "SEED={seed}: {k} {n}"
                    );
                    requests.answered(key(k), id(n), &small);
                }
                assert!(requests.requests.len() <= 48 && requests.answers.weight <= MAX_BYTES, "SEED={seed}");
                agree(&requests);
            }
        }
    }
}
