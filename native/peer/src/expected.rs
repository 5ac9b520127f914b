//! The addresses that nodes are about to connect from, whether this node listens or not.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use macula_peer_core::shares::{Client, Counts, Limits};
use macula_peer_core::sync::lock;
use macula_peer_core::types::Fingerprint;
use tokio::sync::Notify;

use crate::socket::ExtraGuard;

/// A handshake follows at once when a path has been found; its first packets may be lost.
pub(crate) const EXPECTED_FOR: Duration = Duration::from_secs(10);

/// Addresses that nodes may be expected from at once, and those of them that one key may have: a session has some, and
/// a node that begins one session after the other must not take the places of the rest.
const MAX_EXPECTED: usize = 1024;
const MAX_EXPECTED_PER_KEY: usize = 32;

/// Which node may connect from which address.
#[derive(Default)]
pub(crate) struct Expected(Mutex<Table>);

struct Table {
    /// One address may have several callers: the address of a packet may be forged.
    callers: HashMap<SocketAddr, Vec<ExpectedNode>>,
    taken: Counts,
    next_ticket: u64,
}

impl Default for Table {
    fn default() -> Self {
        let limits = Limits { total: MAX_EXPECTED, per_key: MAX_EXPECTED_PER_KEY, per_address: MAX_EXPECTED };
        Self { callers: HashMap::new(), taken: Counts::new(limits), next_ticket: 0 }
    }
}

#[derive(Clone)]
pub(crate) struct ExpectedNode {
    ticket: u64,
    pub(crate) key: Fingerprint,
    /// The socket that hears it, if that is not the main one.
    pub(crate) extra: Option<Arc<ExtraGuard>>,
    /// Told when it has connected.
    pub(crate) connected: Arc<Notify>,
}

/// A key is expected at an address until this is dropped.
pub(crate) struct Expectation {
    expected: Arc<Expected>,
    pub(crate) address: SocketAddr,
    ticket: u64,
}

impl Expected {
    /// Expects the holder of a key at an address. `None`: too many are expected already; this one can try again later.
    pub(crate) fn expect(
        self: &Arc<Self>,
        address: SocketAddr,
        key: Fingerprint,
        extra: Option<Arc<ExtraGuard>>,
        connected: Arc<Notify>,
    ) -> Option<Expectation> {
        let ticket = lock(&self.0).insert(address, key, extra, connected)?;
        Some(Expectation { expected: self.clone(), address, ticket })
    }

    /// The callers that are expected at an address.
    pub(crate) fn at(&self, address: SocketAddr) -> Option<Vec<ExpectedNode>> {
        lock(&self.0).callers.get(&address).cloned()
    }
}

impl Drop for Expectation {
    fn drop(&mut self) {
        lock(&self.expected.0).remove(self.address, self.ticket);
    }
}

impl Table {
    fn insert(
        &mut self,
        address: SocketAddr,
        key: Fingerprint,
        extra: Option<Arc<ExtraGuard>>,
        connected: Arc<Notify>,
    ) -> Option<u64> {
        self.taken.take(&Client::new(key, address.ip()), 1).ok()?;
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.callers.entry(address).or_default().push(ExpectedNode { ticket, key, extra, connected });
        Some(ticket)
    }

    fn remove(&mut self, address: SocketAddr, ticket: u64) {
        let Some(callers) = self.callers.get_mut(&address) else { return };
        let index = callers.iter().position(|caller| caller.ticket == ticket);
        if let Some(ExpectedNode { key, .. }) = index.map(|index| callers.remove(index)) {
            self.taken.give_back(&Client::new(key, address.ip()), 1);
        }
        if callers.is_empty() {
            self.callers.remove(&address);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn keys(expected: &Expected, address: SocketAddr) -> Vec<Fingerprint> {
        expected.at(address).into_iter().flatten().map(|caller| caller.key).collect()
    }

    #[test]
    fn a_caller_that_is_expected_twice_is_expected_until_both_expectations_are_dropped() {
        let (expected, address) = (Arc::new(Expected::default()), "20.0.0.1:7000".parse().unwrap());
        let (one, other) = ([1; 32].into(), [2; 32].into());
        let [first, second, third] =
            [one, one, other].map(|key| expected.expect(address, key, None, Arc::default()).unwrap());
        assert_eq!(keys(&expected, address), [one, one, other], "none takes the place of another");
        drop(first);
        assert_eq!(keys(&expected, address), [one, other]);
        drop(third);
        assert_eq!(keys(&expected, address), [one]);
        drop(second);
        let table = lock(&expected.0);
        assert!(table.callers.is_empty());
        assert_eq!(table.taken.total(), 0);
    }

    #[test]
    fn one_key_does_not_take_all_the_room() {
        let mut table = Table::default();
        let address = |port| SocketAddr::from(([20, 0, 0, 1], port));
        let mut insert = |key, ports: std::ops::Range<u16>| {
            ports.filter(|port| table.insert(address(*port), [key; 32].into(), None, Arc::default()).is_some()).count()
        };
        assert_eq!(insert(1, 0..5000), MAX_EXPECTED_PER_KEY);
        assert_eq!(insert(2, 0..10), 10);
        let all: usize = (3..100).map(|key| insert(key, 0..5000)).sum();
        assert_eq!(all, MAX_EXPECTED - MAX_EXPECTED_PER_KEY - 10);
    }
}
