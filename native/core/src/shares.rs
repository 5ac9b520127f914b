//! Shares: what strangers can use up is limited in total, for one key and for one address, so that no client takes all
//! of it.
//!
//! - [`Counts`] limit what clients have at the same time: connections, names, circuits, sessions, bytes in memory.
//!   `macula-peer` has guards that give back what a task had.
//! - [`Rates`] limit what clients do in a second: handshakes, registrations.
//!
//! A client is known by the key that it has shown, if any, and by its network: an IPv4 address, or the /64 of an IPv6
//! address, which is the least that one subscriber has (RFC 6177). Keys cost nothing, so the share of one address is
//! what limits an attacker that makes many. All tables are bounded, and their hashing is keyed.

use std::cmp::max;
use std::collections::HashMap;
use std::hash::{Hash, RandomState};
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use hashlink::LinkedHashMap;

use crate::types::Fingerprint;

/// Keys and addresses whose buckets are remembered, of each. Beyond that the least recently used are forgotten, which
/// makes their buckets full: that limits no client too much.
const MAX_REMEMBERED: usize = 16_384;

/// What one address is counted as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Network {
    V4(Ipv4Addr),
    /// The first 64 bits.
    V6(u64),
}

impl From<IpAddr> for Network {
    fn from(ip: IpAddr) -> Self {
        match ip.to_canonical() {
            IpAddr::V4(ip) => Self::V4(ip),
            IpAddr::V6(ip) => Self::V6((ip.to_bits() >> 64) as u64),
        }
    }
}

/// The client that takes something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Client {
    key: Option<Fingerprint>,
    network: Network,
}

impl Client {
    /// `key`: `None` for one that has not shown any, as before a handshake. It is limited by its address alone.
    pub fn new(key: impl Into<Option<Fingerprint>>, address: IpAddr) -> Self {
        Self { key: key.into(), network: address.into() }
    }

    pub fn key(&self) -> Option<Fingerprint> {
        self.key
    }
}

/// How much there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub total: usize,
    pub per_key: usize,
    pub per_address: usize,
}

impl Limits {
    /// Shares in percent, rounded up: of a total of 1 or more no share is 0.
    pub fn percent(total: usize, per_key: u8, per_address: u8) -> Self {
        let share = |percent: u8| {
            let share = (total as u128 * u128::from(percent)).div_ceil(100);
            // At most 100 % make it no larger than `total`.
            share.min(total as u128) as usize
        };
        Self { total, per_key: share(per_key), per_address: share(per_address) }
    }

    /// A share that is the whole is no share.
    fn name(&self, exceeded: Exceeded) -> Exceeded {
        match exceeded {
            Exceeded::Key if self.per_key >= self.total => Exceeded::Total,
            Exceeded::Address if self.per_address >= self.total => Exceeded::Total,
            other => other,
        }
    }
}

/// Which limit does not allow it. The client's own are looked at first: `Total` means that others have the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Exceeded {
    #[error("the client's key has its share")]
    Key,
    #[error("the client's address has its share")]
    Address,
    #[error("nothing is left")]
    Total,
}

/// What clients have at the same time.
#[derive(Debug)]
pub struct Counts {
    limits: Limits,
    total: usize,
    /// Only clients that have something: no more than `limits.total`.
    keys: HashMap<Fingerprint, usize>,
    networks: HashMap<Network, usize>,
}

impl Counts {
    pub fn new(limits: Limits) -> Self {
        Self { limits, total: 0, keys: HashMap::new(), networks: HashMap::new() }
    }

    /// From now on these limits hold. What clients have they keep.
    pub fn limit(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Gives the client that amount, or nothing.
    pub fn take(&mut self, client: &Client, amount: usize) -> Result<(), Exceeded> {
        self.allows(client, amount)?;
        self.total += amount;
        if amount > 0 {
            client.key.into_iter().for_each(|key| *self.keys.entry(key).or_default() += amount);
            *self.networks.entry(client.network).or_default() += amount;
        }
        Ok(())
    }

    /// Whether the client could take that amount.
    pub fn allows(&self, client: &Client, amount: usize) -> Result<(), Exceeded> {
        let Limits { total, per_key, per_address } = self.limits;
        let fits = |taken: usize, limit| taken.saturating_add(amount) <= limit;
        let exceeded = match client.key {
            Some(key) if !fits(self.of_key(&key), per_key) => Exceeded::Key,
            _ if !fits(self.of_network(client), per_address) => Exceeded::Address,
            _ if !fits(self.total, total) => Exceeded::Total,
            _ => return Ok(()),
        };
        Err(self.limits.name(exceeded))
    }

    /// Takes back what the same client was given.
    pub fn give_back(&mut self, client: &Client, amount: usize) {
        self.total = self.total.saturating_sub(amount);
        if let Some(key) = &client.key {
            subtract(&mut self.keys, key, amount);
        }
        subtract(&mut self.networks, &client.network, amount);
    }

    /// What all have together.
    pub fn total(&self) -> usize {
        self.total
    }

    /// What no client has.
    pub fn left(&self) -> usize {
        self.limits.total.saturating_sub(self.total)
    }

    /// What the client's network has.
    pub fn of_network(&self, client: &Client) -> usize {
        self.networks.get(&client.network).copied().unwrap_or(0)
    }

    /// What one key has.
    pub fn of_key(&self, key: &Fingerprint) -> usize {
        self.keys.get(key).copied().unwrap_or(0)
    }
}

fn subtract<K: Hash + Eq>(counts: &mut HashMap<K, usize>, key: &K, amount: usize) {
    if let Some(count) = counts.get_mut(key) {
        *count = count.saturating_sub(amount);
        if *count == 0 {
            counts.remove(key);
        }
    }
}

/// What clients do in a second.
#[derive(Debug)]
pub struct Rates {
    limits: Limits,
    total: Bucket,
    keys: Buckets<Fingerprint>,
    networks: Buckets<Network>,
}

impl Rates {
    /// So much in a second, and at once what comes in `burst`, but 1 at the least.
    pub fn new(per_second: Limits, burst: Duration, now: Instant) -> Self {
        let Limits { total, per_key, per_address } = per_second;
        let bucket = |rate: usize| {
            let at_once = (rate as u128).saturating_mul(burst.as_millis()) / 1000;
            Bucket::new(rate as u64, u64::try_from(at_once).unwrap_or(u64::MAX).max(1), now)
        };
        let (keys, networks) = (Buckets::new(bucket(per_key)), Buckets::new(bucket(per_address)));
        Self { limits: per_second, total: bucket(total), keys, networks }
    }

    /// Lets the client do it that many times, or not at all. A refusal takes nothing from any client.
    pub fn take(&mut self, client: &Client, times: u64, now: Instant) -> Result<(), Exceeded> {
        let key = self.key_after(client, times, now)?;
        let network = self.network_after(client, times, now)?;
        self.total = self.total.after(times, now).ok_or(Exceeded::Total)?;
        self.networks.set(client.network, network, now);
        if let Some((key, bucket)) = key {
            self.keys.set(key, bucket, now);
        }
        Ok(())
    }

    /// The same for requests that fail: they take from the share of its key alone, or of its address if it has
    /// shown none.
    pub fn take_own(&mut self, client: &Client, times: u64, now: Instant) -> Result<(), Exceeded> {
        match self.key_after(client, times, now)? {
            Some((key, bucket)) => self.keys.set(key, bucket, now),
            None => {
                let network = self.network_after(client, times, now)?;
                self.networks.set(client.network, network, now);
            }
        }
        Ok(())
    }

    fn key_after(&self, client: &Client, times: u64, now: Instant) -> Result<Option<(Fingerprint, Bucket)>, Exceeded> {
        let Some(key) = client.key else { return Ok(None) };
        let bucket = self.keys.after(&key, times, now).ok_or(self.limits.name(Exceeded::Key))?;
        Ok(Some((key, bucket)))
    }

    fn network_after(&self, client: &Client, times: u64, now: Instant) -> Result<Bucket, Exceeded> {
        self.networks.after(&client.network, times, now).ok_or(self.limits.name(Exceeded::Address))
    }
}

/// Equal buckets, one for each that has taken something from its own a short time ago.
#[derive(Debug)]
struct Buckets<K> {
    full: Bucket,
    /// The least recently used first.
    used: LinkedHashMap<K, Bucket, RandomState>,
}

impl<K: Hash + Eq> Buckets<K> {
    fn new(full: Bucket) -> Self {
        Self { full, used: LinkedHashMap::with_hasher(RandomState::new()) }
    }

    /// What is left after taking that amount.
    fn after(&self, key: &K, tokens: u64, now: Instant) -> Option<Bucket> {
        self.used.get(key).unwrap_or(&self.full).after(tokens, now)
    }

    fn set(&mut self, key: K, bucket: Bucket, now: Instant) {
        self.used.insert(key, bucket);
        // One is added at most: with two the table shrinks when it is used less.
        for _ in 0..2 {
            let forget = |oldest: &Bucket| oldest.is_full(now) || self.used.len() > MAX_REMEMBERED;
            if self.used.front().is_some_and(|(_, oldest)| forget(oldest)) {
                self.used.pop_front();
            }
        }
    }
}

/// A token bucket, as the moment when it will be full again.
#[derive(Debug, Clone, Copy)]
pub struct Bucket {
    /// Per second.
    rate: u64,
    /// The time in which it fills up.
    depth: Duration,
    full: Instant,
}

impl Bucket {
    pub fn new(rate: u64, burst: u64, now: Instant) -> Self {
        // With a rate of 0 it would never fill up: 1 is as good.
        let rate = max(rate, 1);
        Self { rate, depth: time(burst, rate), full: now }
    }

    pub fn take(&mut self, tokens: u64, now: Instant) -> bool {
        let after = self.after(tokens, now);
        *self = after.unwrap_or(*self);
        after.is_some()
    }

    /// Whether it is as if nothing had ever been taken.
    pub fn is_full(&self, now: Instant) -> bool {
        self.full <= now
    }

    fn after(&self, tokens: u64, now: Instant) -> Option<Self> {
        let full = max(self.full, now) + time(tokens, self.rate);
        (full <= now + self.depth).then_some(Self { full, ..*self })
    }
}

/// The time in which that many tokens come, at most a day: longer makes no difference to any use of it.
fn time(tokens: u64, rate: u64) -> Duration {
    const DAY: u128 = 86_400_000_000_000;
    let nanos = u128::from(tokens) * 1_000_000_000 / u128::from(rate);
    // No more than `DAY`, which fits.
    Duration::from_nanos(nanos.min(DAY) as u64)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn key(n: u32) -> Fingerprint {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&n.to_be_bytes());
        bytes.into()
    }

    fn client(n: u32, address: &str) -> Client {
        Client::new(key(n), address.parse().unwrap())
    }

    fn clock() -> (Instant, impl Fn(u64) -> Instant) {
        let start = Instant::now();
        (start, move |ms| start + Duration::from_millis(ms))
    }

    #[test]
    fn an_ipv4_address_is_one_however_it_is_written_and_64_bits_of_an_ipv6_address_are() {
        let network = |ip: &str| Network::from(ip.parse::<IpAddr>().unwrap());
        assert_eq!(network("::ffff:10.0.0.1"), network("10.0.0.1"));
        assert_ne!(network("10.0.0.1"), network("10.0.0.2"));
        assert_eq!(network("2001:db8:1:2::1"), network("2001:db8:1:2:ffff::9"));
        assert_ne!(network("2001:db8:1:2::1"), network("2001:db8:1:3::1"));
    }

    #[test]
    fn shares_in_percent_are_rounded_up_and_no_larger_than_the_total() {
        let limits = |total, per_key, per_address| Limits { total, per_key, per_address };
        assert_eq!(Limits::percent(100, 25, 50), limits(100, 25, 50));
        assert_eq!(Limits::percent(1, 1, 99), limits(1, 1, 1));
        assert_eq!(Limits::percent(10, 21, 255), limits(10, 3, 10));
        assert_eq!(Limits::percent(usize::MAX, 100, 100), limits(usize::MAX, usize::MAX, usize::MAX));
    }

    #[test]
    fn a_key_has_its_share_at_all_addresses_and_an_address_for_all_keys() {
        let mut counts = Counts::new(Limits { total: 8, per_key: 2, per_address: 3 });
        for address in ["10.0.0.1", "10.0.0.2"] {
            counts.take(&client(1, address), 1).unwrap();
        }
        assert_eq!(counts.take(&client(1, "10.0.0.3"), 1), Err(Exceeded::Key));
        counts.take(&client(2, "10.0.0.1"), 1).unwrap();
        counts.take(&Client::new(None, "10.0.0.1".parse().unwrap()), 1).unwrap();
        assert_eq!(counts.take(&client(3, "10.0.0.1"), 1), Err(Exceeded::Address));
        for n in 4..8 {
            counts.take(&client(n, &format!("10.0.1.{n}")), 1).unwrap();
        }
        assert_eq!(counts.take(&client(8, "10.0.1.8"), 1), Err(Exceeded::Total));
        assert_eq!(counts.take(&client(1, "10.0.0.1"), 1), Err(Exceeded::Key), "its own share is named first");
        counts.give_back(&client(1, "10.0.0.2"), 1);
        counts.take(&client(1, "10.0.0.2"), 1).unwrap();
    }

    #[test]
    fn an_amount_is_given_as_a_whole_or_not() {
        let mut counts = Counts::new(Limits { total: 100, per_key: 60, per_address: 60 });
        let (one, other) = (client(1, "10.0.0.1"), client(2, "10.0.0.2"));
        counts.take(&one, 60).unwrap();
        assert_eq!(counts.take(&other, 41), Err(Exceeded::Total));
        assert_eq!(counts.take(&other, usize::MAX), Err(Exceeded::Key));
        counts.take(&other, 40).unwrap();
        counts.give_back(&one, 60);
        assert_eq!((counts.total(), counts.of_key(&key(1)), counts.of_key(&key(2))), (40, 0, 40));
        assert_eq!((counts.keys.len(), counts.networks.len()), (1, 1));
    }

    #[test]
    fn one_key_and_one_address_leave_their_share_of_a_rate_to_others() {
        let (start, at) = clock();
        let per_second = Limits { total: 100, per_key: 20, per_address: 50 };
        let mut rates = Rates::new(per_second, Duration::from_secs(1), start);
        let mut burst = |client: Client, now| (0..1000).filter(|_| rates.take(&client, 1, now).is_ok()).count();
        assert_eq!(burst(client(1, "10.0.0.1"), start), 20);
        assert_eq!(burst(client(1, "10.0.0.2"), start), 0, "the same key elsewhere");
        let others: usize = (2..10).map(|n| burst(client(n, "10.0.0.1"), start)).sum();
        assert_eq!(others, 30, "many keys at one address");
        assert_eq!(burst(client(10, "10.0.0.2"), start), 20, "nothing of what was refused is taken");
        assert_eq!(burst(client(1, "10.0.0.1"), at(100)), 2);
        assert_eq!(burst(client(1, "10.0.0.1"), at(60_000)), 20, "what was not used does not add up");
    }

    #[test]
    fn the_limit_that_a_client_meets_is_named() {
        let (start, _) = clock();
        let mut rates = Rates::new(Limits { total: 3, per_key: 1, per_address: 2 }, Duration::from_secs(1), start);
        let mut take = |client: Client| rates.take(&client, 1, start);
        assert_eq!(take(client(1, "10.0.0.1")), Ok(()));
        assert_eq!(take(client(1, "10.0.0.2")), Err(Exceeded::Key));
        assert_eq!(take(client(2, "10.0.0.1")), Ok(()));
        assert_eq!(take(client(3, "10.0.0.1")), Err(Exceeded::Address));
        assert_eq!(take(client(3, "10.0.0.2")), Ok(()));
        assert_eq!(take(client(4, "10.0.0.3")), Err(Exceeded::Total));
    }

    #[test]
    fn a_share_that_is_the_whole_has_the_name_of_the_whole() {
        let (start, _) = clock();
        let whole = Limits { total: 1, per_key: 1, per_address: 1 };
        let (mut counts, mut rates) = (Counts::new(whole), Rates::new(whole, Duration::from_secs(1), start));
        let one = client(1, "10.0.0.1");
        counts.take(&one, 1).unwrap();
        rates.take(&one, 1, start).unwrap();
        assert_eq!([counts.take(&one, 1), rates.take(&one, 1, start)], [Err(Exceeded::Total); 2]);
    }

    #[test]
    fn refused_requests_take_nothing_from_others() {
        let (start, _) = clock();
        let mut rates = Rates::new(Limits { total: 10, per_key: 4, per_address: 8 }, Duration::from_secs(1), start);
        let one = client(1, "10.0.0.1");
        let vain = (0..100).filter(|_| rates.take_own(&one, 1, start).is_ok()).count();
        assert_eq!((vain, rates.take(&one, 1, start)), (4, Err(Exceeded::Key)));
        let neighbours = (2..4).flat_map(|n| [n; 4]).filter(|&n| rates.take(&client(n, "10.0.0.1"), 1, start).is_ok());
        assert_eq!(neighbours.count(), 8);
        assert_eq!(rates.take_own(&Client::new(None, "10.0.0.1".parse().unwrap()), 1, start), Err(Exceeded::Address));
    }

    #[test]
    fn a_short_burst_still_lets_one_through() {
        let (start, at) = clock();
        let once_a_second = Limits { total: 1, per_key: 1, per_address: 1 };
        let mut rates = Rates::new(once_a_second, Duration::from_millis(10), start);
        let one = client(1, "10.0.0.1");
        assert_eq!([start, at(999), at(1000)].map(|now| rates.take(&one, 1, now).is_ok()), [true, false, true]);
    }

    #[test]
    fn buckets_are_forgotten_when_they_are_full_and_are_never_too_many() {
        let (start, at) = clock();
        let per_second = Limits { total: 1_000_000, per_key: 10, per_address: 1_000_000 };
        let mut rates = Rates::new(per_second, Duration::from_secs(1), start);
        let mut most = 0;
        for n in 0..20_000 {
            rates.take(&client(n, "10.0.0.1"), 1, at(0)).unwrap();
            most = most.max(rates.keys.used.len());
        }
        assert_eq!(most, MAX_REMEMBERED);
        for n in 0..MAX_REMEMBERED as u32 {
            rates.take(&client(n, "10.0.0.1"), 1, at(200)).unwrap();
        }
        rates.take(&client(1, "10.0.0.1"), 1, at(1000)).unwrap();
        for _ in 0..MAX_REMEMBERED {
            rates.take(&client(1, "10.0.0.1"), 1, at(2000)).ok();
        }
        assert!(rates.keys.used.len() > 1, "a refused attempt does no work");
        for ms in 0..MAX_REMEMBERED as u64 {
            rates.take(&client(1, "10.0.0.1"), 1, at(3000 + 100 * ms)).unwrap();
        }
        assert_eq!((rates.keys.used.len(), rates.networks.used.len()), (1, 1));
    }

    proptest! {
        /// After any sequence, no share is exceeded, the counts agree, and nothing is left in the end.
        #[test]
        fn counts_agree_and_stay_within_their_limits(
            steps in vec((0..4u32, 0..4u8, 0..5usize, any::<bool>(), any::<prop::sample::Index>()), 0..200)
        ) {
            let limits = Limits { total: 20, per_key: 7, per_address: 9 };
            let mut counts = Counts::new(limits);
            let mut held: Vec<(Client, usize)> = Vec::new();
            for (n, host, amount, give_back, which) in steps {
                if give_back && !held.is_empty() {
                    let (client, amount) = held.swap_remove(which.index(held.len()));
                    counts.give_back(&client, amount);
                } else {
                    let shown = (n > 0).then(|| key(n));
                    let client = Client::new(shown, [10, 0, 0, host].into());
                    if counts.take(&client, amount).is_ok() {
                        held.push((client, amount));
                    }
                }
                let sum = |of: &dyn Fn(&Client) -> bool| -> usize {
                    held.iter().filter(|(client, _)| of(client)).map(|(_, amount)| amount).sum()
                };
                prop_assert!(sum(&|_| true) == counts.total() && counts.total() <= limits.total);
                for (key, count) in &counts.keys {
                    prop_assert!(*count > 0 && *count <= limits.per_key);
                    prop_assert_eq!(sum(&|client| client.key == Some(*key)), *count);
                }
                for (network, count) in &counts.networks {
                    prop_assert!(*count > 0 && *count <= limits.per_address);
                    prop_assert_eq!(sum(&|client| client.network == *network), *count);
                }
            }
            for (client, amount) in held {
                counts.give_back(&client, amount);
            }
            prop_assert!(counts.total() == 0 && counts.keys.is_empty() && counts.networks.is_empty());
        }

        /// In no window of time does a key or an address get more than its burst and its rate; and one that keeps to
        /// its rate always gets it, whatever others do within a part of the total.
        #[test]
        fn rates_hold_over_any_period_and_senders_within_them_are_never_refused(
            hostile in vec((0..3u32, 1..4u64, 0..40u64), 1..400)
        ) {
            let (start, at) = clock();
            let per_second = Limits { total: 40, per_key: 10, per_address: 20 };
            let mut rates = Rates::new(per_second, Duration::from_secs(1), start);
            let (mut ms, mut next_honest) = (0, 0);
            let mut taken: Vec<(u64, u32, u64)> = Vec::new();
            for (n, times, pause) in hostile {
                ms += pause;
                while next_honest <= ms {
                    prop_assert_eq!(rates.take(&client(9, "10.0.0.9"), 1, at(next_honest)), Ok(()));
                    next_honest += 100;
                }
                if rates.take(&client(n, "10.0.0.1"), times, at(ms)).is_ok() {
                    taken.push((ms, n, times));
                }
            }
            for (index, &(from, ..)) in taken.iter().enumerate() {
                for &(until, ..) in &taken[index..] {
                    let sum = |of: &dyn Fn(u32) -> bool| -> u64 {
                        let within = taken[index..].iter().filter(|(ms, n, _)| *ms <= until && of(*n));
                        within.map(|(_, _, times)| times).sum()
                    };
                    let most = |rate: u64| rate + rate * (until - from) / 1000;
                    prop_assert!(sum(&|_| true) <= most(20));
                    prop_assert!((0..3).all(|n| sum(&|other| other == n) <= most(10)));
                }
            }
        }
    }
}
