//! Which peers leave the pool: those that were not used for long, and others when a new one needs room.

use std::time::{Duration, Instant};

/// How a peer is used. The least leaves first: a peer without a link before one with a link, because a link costs a handshake, and
/// then the least recently used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Usage {
    pub linked: bool,
    /// When it was last used, in milliseconds of a clock that all peers share.
    pub last_used: u64,
}

/// The peer that leaves before there is room for another one in a pool of this size. `None`: there is room. A pool has room for one
/// peer at least.
pub fn evicted<T>(peers: impl ExactSizeIterator<Item = (T, Usage)>, size: usize) -> Option<T> {
    if peers.len() < size.max(1) {
        return None;
    }
    peers.min_by_key(|(_, usage)| *usage).map(|(peer, _)| peer)
}

/// Whether a peer that was last used then leaves, though there is room.
pub fn is_idle(last_used: Instant, timeout: Duration, now: Instant) -> bool {
    now >= last_used + timeout
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn usage(linked: bool, last_used: u64) -> Usage {
        Usage { linked, last_used }
    }

    fn leaves(peers: &[Usage], size: usize) -> Option<usize> {
        evicted(peers.iter().copied().enumerate(), size)
    }

    #[test]
    fn none_leaves_while_there_is_room() {
        assert_eq!(leaves(&[], 2), None);
        assert_eq!(leaves(&[usage(false, 1)], 2), None);
        assert_eq!(leaves(&[usage(false, 1), usage(false, 2)], 2), Some(0));
    }

    #[test]
    fn the_least_recently_used_leaves() {
        assert_eq!(leaves(&[usage(true, 3), usage(true, 1), usage(true, 2)], 3), Some(1));
        assert_eq!(leaves(&[usage(false, 3), usage(false, 2), usage(false, 1)], 3), Some(2));
    }

    #[test]
    fn a_peer_without_a_link_leaves_before_one_with_a_link() {
        assert_eq!(leaves(&[usage(true, 1), usage(false, 9), usage(true, 2)], 3), Some(1));
        assert_eq!(leaves(&[usage(true, 1), usage(false, 9), usage(false, 8)], 3), Some(2));
    }

    #[test]
    fn a_pool_of_no_size_has_room_for_one() {
        assert_eq!(leaves(&[], 0), None);
        assert_eq!(leaves(&[usage(true, 1)], 0), Some(0));
    }

    #[test]
    fn as_many_leave_as_are_too_many() {
        let mut peers: Vec<Usage> = (0..10).map(|n| usage(n % 2 == 0, n)).collect();
        let mut left = Vec::new();
        while let Some(place) = leaves(&peers, 6) {
            left.push(peers.remove(place).last_used);
        }
        assert_eq!(left, [1, 3, 5, 7, 9]);
        assert_eq!(peers.len(), 5);
    }

    #[test]
    fn a_peer_is_idle_once_it_was_not_used_for_the_timeout() {
        let (used, timeout) = (Instant::now(), Duration::from_secs(300));
        assert!(!is_idle(used, timeout, used + timeout - Duration::from_millis(1)));
        assert!(is_idle(used, timeout, used + timeout));
        assert!(!is_idle(used + Duration::from_millis(1), timeout, used + timeout), "used meanwhile");
    }
}
