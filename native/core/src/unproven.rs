//! What may be sent to an unproven address: three times the bytes that came from it (RFC 9000, section 8). Any host can
//! forge a packet's source address.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How much more may be sent than came.
const FACTOR: u64 = 3;

/// How long what came from an address counts. A handshake is over by then.
const LIFE: Duration = Duration::from_secs(10);

/// Addresses at once. Beyond that the oldest is dropped: what came from there no longer counts.
const MAX_ADDRESSES: usize = 16_384;

/// Addresses that have proved nothing.
#[derive(Debug, Default)]
pub struct Unproven {
    /// At most `MAX_ADDRESSES`.
    addresses: HashMap<SocketAddr, Account>,
    /// The same, the oldest first, including those that were forgotten early.
    order: VecDeque<(Instant, SocketAddr)>,
}

#[derive(Debug)]
struct Account {
    since: Instant,
    received: u64,
    sent: u64,
}

impl Unproven {
    /// Bytes came from there.
    pub fn received(&mut self, from: SocketAddr, bytes: usize, now: Instant) {
        self.expire(now);
        if let Some(account) = self.addresses.get_mut(&from) {
            account.received = account.received.saturating_add(bytes as u64);
            return;
        }
        while self.order.len() >= MAX_ADDRESSES {
            self.forget_oldest();
        }
        self.addresses.insert(from, Account { since: now, received: bytes as u64, sent: 0 });
        self.order.push_back((now, from));
    }

    /// Whether that many bytes may be sent there; then they count as sent.
    pub fn take(&mut self, to: SocketAddr, bytes: usize, now: Instant) -> bool {
        self.expire(now);
        let Some(account) = self.addresses.get_mut(&to) else { return false };
        let sent = account.sent.saturating_add(bytes as u64);
        let allowed = sent <= account.received.saturating_mul(FACTOR);
        if allowed {
            account.sent = sent;
        }
        allowed
    }

    /// The address is proven.
    pub fn forget(&mut self, address: SocketAddr) {
        self.addresses.remove(&address);
        if self.addresses.is_empty() {
            self.order.clear();
        }
    }

    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty()
    }

    /// Forgets what came too long ago.
    pub fn expire(&mut self, now: Instant) {
        while self.order.front().is_some_and(|(since, _)| now.saturating_duration_since(*since) >= LIFE) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        let Some((since, address)) = self.order.pop_front() else { return };
        // It may have been forgotten, and come again.
        if self.addresses.get(&address).is_some_and(|account| account.since == since) {
            self.addresses.remove(&address);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn address(n: u32) -> SocketAddr {
        (n.to_be_bytes(), 7000).into()
    }

    #[test]
    fn an_address_gets_three_times_its_bytes_and_others_nothing() {
        let (mut unproven, now) = (Unproven::default(), Instant::now());
        unproven.received(address(1), 100, now);
        assert!(!unproven.take(address(2), 1, now));
        assert!(!unproven.take(address(1), 301, now), "refused as a whole, and nothing is taken");
        assert!(unproven.take(address(1), 300, now));
        assert!(!unproven.take(address(1), 1, now));
        unproven.received(address(1), 1, now);
        assert!(unproven.take(address(1), 3, now));
        assert!(!unproven.take(address(1), 1, now));
    }

    #[test]
    fn old_packets_do_not_count_and_proven_addresses_are_forgotten() {
        let (mut unproven, now) = (Unproven::default(), Instant::now());
        unproven.received(address(1), 100, now);
        assert!(!unproven.take(address(1), 1, now + LIFE));
        assert!(unproven.is_empty() && unproven.order.is_empty());
        unproven.received(address(1), 100, now);
        unproven.forget(address(1));
        assert!(unproven.is_empty() && !unproven.take(address(1), 1, now));
        unproven.received(address(2), 100, now);
        unproven.received(address(1), 100, now);
        unproven.forget(address(1));
        let later = now + LIFE / 2;
        unproven.received(address(1), 100, later);
        assert!(unproven.take(address(1), 1, now + LIFE), "it came again");
    }

    #[test]
    fn a_flood_of_addresses_takes_bounded_room_and_the_newest_is_answered() {
        let (mut unproven, now) = (Unproven::default(), Instant::now());
        for n in 0..3 * MAX_ADDRESSES as u32 {
            unproven.received(address(n), 100, now);
            assert!(unproven.take(address(n), 300, now));
            if n % 7 == 0 {
                unproven.forget(address(n));
            }
        }
        assert!(unproven.addresses.len() <= MAX_ADDRESSES && unproven.order.len() <= MAX_ADDRESSES);
    }

    proptest! {
        #[test]
        fn at_most_three_times_the_received_bytes_are_sent(
            steps in vec((any::<bool>(), 0..4u32, 0..2000usize, 0..4000u64), 0..200),
        ) {
            let mut unproven = Unproven::default();
            let (mut now, mut received, mut sent) = (Instant::now(), [0; 4], [0; 4]);
            for (receives, n, bytes, pause) in steps {
                now += Duration::from_millis(pause);
                if receives {
                    unproven.received(address(n), bytes, now);
                    received[n as usize] += bytes;
                } else if unproven.take(address(n), bytes, now) {
                    sent[n as usize] += bytes;
                }
                prop_assert!(sent[n as usize] <= 3 * received[n as usize]);
            }
        }
    }
}
