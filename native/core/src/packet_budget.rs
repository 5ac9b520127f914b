//! Limits the signals that go to addresses named by others: to one address, to all, and to those that have never
//! answered. The limits span all sessions, so that many short sessions do not add up to a flood.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use super::punch::MAX_BIRTHDAY_PACKETS;
use super::shares::Bucket;

/// The burst to one address: as much as the largest session sends, and some more for retransmissions.
const BURST_PER_TARGET: u64 = 2048;
const _: () = assert!(BURST_PER_TARGET >= MAX_BIRTHDAY_PACKETS as u64);

/// The sustained rate to one address, per second: as much as four sessions of the simplest kind. At 63 bytes each this
/// is 3 kB/s, which is harmless.
const RATE_PER_TARGET: u64 = 50;

/// The burst to all addresses together, and their rate per second: some hundred sessions of the simplest kind, or a
/// birthday attempt every three seconds beside others. 32 kB/s.
const BURST: u64 = 8192;
const RATE: u64 = 512;

/// Targets remembered because they were sent something recently: as many as all possible sessions have addresses.
const MAX_TARGETS: usize = 1024;

/// What an address that has not answered gets, and for how long it then gets nothing: enough for two probes with
/// losses.
const UNHEARD_PACKETS: u32 = 6;
const UNHEARD_FOR: Duration = Duration::from_secs(600);

/// Such addresses at once. Nothing is sent to further ones.
const MAX_UNHEARD: usize = 64;

/// What may still be sent, by target.
#[derive(Debug)]
pub struct PacketBudget {
    all: Bucket,
    /// At most `MAX_TARGETS`: those whose buckets are not full.
    each: HashMap<IpAddr, Bucket>,
    /// At most `MAX_UNHEARD`.
    unheard: HashMap<SocketAddr, Unheard>,
}

/// An address that was named by a node or relay at another address.
#[derive(Debug)]
struct Unheard {
    since: Instant,
    sent: u32,
    /// It has answered, so it expects probes.
    heard: bool,
}

impl PacketBudget {
    pub fn new(now: Instant) -> Self {
        Self { all: Bucket::new(RATE, BURST, now), each: HashMap::new(), unheard: HashMap::new() }
    }

    /// Whether a packet may be sent to an address. Its port does not matter: all ports of an address belong to one
    /// host, or share one line.
    pub fn take(&mut self, to: SocketAddr, now: Instant) -> bool {
        let target = network(to.ip());
        if !self.each.contains_key(&target) {
            if self.each.len() >= MAX_TARGETS {
                self.each.retain(|_, bucket| !bucket.is_full(now));
            }
            if self.each.len() >= MAX_TARGETS {
                return false;
            }
        }
        let bucket = self.each.entry(target).or_insert_with(|| Bucket::new(RATE_PER_TARGET, BURST_PER_TARGET, now));
        // A target over its own limit takes nothing from the others.
        bucket.take(1, now) && self.all.take(1, now)
    }

    /// Like [`Self::take`], for an address named by a node or relay elsewhere: until it answers it gets a few packets.
    pub fn take_unheard(&mut self, to: SocketAddr, now: Instant) -> bool {
        self.unheard.retain(|_, known| now < known.since + UNHEARD_FOR);
        if !self.unheard.contains_key(&to) && self.unheard.len() >= MAX_UNHEARD {
            return false;
        }
        let known = self.unheard.entry(to).or_insert(Unheard { since: now, sent: 0, heard: false });
        if !known.heard && known.sent >= UNHEARD_PACKETS {
            return false;
        }
        known.sent += 1;
        self.take(to, now)
    }

    /// The address has answered something that was sent to it alone.
    pub fn heard(&mut self, from: SocketAddr) {
        if let Some(known) = self.unheard.get_mut(&from) {
            known.heard = true;
        }
    }
}

/// The network that counts as one target: a host that has one IPv6 address has all of its /64.
pub fn network(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn taken(budget: &mut PacketBudget, to: SocketAddr, now: Instant) -> u64 {
        (0..100_000).take_while(|_| budget.take(to, now)).count() as u64
    }

    #[test]
    fn an_address_gets_a_burst_and_then_a_steady_rate_over_all_its_ports() {
        let now = Instant::now();
        let mut budget = PacketBudget::new(now);
        assert_eq!(taken(&mut budget, address("20.0.0.1:7000"), now), BURST_PER_TARGET);
        assert!(!budget.take(address("20.0.0.1:7001"), now));
        assert!(!budget.take(address("[::ffff:20.0.0.1]:7001"), now));
        let later = now + Duration::from_secs(10);
        assert_eq!(taken(&mut budget, address("20.0.0.1:7002"), later), 10 * RATE_PER_TARGET);
    }

    #[test]
    fn a_target_over_its_limit_takes_nothing_from_others() {
        let now = Instant::now();
        let mut budget = PacketBudget::new(now);
        for _ in 0..2 * BURST {
            budget.take(address("20.0.0.1:7000"), now);
        }
        assert_eq!(taken(&mut budget, address("20.0.0.2:7000"), now), BURST_PER_TARGET);
    }

    #[test]
    fn all_together_are_bounded_too() {
        let now = Instant::now();
        let mut budget = PacketBudget::new(now);
        let to = |n: u32| SocketAddr::new(Ipv4Addr::from_bits(0x1400_0000 + n).into(), 7000);
        let all: u64 = (0..20).map(|n| taken(&mut budget, to(n), now)).sum();
        assert_eq!(all, BURST);
        let later = now + Duration::from_secs(1);
        assert_eq!((20..40).map(|n| taken(&mut budget, to(n), later)).sum::<u64>(), RATE);
    }

    #[test]
    fn an_address_that_does_not_answer_gets_a_few_packets_and_then_nothing_for_long() {
        let now = Instant::now();
        let mut budget = PacketBudget::new(now);
        let (silent, answers) = (address("20.0.0.1:7000"), address("20.0.0.2:7000"));
        let mut taken = |to, now| (0..100).take_while(|_| budget.take_unheard(to, now)).count() as u32;
        assert_eq!((taken(silent, now), taken(answers, now)), (UNHEARD_PACKETS, UNHEARD_PACKETS));
        budget.heard(answers);
        let mut taken = |to, now| (0..100).take_while(|_| budget.take_unheard(to, now)).count() as u32;
        assert_eq!((taken(silent, now), taken(answers, now)), (0, 100));
        let later = now + UNHEARD_FOR - Duration::from_millis(1);
        assert_eq!(taken(silent, later), 0);
        assert_eq!(taken(silent, now + UNHEARD_FOR), UNHEARD_PACKETS);
    }

    #[test]
    fn the_number_of_unheard_addresses_is_bounded() {
        let now = Instant::now();
        let mut budget = PacketBudget::new(now);
        let to = |n: u32| SocketAddr::new(Ipv4Addr::from_bits(0x1400_0000 + n).into(), 7000);
        let reached = (0..1000).filter(|n| budget.take_unheard(to(*n), now)).count();
        assert_eq!(reached, MAX_UNHEARD);
        assert!(budget.take_unheard(to(1000), now + UNHEARD_FOR));
        assert!(budget.unheard.len() <= MAX_UNHEARD);
    }

    #[test]
    fn the_addresses_of_one_ipv6_network_are_one_target() {
        let now = Instant::now();
        let mut budget = PacketBudget::new(now);
        let one = taken(&mut budget, address("[2001:db8::1]:7000"), now);
        assert_eq!((one, taken(&mut budget, address("[2001:db8::2:1]:7000"), now)), (BURST_PER_TARGET, 0));
        assert_eq!(taken(&mut budget, address("[2001:db8:0:1::1]:7000"), now), BURST_PER_TARGET);
    }

    #[test]
    fn targets_that_got_nothing_recently_are_forgotten() {
        let now = Instant::now();
        let mut budget = PacketBudget::new(now);
        let to = |n: u32| SocketAddr::new(Ipv4Addr::from_bits(0x1400_0000 + n).into(), 7000);
        let (known, more) = (0..MAX_TARGETS as u32, MAX_TARGETS as u32..2 * MAX_TARGETS as u32);
        assert!(known.clone().all(|n| budget.take(to(n), now)));
        assert!(!budget.take(to(more.start), now), "there is no room");
        assert!(budget.take(to(0), now), "there is for known targets");
        let later = now + Duration::from_secs(1);
        assert!(more.into_iter().all(|n| budget.take(to(n), later)));
        assert!(budget.each.len() <= MAX_TARGETS);
    }
}
