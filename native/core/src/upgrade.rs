//! When two nodes that meet through a relay try for a direct path, and which of their connections they keep.

use std::time::{Duration, Instant};

use super::proto::control::PunchFailure;
use super::retry::Backoff;
use crate::types::Fingerprint;

/// The first pause: what lost the first attempt, a lost packet or a node that was busy, may be over by then.
const FIRST: Duration = Duration::from_secs(1);

/// The longest: an attempt is some hundred small packets, nothing once a minute.
const LONGEST: Duration = Duration::from_secs(60);

/// The pause after a failure that will not change as long as the two NATs are what they are. The profile may have been
/// wrong, or become wrong unnoticed.
const HOPELESS: Duration = Duration::from_secs(600);

/// When a node tries again, for one peer.
#[derive(Debug)]
pub struct Upgrade {
    pauses: Backoff,
    next: Instant,
    /// When an attempt was last interrupted.
    interrupted: Option<Instant>,
}

impl Upgrade {
    /// The link is relayed since now: the first attempt is due.
    pub fn new(now: Instant) -> Self {
        Self { pauses: Backoff::new(FIRST, LONGEST), next: now, interrupted: None }
    }

    /// When the next attempt is due.
    pub fn next(&self) -> Instant {
        self.next
    }

    /// An attempt failed. `draw` is uniform in 0..1, here and below.
    pub fn failed(&mut self, failure: PunchFailure, now: Instant, draw: f64) {
        self.next = now
            + match failure {
                PunchFailure::BothHard | PunchFailure::NotAllowed => HOPELESS.mul_f64(0.5 + draw / 2.0),
                // It says nothing about the NATs, but a peer may claim it again and again.
                PunchFailure::Interrupted => {
                    if self.interrupted.replace(now).is_none_or(|last| now >= last + LONGEST) {
                        self.pauses.reset();
                    }
                    self.pauses.pause(draw)
                }
                PunchFailure::TimedOut | PunchFailure::Busy | PunchFailure::Unwanted | PunchFailure::Unknown => {
                    self.pauses.pause(draw)
                }
            };
    }

    /// An address or a NAT of one of the two has changed: what failed may work now.
    pub fn changed(&mut self, now: Instant, draw: f64) {
        self.pauses.reset();
        self.next = self.next.min(now + self.pauses.pause(draw));
    }
}

/// What a connection is worth, beside others between the same two nodes. The least is kept; both sides see the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    pub relayed: bool,
    /// The node that dialled it.
    pub dialler: Fingerprint,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_from_a_second_to_a_minute() {
        let start = Instant::now();
        let mut upgrade = Upgrade::new(start);
        assert_eq!(upgrade.next(), start, "at once");
        let pauses = [0; 8].map(|_| {
            upgrade.failed(PunchFailure::TimedOut, start, 1.0);
            (upgrade.next() - start).as_secs()
        });
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        upgrade.failed(PunchFailure::Busy, start, 0.0);
        assert_eq!(upgrade.next(), start + LONGEST / 2, "not in step with others");
    }

    #[test]
    fn a_hopeless_attempt_waits_until_something_changes() {
        let start = Instant::now();
        let mut upgrade = Upgrade::new(start);
        for failure in [PunchFailure::BothHard, PunchFailure::NotAllowed] {
            upgrade.failed(failure, start, 1.0);
            assert_eq!(upgrade.next(), start + HOPELESS);
        }
        let later = start + Duration::from_secs(100);
        upgrade.changed(later, 1.0);
        assert_eq!(upgrade.next(), later + FIRST);
        upgrade.failed(PunchFailure::TimedOut, later + FIRST, 1.0);
        assert_eq!(upgrade.next(), later + FIRST + 2 * FIRST, "the change's pause was the first");
    }

    #[test]
    fn after_an_attempt_that_was_interrupted_the_next_one_is_soon() {
        let start = Instant::now();
        let mut upgrade = Upgrade::new(start);
        for _ in 0..8 {
            upgrade.failed(PunchFailure::TimedOut, start, 1.0);
        }
        upgrade.failed(PunchFailure::Interrupted, start, 1.0);
        assert_eq!(upgrade.next(), start + FIRST);
        let mut at = upgrade.next();
        let pauses = [0; 7].map(|_| {
            upgrade.failed(PunchFailure::Interrupted, at, 1.0);
            let pause = upgrade.next() - at;
            at = upgrade.next();
            pause.as_secs()
        });
        assert_eq!(pauses, [2, 4, 8, 16, 32, 60, 1], "once a minute");
    }

    #[test]
    fn a_change_does_not_put_off_what_is_due() {
        let start = Instant::now();
        let mut upgrade = Upgrade::new(start);
        upgrade.changed(start, 1.0);
        assert_eq!(upgrade.next(), start);
    }

    #[test]
    fn a_direct_connection_is_kept_and_of_two_the_one_of_the_smaller_key() {
        let worth = |relayed, dialler: u8| Rank { relayed, dialler: [dialler; 32].into() };
        let mut all = [worth(true, 1), worth(false, 2), worth(true, 0), worth(false, 1)];
        all.sort();
        assert_eq!(all, [worth(false, 1), worth(false, 2), worth(true, 0), worth(true, 1)]);
    }
}
