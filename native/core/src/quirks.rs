//! What to leave out of packets to some destinations, because earlier packets did not get through with it.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// How long it holds. Then it is tried again: routes and devices change.
const LASTS: Duration = Duration::from_secs(600);

/// How long a packet may be unmarked to see whether that gets through. No dial lasts longer by default.
const TRIAL: Duration = Duration::from_secs(10);

/// How many destinations are remembered. Those that would expire first are evicted.
const MAX_REMEMBERED: usize = 1024;

#[derive(Debug, Default)]
pub struct Quirks {
    /// The device towards these cannot cut packets into segments.
    unsegmented: Expiring<IpAddr>,
    /// ECN marks do not get there.
    unmarked: Expiring<SocketAddr>,
}

impl Quirks {
    /// Whether there are none, which saves a lookup.
    pub fn is_empty(&self) -> bool {
        self.unsegmented.until.is_empty() && self.unmarked.until.is_empty()
    }

    /// Forgets what no longer holds.
    pub fn expire(&mut self, now: Instant) {
        self.unsegmented.expire(now);
        self.unmarked.expire(now);
    }

    pub fn is_segmented(&self, to: SocketAddr, now: Instant) -> bool {
        !self.unsegmented.has(&to.ip().to_canonical(), now)
    }

    pub fn is_marked(&self, to: SocketAddr, now: Instant) -> bool {
        !self.unmarked.has(&canonical(to), now)
    }

    /// A packet got there once it was not to be segmented.
    pub fn do_not_segment(&mut self, to: SocketAddr, now: Instant) {
        self.unsegmented.insert(to.ip().to_canonical(), now, LASTS);
    }

    /// A packet got there once it was not marked.
    pub fn do_not_mark(&mut self, to: SocketAddr, now: Instant) {
        self.unmarked.insert(canonical(to), now, LASTS);
    }

    /// Marked packets were not answered: for a moment later ones are not marked.
    pub fn try_unmarked(&mut self, to: SocketAddr, now: Instant) {
        self.unmarked.insert(canonical(to), now, TRIAL);
    }
}

fn canonical(to: SocketAddr) -> SocketAddr {
    (to.ip().to_canonical(), to.port()).into()
}

#[derive(Debug)]
struct Expiring<K> {
    until: HashMap<K, Instant>,
}

impl<K> Default for Expiring<K> {
    fn default() -> Self {
        Self { until: HashMap::new() }
    }
}

impl<K: Clone + Eq + Hash> Expiring<K> {
    fn has(&self, key: &K, now: Instant) -> bool {
        self.until.get(key).is_some_and(|until| now < *until)
    }

    fn insert(&mut self, key: K, now: Instant, lasts: Duration) {
        if self.until.len() >= MAX_REMEMBERED && !self.until.contains_key(&key) {
            // Filling the table with trials does not evict what is known for longer.
            let soonest = self.until.iter().min_by_key(|(_, until)| **until).map(|(key, _)| key.clone());
            soonest.map(|soonest| self.until.remove(&soonest));
        }
        let until = self.until.entry(key).or_insert(now);
        *until = (*until).max(now + lasts);
    }

    fn expire(&mut self, now: Instant) {
        self.until.retain(|_, until| now < *until);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_quirk_is_one_destinations_and_expires() {
        let now = Instant::now();
        let mut quirks = Quirks::default();
        quirks.do_not_segment(address("192.0.2.1:1"), now);
        quirks.do_not_mark(address("192.0.2.1:1"), now);
        // The device is the same for every port, and for another notation of the address.
        assert!(!quirks.is_segmented(address("[::ffff:192.0.2.1]:2"), now));
        assert!(quirks.is_segmented(address("192.0.2.2:1"), now));
        assert!(!quirks.is_marked(address("[::ffff:192.0.2.1]:1"), now));
        assert!(quirks.is_marked(address("192.0.2.1:2"), now));
        let later = now + LASTS;
        assert!(quirks.is_segmented(address("192.0.2.1:1"), later) && quirks.is_marked(address("192.0.2.1:1"), later));
        quirks.expire(later);
        assert!(quirks.is_empty());
    }

    #[test]
    fn a_trial_is_short_and_shortens_nothing() {
        let now = Instant::now();
        let to = address("192.0.2.1:1");
        let mut quirks = Quirks::default();
        quirks.try_unmarked(to, now);
        assert!(!quirks.is_marked(to, now) && quirks.is_marked(to, now + TRIAL));
        quirks.do_not_mark(to, now);
        quirks.try_unmarked(to, now);
        assert!(!quirks.is_marked(to, now + TRIAL));
    }

    #[test]
    fn the_number_of_remembered_destinations_is_bounded() {
        let now = Instant::now();
        let mut quirks = Quirks::default();
        let to = |n: usize| SocketAddr::from(([10, 0, (n >> 8) as u8, n as u8], 1));
        quirks.do_not_mark(to(0), now);
        (1..2 * MAX_REMEMBERED).for_each(|n| quirks.try_unmarked(to(n), now + Duration::from_micros(n as u64)));
        assert_eq!(quirks.unmarked.until.len(), MAX_REMEMBERED);
        let marked = [0, 1, 2 * MAX_REMEMBERED - 1].map(|n| quirks.is_marked(to(n), now));
        assert_eq!(marked, [false, true, false], "what is known stays, and the oldest trials go");
    }
}
