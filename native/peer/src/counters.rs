//! Counters.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter that threads share and nothing is ordered by.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Returns what it was before.
    pub(crate) fn add(&self, n: u64) -> u64 {
        self.0.fetch_add(n, Ordering::Relaxed)
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug, Default)]
pub(crate) struct PeerCounters {
    pub(crate) sent: Counter,
    pub(crate) acknowledged: Counter,
    pub(crate) received: Counter,
    pub(crate) failed: Counter,
    pub(crate) dials: Counter,
}

#[derive(Debug, Default)]
pub(crate) struct NodeCounters {
    pub(crate) hits: Counter,
    pub(crate) misses: Counter,
    pub(crate) evictions: Counter,
    pub(crate) unverified: Counter,
    pub(crate) undelivered: Counter,
    pub(crate) unhandled: Counter,
    pub(crate) malformed: Counter,
}
