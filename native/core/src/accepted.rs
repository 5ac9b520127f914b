//! Connections that a peer began, and which of them may serve as its link.

use std::sync::atomic::{AtomicU64, Ordering};

/// None was found to be silent.
const NEVER: u64 = u64::MAX;

/// Whether a connection was given up because its other end was silent, or allowed no streams in time. Packets are counted as
/// they are received.
#[derive(Debug)]
pub struct GivenUp(AtomicU64);

impl Default for GivenUp {
    fn default() -> Self {
        Self(AtomicU64::new(NEVER))
    }
}

impl GivenUp {
    /// The other end may be gone.
    pub fn mark(&self, received: u64) {
        self.0.store(received, Ordering::Relaxed);
    }

    /// Whether nothing has come since.
    pub fn is_silent(&self, received: u64) -> bool {
        self.0.load(Ordering::Relaxed) == received
    }

    /// A message has come. Whether it is the first since the connection was given up: the other node, which may never have
    /// noticed the silence, may keep this one of several connections.
    pub fn is_heard_again(&self) -> bool {
        // As a rule nothing is written.
        self.0.load(Ordering::Relaxed) != NEVER && self.0.swap(NEVER, Ordering::Relaxed) != NEVER
    }
}

/// Which of the connections that the holder of a key began are tried, and in which order: those that are live, direct ones
/// first.
pub fn usable<C>(mut all: Vec<C>, is_live: impl Fn(&C) -> bool, is_relayed: impl Fn(&C) -> bool) -> Vec<C> {
    all.retain(is_live);
    all.sort_by_key(is_relayed);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_silent_until_something_comes_and_heard_again_once() {
        let given_up = GivenUp::default();
        assert!(!given_up.is_silent(0) && !given_up.is_heard_again());
        given_up.mark(7);
        assert!(given_up.is_silent(7) && !given_up.is_silent(8));
        assert!(given_up.is_heard_again());
        assert!(!given_up.is_heard_again() && !given_up.is_silent(7));
    }

    #[test]
    fn live_connections_are_tried_and_direct_ones_first() {
        let all = vec![(1, true, true), (2, false, false), (3, true, false), (4, true, true)];
        let tried = usable(all, |(_, live, _)| *live, |(_, _, relayed)| *relayed);
        assert_eq!(tried.into_iter().map(|(id, ..)| id).collect::<Vec<_>>(), [3, 1, 4]);
    }
}
