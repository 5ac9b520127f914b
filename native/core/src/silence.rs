//! Since when a connection has had something unanswered, as its counters tell. Whether that is too long is decided as for
//! peers ([`super::liveness`]).

use std::time::{Duration, Instant};

/// How long nothing may be heard of what must be answered, at least, before it counts as silence, and what is not answered
/// may take to be asked again. As for peers: several times what a busy machine needs to answer, and little enough for a
/// caller to wait.
pub const SILENCE: Duration = Duration::from_millis(500);

/// How much later than after a round trip an answer may come: acknowledgements are put off by 25 ms.
const LATE: Duration = Duration::from_millis(50);

/// What a connection has counted so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counted {
    /// What was sent that QUIC makes the other side acknowledge.
    pub asked: u64,
    /// What came, of any kind.
    pub heard: u64,
}

/// Watches by looking at the counters from time to time. Something that is asked between the last that was heard and a look
/// escapes the look; QUIC repeats what is not acknowledged, and that counts as asked again.
#[derive(Debug)]
pub struct Silence {
    heard_at: Counted,
    last: Counted,
    moved_at: Option<Instant>,
    unanswered_since: Option<Instant>,
}

impl Silence {
    pub fn new(counted: Counted) -> Self {
        Self { heard_at: counted, last: counted, moved_at: None, unanswered_since: None }
    }

    /// Whether there is reason to look again soon: something is unanswered, or may be and is repeated soon.
    pub fn look(&mut self, counted: Counted, now: Instant) -> bool {
        if counted != self.last {
            (self.last, self.moved_at) = (counted, Some(now));
        }
        if counted.heard != self.heard_at.heard {
            (self.heard_at, self.unanswered_since) = (counted, None);
        } else if counted.asked != self.heard_at.asked {
            self.unanswered_since.get_or_insert(now);
        }
        self.unanswered_since.is_some() || self.moved_at.is_some_and(|moved| now < moved + SILENCE)
    }

    /// Since when something has been unanswered.
    pub fn unanswered_since(&self) -> Option<Instant> {
        self.unanswered_since
    }

    /// Something has been unanswered for longer than an answer takes.
    pub fn is_late(&self, now: Instant, round_trip: Duration) -> bool {
        self.unanswered_since.is_some_and(|since| now >= since + LATE + round_trip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(asked: u64, heard: u64) -> Counted {
        Counted { asked, heard }
    }

    #[test]
    fn who_is_asked_nothing_is_not_silent() {
        let start = Instant::now();
        let mut silence = Silence::new(counted(3, 3));
        for s in 0..100 {
            let now = start + Duration::from_secs(s);
            assert!(!silence.look(counted(3, 3), now) && silence.unanswered_since().is_none());
        }
    }

    #[test]
    fn what_is_asked_is_unanswered_until_something_is_heard() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut silence = Silence::new(counted(0, 0));
        assert!(silence.look(counted(1, 0), at(0)));
        assert!(silence.look(counted(5, 0), at(400)));
        assert!(silence.look(counted(5, 0), at(450)), "waits");
        assert_eq!(silence.unanswered_since(), Some(start));
        assert!(silence.look(counted(5, 1), at(500)));
        assert_eq!(silence.unanswered_since(), None);
        assert!(!silence.look(counted(5, 1), at(5000)));
    }

    #[test]
    fn what_escaped_a_look_is_noticed_when_it_is_repeated() {
        let start = Instant::now();
        let mut silence = Silence::new(counted(0, 0));
        assert!(silence.look(counted(2, 1), start), "there may be more");
        assert!(silence.look(counted(2, 1), start + SILENCE / 2), "or be repeated");
        assert_eq!(silence.unanswered_since(), None);
        assert!(!silence.look(counted(2, 1), start + SILENCE));
        silence.look(counted(3, 1), start + 2 * SILENCE);
        assert_eq!(silence.unanswered_since(), Some(start + 2 * SILENCE));
    }
}
