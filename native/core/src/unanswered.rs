//! Since when a connection has had something unanswered, according to its counters. Whether that is too long is decided
//! as for peers ([`super::liveness`]).

use std::time::{Duration, Instant};

/// The shortest wait for an answer that counts as silence, and the longest time QUIC takes to repeat what is not
/// acknowledged. As for peers: several times what a busy machine needs to answer, and short enough for a caller to
/// wait.
pub const SILENCE: Duration = Duration::from_millis(500);

/// How much later than a round trip an answer may come: acknowledgements are delayed by 25 ms.
const LATE: Duration = Duration::from_millis(50);

/// A connection's packet counters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counted {
    /// Ack-eliciting packets sent.
    pub asked: u64,
    /// Packets received, of any kind.
    pub heard: u64,
}

/// Compares the counters from time to time. It misses what was sent after the last packet was received and before it
/// looked, until QUIC repeats it because it is not acknowledged.
#[derive(Debug)]
pub struct Unanswered {
    heard_at: Counted,
    last: Counted,
    moved_at: Option<Instant>,
    since: Option<Instant>,
}

impl Unanswered {
    pub fn new(counted: Counted) -> Self {
        Self { heard_at: counted, last: counted, moved_at: None, since: None }
    }

    /// Whether to look again soon: something is unanswered, or may be and would be repeated soon.
    pub fn look(&mut self, counted: Counted, now: Instant) -> bool {
        if counted != self.last {
            (self.last, self.moved_at) = (counted, Some(now));
        }
        if counted.heard != self.heard_at.heard {
            (self.heard_at, self.since) = (counted, None);
        } else if counted.asked != self.heard_at.asked {
            self.since.get_or_insert(now);
        }
        self.since.is_some() || self.moved_at.is_some_and(|moved| now < moved + SILENCE)
    }

    /// Since when something has been unanswered.
    pub fn since(&self) -> Option<Instant> {
        self.since
    }

    /// Something has been unanswered for longer than an answer takes.
    pub fn is_late(&self, now: Instant, round_trip: Duration) -> bool {
        self.since.is_some_and(|since| now >= since + LATE + round_trip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(asked: u64, heard: u64) -> Counted {
        Counted { asked, heard }
    }

    #[test]
    fn an_idle_connection_is_not_silent() {
        let start = Instant::now();
        let mut unanswered = Unanswered::new(counted(3, 3));
        for s in 0..100 {
            let now = start + Duration::from_secs(s);
            assert!(!unanswered.look(counted(3, 3), now) && unanswered.since().is_none());
        }
    }

    #[test]
    fn a_packet_is_unanswered_until_something_is_heard() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut unanswered = Unanswered::new(counted(0, 0));
        assert!(unanswered.look(counted(1, 0), at(0)));
        assert!(unanswered.look(counted(5, 0), at(400)));
        assert!(unanswered.look(counted(5, 0), at(450)), "waits");
        assert_eq!(unanswered.since(), Some(start));
        assert!(unanswered.look(counted(5, 1), at(500)));
        assert_eq!(unanswered.since(), None);
        assert!(!unanswered.look(counted(5, 1), at(5000)));
    }

    #[test]
    fn a_missed_packet_is_noticed_when_it_is_repeated() {
        let start = Instant::now();
        let mut unanswered = Unanswered::new(counted(0, 0));
        assert!(unanswered.look(counted(2, 1), start), "there may be more");
        assert!(unanswered.look(counted(2, 1), start + SILENCE / 2), "or be repeated");
        assert_eq!(unanswered.since(), None);
        assert!(!unanswered.look(counted(2, 1), start + SILENCE));
        unanswered.look(counted(3, 1), start + 2 * SILENCE);
        assert_eq!(unanswered.since(), Some(start + 2 * SILENCE));
    }
}
