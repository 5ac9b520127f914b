//! The requests that this node was asked. One that is asked again, because its link died, is not handed over again: its
//! answer goes to where it was asked last, also if there was one by then.
//!
//! A request is kept until the answer has arrived, or for [`KEPT_FOR`]. Beyond the bounds the oldest are forgotten, those
//! of the same key first; one that is forgotten and asked again fails if the asker knows that it had arrived.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::identity::Fingerprint;

/// What the asker calls a request, unique among its own.
pub(crate) type RequestId = [u8; 16];

/// As long as a message may be answered.
const KEPT_FOR: Duration = Duration::from_secs(300);

/// Requests in all and of one key: more than one node has streams for at once.
const MAX_REQUESTS: usize = 65_536;
const MAX_OF_KEY: usize = 4096;

/// Bytes of answers that have not arrived, in all and to one key.
const MAX_BYTES: usize = 64 << 20;
const MAX_BYTES_OF_KEY: usize = 16 << 20;

/// `R`: where an answer goes.
#[derive(Debug)]
pub(crate) struct Requests<R> {
    askers: HashMap<Fingerprint, Asker<R>>,
    /// Whose request it is, oldest first.
    order: BTreeMap<u64, Fingerprint>,
    next: u64,
    bytes: usize,
}

#[derive(Debug)]
struct Asker<R> {
    requests: HashMap<RequestId, Request<R>>,
    /// Oldest first.
    order: BTreeMap<u64, RequestId>,
    /// Those that have an answer, in the order of these. Some may be gone.
    answered: VecDeque<RequestId>,
    bytes: usize,
}

#[derive(Debug)]
struct Request<R> {
    number: u64,
    asked: Instant,
    state: State<R>,
}

#[derive(Debug)]
enum State<R> {
    /// Its answer goes there.
    Waits(R),
    Answered(Bytes),
    /// There will be no answer, or it was too much to keep.
    Over(Ended),
}

/// What becomes of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Asked {
    /// It is to be handed over.
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
pub(crate) enum Ended {
    /// Nobody will answer.
    Unanswered,
    /// Nothing is known of it any more.
    Forgotten,
}

impl<R> Default for Requests<R> {
    fn default() -> Self {
        Self { askers: HashMap::new(), order: BTreeMap::new(), next: 0, bytes: 0 }
    }
}

impl<R> Default for Asker<R> {
    fn default() -> Self {
        Self { requests: HashMap::new(), order: BTreeMap::new(), answered: VecDeque::new(), bytes: 0 }
    }
}

impl<R> Requests<R> {
    /// A request came, whose answer goes to `route`. `again`: the asker knows that it came before, or it may not come twice.
    pub(crate) fn ask(&mut self, key: Fingerprint, id: RequestId, again: bool, route: R, now: Instant) -> Asked {
        self.expire(now);
        if let Some(request) = self.askers.get_mut(&key).and_then(|asker| asker.requests.get_mut(&id)) {
            return match &mut request.state {
                State::Waits(last) => {
                    *last = route;
                    Asked::Waits
                }
                State::Answered(answer) => Asked::Answered(answer.clone()),
                State::Over(ended) => Asked::Over(*ended),
            };
        }
        if again {
            return Asked::Over(Ended::Forgotten);
        }
        self.make_room(key);
        let number = self.next;
        self.next += 1;
        self.order.insert(number, key);
        let asker = self.askers.entry(key).or_default();
        asker.order.insert(number, id);
        asker.requests.insert(id, Request { number, asked: now, state: State::Waits(route) });
        Asked::New
    }

    /// A request has its answer. Returns where that goes; `None`: the request is forgotten.
    pub(crate) fn answered(&mut self, key: Fingerprint, id: RequestId, answer: &Bytes) -> Option<R> {
        let asker = self.askers.get_mut(&key)?;
        let request = asker.requests.get_mut(&id)?;
        let fits = answer.len() <= MAX_BYTES_OF_KEY && self.bytes + answer.len() <= MAX_BYTES;
        let state = if fits { State::Answered(answer.clone()) } else { State::Over(Ended::Forgotten) };
        let before = std::mem::replace(&mut request.state, state);
        let State::Waits(route) = before else {
            request.state = before;
            return None;
        };
        if fits {
            asker.bytes += answer.len();
            self.bytes += answer.len();
            asker.answered.push_back(id);
            while asker.bytes > MAX_BYTES_OF_KEY || asker.answered.len() > MAX_OF_KEY {
                let Some(oldest) = asker.answered.pop_front() else { break };
                self.bytes -= asker.forget_answer(&oldest);
            }
        }
        Some(route)
    }

    /// Nobody will answer a request. Returns who is to know.
    pub(crate) fn unanswered(&mut self, key: Fingerprint, id: RequestId) -> Option<R> {
        let request = self.askers.get_mut(&key)?.requests.get_mut(&id)?;
        match std::mem::replace(&mut request.state, State::Over(Ended::Unanswered)) {
            State::Waits(route) => Some(route),
            before => {
                request.state = before;
                None
            }
        }
    }

    /// The asker has the answer, or its request was not handed over.
    pub(crate) fn forget(&mut self, key: Fingerprint, id: RequestId) {
        let request = self.askers.get(&key).and_then(|asker| asker.requests.get(&id));
        if let Some(number) = request.map(|request| request.number) {
            self.remove(number, key);
        }
    }

    /// Forgets what is too old.
    pub(crate) fn expire(&mut self, now: Instant) {
        while let Some((&number, &key)) = self.order.first_key_value() {
            let asker = self.askers.get(&key);
            let request = asker.and_then(|asker| asker.requests.get(asker.order.get(&number)?));
            if request.is_some_and(|request| now < request.asked + KEPT_FOR) {
                return;
            }
            self.remove(number, key);
        }
    }

    fn make_room(&mut self, key: Fingerprint) {
        let own = self.askers.get(&key).filter(|asker| asker.requests.len() >= MAX_OF_KEY);
        if let Some(&number) = own.and_then(|asker| asker.order.keys().next()) {
            self.remove(number, key);
        } else if self.order.len() >= MAX_REQUESTS
            && let Some((&number, &oldest)) = self.order.first_key_value()
        {
            self.remove(number, oldest);
        }
    }

    fn remove(&mut self, number: u64, key: Fingerprint) {
        self.order.remove(&number);
        let Some(asker) = self.askers.get_mut(&key) else { return };
        let Some(id) = asker.order.remove(&number) else { return };
        self.bytes -= asker.forget_answer(&id);
        asker.requests.remove(&id);
        while asker.answered.front().is_some_and(|id| !asker.requests.contains_key(id)) {
            asker.answered.pop_front();
        }
        if asker.requests.is_empty() {
            self.askers.remove(&key);
        }
    }
}

impl<R> Asker<R> {
    /// Returns how many bytes that were.
    fn forget_answer(&mut self, id: &RequestId) -> usize {
        let Some(request) = self.requests.get_mut(id) else { return 0 };
        let State::Answered(answer) = &request.state else { return 0 };
        let len = answer.len();
        request.state = State::Over(Ended::Forgotten);
        self.bytes -= len;
        len
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::HashSet;

    use super::*;

    fn key(n: u8) -> Fingerprint {
        [n; 32].into()
    }

    fn id(n: u32) -> RequestId {
        u128::from(n).to_be_bytes()
    }

    fn answer(len: usize) -> Bytes {
        vec![7; len].into()
    }

    #[test]
    fn one_that_is_asked_again_is_handed_over_once_and_answered_where_it_was_asked_last() {
        let (mut requests, now) = (Requests::default(), Instant::now());
        assert_eq!(requests.ask(key(1), id(1), false, "first", now), Asked::New);
        assert_eq!(requests.ask(key(1), id(1), true, "second", now), Asked::Waits);
        assert_eq!(requests.ask(key(2), id(1), false, "another's", now), Asked::New, "ids are each key's own");
        assert_eq!(requests.answered(key(1), id(1), &answer(3)), Some("second"));
        assert_eq!(requests.answered(key(1), id(1), &answer(4)), None);
        assert_eq!(requests.ask(key(1), id(1), false, "third", now), Asked::Answered(answer(3)));
        requests.forget(key(1), id(1));
        assert_eq!(requests.ask(key(1), id(1), true, "fourth", now), Asked::Over(Ended::Forgotten));
        assert_eq!(requests.unanswered(key(2), id(1)), Some("another's"));
        assert_eq!(requests.ask(key(2), id(1), true, "again", now), Asked::Over(Ended::Unanswered));
    }

    #[test]
    fn what_a_restarted_node_does_not_know_is_not_done_twice() {
        let mut requests = Requests::default();
        assert_eq!(requests.ask(key(1), id(1), true, (), Instant::now()), Asked::Over(Ended::Forgotten));
        assert!(requests.order.is_empty() && requests.askers.is_empty());
    }

    #[test]
    fn one_key_uses_up_its_own_room() {
        let (mut requests, now) = (Requests::default(), Instant::now());
        requests.ask(key(1), id(0), false, (), now);
        for n in 0..2 * MAX_OF_KEY as u32 {
            requests.ask(key(2), id(n), false, (), now);
        }
        assert_eq!(requests.ask(key(1), id(0), true, (), now), Asked::Waits);
        assert_eq!(requests.ask(key(2), id(0), true, (), now), Asked::Over(Ended::Forgotten));
        assert_eq!(requests.ask(key(2), id(2 * MAX_OF_KEY as u32 - 1), true, (), now), Asked::Waits);
        assert_eq!(requests.order.len(), MAX_OF_KEY + 1);
    }

    #[test]
    fn large_answers_push_out_those_of_the_same_key() {
        let (mut requests, now) = (Requests::default(), Instant::now());
        let mut ask = |k, n, len| {
            requests.ask(key(k), id(n), false, (), now);
            requests.answered(key(k), id(n), &answer(len)).unwrap();
        };
        ask(1, 0, 1000);
        (0..40).for_each(|n| ask(2, n, 1 << 20));
        (0..4).for_each(|n| ask(3, n, MAX_BYTES_OF_KEY));
        assert_eq!(requests.ask(key(1), id(0), true, (), now), Asked::Answered(answer(1000)));
        let kept = |requests: &mut Requests<()>, k, n| requests.ask(key(k), id(n), true, (), now);
        assert_eq!(kept(&mut requests, 2, 0), Asked::Over(Ended::Forgotten));
        assert_eq!(kept(&mut requests, 2, 39), Asked::Answered(answer(1 << 20)));
        assert_eq!(kept(&mut requests, 3, 3), Asked::Answered(answer(MAX_BYTES_OF_KEY)));
        assert!(requests.bytes <= MAX_BYTES);
        requests.expire(now + KEPT_FOR);
        assert!(requests.bytes == 0 && requests.order.is_empty() && requests.askers.is_empty());
    }

    /// Whatever happens, nothing is handed over twice within the bounds, and the books agree.
    #[test]
    fn books_agree_and_nothing_is_handed_over_twice() {
        for seed in 0..300 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut requests, start, mut now) = (Requests::default(), Instant::now(), 0);
            let mut handed_over = HashSet::new();
            for step in 0..400_u32 {
                now += random.u64(0..20);
                let (k, n, at) = (random.u8(0..4), random.u32(0..60), start + Duration::from_millis(now));
                match random.u8(0..8) {
                    0..4 => {
                        let asked = requests.ask(key(k), id(n), random.bool(), step, at);
                        assert!(asked != Asked::New || handed_over.insert((k, n)), "SEED={seed}: {k} {n} twice");
                    }
                    4..6 => drop(requests.answered(key(k), id(n), &answer(random.usize(0..100)))),
                    6 => drop(requests.unanswered(key(k), id(n))),
                    _ => {
                        requests.forget(key(k), id(n));
                        // The asker does not ask again.
                        handed_over.remove(&(k, n));
                    }
                }
                let all = || requests.askers.values();
                assert_eq!(all().map(|asker| asker.requests.len()).sum::<usize>(), requests.order.len());
                assert_eq!(all().map(|asker| asker.bytes).sum::<usize>(), requests.bytes);
                for asker in all() {
                    let kept = asker.requests.values().map(|request| match &request.state {
                        State::Answered(answer) => answer.len(),
                        _ => 0,
                    });
                    assert_eq!((kept.sum::<usize>(), asker.order.len()), (asker.bytes, asker.requests.len()));
                }
            }
            requests.expire(start + Duration::from_millis(now) + KEPT_FOR);
            assert!(requests.order.is_empty() && requests.askers.is_empty() && requests.bytes == 0, "SEED={seed}");
        }
    }
}
